"""The plan: what it is a function of, its rules, its errors, its text and its scales."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import FOUR, collection, kernel

import fgsgd_jax as fg

# --- determinism


def test_a_plan_is_a_function_of_rules_seed_and_shapes():
    params = {"a": {"kernel": jnp.zeros((3, 3, 4, 6))}, "b": {"kernel": jnp.zeros((3, 3, 6, 8))}}
    rules = [("kernel", fg.PIO(FOUR))]
    plan = fg.plan(params, rules, seed=3)
    values = jax.tree.map(lambda leaf: leaf + 1, params)
    shapes = jax.eval_shape(lambda: params)
    assert plan == fg.plan(values, rules, seed=3)
    assert plan == fg.plan(shapes, rules, seed=3)
    assert plan.difference(fg.plan(values, rules, seed=3)) is None
    other = fg.plan(params, rules, seed=4)
    assert plan != other
    assert "a/kernel" in plan.difference(other)
    # A parameter's groups are its own: another layer beside it changes nothing.
    more = fg.plan({**params, "c": {"kernel": jnp.zeros((3, 3, 6, 8))}}, rules, seed=3)
    np.testing.assert_array_equal(more["a/kernel"].member, plan["a/kernel"].member)


def test_a_plan_is_the_same_in_another_process(tmp_path):
    """Python's string hashes are salted by process: a seed made of them would differ."""
    import os
    import subprocess
    import sys

    program = (
        "import fgsgd_jax as fg, numpy as np, hashlib\n"
        "p = {'a': {'kernel': np.zeros((3, 3, 4, 6), 'float32')}}\n"
        "c = fg.plan(p, [('kernel', fg.PIO([fg.Sphere(), fg.Stiefel()]))], seed=3)['a/kernel']\n"
        "arrays = str(np.asarray(c.member).tolist()) + str(np.asarray(c.group).tolist())\n"
        "print(hashlib.sha256(arrays.encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(hashes) == 1


def test_difference_names_the_first_thing_that_differs():
    params = {"a": {"kernel": jnp.zeros((3, 3, 4, 6))}, "b": {"bias": jnp.zeros(3)}}
    base = [("a/kernel", fg.PI(FOUR)), ("*", None)]
    plan = fg.plan(params, base)
    variants = [
        fg.plan(params, [("a/kernel", fg.PO(FOUR)), ("*", None)]),
        fg.plan(params, [("a/kernel", fg.PI(FOUR[:2])), ("*", None)]),
        fg.plan(params, [("a/kernel", fg.PI([*FOUR[:2], fg.Stiefel(retraction="qr"), FOUR[3]])), ("*", None)]),
        fg.plan(params, [("a/kernel", fg.PI(FOUR, view="h w i o -> o i h w")), ("*", None)]),
        fg.plan(params, base, gamma=0.5),
        fg.plan(params, [("*", None)]),
        fg.plan({"a": {"kernel": jnp.zeros((3, 3, 4, 8))}, "b": {"bias": jnp.zeros(3)}}, base),
    ]
    for variant in variants:
        assert plan != variant
        for found in (plan.difference(variant), variant.difference(plan)):
            assert isinstance(found, str)
            assert "a/kernel" in found
    fewer = fg.plan({"a": params["a"]}, [("a/kernel", fg.PI(FOUR))])
    assert plan != fewer
    assert "b/bias" in plan.difference(fewer)


# --- rules


TREE = {
    "Conv_0": {"kernel": jnp.zeros((3, 3, 3, 8))},
    "Block_0": {
        "Conv_0": {"kernel": jnp.zeros((3, 3, 8, 8)), "bias": jnp.zeros(8)},
        "mykernel": jnp.zeros((3, 3, 2, 2)),
    },
    "Block_1": {"Conv_10": {"kernel": jnp.zeros((3, 3, 8, 8))}},
    "head": {"kernel": jnp.zeros((8, 10))},
}
PATHS = [
    "Block_0/Conv_0/bias",
    "Block_0/Conv_0/kernel",
    "Block_0/mykernel",
    "Block_1/Conv_10/kernel",
    "Conv_0/kernel",
    "head/kernel",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Conv_*/kernel", {"Block_0/Conv_0/kernel", "Block_1/Conv_10/kernel", "Conv_0/kernel"}),
        ("Conv_?/kernel", {"Block_0/Conv_0/kernel", "Conv_0/kernel"}),
        ("Conv_[1-9]*/kernel", {"Block_1/Conv_10/kernel"}),
        ("Block_0/*/kernel", {"Block_0/Conv_0/kernel"}),
        ("Block_0/*kernel", {"Block_0/Conv_0/kernel", "Block_0/mykernel"}),  # * crosses /
        (
            "Block_*",
            {"Block_0/Conv_0/kernel", "Block_0/Conv_0/bias", "Block_0/mykernel", "Block_1/Conv_10/kernel"},
        ),
        ("mykernel", {"Block_0/mykernel"}),
        ("Block_0/Conv_0/kernel", {"Block_0/Conv_0/kernel"}),
        (lambda path, leaf: leaf.ndim == 4 and leaf.shape[2] == 3, {"Conv_0/kernel"}),
        (lambda path, leaf: path.startswith("Block_1/"), {"Block_1/Conv_10/kernel"}),
    ],
    ids=[str(n) for n in range(10)],
)
def test_patterns_match_suffixes_of_whole_components(pattern, expected):
    """Found by what a rule of no view, given to what may not have one, would do: so the matched are set to None."""
    rest = fg.Each(fg.Sphere(), view="... -> 1 1 (...) 1")
    by_path = {}
    flat = jax.tree_util.tree_flatten_with_path(TREE)[0]
    for path, leaf in flat:
        by_path["/".join(k.key for k in path)] = leaf
    assert sorted(by_path) == PATHS
    views = {1: "o -> 1 1 o 1", 2: "i o -> 1 1 i o", 4: "h w i o -> 1 1 (h w i) o"}
    others = [((lambda path, leaf, n=n: leaf.ndim == n), fg.Each(fg.Sphere(), view=view)) for n, view in views.items()]
    # Rules that the first has left nothing to would be errors, so only those that still match are given.
    left = [leaf.ndim for path, leaf in by_path.items() if path not in expected]
    plan = fg.plan(TREE, [(pattern, None), *(rule for rule, n in zip(others, views, strict=True) if n in left)])
    assert {path for path in PATHS if plan[path] is None} == expected
    del rest


def test_kernel_is_not_a_suffix_of_mykernel():
    plan = fg.plan(TREE, [("head/kernel", None), ("kernel", fg.Each(fg.Sphere())), ("*", None)])
    assert plan["Block_0/mykernel"] is None
    assert plan["Conv_0/kernel"] is not None


def test_first_match_wins():
    plan = fg.plan(
        TREE,
        [
            ("Block_0/Conv_0/kernel", fg.Whole(fg.Stiefel())),
            ("Conv_*/kernel", fg.Each(fg.Sphere())),
            ("*", None),
        ],
    )
    assert [type(m).__name__ for m in plan["Block_0/Conv_0/kernel"].manifolds] == ["Stiefel"]
    assert [type(m).__name__ for m in plan["Conv_0/kernel"].manifolds] == ["Sphere"]
    assert plan["head/kernel"] is None


# --- errors: each names the path, what was found, and what to write instead


def fails(params, rules, *expected, error=ValueError, **options):
    with pytest.raises(error) as caught:
        fg.plan(params, rules, **options)
    for word in expected:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


class TestErrors:
    def test_pattern_that_matches_nothing(self):
        message = fails(TREE, [("Cnv_*/kernel", fg.PI(FOUR)), ("*", None)], r"Cnv_\*/kernel", "match")
        assert "Conv_0/kernel" in message  # what there is to match

    def test_predicate_that_matches_nothing(self):
        fails(TREE, [(lambda path, leaf: False, None), ("*", None)], "match")

    def test_parameter_that_no_rule_matches(self):
        fails(
            TREE,
            [("Conv_*/kernel", fg.PI(FOUR)), ("bias", None), ("mykernel", None)],
            "head/kernel",
            r'\("\*", None\)',
        )

    @pytest.mark.parametrize(
        ("manifold", "view", "shape"),
        [
            (fg.Sphere(), None, (1, 1, 4, 6)),
            (fg.Stiefel(), None, (1, 1, 4, 6)),
            (fg.Oblique(), None, (1, 1, 4, 6)),
            (fg.Oblique(), None, (1, 3, 4, 6)),
            (fg.Stiefel(), "i o -> i o 1 1", (4, 6)),
        ],
        ids=str,
    )
    def test_dimension_0(self, manifold, view, shape):
        """{-s, s} cannot train; the remedies are another view, None, or degenerate="euclidean"."""
        params = {"a": {"w": jnp.zeros(shape)}}
        scheme = fg.PI([manifold, fg.Euclidean()], **({"view": view} if view else {}))
        fails(params, [("w", scheme)], "a/w", type(manifold).__name__, 'degenerate="euclidean"', "view")
        plan = fg.plan(params, [("w", scheme)], degenerate="euclidean")
        assert "a/w" in str(plan)
        moved = fg.initialize(jax.random.key(0), params, plan)["a"]["w"]
        np.testing.assert_array_equal(moved, 0)  # left as given: the slices became Euclidean

    def test_a_row_is_a_fine_sphere(self):
        params = {"w": jnp.zeros((1, 3, 4, 6))}
        plan = fg.plan(params, [("w", fg.PI([fg.Sphere(), fg.Stiefel()]))])
        assert float(fg.violation(fg.initialize(jax.random.key(0), params, plan), plan)["w"]) < 1e-6

    def test_unknown_degenerate(self):
        fails(kernel(4, 6), [("k", fg.PI(FOUR))], "degenerate", "error", "euclidean", degenerate="ignore")

    def test_complex(self):
        params = {"a": {"w": jnp.zeros((3, 3, 4, 6), jnp.complex64)}}
        fails(params, [("w", fg.PI(FOUR))], "a/w", "complex", error=(ValueError, TypeError))
        assert fg.plan(params, [("w", None)])["a/w"] is None

    def test_integers(self):
        fails(
            {"a": {"w": jnp.zeros((3, 3, 4, 6), int)}},
            [("w", fg.PI(FOUR))],
            "a/w",
            "int",
            error=(ValueError, TypeError),
        )

    @pytest.mark.parametrize("shape", [(), (8,), (3, 8, 6), (2, 3, 3, 4, 6)], ids=str)
    def test_no_view_of_a_tensor_that_is_no_kernel(self, shape):
        fails(
            {"a": {"w": jnp.zeros(shape)}},
            [("w", fg.Each(fg.Sphere()))],
            "a/w",
            "view=",
            re.escape(str(shape)),
        )

    @pytest.mark.parametrize(
        ("view", "sizes"),
        [
            ("i o -> 1 1 i o", {}),  # another number of axes
            ("h w i o -> i o h", {}),  # not four on the right
            ("h w i o -> i o h x", {}),  # an axis from nowhere
            ("h w i o -> i o h h", {}),  # an axis twice
            ("h w i o", {}),  # no arrow
            ("h w (i a) o -> i o h (w a)", {"a": 3}),  # 4 is not a multiple of 3
            ("h w i o -> 1 o h w", {}),  # an axis lost
            ("", {}),
        ],
        ids=str,
    )
    def test_bad_views(self, view, sizes):
        fails(
            {"a": {"w": jnp.zeros((3, 3, 4, 6))}},
            [("w", fg.Each(fg.Sphere(), view=view, **sizes))],
            "a/w|view",
        )

    def test_bad_view_of_a_parameter_names_it(self):
        scheme = fg.Each(fg.Sphere(), view="(i a) (o b) -> i o a b", a=4, b=4)
        fails({"a": {"w": jnp.zeros((8, 6))}}, [("w", scheme)], "a/w", r"\(8, 6\)")

    @pytest.mark.parametrize(
        ("member", "group", "named"),
        [
            (np.zeros((4, 5), int), np.zeros((4, 5), int), r"\(4, 5\)"),
            (np.zeros((4, 6), int), np.zeros((6, 4), int), r"\(6, 4\)"),
            (np.full((4, 6), 2), np.zeros((4, 6), int), "2"),
            (np.full((4, 6), -1), np.zeros((4, 6), int), "-1"),
            (np.arange(24).reshape(4, 6) % 2, np.zeros((4, 6), int), "group"),
            (np.zeros((4, 6)), np.zeros((4, 6), int), "float|integer"),
            (np.zeros((4, 6), int), np.full((4, 6), -1), "-1|negative"),
        ],
        ids=[
            "member's shape",
            "group's shape",
            "no such manifold",
            "negative",
            "mixed group",
            "floats",
            "group -1",
        ],
    )
    def test_bad_custom_arrays(self, member, group, named):
        params = {"a": {"w": jnp.zeros((3, 3, 4, 6))}}
        with pytest.raises((ValueError, TypeError)) as caught:
            fg.plan(params, [("w", fg.Custom([fg.Sphere(), fg.Stiefel()], member, group))])
        assert re.search(named, str(caught.value)), caught.value

    @pytest.mark.parametrize("scheme", [fg.PI, fg.PO, fg.PIO])
    def test_no_manifolds(self, scheme):
        with pytest.raises((ValueError, TypeError), match="manifold"):
            fg.plan(kernel(4, 6), [("k", scheme([]))])

    def test_things_that_are_not_manifolds_or_schemes(self):
        with pytest.raises((ValueError, TypeError)) as caught:
            fg.plan(kernel(4, 6), [("k", fg.PI(["sphere"]))])
        assert re.search("sphere|str", str(caught.value))
        with pytest.raises((ValueError, TypeError)) as caught:
            fg.plan(kernel(4, 6), [("k", fg.Sphere())])
        assert re.search("Sphere|scheme", str(caught.value))

    @pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf"), "xavier"])
    def test_bad_gamma(self, gamma):
        fails(kernel(4, 6), [("k", fg.PI(FOUR))], "gamma", error=(ValueError, TypeError), gamma=gamma)

    def test_bad_radius(self):
        with pytest.raises(ValueError, match="radius"):
            fg.plan(kernel(4, 6), [("k", fg.PI([fg.Sphere(radius=-1.0)]))])

    @pytest.mark.parametrize("radius", [jnp.ones(3), jnp.ones((1, 4, 6))], ids=["3", "1×4×6"])
    def test_radius_that_does_not_fit_the_grid(self, radius):
        with pytest.raises(ValueError, match=r"k \(shape .*radius of shape .* the grid \(4, 6\)"):
            fg.plan(kernel(4, 6), [("k", fg.PI([fg.Sphere(radius=radius)]))])

    @pytest.mark.parametrize(
        ("leaf", "remedy"),
        [(jnp.tanh, "eqx.filter"), ("name", "eqx.filter"), (1.5, "jnp.asarray")],
        ids=["function", "string", "number"],
    )
    def test_leaves_that_are_no_arrays(self, leaf, remedy):
        """An equinox model that was not filtered, as its activation shows."""
        message = fails({"mlp": {"w": jnp.zeros((4, 6)), "leaf": leaf}}, [("*", None)], "mlp/leaf", error=TypeError)
        assert remedy in message
        assert type(leaf).__name__ in message

    def test_unknown_path(self):
        plan = fg.plan(TREE, [("*", None)])
        with pytest.raises(KeyError, match="kernle"):
            plan["Conv_0/kernle"]

    def test_other_trees(self):
        plan = fg.plan(kernel(4, 6), [("k", fg.PI(FOUR))])
        for call in (
            lambda p: fg.initialize(jax.random.key(0), p, plan),
            lambda p: fg.nearest(p, plan),
            lambda p: fg.violation(p, plan),
        ):
            for other in (kernel(4, 8), {"j": jnp.zeros((3, 3, 4, 6))}):
                with pytest.raises((ValueError, KeyError)) as caught:
                    call(other)
                assert re.search(r"\bk\b", str(caught.value))


# --- JSON


def plans():
    params = {
        "a": {"kernel": jnp.zeros((3, 3, 4, 6))},
        "b": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(3)},
    }
    rules = [
        ("a/kernel", fg.PIO([fg.Sphere(radius=0.3), fg.Stiefel(retraction="cayley"), fg.Euclidean()])),
        ("b/kernel", fg.Each(fg.Oblique(), view="(i a) (o b) -> i o a b", a=4, b=4)),
        ("*", None),
    ]
    return params, rules


def test_json_round_trip():
    params, rules = plans()
    for options in ({}, {"gamma": 0.3}, {"seed": 5}):
        plan = fg.plan(params, rules, **options)
        text = plan.to_json()
        json.loads(text)
        again = fg.Plan.from_json(text)
        assert again == plan
        assert again.difference(plan) is None
        assert again.to_json() == text
        assert str(again) == str(plan)
    # What was read back still draws and trains.
    start, expected = (fg.initialize(jax.random.key(0), params, p) for p in (again, plan))
    for one, other in zip(*map(jax.tree.leaves, (start, expected)), strict=True):
        np.testing.assert_array_equal(one, other)
    tx = fg.fgsgd(0.1, again)
    updates, _ = jax.jit(tx.update)(start, tx.init(start), start)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


def test_custom_plans_go_through_json_too():
    member, group = np.array([[0, 1, 0], [1, 0, 0]]), np.array([[0, 1, 0], [1, 2, 2]])
    plan = fg.plan(kernel(2, 3), [("k", fg.Custom([fg.Sphere(), fg.Stiefel()], member, group))])
    again = fg.Plan.from_json(plan.to_json())
    assert again == plan
    np.testing.assert_array_equal(again["k"].member, member)


@pytest.mark.parametrize("what", ["not json", "not a plan", "truncated", "members", "missing key", "version"])
def test_tampered_json_is_refused(what):
    params, rules = plans()
    text = fg.plan(params, rules).to_json()
    data = json.loads(text)
    if what == "not json":
        bad = "{"
    elif what == "not a plan":
        bad = '{"epochs": 3}'
    elif what == "truncated":
        bad = text[: len(text) // 2]
    elif what == "missing key":
        data.pop(next(iter(data)))
        bad = json.dumps(data)
    elif what == "version":
        versions = [key for key in data if "version" in key or "format" in key]
        if not versions:
            pytest.skip("the format has no version")
        data[versions[0]] = 10**6
        bad = json.dumps(data)
    else:
        # Swap two digits somewhere in the first long run of numbers: the member or group arrays, however written.
        bad = re.sub(r"(\[\s*)(\d)((?:\s*,\s*\d){3})", lambda found: found[1] + "9" + found[3], text, count=1)
        if bad == text:
            pytest.skip("arrays are not written as lists of small integers")
    with pytest.raises(ValueError):
        fg.Plan.from_json(bad)


# --- gamma


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 3, 16, 16), 0.0589), ((3, 3, 64, 64), 0.0295), ((3, 3, 512, 512), 0.0104), ((7, 7, 3, 64), 0.0175)],
    ids=str,
)
def test_glorots_gamma(shape, expected):
    """(b + b^)^-1/2 with b = C A B, b^ = A B D."""
    a, b, c, d = shape
    for options in ({}, {"gamma": "glorot"}):
        gamma = np.asarray(fg.plan(kernel(c, d, a, b), [("k", fg.Each(fg.Sphere()))], **options)["k"].gamma)
        np.testing.assert_allclose(gamma, (a * b * (c + d)) ** -0.5, rtol=1e-6)
        np.testing.assert_allclose(gamma, expected, atol=5e-5)


def test_glorots_gamma_of_literal_slices_of_dense():
    params = {"w": jnp.zeros((2048, 1000), jnp.float32)}
    plan = fg.plan(params, [("w", fg.Each(fg.Sphere(), view="i o -> i o 1 1"))], degenerate="euclidean")
    assert plan["w"] is not None
    np.testing.assert_allclose(plan["w"].gamma, 3048**-0.5, rtol=1e-6)
    np.testing.assert_allclose(plan["w"].gamma, 0.0181, atol=5e-5)


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        ("i o -> 1 1 i o", (8, 6)),  # one matrix per layer
        ("h w i o -> 1 1 (h w i) o", (3, 3, 4, 6)),
        ("e h d -> 1 h e d", (8, 2, 4)),  # per head
        ("h w i o -> 1 o (h w i) 1", (3, 3, 4, 6)),  # per neuron
    ],
)
def test_gamma_is_1_for_one_matrix_per_layer_head_or_neuron(view, shape):
    params = {"w": jnp.zeros(shape)}
    np.testing.assert_array_equal(fg.plan(params, [("w", fg.Each(fg.Stiefel(), view=view))])["w"].gamma, 1.0)


def test_gamma_of_ones_own():
    np.testing.assert_allclose(collection(fg.Each(fg.Sphere()), 4, 6, gamma=0.3).gamma, 0.3, rtol=1e-6)


# --- the printed table


def test_the_table_shows_what_was_decided():
    params = {
        "Conv_0": {"kernel": jnp.zeros((3, 3, 16, 16)), "bias": jnp.zeros(16)},
        "Dense_0": {"kernel": jnp.zeros((16, 10))},
    }
    plan = fg.plan(
        params,
        [
            ("Conv_*/kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])),
            ("Dense_*/kernel", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")),
            ("*", None),
        ],
    )
    lines = str(plan).splitlines()

    def row(path):
        (line,) = [line for line in lines if path in line]
        return line

    conv = row("Conv_0/kernel")
    shape = re.compile(r"3\D{1,3}3\D{1,3}16\D{1,3}16")
    assert shape.search(conv)
    groups = len(np.unique(plan["Conv_0/kernel"].group))
    assert groups == 16 + 3 * 8
    for word in ("h w i o -> i o h w", "PIO", "Sphere", "Oblique", "Stiefel", str(groups), "0589"):
        assert word in conv, word
    dense = row("Dense_0/kernel")
    for word in ("i o -> 1 1 i o", "Whole", "Stiefel"):
        assert word in dense, word
    assert "Conv_0/bias" in str(plan)  # what is frozen out is said aloud
