"""Views, schemes and the plan: counts that are fixed, positions that are drawn, and errors that say what to write."""

import dataclasses
import json
import re

import einops
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fgsgd_jax as fg
from fgsgd_jax.groups import batches, buckets

FOUR = [fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]
SCHEMES = {"PI": fg.PI, "PO": fg.PO, "PIO": fg.PIO}


def kernel(c, d, a=3, b=3):
    return {"k": jnp.zeros((a, b, c, d), jnp.float32)}


def collection(scheme, c, d, seed=0, a=3, b=3, **options):
    return fg.plan(kernel(c, d, a, b), [("k", scheme)], seed=seed, **options)["k"]


def arrays(scheme, c, d, seed=0):
    found = collection(scheme, c, d, seed)
    return np.asarray(found.member), np.asarray(found.group)


def groups_of(member, group):
    """{group: (manifold, slices' positions)}; a group on two manifolds is refused here, for every test."""
    assert member.shape == group.shape
    found = {}
    for number in np.unique(group):
        members = np.unique(member[group == number])
        assert len(members) == 1, f"group {number} is on {members}"
        found[int(number)] = (int(members[0]), np.argwhere(group == number))
    return found


def near_equal(counts):
    counts = list(counts)
    return max(counts) - min(counts) <= 1


# --- the worked example


@pytest.mark.parametrize("seed", range(5))
def test_worked_example_of_section_2(seed):
    """A 3x3x4x6 kernel, PIO over {Sphere, Stiefel}: 10 groups, 5 on each; 6 of 2 slices (PO, 3 on each) and 4 of 3
    slices (PI, 2 on each)."""
    groups = groups_of(*arrays(fg.PIO([fg.Sphere(), fg.Stiefel()]), 4, 6, seed))
    assert len(groups) == 10
    assert sorted(m for m, _ in groups.values()) == [0] * 5 + [1] * 5
    po = [(m, at) for m, at in groups.values() if len(at) == 2]
    pi = [(m, at) for m, at in groups.values() if len(at) == 3]
    assert sorted(m for m, _ in po) == [0] * 3 + [1] * 3
    assert sorted(m for m, _ in pi) == [0] * 2 + [1] * 2
    # PO: one output channel each, all six of them, the same two input channels. PI: one input channel each.
    assert sorted(at[0, 1] for _, at in po) == list(range(6))
    assert all(at[0, 1] == at[1, 1] for _, at in po)
    halves = {tuple(at[:, 0]) for _, at in po}
    assert len(halves) == 1
    assert all(len(set(at[:, 0])) == 1 for _, at in pi)
    assert {int(at[0, 0]) for _, at in pi} == set(range(4)) - set(*halves)


# --- counts


def sets_of(m):
    return (FOUR * 2)[:m]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("c", "d"), [(1, 1), (1, 6), (2, 3), (3, 16), (4, 6), (5, 7), (3, 2), (8, 8), (16, 5), (6, 1)], ids=str
)
class TestCounts:
    @pytest.mark.parametrize(("scheme", "across"), [(fg.PI, 0), (fg.PO, 1)])
    def test_pi_and_po(self, scheme, across, c, d, m, seed):
        """m parts of every input (PI) or output (PO) channel, less the parts that are empty: fewer slices than m."""
        member, group = arrays(scheme(sets_of(m)), c, d, seed)
        assert member.shape == (c, d)
        groups = groups_of(member, group)
        channels, slices = (c, d) if across == 0 else (d, c)
        assert len(groups) == channels * min(m, slices)
        assert all(len(set(at[:, across])) == 1 for _, at in groups.values())
        for channel in np.moveaxis(member, across, 0):
            assert near_equal(np.bincount(channel, minlength=m))
        assert near_equal(np.bincount(member.ravel(), minlength=m))

    def test_pio(self, c, d, m, seed):
        """D*[C >= 2] + m*ceil(C/2) groups, less empty parts; with C = 1 the layer is all PI."""
        member, group = arrays(fg.PIO(sets_of(m)), c, d, seed)
        assert member.shape == (c, d)
        groups = groups_of(member, group)
        half = c // 2
        assert len(groups) == d * (c >= 2) + min(m, d) * (c - half)
        if half < 2:
            return  # a half-column of one slice looks like a part of one slice
        po = {n: at for n, (_, at) in groups.items() if len(set(at[:, 0])) > 1}
        rows = {tuple(sorted(at[:, 0])) for at in po.values()}
        assert len(rows) == 1  # the same input channels for every output channel
        (rows,) = rows
        assert len(rows) == half
        assert sorted(at[0, 1] for at in po.values()) == list(range(d))
        assert all(np.all(at[:, 1] == at[0, 1]) for at in po.values())
        assert near_equal(np.bincount([groups[n][0] for n in po], minlength=m))
        others = np.setdiff1d(np.arange(c), rows)
        for row in member[others]:
            assert near_equal(np.bincount(row, minlength=m))
        assert near_equal(np.bincount(member[others].ravel(), minlength=m))

    def test_whole_and_each(self, c, d, m, seed):
        member, group = arrays(fg.Whole(fg.Stiefel()), c, d, seed)
        assert len(groups_of(member, group)) == 1
        member, group = arrays(fg.Each(fg.Stiefel()), c, d, seed)
        assert len(groups_of(member, group)) == c * d


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize(("c", "d"), [(4, 6), (5, 7), (3, 16), (3, 2), (1, 7), (2, 2)], ids=str)
def test_totals_do_not_depend_on_the_seed(name, m, c, d):
    """Nor does the number of groups, in all or by manifold, nor their sizes: shapes of one program."""
    totals, sizes = set(), set()
    for seed in range(20):
        member, group = arrays(SCHEMES[name](sets_of(m)), c, d, seed)
        totals.add(tuple(np.bincount(member.ravel(), minlength=m)))
        sizes.add(len(np.unique(group)))
    assert len(totals) == 1, totals
    assert len(sizes) == 1


@pytest.mark.parametrize("name", SCHEMES)
def test_scarce_rows_get_one_slice_each_of_manifolds_drawn_at_random(name):
    """RGB stems: 3 input channels and 4 manifolds. Which is left out of a column differs from column to column."""
    scheme = SCHEMES[name](FOUR)
    if name == "PI":  # the scarce direction is D there
        member, _ = arrays(scheme, 16, 3)
        lines = member
    elif name == "PO":
        member, _ = arrays(scheme, 3, 16)
        lines = member.T
    else:
        member, _ = arrays(scheme, 16, 3)
        lines = member
    lines = [line for line in lines if len(set(line)) == 3]
    assert len(lines) >= 8
    left_out = [({0, 1, 2, 3} - set(line.tolist())).pop() for line in lines]
    assert len(set(left_out)) == 4
    # What PO leaves out is dealt evenly, or the totals would be those of the seed.
    if name == "PO":
        assert np.all(np.bincount(left_out, minlength=4) == 4)


@pytest.mark.parametrize("name", ["PI", "PO"])
def test_remainders_are_dealt_at_random(name):
    """7 slices over 3 manifolds: the third slice goes to each of them at times, in every row."""
    seen = [set(), set(), set()]
    for seed in range(40):
        member, _ = arrays(
            SCHEMES[name]([fg.Sphere(), fg.Oblique(), fg.Stiefel()]),
            *((3, 7) if name == "PI" else (7, 3)),
            seed,
        )
        for i, line in enumerate(member if name == "PI" else member.T):
            seen[i].add(int(np.argmax(np.bincount(line, minlength=3))))
    assert seen == [{0, 1, 2}] * 3


def test_the_plan_prints_a_note_about_scarce_rows():
    text = str(fg.plan(kernel(3, 16), [("k", fg.PO(FOUR))]))
    plain = str(fg.plan(kernel(4, 16), [("k", fg.PO(FOUR))]))
    assert len(text.splitlines()) > len(plain.splitlines())
    assert re.search(r"fewer|less", text)
    assert "k" in text


# --- positions. Each test's p-value is uniform under the claim and its seeds are fixed; it is asserted above 1e-4, so
# that another stream of random numbers would fail one of these assertions once in ten thousand times.

LEAST_P = 1e-4
SEEDS = 400


def goodness_of_fit(counts, probabilities):
    """Chi-square of counts over cells of known probability: cells - 1 degrees of freedom."""
    counts, expected = np.asarray(counts, float), np.sum(counts) * np.asarray(probabilities)
    assert np.min(expected) > 5  # where the chi-square distribution is a good one
    statistic = np.sum((counts - expected) ** 2 / expected)
    return stats.chi2.sf(statistic, len(counts) - 1)


def position_table(lines, m):
    """How often each position is on each manifold."""
    return np.stack([np.bincount(column, minlength=m) for column in np.asarray(lines).T])


def uniformity_of_positions(lines, m):
    """Chi-square of the table of positions by manifolds, where each line has the same number of each manifold.

    A line is a random order of fixed counts, so its positions are not independent: the variance of a cell is that of
    one draw, and the covariance of two positions is -1/(D - 1) of it. So (D - 1)/D times Pearson's statistic has
    (D - 1)(m - 1) degrees of freedom (Friedman's test, with the manifolds as tied ranks).
    """
    table = position_table(lines, m)
    n, d = np.shape(lines)
    expected = n * np.bincount(np.asarray(lines)[0], minlength=m) / d
    statistic = (d - 1) / d * np.sum((table - expected) ** 2 / expected)
    return stats.chi2.sf(statistic, (d - 1) * (m - 1))


def test_the_chi_square_has_the_right_degrees_of_freedom():
    """On lines known to be random orders, p-values are uniform; with Pearson's own they would not be."""
    rng = np.random.default_rng(0)
    line = np.repeat([0, 1, 2], 4)
    p = [uniformity_of_positions([rng.permutation(line) for _ in range(200)], 3) for _ in range(300)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    cyclic = [np.roll(line, rng.integers(0, 6)) for _ in range(200)]
    assert uniformity_of_positions(cyclic, 3) < 1e-9


@pytest.fixture(scope="module")
def draws():
    """Members and groups over many seeds: a 6 x 12 grid, three manifolds, four to a row of 12 and two to a column."""
    three = [fg.Sphere(), fg.Oblique(), fg.Stiefel()]
    return {
        name: np.stack([arrays(scheme(three), 6, 12, seed) for seed in range(SEEDS)])
        for name, scheme in SCHEMES.items()
    }


def pio_rows(group):
    """The input channels that PIO treats PO-style: a group of theirs spans all of them."""
    spans = [{int(c) for c in np.argwhere(group == number)[:, 0]} for number in np.unique(group)]
    return sorted(max(spans, key=len))


@pytest.mark.parametrize("name", ["PI", "PO"])
def test_positions_are_hypergeometric(draws, name):
    """How many of a line's first h slices are on a manifold: drawn without replacement, so hypergeometric."""
    members = draws[name][:, 0]
    lines = members if name == "PI" else np.swapaxes(members, 1, 2)
    lines = lines.reshape(-1, lines.shape[-1])
    d = lines.shape[-1]
    fixed = d // 3
    assert np.all(np.apply_along_axis(np.bincount, 1, lines, minlength=3) == fixed)  # counts by line
    assert uniformity_of_positions(lines, 3) > LEAST_P
    first = d // 2
    law = stats.hypergeom(d, fixed, first)
    support = np.arange(max(0, fixed + first - d), min(fixed, first) + 1)
    for k in range(3):
        hits = np.sum(lines[:, :first] == k, axis=1)
        assert goodness_of_fit(np.bincount(hits, minlength=support[-1] + 1)[support], law.pmf(support)) > LEAST_P
    # Neighbours are on one manifold as often as a random order has it: (fixed - 1)/(d - 1), a binomial for a
    # single pair of positions, over independent lines.
    same = int(np.sum(lines[:, 0] == lines[:, 1]))
    assert stats.binomtest(same, len(lines), (fixed - 1) / (d - 1)).pvalue > LEAST_P


@pytest.mark.parametrize("name", ["PI", "PO"])
def test_lines_of_one_layer_are_independent(draws, name):
    """Two rows agree at a position one time in three."""
    members = draws[name][:, 0]
    lines = members if name == "PI" else np.swapaxes(members, 1, 2)
    agree = int(np.sum(lines[:, 0, 0] == lines[:, 1, 0]))
    assert stats.binomtest(agree, SEEDS, 1 / 3).pvalue > LEAST_P


def test_pio_positions(draws):
    members, groups = draws["PIO"][:, 0], draws["PIO"][:, 1]
    chosen = np.array([pio_rows(group) for group in groups])
    assert chosen.shape == (SEEDS, 3)  # floor(6/2) of them, always
    # Which input channels: each equally often, without replacement; a line of 3 ones and 3 zeros over six places.
    halves = np.array([np.isin(np.arange(6), rows).astype(int) for rows in chosen])
    assert uniformity_of_positions(halves, 2) > LEAST_P
    hits = halves[:, :3].sum(axis=1)
    assert goodness_of_fit(np.bincount(hits, minlength=4), stats.hypergeom(6, 3, 3).pmf(range(4))) > LEAST_P
    # PO half: the 12 half-columns, four on each manifold. PI half: each row by itself.
    columns = np.array([member[rows[0]] for member, rows in zip(members, chosen, strict=True)])
    assert np.all(np.apply_along_axis(np.bincount, 1, columns, minlength=3) == 4)
    assert uniformity_of_positions(columns, 3) > LEAST_P
    rows = np.concatenate([member[np.setdiff1d(np.arange(6), chosen[i])] for i, member in enumerate(members)])
    assert np.all(np.apply_along_axis(np.bincount, 1, rows, minlength=3) == 4)
    assert uniformity_of_positions(rows, 3) > LEAST_P


def test_two_layers_of_one_shape_are_drawn_independently():
    params = {name: jnp.zeros((3, 3, 6, 12)) for name in ("a", "b")}
    plan = fg.plan(params, [("*", fg.PI(FOUR[:3]))])
    assert np.any(np.asarray(plan["a"].member) != np.asarray(plan["b"].member))


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


# --- views


VIEWS = [
    ("h w i o -> i o h w", {}, (3, 3, 4, 5), (4, 5, 3, 3)),
    ("h w i o -> 1 o (h w i) 1", {}, (3, 3, 4, 5), (1, 5, 36, 1)),
    ("i o -> 1 1 i o", {}, (8, 6), (1, 1, 8, 6)),
    ("e h d -> 1 h e d", {}, (8, 2, 4), (1, 2, 8, 4)),
    ("(i a) (o b) -> i o a b", {"a": 4, "b": 4}, (8, 12), (2, 3, 4, 4)),
    ("h w i o -> i 1 (h w) o", {}, (3, 3, 4, 5), (4, 1, 9, 5)),
    ("h w i o -> 1 1 (h w i) o", {}, (1, 1, 8, 6), (1, 1, 8, 6)),
    ("i o -> 1 o i 1", {}, (8, 6), (1, 6, 8, 1)),
    ("d h w i o -> i o (d h) w", {}, (2, 3, 3, 4, 5), (4, 5, 6, 3)),
]


@pytest.mark.parametrize(("view", "sizes", "shape", "grid"), VIEWS, ids=[v[0] for v in VIEWS])
def test_views_are_einops_patterns(view, sizes, shape, grid):
    """Drawn points lie on their manifolds when rearranged by einops itself, and on none when not."""
    params = {"w": jnp.zeros(shape, jnp.float32)}
    plan = fg.plan(params, [("w", fg.Each(fg.Stiefel(), view=view, **sizes))], gamma=0.7)
    found = plan["w"]
    assert np.shape(found.member) == np.shape(found.group) == grid[:2]
    drawn = fg.initialize(jax.random.key(0), params, plan)["w"]
    assert drawn.shape == shape
    assert drawn.dtype == jnp.float32
    matrices = einops.rearrange(np.asarray(drawn, np.float64), view, **sizes)
    assert matrices.shape == grid
    assert np.max(h.violation("stiefel", matrices, 0.7)) <= 1e-6
    if grid[:2] != (1, 1) and shape != grid:
        scrambled = np.asarray(drawn, np.float64).reshape(grid)
        assert np.max(h.violation("stiefel", scrambled, 0.7)) > 1e-2
    assert float(fg.violation({"w": drawn}, plan)["w"]) <= 1e-6


def test_the_papers_slices_are_the_default_for_kernels():
    one = fg.plan(kernel(4, 6), [("k", fg.PI(FOUR))])
    assert one == fg.plan(kernel(4, 6), [("k", fg.PI(FOUR, view="h w i o -> i o h w"))])
    assert "h w i o -> i o h w" in str(one["k"].view)


def test_grouped_convolutions_have_fewer_inputs():
    """A depthwise kernel is 3 x 3 x 1 x D: one input channel to each slice."""
    member, group = arrays(fg.PIO(FOUR[:3]), 1, 9)
    assert np.all(np.bincount(member[0]) == 3)
    assert len(np.unique(group)) == 3


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

    @pytest.mark.parametrize("shape", [(8,), (8, 6), (3, 8, 6), (2, 3, 3, 4, 6)], ids=str)
    def test_no_view_of_a_tensor_that_is_not_4d(self, shape):
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


# --- Custom


def test_custom_arrays_are_taken_as_they_are():
    member = np.array([[0, 1, 0], [1, 0, 0]])
    group = np.array([[0, 1, 0], [1, 2, 2]])
    for kind in (np.asarray, jnp.asarray, lambda a: a.tolist()):
        found = collection(fg.Custom([fg.Sphere(), fg.Stiefel()], kind(member), kind(group)), 2, 3, seed=9)
        np.testing.assert_array_equal(found.member, member)
        assert len(np.unique(found.group)) == 3
        for number in range(3):
            assert len(np.unique(np.asarray(found.group)[group == number])) == 1


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


# --- initialize, nearest, violation


PARAMS = {"conv": {"kernel": np.random.default_rng(0).standard_normal((3, 3, 4, 6)), "bias": np.arange(6.0)}}
PLAN_RULES = [("kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])), ("*", None)]


def setting(dtype="float32", rules=PLAN_RULES, **options):
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS)
    return params, fg.plan(params, rules, **options)


def per_slice(params, plan, radius):
    """Violations by the definition, over the grid."""
    found = plan["conv/kernel"]
    member = np.asarray(found.member)
    out = np.zeros(member.shape)
    radius = np.broadcast_to(radius, member.shape)
    for c, d in np.ndindex(member.shape):
        kind = type(found.manifolds[member[c, d]]).__name__.lower()
        out[c, d] = h.violation(kind, np.asarray(params["conv"]["kernel"], np.float64)[:, :, c, d], radius[c, d])
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_initialize_draws_every_slice_on_its_manifold(dtype):
    params, plan = setting(dtype)
    drawn = fg.initialize(jax.random.key(0), params, plan)
    limit = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 0.03}[dtype]
    assert np.max(per_slice(drawn, plan, plan["conv/kernel"].gamma)) <= limit
    assert drawn["conv"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(drawn["conv"]["bias"], params["conv"]["bias"])  # not the plan's business
    again, other = (
        fg.initialize(jax.random.key(0), params, plan),
        fg.initialize(jax.random.key(1), params, plan),
    )
    np.testing.assert_array_equal(drawn["conv"]["kernel"], again["conv"]["kernel"])
    assert np.all(np.asarray(drawn["conv"]["kernel"]) != np.asarray(other["conv"]["kernel"]))
    # No two slices, and no two layers, share a draw.
    slices = np.asarray(drawn["conv"]["kernel"], np.float64).reshape(9, -1).T
    assert len(np.unique(slices.round(4), axis=0)) == 24


def test_layers_of_one_shape_are_drawn_apart():
    params = {name: {"kernel": jnp.zeros((3, 3, 2, 2))} for name in "ab"}
    plan = fg.plan(params, [("kernel", fg.Each(fg.Stiefel()))])
    drawn = fg.initialize(jax.random.key(0), params, plan)
    assert np.all(np.asarray(drawn["a"]["kernel"]) != np.asarray(drawn["b"]["kernel"]))


def test_initialize_is_uniform():
    """Each slice's, by its marginals: the p-values would be below 1e-4 for one key in ten thousand."""
    params = kernel(40, 60)
    plan = fg.plan(params, [("k", fg.PI([fg.Sphere(), fg.Stiefel()]))], gamma=0.5)
    drawn = np.asarray(fg.initialize(jax.random.key(0), params, plan)["k"], np.float64) / 0.5
    member = np.asarray(plan["k"].member)
    for k, n in ((0, 9), (1, 3)):
        entries = drawn[:, :, member == k]
        law = stats.beta((n - 1) / 2, (n - 1) / 2, loc=-1, scale=2)
        for i, j in ((0, 0), (1, 2)):
            assert stats.kstest(entries[i, j], law.cdf).pvalue > LEAST_P


def test_nearest_keeps_what_can_be_kept():
    params, plan = setting("float64")
    gamma = np.asarray(plan["conv/kernel"].gamma)
    found = fg.nearest(params, plan)
    assert np.max(per_slice(found, plan, gamma)) < 1e-13
    np.testing.assert_array_equal(found["conv"]["bias"], params["conv"]["bias"])
    member = np.asarray(plan["conv/kernel"].member)
    for c, d in np.ndindex(member.shape):
        kind = type(plan["conv/kernel"].manifolds[member[c, d]]).__name__.lower()
        expected = h.nearest(
            kind, PARAMS["conv"]["kernel"][:, :, c, d], float(np.broadcast_to(gamma, member.shape)[c, d])
        )
        np.testing.assert_allclose(found["conv"]["kernel"][:, :, c, d], expected, atol=1e-12)
    twice = fg.nearest(found, plan)
    np.testing.assert_allclose(twice["conv"]["kernel"], found["conv"]["kernel"], atol=1e-15)


def test_nearest_at_radii_of_ones_own():
    params, plan = setting("float64")
    radii = {"conv/kernel": jnp.asarray(np.linspace(0.1, 2, 24).reshape(4, 6))}
    found = fg.nearest(params, plan, radii=radii)
    assert np.max(per_slice(found, plan, radii["conv/kernel"])) < 1e-13
    assert float(fg.violation(found, plan, radii=radii)["conv/kernel"]) < 1e-13
    assert float(fg.violation(found, plan)["conv/kernel"]) > 0.5


def test_nearest_fitted_is_the_least_squares_scale():
    """Weights that are on their manifolds at some scale stay as they are; of others, no scale is nearer."""
    params, plan = setting("float64")
    drawn = fg.initialize(jax.random.key(0), params, plan)
    scaled = jax.tree.map(lambda leaf: 7.3 * leaf, drawn)
    found = fg.nearest(scaled, plan, radii="fitted")
    np.testing.assert_allclose(found["conv"]["kernel"], scaled["conv"]["kernel"], rtol=1e-9, atol=1e-9)
    fitted = fg.nearest(params, plan, radii="fitted")["conv"]["kernel"]
    best = float(jnp.sum((fitted - params["conv"]["kernel"]) ** 2))
    for gamma in np.geomspace(0.1, 10, 25):
        radii = {"conv/kernel": jnp.full((4, 6), gamma)}
        other = fg.nearest(params, plan, radii=radii)["conv"]["kernel"]
        assert best <= float(jnp.sum((other - params["conv"]["kernel"]) ** 2)) + 1e-9


def test_nearest_leaves_euclidean_slices():
    params, plan = setting("float64", [("kernel", fg.PI([fg.Sphere(), fg.Euclidean()])), ("*", None)])
    flatland = np.asarray(plan["conv/kernel"].member) == 1
    found = np.asarray(fg.nearest(params, plan)["conv"]["kernel"])
    np.testing.assert_array_equal(found[:, :, flatland], PARAMS["conv"]["kernel"][:, :, flatland])


def test_violation_is_the_worst_slices():
    params, plan = setting("float64")
    gamma = plan["conv/kernel"].gamma
    drawn = fg.initialize(jax.random.key(0), params, plan)
    drawn["conv"]["kernel"] = drawn["conv"]["kernel"].at[:, :, 2, 3].multiply(1.1)
    found = fg.violation(drawn, plan)
    expected = np.max(per_slice(drawn, plan, gamma))
    assert expected == pytest.approx(0.1) or expected == pytest.approx(0.21)
    (value,) = jax.tree.leaves(found)  # one number per constrained parameter
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.shape(value) == ()
    np.testing.assert_allclose(jax.jit(lambda p: fg.violation(p, plan))(drawn)["conv/kernel"], expected, rtol=1e-9)


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


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "sharded"])
def test_what_an_update_keeps_comes_back_in_the_dtype_of_the_momentum(joined):
    """Else the momentum of float32 weights would be float64 after a gradient that is."""
    like = {"w": jnp.zeros((2, 3, 4, 5), jnp.float32)}
    plan = fg.plan(like, [("w", fg.Each(fg.Sphere()))])
    (batch,) = (dataclasses.replace(batch, joined=joined) for batch in batches(plan, buckets(plan)))
    directions = {"w": jnp.arange(120.0, dtype=jnp.float64).reshape(2, 3, 4, 5)}
    found = batch.unkept_leaves(batch.keep(batch.stack(directions), directions), like)
    assert found["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["w"], directions["w"])
