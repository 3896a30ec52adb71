"""The two operations of a step, and which form serves which matrices on which backend."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ..manifolds import Manifold, Mixture
from . import _cpu_lengths, _cpu_matrices, _cpu_planes, _matrices, _reference, _share_out
from ._by_platform import Program, by_platform
from ._layers import Layers, Operation, Results

# A module, or an object, with `serves` and `run`.
Form = Any

# The first that serves is taken. Whatever none serves, and every other backend, gets the reference.
_FORMS: dict[str, tuple[Form, ...]] = {
    "cpu": (_cpu_planes, _cpu_lengths, _cpu_matrices),
    "tpu": (_matrices.TPU,),
    "cuda": (_matrices.GPU,),
}

# For each mixture arrays like its points, and for each mixture an array with a figure of every matrix.
Found = tuple[list[tuple[Float[Array, "..."], ...]], list[Float[Array, "..."]]]


def tangent(
    mixtures: Sequence[Mixture],
    points: Sequence[Sequence[Float[Array, "..."]]],
    gradients: Sequence[Sequence[Float[Array, "..."]]],
    is_exact: bool = True,
) -> Found:
    """Line 5 of Algorithm 1: projected gradients, and the squared norm of each matrix.

    Args:
      mixtures: the manifolds of layers, with `kind` and `radius` over their batch axes.
      points: for each mixture one array or several, which continue each other along the first batch axis: [*batch, n,
        p]. All are of one dtype of at least 32 bits.
      gradients: in the shapes and the dtype of the points.
      is_exact: whether the results are wanted to round-off. False leaves a part normal to the manifold, 2⁻⁸ of a
        gradient at most, where that is faster: `step` removes it.

    Returns:
      For each mixture the tangent vectors, in arrays like its points, and the squared norms [*batch] of all its
      matrices. Squared norms may overflow.
    """
    return _by_size(Operation((), is_step=False, is_exact=is_exact), mixtures, points, gradients)


def step(
    mixtures: Sequence[Mixture],
    points: Sequence[Sequence[Float[Array, "..."]]],
    directions: Sequence[Sequence[Float[Array, "..."]]],
    radii: Sequence[Float[Array, "..."]] | None = None,
    factor: float | Float[Array, ""] = 1.0,
    is_tangent: bool = False,
    share_out: Mesh | None = None,
) -> Found:
    """Line 7 and eq. 2: displacements to the next points, and ‖v‖_F/s of each matrix.

    Args:
      mixtures: the manifolds of layers, with `kind` and `radius` over their batch axes.
      points: for each mixture one array or several, as in `tangent`.
      directions: in the shapes and the dtype of the points. They are projected first, unless they are tangent.
      radii: of the points to reach [*batch]; None for those of `mixtures`.
      factor: v is so many times the tangent part of a direction: minus the learning rate.
      is_tangent: whether the directions are tangent already.
      share_out: a mesh over whose devices the work on large matrices is shared out; see `_share_out`.

    Returns:
      For each mixture the displacements φ(v) - x, in arrays like its points, and ‖v‖_F/s [*batch] (0 of Euclidean
      matrices).
    """
    operation = Operation((), is_step=True, is_tangent=is_tangent)
    return _by_size(operation, mixtures, points, directions, radii, factor, share_out)


def form_for(platform: str, program: Program, manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> Form:
    """The form that serves `count` n×p matrices on these manifolds."""
    # The forms of a CPU join layers, which would destroy the sharding of their axes.
    forms = () if platform == "cpu" and program.is_shared else _FORMS[platform]
    return next((form for form in forms if form.serves(manifolds, n, p, count)), _reference)


def _by_size(
    operation: Operation,
    mixtures: Sequence[Mixture],
    points: Sequence[Sequence[Array]],
    vectors: Sequence[Sequence[Array]],
    radii: Sequence[Array] | None = None,
    factor: float | Array = 1.0,
    share_out: Mesh | None = None,
) -> Found:
    """The operation on all layers that have one size, dtype and set of manifolds at a time."""
    sizes: dict[tuple, dict[int, Layers]] = {}
    for place, (mixture, x, w) in enumerate(zip(mixtures, points, vectors, strict=True)):
        first, dtype = x[0].shape, x[0].dtype
        radius = jnp.broadcast_to(jnp.asarray(mixture.radius, dtype), (sum(map(len, x)), *first[1:-2]))
        new = None if radii is None else radii[place].astype(dtype)
        layers = Layers(tuple(x), tuple(w), mixture.kind, radius, new)
        sizes.setdefault((mixture.manifolds, first[-2:], dtype), {})[place] = layers
    found = {}
    for (manifolds, (n, p), dtype), own in sizes.items():
        on_platforms = functools.partial(_on_platforms, operation._replace(manifolds=manifolds))
        given = list(own.values()), jnp.asarray(factor, dtype)
        if share_out is not None and _share_out.pays(n, p, given[0]):
            results = _share_out.step(share_out, *given, on_platforms)
        else:
            results = on_platforms(*given)
        found |= dict(zip(own, results, strict=True))
    in_order = [found[place] for place in range(len(points))]
    return [arrays for arrays, _ in in_order], [figures for _, figures in in_order]


def _on_platforms(operation: Operation, layers: list[Layers], factor: Float[Array, ""]) -> Results:
    """The operation on layers of one size by the form that serves them on the platform of the program."""

    def of_instances(layers: list[Layers], factors: Float[Array, "size"]) -> Results:
        """The matrices of all instances as those of one, the instances along the second axis."""
        layers = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), layers)
        # v is linear in the direction, so the factors of the instances go into it. Line 5 has no factor.
        own = [
            each._replace(w=tuple(w * factors.reshape(1, -1, *(1,) * (w.ndim - 2)) for w in each.w)) for each in layers
        ]
        found = _on_platforms(operation, own, jnp.ones_like(factors[0]))
        return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), found)

    given: Any = operation.manifolds, *layers[0].x[0].shape[-2:], sum(own.radius.size for own in layers)
    ways = {
        platform: lambda program, of=platform: functools.partial(
            form_for(of, program, *given).run, operation._replace(is_shared=program.is_shared)
        )
        for platform in _FORMS
    }
    like = [(own.x, own.radius) for own in layers]
    # A loop whose length is found at run time has no derivative: that is the reference's.
    return by_platform(functools.partial(_reference.run, operation), ways, like, layers, factor, batched=of_instances)
