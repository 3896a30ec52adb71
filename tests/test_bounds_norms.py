"""Norms of groups and layers against loops over slices, and the certificates that stand on them."""

import math
import re
from fractions import Fraction

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg
from fgsgd_jax.bounds import Norms

NAMES = Norms._fields
THREE = [fg.Sphere(), fg.Oblique(), fg.Stiefel()]


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def measured(matrix):
    """Frobenius, spectral and 2→1 norm of one matrix."""
    return (
        np.sqrt(np.sum(matrix**2)),
        np.linalg.svd(matrix, compute_uv=False)[0],
        sum(np.sqrt(np.sum(row**2)) for row in matrix),
    )


def initialized(params, rules, seed=0, **options):
    plan = fg.plan(params, rules, seed=seed, **options)
    return fg.initialize(jax.random.key(seed), params, plan), plan


def slices_of(kernel, collection):
    """{group: its matrices, side by side}, by plain indexing of an HWIO kernel."""
    kernel = np.asarray(kernel, np.float64)
    found = {}
    for number in range(collection.num_groups):
        at = np.argwhere(np.asarray(collection.group) == number)
        found[number] = [kernel[:, :, c, d] for c, d in at]
    return found


# --- measured


@pytest.mark.parametrize(
    "scheme",
    [fg.PI(THREE), fg.PO(THREE), fg.PIO([*THREE, fg.Euclidean()]), fg.Whole(fg.Stiefel()), fg.Each(fg.Oblique())],
    ids=str,
)
@pytest.mark.parametrize("window", [slow((3, 3)), (2, 4)], ids=str)
def test_norms_of_groups_and_layers_are_those_of_the_concatenated_slices(scheme, window):
    rng = np.random.default_rng(0)
    # Two layers of one shape: they are measured together.
    params = {name: jnp.asarray(rng.standard_normal((*window, 5, 7)), jnp.float32) for name in ("a", "b")}
    plan = fg.plan(params, [("*", scheme)])
    found = fg.norms(params, plan)
    assert list(found) == ["a", "b"]
    for path, layer in found.items():
        groups = slices_of(params[path], plan[path])
        for number, matrices in groups.items():
            expected = measured(np.concatenate(matrices, axis=1))
            for name, value in zip(NAMES, expected, strict=True):
                np.testing.assert_allclose(getattr(layer.groups.measured, name)[number], value, rtol=2e-6)
        expected = measured(np.concatenate([m for group in groups.values() for m in group], axis=1))
        for name, value in zip(NAMES, expected, strict=True):
            np.testing.assert_allclose(getattr(layer.layer.measured, name), value, rtol=2e-6)


def test_other_views():
    """Tall matrices, whose side-by-side Gram would be large, and groups of very unequal sizes."""
    rng = np.random.default_rng(1)
    params = {
        "conv": jnp.asarray(rng.standard_normal((3, 3, 8, 6))),
        "dense": jnp.asarray(rng.standard_normal((40, 9))),
        "heads": jnp.asarray(rng.standard_normal((12, 4, 5))),
        "tiny": jnp.asarray(rng.standard_normal((1, 1, 4, 6))),
    }
    group = np.zeros((1, 6), int)
    group[0, 2] = 1
    plan = fg.plan(
        params,
        [
            ("conv", fg.Custom([fg.Sphere()], np.zeros((1, 6), int), group, view="h w i o -> 1 o (h w i) 1")),
            ("dense", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")),
            ("heads", fg.Each(fg.Stiefel(), view="e h d -> 1 h e d")),
            ("tiny", fg.Each(fg.Sphere(), view="h w i o -> 1 o (h w i) 1")),
        ],
    )
    conv, dense, heads, tiny = fg.norms(params, plan).values()
    filters = np.asarray(params["conv"]).reshape(72, 6)
    of = {
        "conv": (conv, [filters[:, [0, 1, 3, 4, 5]], filters[:, [2]]], filters),
        "dense": (dense, [np.asarray(params["dense"])], np.asarray(params["dense"])),
        "heads": (heads, list(np.asarray(params["heads"]).transpose(1, 0, 2)), None),
        "tiny": (tiny, [column[:, None] for column in np.asarray(params["tiny"])[0, 0].T], None),
    }
    for layer, groups, whole in of.values():
        for number, matrix in enumerate(groups):
            np.testing.assert_allclose([norm[number] for norm in layer.groups.measured], measured(matrix), rtol=1e-12)
        if whole is not None:
            np.testing.assert_allclose(list(layer.layer.measured), measured(whole), rtol=1e-12)


def test_free_weights_are_one_matrix_and_vectors_are_none():
    rng = np.random.default_rng(2)
    params = {
        "z": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 4, 5))), "bias": jnp.ones(5)},
        "conv": jnp.asarray(rng.standard_normal((3, 3, 2, 4))),
        "attention": jnp.asarray(rng.standard_normal((6, 2, 3))),
        "steps": jnp.zeros((2, 2), jnp.int32),
    }
    plan = fg.plan(params, [("conv", fg.PO([fg.Sphere()])), ("*", None)])
    found = fg.norms(params, plan)
    assert list(found) == ["attention", "conv", "z/kernel"]
    for path, leaf in (("z/kernel", params["z"]["kernel"]), ("attention", params["attention"])):
        matrix = np.asarray(leaf).reshape(-1, leaf.shape[-1])
        for table in (found[path].layer, jax.tree.map(lambda x: x[0], found[path].groups)):
            np.testing.assert_allclose(list(table.measured), measured(matrix), rtol=1e-12)
            assert all(np.isinf(bound) for bound in table.bound)
            assert all(np.isnan(entry) for entry in table.table2)


# --- bounds


@pytest.mark.parametrize("shape", [(3, 3), slow((5, 2)), (2, 5), slow((4, 1)), slow((1, 4))], ids=str)
@pytest.mark.parametrize("manifold", THREE, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("radius", [1.0, 0.3])
def test_bounds_hold_for_random_points_and_the_frobenius_norm_is_known(manifold, shape, radius):
    if manifold.dim(shape) == 0:
        pytest.skip("no manifold")
    params = {"k": jnp.zeros((*shape, 4, 6))}
    params, plan = initialized(params, [("k", fg.PI([manifold.with_radius(radius)]))])
    layer = fg.norms(params, plan)["k"]
    for table in layer:
        for found, bound in zip(table.measured, table.bound, strict=True):
            assert np.all(np.asarray(found) <= np.asarray(bound) * (1 + 1e-12))
        np.testing.assert_allclose(table.measured.frobenius, table.bound.frobenius, rtol=1e-12)
    unit = {"Sphere": 1, "Oblique": shape[1], "Stiefel": min(shape)}[type(manifold).__name__]
    np.testing.assert_allclose(layer.groups.bound.frobenius, radius * math.sqrt(unit * 6))
    np.testing.assert_allclose(layer.layer.bound.frobenius, radius * math.sqrt(unit * 24))


def attaining(kind, n, p, count):
    """Slices that reach the bound of the spectral norm, and others that reach that of the 2→1 norm."""
    unit = {"sphere": np.outer(np.eye(n)[0], np.eye(p)[0]), "oblique": np.outer(np.eye(n)[0], np.ones(p))}
    spectral = unit.get(kind, np.eye(n, p))
    rows = {"sphere": np.full((n, p), (n * p) ** -0.5), "oblique": np.full((n, p), n**-0.5)}.get(kind, np.eye(n, p))
    return [np.repeat(x[None], count, axis=0) for x in (spectral, rows)]


@pytest.mark.parametrize("manifold", THREE, ids=lambda m: type(m).__name__)
def test_bounds_are_attained(manifold):
    """No smaller number than the bound would hold."""
    name = type(manifold).__name__.lower()
    for norm, slices in zip(("spectral", "two_to_one"), attaining(name, 3, 3, 5), strict=True):
        assert np.all(h.violation(name, slices) < 1e-12)
        params = {"k": jnp.asarray(0.5 * slices.transpose(1, 2, 0)[:, :, None, :])}
        plan = fg.plan(params, [("k", fg.Whole(manifold))], gamma=0.5)
        table = fg.norms(params, plan)["k"].layer
        np.testing.assert_allclose(getattr(table.measured, norm), getattr(table.bound, norm), rtol=1e-12)


def test_radii_enter_the_bounds():
    params, plan = initialized({"k": jnp.zeros((3, 3, 2, 4))}, [("k", fg.PO([fg.Stiefel()]))], gamma=1.0)
    radii = np.random.default_rng(3).random((2, 4))
    scaled = {"k": params["k"] * jnp.asarray(radii)[None, None]}
    table = fg.norms(scaled, plan, {"k": jnp.asarray(radii)})["k"].groups
    column = np.sqrt(np.sum(radii**2, axis=0))
    np.testing.assert_allclose(table.bound.frobenius, math.sqrt(3) * column)
    np.testing.assert_allclose(table.measured.frobenius, math.sqrt(3) * column)
    np.testing.assert_allclose(table.bound.spectral, column)
    np.testing.assert_allclose(table.bound.two_to_one, 3 * column)
    np.testing.assert_allclose(table.table2.frobenius, math.sqrt(3) * radii.max(axis=0))
    with pytest.raises(ValueError, match=r"no entry for 'k'"):
        fg.norms(scaled, plan, {})


def test_figures_of_the_documentation():
    """A 3×3 Stiefel slice has a 2→1 norm of 3, not 3^¼; a whole layer 512→512 at 4×4 a Frobenius norm of 7.8."""
    params, plan = initialized({"k": jnp.zeros((3, 3, 2, 3))}, [("k", fg.Each(fg.Stiefel()))], gamma=1.0)
    table = fg.norms(params, plan)["k"].groups
    np.testing.assert_allclose(table.measured.two_to_one, 3)
    np.testing.assert_allclose(table.table2.two_to_one, 3**0.25)
    gamma = (512 * 9 + 4 * 4 * 512) ** -0.5
    layer = {"k": jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32)}
    plan = fg.plan(layer, [("k", fg.PO([fg.Stiefel()]))], gamma=gamma)
    params = {"k": jnp.broadcast_to(gamma * jnp.eye(3)[:, :, None, None], (3, 3, 512, 512))}
    table = fg.norms(params, plan)["k"]
    np.testing.assert_allclose(table.layer.measured.frobenius, 7.84, atol=0.01)
    assert np.all(np.asarray(table.groups.bound.frobenius) < 1)


@pytest.mark.parametrize(
    ("manifold", "expected"),
    [
        (fg.Sphere(), (1.0, None, 1.0)),
        (fg.Stiefel(), (3**0.5, 1.0, 3**0.25)),
        (fg.Oblique(), (3**0.5, None, 3**0.25)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_table_2_as_printed(manifold, expected):
    """None stands for the table's σ(ω): the largest of the group's slices."""
    params, plan = initialized({"k": jnp.zeros((5, 3, 2, 4))}, [("k", fg.PI([manifold]))], gamma=0.5)
    table = fg.norms(params, plan)["k"].groups.table2
    kernel = np.asarray(params["k"])
    for name, value in zip(NAMES, expected, strict=True):
        if value is None:
            for c in range(2):
                sigma = max(measured(kernel[:, :, c, d])[1] for d in range(4))
                np.testing.assert_allclose(getattr(table, name)[c], sigma, rtol=1e-12)
        else:
            np.testing.assert_allclose(getattr(table, name), 0.5 * value)


def test_a_layer_with_euclidean_members_has_no_bound_but_its_other_groups_do():
    params, plan = initialized({"k": jnp.ones((3, 3, 2, 4))}, [("k", fg.PI([fg.Stiefel(), fg.Euclidean()]))])
    layer, on = fg.norms(params, plan)["k"], np.asarray(plan["k"].member)
    stiefel = {int(g) for g in np.asarray(plan["k"].group)[on == 0]}
    for number in range(4):
        assert np.isfinite(layer.groups.bound.spectral[number]) == (number in stiefel)
        assert np.isnan(layer.groups.table2.spectral[number]) == (number not in stiefel)
    assert np.isinf(layer.layer.bound.frobenius)
    np.testing.assert_allclose(layer.layer.table2.spectral, plan["k"].gamma)


@pytest.mark.slow
def test_norms_run_under_jit_and_in_bfloat16():
    params, plan = initialized({"k": jnp.zeros((3, 3, 4, 4), jnp.bfloat16)}, [("k", fg.PIO(THREE))])
    found = fg.norms(params, plan)
    traced = jax.jit(lambda p: fg.norms(p, plan))(params)
    for eager, compiled in zip(jax.tree.leaves(found), jax.tree.leaves(traced), strict=True):
        assert eager.dtype == jnp.float32
        np.testing.assert_allclose(eager, compiled, rtol=1e-6)


# --- certificates


def exact_square(matrix):
    return sum(Fraction(float(v)) ** 2 for v in np.ravel(matrix))


@pytest.mark.parametrize(
    "scheme",
    [fg.PO(THREE), slow(fg.PI(THREE)), slow(fg.PO([fg.Stiefel()])), slow(fg.PI([fg.Oblique()])), slow(fg.PIO(THREE))],
    ids=str,
)
def test_proposition_1_holds_for_groups_with_glorots_gamma(scheme):
    shapes = {"a": (3, 3, 3, 16), "b": (5, 5, 8, 2)}
    params, plan = initialized({name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}, [("*", scheme)])
    certificate = fg.certify(params, plan)
    assert certificate.holds
    assert not list(certificate.violations())
    assert certificate.groups == sum(plan[path].num_groups for path in shapes)
    bounds = fg.norms(params, plan)
    for path, statements in certificate.statements.items():
        for name in NAMES:
            statement = getattr(statements, name)
            np.testing.assert_allclose(statement.upper, getattr(bounds[path].groups.measured, name), rtol=1e-5)
            assert np.all(statement.lower <= statement.upper)
            assert np.all(statement.margin <= 1 - statement.upper)
            np.testing.assert_allclose(statement.margin, 1 - statement.upper, atol=1e-15)


def test_proposition_1_does_not_hold_where_it_should_not():
    """A whole layer, and a Euclidean member at its usual scale."""
    params = {"k": jnp.zeros((3, 3, 64, 64), jnp.float32)}
    found, plan = initialized(params, [("k", fg.Whole(fg.Stiefel()))])
    assert {violation.norm for violation in fg.certify(found, plan).violations()} == {
        "frobenius",
        "spectral",
        "two_to_one",
    }
    he = {"k": jax.random.normal(jax.random.key(0), (3, 3, 64, 64)) * (2 / 576) ** 0.5}
    plan = fg.plan(he, [("k", fg.PO([fg.Euclidean()]))])
    certificate = fg.certify(he, plan)
    assert certificate.statements["k"].frobenius.violated.mean() > 0.9
    assert "Euclidean" in str(next(certificate.violations()))


@pytest.mark.parametrize("seed", range(3))
def test_every_planted_violation_is_flagged_and_nothing_else(seed):
    """Groups scaled to just above 1 in one of the norms, by as little as 1e-12 in float64."""
    rng = np.random.default_rng(seed)
    params, plan = initialized(
        {path: jnp.zeros((3, 3, 6, 8)) for path in ("a", "b", "c/d")}, [("*", fg.PIO(THREE))], seed
    )
    planted, tensors = set(), {path: np.array(leaf) for path, leaf in zip(plan, jax.tree.leaves(params), strict=True)}
    for path, tensor in tensors.items():
        for number in rng.choice(plan[path].num_groups, 5, replace=False):
            at = np.asarray(plan[path].group) == number
            matrix = np.concatenate([tensor[:, :, c, d] for c, d in np.argwhere(at)], axis=1)
            index = int(rng.integers(3))
            tensor[:, :, at] *= (1 + 10.0 ** rng.uniform(-12, 0)) / measured(matrix)[index]
            planted.add((path, int(number), NAMES[index]))
    planted_params = {"a": tensors["a"], "b": tensors["b"], "c": {"d": tensors["c/d"]}}
    certificate = fg.certify(jax.tree.map(jnp.asarray, planted_params), plan)
    found = {(v.path, v.group, v.norm): v for v in certificate.violations()}
    assert planted <= set(found)
    assert {(path, number) for path, number, _ in found} == {(path, number) for path, number, _ in planted}
    assert not certificate.holds
    for (path, number, name), violation in found.items():
        assert violation.certain
        assert violation.lower > 1
        assert plan[path].manifolds[int(plan[path].member[plan[path].group == number][0])].__class__.__name__ == (
            violation.manifold
        )
        assert re.search(rf"{path} group {number} .*{name} norm", str(violation))


def test_a_certificate_is_never_wrong_by_round_off():
    """Groups whose exact norm is within a few units of float64 of 1, judged in rational arithmetic."""
    rng = np.random.default_rng(4)
    kernel = rng.standard_normal((3, 3, 4, 50))
    kernel /= np.sqrt(np.sum(kernel**2, axis=(0, 1, 2)))
    kernel *= 1 + rng.integers(-30, 30, 50) * 2.0**-53
    params = {"k": jnp.asarray(kernel)}
    plan = fg.plan(params, [("k", fg.PO([fg.Sphere()]))])
    statement = fg.certify(params, plan).statements["k"].frobenius
    numbers = np.asarray(plan["k"].group)[0]
    wrong, decided = 0, 0
    for d in range(50):
        square = exact_square(np.asarray(params["k"])[..., d])
        wrong += statement.holds[numbers[d]] and square > 1
        wrong += statement.violated[numbers[d]] and square <= 1
        decided += statement.holds[numbers[d]] or statement.violated[numbers[d]]
    assert wrong == 0
    # The arithmetic is not so coarse as to say nothing; and at so small distances it cannot always know.
    assert 0 < decided < 50


def test_exactly_one_is_neither_certain_nor_violated_and_a_tolerance_certifies_it():
    params = {"k": jnp.eye(3)[:, :, None, None] * jnp.ones((1, 1, 1, 2))}
    plan = fg.plan(params, [("k", fg.Each(fg.Stiefel()))])
    spectral = fg.certify(params, plan).statements["k"].spectral
    assert not spectral.holds.any()
    assert not spectral.violated.any()
    assert np.all(np.abs(spectral.margin) < 1e-13)
    assert fg.certify(params, plan, tolerance=1e-12).statements["k"].spectral.holds.all()
    assert "round-off" in str(fg.certify(params, plan))
    with pytest.raises(ValueError, match="tolerance"):
        fg.certify(params, plan, tolerance=-1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_certified(bad):
    params, plan = initialized({"k": jnp.zeros((3, 3, 2, 4), jnp.float32)}, [("k", fg.PO([fg.Sphere()]))])
    params = {"k": params["k"].at[1, 2, 0, 3].set(bad)}
    violations = list(fg.certify(params, plan).violations())
    number = int(plan["k"].group[0, 3])
    assert {(v.group, v.norm) for v in violations} == {(number, name) for name in NAMES}
    assert all(v.upper == np.inf for v in violations)


def test_certificates_of_numpy_float64_need_no_x64(users_settings):
    """JAX would round these to float32, to exactly 1."""
    del users_settings
    kernel = np.zeros((3, 3, 1, 1))
    kernel[0, 0] = 1 + 1e-12
    plan = fg.plan({"k": kernel}, [("k", fg.Each(fg.Sphere()))])
    assert fg.certify({"k": kernel}, plan).statements["k"].frobenius.violated.all()


def test_the_report_names_the_first_violations():
    params, plan = initialized({"k": jnp.zeros((3, 3, 8, 8), jnp.float32)}, [("k", fg.Each(fg.Stiefel()))], gamma=1.0)
    lines = str(fg.certify(params, plan)).splitlines()
    assert lines[0].startswith("frobenius norm: 0 of 64 groups certified, least margin -0.732")
    assert len(lines) == 3 + 20 + 1
    assert lines[3].startswith("  k group 0 (Stiefel): frobenius norm 1.73205, 0.73 above the limit")
