"""Views: einops patterns, their names, and what is refused."""

import re

import einops
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import FOUR, arrays, kernel

import fgsgd_jax as fg

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


# --- names

NAMES = [
    ("slices", (3, 3, 4, 6), "h w i o -> i o h w"),
    ("slices", (5, 4, 6), "w i o -> i o w 1"),
    ("matrix", (4, 6), "i o -> 1 1 i o"),
    ("matrix", (3, 3, 4, 6), "h w i o -> 1 1 (h w i) o"),
    ("filters", (3, 3, 4, 6), "h w i o -> 1 o (h w i) 1"),
    ("filters", (5, 4, 6), "w i o -> 1 o (w i) 1"),
    ("filters", (4, 6), "i o -> 1 o i 1"),
    ("neurons", (4, 6), "i o -> 1 o i 1"),
    ("neurons", (3, 3, 4, 6), "h w i o -> 1 o (h w i) 1"),
    ("rows", (10, 4), "v e -> v 1 e 1"),
    ("heads", (8, 2, 4), "e h d -> 1 h e d"),
    ("heads", (8, 1, 4), "e h d -> 1 h e d"),  # queries share keys and values
    ("heads", (2, 4, 8), "h d e -> h 1 d e"),
    ("slices", (16, 16, 3, 8), "h w i o -> i o h w"),  # the first layer of a vision transformer, which says so
]


@pytest.mark.parametrize(("name", "shape", "pattern"), NAMES, ids=str)
def test_names_are_patterns(name, shape, pattern):
    params = {"w": jnp.zeros(shape)}
    plan = fg.plan(params, [("w", fg.Each(fg.Sphere(), view=name))])
    assert plan == fg.plan(params, [("w", fg.Each(fg.Sphere(), view=pattern))])
    assert plan["w"].view.pattern == pattern
    assert pattern in str(plan)
    assert pattern in plan.to_json()
    assert fg.View.of(name, shape) == plan["w"].view


def test_a_dense_layer_is_one_matrix():
    """Of γ = 1: `fg.Whole(fg.Stiefel())` needs no view."""
    params = {"kernel": jnp.zeros((8, 6))}
    plan = fg.plan(params, [("kernel", fg.Whole(fg.Stiefel()))])
    assert plan == fg.plan(params, [("kernel", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))])
    assert plan["kernel"].gamma == 1


@pytest.mark.parametrize(
    ("name", "shape", "remedy"),
    [
        (None, (12, 64, 4, 16), "layers=1.*heads"),  # projections of twelve blocks
        (None, (4, 12, 8, 8), "layers=1"),
        (None, (16, 16, 3, 8), 'view="slices"'),
        (None, (8, 2, 4), 'view="heads"'),
        (None, (2, 3, 3, 4, 6), "layers=1.*d h w i o"),
        ("slices", (2, 3, 3, 4, 6), "layers=1.*d h w i o"),
        ("matrix", (12, 64, 4, 16), "layers=1"),
        ("neurons", (12, 64, 4, 16), "layers=1"),
        ("matrix", (8, 2, 4), r"e h d -> 1 1 e \(h d\)"),
        ("neurons", (12, 8, 6), "layers=1"),
        ("rows", (3, 10, 4), "layers=1"),
        ("heads", (12, 8, 2, 4), 'layers=1, view="heads"'),
        ("heads", (8, 4, 4), "e h d -> 1 h e d.*h d e -> h 1 d e"),  # 8 < 16: either end may be the model's
        ("heads", (8, 8), r"e \(h d\) -> 1 h e d"),
        ("slices", (8, 8), 'view="matrix"'),
        ("filters", (8,), "scheme None"),
    ],
    ids=str,
)
def test_what_could_be_meant_otherwise_is_refused_with_the_remedy(name, shape, remedy):
    with pytest.raises(ValueError, match=rf"w \(shape {re.escape(str(shape))}\): .*{remedy}"):
        fg.plan({"w": jnp.zeros(shape)}, [("w", fg.Each(fg.Sphere(), view=name))])


def test_a_name_that_is_none_suggests_one():
    with pytest.raises(ValueError, match=r"view 'slice': .*\('slices'\?\)"):
        fg.plan(kernel(4, 6), [("k", fg.Each(fg.Sphere(), view="slice"))])
    with pytest.raises(ValueError, match=r"has no axis \['a'\]"):
        fg.plan(kernel(4, 6), [("k", fg.Each(fg.Sphere(), view="slices", a=3))])


@pytest.mark.parametrize(
    ("scheme", "shape", "noted"),
    [
        (fg.Each(fg.Sphere()), (4, 3, 8, 8), True),  # four one-dimensional convolutions, or a window of 4×3
        (fg.Each(fg.Sphere()), (3, 3, 8, 8), False),
        (fg.Each(fg.Sphere(), view="slices"), (3, 8, 8), True),
        (fg.Each(fg.Sphere(), view="w i o -> i o w 1"), (3, 8, 8), False),
        (fg.Each(fg.Sphere(), view="slices", layers=1), (4, 3, 8, 8), False),
    ],
    ids=str,
)
def test_kernels_that_could_be_stacks_are_noted(scheme, shape, noted):
    assert ("layers=1" in str(fg.plan({"w": jnp.zeros(shape)}, [("w", scheme)]))) == noted


def test_arrays_that_broadcast_against_a_stack_of_tensors():
    view = fg.View.of("h w i o -> i o h w", (3, 3, 4, 6))
    x = jnp.arange(20.0).reshape(5, 1, 1, 4, 1)
    found = view.split_broadcast(x)
    assert found.shape == (5, 4, 1, 1, 1)
    np.testing.assert_array_equal(found[..., 0, 0, 0], x[:, 0, 0, :, 0])
