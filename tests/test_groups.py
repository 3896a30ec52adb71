"""Schemes: counts that are fixed, and positions that are drawn."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from grids import FOUR, SCHEMES, arrays, collection, groups_of, kernel
from scipy import stats

import fgsgd_jax as fg


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
