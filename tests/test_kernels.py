"""Every form of a step is held against the definition, `kernels._reference` in float64, by one table."""

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from layer_examples import FEW, LARGE, LENGTHS, MANY, MIX, OTHER_RETRACTIONS, example

import fgsgd_jax as fg
from fgsgd_jax.kernels import _cpu_lengths, _cpu_matrices, _cpu_planes, _matrices, _reference
from fgsgd_jax.kernels._layers import Operation
from fgsgd_jax.manifolds import Mixture

# In radii. Beyond eps^-½ a sum holds nothing of the point.
STEPS = (0.0, 1e-4, 0.1, 1.0, 30.0, 1e4)

CASES = [
    (_cpu_planes, MIX, (3, 3), FEW),
    (_cpu_planes, MIX, (5, 3), FEW),
    (_cpu_planes, MIX, (4, 1), FEW),
    (_cpu_planes, MIX, (7, 7), MANY),
    (_cpu_planes, (fg.Stiefel(),), (3, 3), FEW),
    (_cpu_planes, LENGTHS, (3, 3), FEW),
    (_cpu_lengths, LENGTHS, (2, 5), FEW),
    (_cpu_lengths, LENGTHS, (70, 3), FEW),
    (_cpu_lengths, (fg.Sphere(),), (33, 1), FEW),
    (_cpu_lengths, (fg.Oblique(),), (3, 2), FEW),
    (_cpu_matrices, MIX, (64, 40), LARGE),
    (_cpu_matrices, OTHER_RETRACTIONS, (40, 64), LARGE),
    (_reference, MIX, (2, 5), FEW),
    (_reference, OTHER_RETRACTIONS, (3, 3), FEW),
    (_reference, (fg.Stiefel(),), (12, 8), FEW),
    (_matrices.TPU, MIX, (32, 16), LARGE),
    (_matrices.TPU, (fg.Stiefel(),), (16, 24), LARGE),
    (_matrices.GPU, MIX, (24, 16), LARGE),
    (_cpu_matrices, (fg.Stiefel(),), (16, 24), LARGE),
    (_cpu_matrices, MIX, (72, 16), FEW),
]
FAST = {(0, "float32"), (0, "float64"), (3, "float32"), (6, "float32"), (7, "float32"), (12, "float32")}
FAST |= {(15, "float64"), (18, "float32")}


def form_name(form):
    return str(getattr(form, "__name__", form)).rpartition("._")[2]


def named(manifolds):
    return "+".join(type(m).__name__.lower() + (getattr(m, "retraction", "polar") != "polar") * "*" for m in manifolds)


TABLE = pytest.mark.parametrize(
    ("form", "manifolds", "shape", "grids", "dtype"),
    [
        pytest.param(
            *case,
            dtype,
            id=f"{form_name(case[0])}-{named(case[1])}-{case[2][0]}x{case[2][1]}-{dtype}",
            marks=() if (number, dtype) in FAST else pytest.mark.slow,
        )
        for number, case in enumerate(CASES)
        for dtype in h.EPS
        # In float32 its products are of few passes on CPU too: see below.
        if (case[0], dtype) != (_matrices.TPU, "float32")
    ],
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def defined(manifolds, is_tangent, kind, radius, new_radius, x, w, factors):
    """What the definition says, of all matrices at once."""
    mixture = Mixture(manifolds, None if len(manifolds) == 1 else kind, radius)
    steps = lax.map(lambda factor: _reference.step(mixture, x, w, new_radius, factor, is_tangent), factors)
    return *_reference.tangent(mixture, x, w), *steps


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def found_by(form, its, is_tangent, layers, factors):
    """What a form says, of all matrices in one row."""

    def run(operation, factor):
        return its.in_one_row(form.run(operation, layers, factor))

    # In turn, as in training: under vmap the turns of an iteration would be those of the longest step.
    steps = lax.map(functools.partial(run, Operation(its.manifolds, True, is_tangent)), factors)
    exactly = Operation(its.manifolds, is_step=False, is_exact=True)
    return list(steps) if is_tangent else [*run(exactly, jnp.ones_like(factors[0])), *steps]


def check(found, expected, limit):
    """No further from the definition than `limit`."""
    gap = np.abs(found - expected)
    above = np.argwhere(~(gap <= limit))
    assert not len(above), f"{len(above)} above the limit: {gap[tuple(above[0])]:.1e} at {above[0].tolist()}"


def check_steps(its, found, expected, reached):
    """Against the definition and the constraint, at every length of step; `reached` are the radii of the points."""
    eps, s, fine = h.EPS[its.dtype], h.spread(its.radius), its.has_direction
    for length, displacement, ratio, its_displacement, its_ratio in zip(STEPS, *found, *expected, strict=True):
        assert displacement.dtype == ratio.dtype == its.dtype
        limit = its.limit(length)
        check((displacement / s)[fine], (its_displacement / s)[fine], limit[fine])
        check(ratio[fine], its_ratio[fine], 64 * eps * length)
        violations = its.violations(displacement, reached)
        assert np.max(violations[fine | its.constrained]) <= its.violation_limit, length


@TABLE
def test_a_form_is_the_definition(form, manifolds, shape, grids, dtype):
    its = example(manifolds, shape, grids, dtype)
    # What serves many large matrices is held with a few.
    assert form in (_reference, _cpu_matrices) or form.serves(manifolds, *shape, len(its.kind))
    factors = -np.asarray(STEPS)

    def found(is_tangent, w):
        of_form = found_by(form, its, is_tangent, its.layers(w, is_tangent), jnp.asarray(factors, dtype))
        return jax.tree.map(np.asarray, of_form)

    def expected(is_tangent, w):
        new_radius = its.new_radius if is_tangent else None
        return jax.tree.map(
            np.asarray, defined(manifolds, is_tangent, its.kind, its.radius, new_radius, its.x, w, factors)
        )

    # From any direction, to the same radius.
    t, squares, *steps = expected(False, its.w)
    its_t, its_squares, *its_steps = found(False, its.w)
    assert its_t.dtype == its_squares.dtype == dtype
    size = h.norm(np.nan_to_num(its.w))
    fine = its.has_direction
    check(its_t[fine], t[fine], 16 * h.EPS[dtype] * h.spread(size)[fine])
    check(its_squares[fine], squares[fine], 32 * h.EPS[dtype] * size[fine] ** 2)
    assert not np.any(np.isfinite(its_squares[~fine]))
    check_steps(its, its_steps, steps, its.radius)

    # From a tangent vector, to a new radius.
    t = np.asarray(t.astype(dtype), np.float64)
    its_steps = found(True, t)
    check_steps(its, its_steps, expected(True, t)[2:], its.new_radius)

    # What overflows keeps its place and harms no other.
    spoilt = np.isin(np.arange(len(t)), (5, 10, 15))
    t[5], t[10, 0, 0], t[15] = np.inf, np.inf, 1e30 if dtype == "float32" else 1e200
    others = its.constrained & ~spoilt
    for length, displacement, before in zip(STEPS, found(True, t)[0], its_steps[0], strict=True):
        limit = its.limit(length) * h.spread(its.radius)
        check(displacement[others], before[others], limit[others])
        assert np.max(its.violations(displacement, its.new_radius)[its.constrained]) <= its.violation_limit
