"""Seeded faults in the numerical core, each of which a named test must catch: `make mutants`.

Each is applied to a copy of package and tests in a temporary folder; the copy without any fault passes them all.
`mutants.py NAME...` runs those alone. Prints one JSON object at the end.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300

ZETA = "tests/test_transforms.py::test_zeta_is_eq_5_and_eq_7"
GROUPS = "tests/test_transforms.py::test_zeta_is_of_the_group_and_of_the_tangential_part"
TANGENT = "tests/test_manifolds.py::test_tangent_laws"
RETRACTION = "tests/test_manifolds.py::test_retraction_laws"
SHARED = "tests/test_mixture.py::test_shared_projection_is_that_of_each_manifold"
LAYOUTS = "tests/test_linalg.py::test_layouts_multiply_sum_and_give_back"
REFERENCE = "tests/test_transforms.py::test_fifty_steps_beside_the_reference"
DECAY = "tests/test_transforms.py::test_weight_decay_acts_on_euclidean_leaves_only"
TAKEN = "tests/test_hard_gradients.py::test_weights_stay_finite_and_on_their_manifolds"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Replacements in files of the package, `(file, old, new)`, and the tests of which one must fail."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def mutant(name, *changes, by):
    return Mutant(name, changes, (by,) if isinstance(by, str) else by)


MUTANTS = [
    mutant(
        "sign of the sphere's projection",
        (
            "manifolds/_sphere.py",
            "return g - total(x * g, self._axes) * x",
            "return g + total(x * g, self._axes) * x",
        ),
        by=TANGENT,
    ),
    mutant(
        "sign of the shared projection",
        ("manifolds/_shared_products.py", "return g - normal", "return g + normal"),
        by=SHARED,
    ),
    mutant(
        "sym without its half",
        ("linalg/_products.py", "return (a + self.transpose(a)) / 2", "return a + self.transpose(a)"),
        by=TANGENT,
    ),
    mutant(
        "skew for sym",
        ("linalg/_products.py", "return (a + self.transpose(a)) / 2", "return (a - self.transpose(a)) / 2"),
        by=TANGENT,
    ),
    mutant(
        "skew for sym, far apart",
        ("linalg/_products.py", "return (a + _row_major(", "return (a - _row_major("),
        by=LAYOUTS,
    ),
    mutant(
        "wide Gram transposed",
        ("linalg/_products.py", '"...pk,...nk->...pn", b, a', '"...pk,...nk->...pn", a, b'),
        by="tests/test_linalg.py::test_wide_matrices_are_multiplied_as_their_transposes",
    ),
    mutant(
        "squares of a column in one sum",
        ("linalg/_newton_schulz.py", "if y.shape[layout.axes[0]] < _TALL:", "if True:"),
        by="tests/test_linalg.py::test_deviation_of_tall_matrices_is_not_rounded_like_their_sums_of_squares",
    ),
    mutant(
        "chunks put into the first place",
        ("linalg/_products.py", "update_slice_in_dim(x, part, start, 0)", "update_slice_in_dim(x, part, 0 * start, 0)"),
        by="tests/test_mixture.py::test_large_matrices_by_chunks_are_handled_as_the_whole",
    ),
    mutant("oblique by rows", ("manifolds/_oblique.py", "_axes = (-2,)", "_axes = (-1,)"), by=(TANGENT, RETRACTION)),
    mutant(
        "radius forgotten in projections",
        (
            "manifolds/_manifold.py",
            "return self._project(_up(x) / s, _up(g)).astype(g.dtype)",
            "return self._project(_up(x), _up(g)).astype(g.dtype)",
        ),
        by=TANGENT,
    ),
    mutant(
        "radius forgotten in retractions",
        (
            "manifolds/_manifold.py",
            "return (s * self._retract(_up(x) / s, _up(v) / s)).astype(x.dtype)",
            "return (s * self._retract(_up(x) / s, _up(v))).astype(x.dtype)",
        ),
        by=RETRACTION,
    ),
    mutant(
        "radius forgotten in shared projections",
        ("manifolds/_shared_products.py", "products) * jnp.square(self.inverse)", "products) * self.inverse"),
        by=SHARED,
    ),
    mutant(
        "zeta after momentum",
        ("transforms/_fgsgd.py", "t, share, norm = normalized_groups(", "_, share, norm = normalized_groups("),
        (
            "transforms/_fgsgd.py",
            "x, v, tangent = batch.stack(points), batch.kept(own), trace is None",
            "x, v, tangent = batch.stack(points), batch.kept(own), trace is None; "
            "squares = jnp.sum(v**2, (-2, -1)); "
            "v = normalized_groups(batch, state.groups, v, squares, rho, curvature)[0]",
        ),
        by="tests/test_transforms.py::test_chain_is_fgsgd",
    ),
    mutant(
        "zeta with rho for 2 rho", ("transforms/_zeta.py", "jnp.maximum(2 * rho + r,", "jnp.maximum(rho + r,"), by=ZETA
    ),
    mutant(
        "zeta of R squared",
        ("transforms/_normalize.py", "reciprocal_zeta(jnp.sqrt(own), rho", "reciprocal_zeta(own, rho"),
        by=ZETA,
    ),
    mutant("zeta below one", ("transforms/_zeta.py", "jnp.maximum(1, r * root_gamma)", "r * root_gamma"), by=ZETA),
    mutant(
        "group sum over the layer",
        ("transforms/_zeta.py", "match bucket.grouping:", 'match "layer":'),
        by=GROUPS,
    ),
    mutant(
        "group sum over the other axis",
        (
            "transforms/_zeta.py",
            '{"row": (2,), "column": (1,), "row or column": (2, 1)}',
            '{"row": (1,), "column": (2,), "row or column": (1, 2)}',
        ),
        by=REFERENCE,
    ),
    mutant(
        "PI and PO swapped",
        ("groups/_schemes.py", "class PI(Scheme):", "class PO_(Scheme):"),
        ("groups/_schemes.py", "class PO(Scheme):", "class PI(Scheme):"),
        ("groups/_schemes.py", "class PO_(Scheme):", "class PO(Scheme):"),
        by="tests/test_hard_properties.py::test_counts_and_round_trip_of_any_plan",
    ),
    mutant(
        "PIO by output for all inputs",
        ("groups/_schemes.py", 'kind="stable")[: inputs // 2]', 'kind="stable")[: inputs - 1]'),
        by="tests/test_groups.py::test_worked_example_of_section_2",
    ),
    mutant(
        "momentum not projected on use",
        ("transforms/_fgsgd.py", "x, v, radius, tangent, share_out", "x, v, radius, True, share_out"),
        by="tests/test_transforms.py::test_chain_is_fgsgd",
    ),
    mutant(
        "one Newton-Schulz step too few",
        (
            "linalg/_newton_schulz.py",
            "_STEPS_FOR_DEVIATION = (0.005, 0.2, 0.7)",
            "_STEPS_FOR_DEVIATION = (0.2, 0.6, 0.7)",
        ),
        by="tests/test_linalg.py::test_orthonormalize_is_polar_at_any_distance",
    ),
    mutant(
        "order four too far from the identity",
        ("linalg/_newton_schulz.py", "_ORDER_FOUR_BELOW = 0.04", "_ORDER_FOUR_BELOW = 0.5"),
        by="tests/test_linalg.py::test_orthonormalize_is_polar_at_any_distance",
    ),
    mutant(
        "a coefficient of order four",
        ("linalg/_newton_schulz.py", "0.3125 * e)", "0.25 * e)"),
        by="tests/test_linalg.py::test_orthonormalize_is_polar_at_any_distance",
    ),
    mutant(
        "a coefficient of Newton-Schulz",
        ("linalg/_newton_schulz.py", "0.375 * square - 0.5 * e", "0.375 * square - 0.45 * e"),
        by="tests/test_linalg.py::test_orthonormalize_is_polar_at_any_distance",
    ),
    mutant(
        "QR without its signs",
        ("linalg/_qr.py", "return q * jnp.where(diagonal < 0, -1, 1).astype(y.dtype)", "return q"),
        by="tests/test_linalg.py::test_qf_is_the_q_with_positive_r",
    ),
    mutant(
        "Cayley without a half",
        ("linalg/_cayley.py", "/ 4 - a / 2)", "/ 4 - a)"),
        by="tests/test_linalg.py::test_cayley",
    ),
    mutant(
        "weight decay on manifolds",
        ("transforms/_fgsgd.py", "if all(isinstance(kind, Euclidean) for kind in batch.kinds):", "if True:"),
        by=DECAY,
    ),
    mutant(
        "lambda multiplies",
        (
            "transforms/_scale.py",
            "profile = gamma / (radius * std) / common",
            "profile = gamma * std / radius / common",
        ),
        by="tests/test_features.py::test_radii_follow_the_features_of_an_epoch",
    ),
    mutant(
        "gradients that are no numbers taken",
        (
            "transforms/_refuse.py",
            "return jnp.where(on[..., None, None], t, 0)",
            "return jnp.where(on[..., None, None], t, t)",
        ),
        by=TAKEN,
    ),
    mutant(
        "a step in the wrong direction",
        (
            "transforms/_fgsgd.py",
            "optax.scale_by_learning_rate(learning_rate)",
            "optax.scale_by_learning_rate(learning_rate, flip_sign=False)",
        ),
        by="tests/test_transforms.py::test_a_plan_of_none_is_sgd_exactly",
    ),
]


def copied(folder):
    """A copy of what a test run needs; imported from there, since it is the working directory."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("fgsgd_jax", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "fgsgd_jax"


def applied(package, mutant):
    """Seeds the fault; raises if the code is no longer what it was written for."""
    for name, old, new in mutant.changes:
        file = package / name
        text = file.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(
                f"{mutant.name}: {name} has {text.count(old)} times {old!r}; bring tests/mutants.py up to date"
            )
        file.write_text(text.replace(old, new), encoding="utf-8")


def tested(folder, tests):
    """Exit status of pytest and its last line; None if it takes too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-m", "not slow", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS * len(tests)
        )
    except subprocess.TimeoutExpired:
        return None, "too long"
    return done.returncode, (done.stdout.strip().splitlines() or [done.stderr[-500:]])[-1]


def caught(mutant):
    """Whether one of its tests fails: as a test that ran, not as one that could not be collected."""
    with tempfile.TemporaryDirectory() as folder:
        applied(copied(Path(folder)), mutant)
        status, said = tested(folder, mutant.tests)
    return status == 1 and " failed" in said, said


def main():
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    if not sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            copied(Path(folder))
            status, said = tested(folder, sorted({test for mutant in chosen for test in mutant.tests}))
        if status != 0:
            sys.exit(f"without any fault: {said}")
        print(f"without any fault: {said}", file=sys.stderr, flush=True)
    survived = []
    for mutant in chosen:
        found, said = caught(mutant)
        print(f"{'caught' if found else 'SURVIVED'}: {mutant.name} ({said})", file=sys.stderr, flush=True)
        survived += [] if found else [mutant.name]
    print(json.dumps({"mutants": len(chosen), "caught": len(chosen) - len(survived), "survived": survived}))
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
