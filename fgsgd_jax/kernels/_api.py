"""The two operations of a step, and which form serves which matrices on which backend."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ..manifolds import Manifold, Mixture
from . import _cpu_lengths, _cpu_matrices, _cpu_planes, _matrices, _share_out, _xla
from ._by_platform import by_platform
from ._layers import Layer, Results, unpacked

# In the order of preference. What none of them serves, and every other backend, gets the reference.
_ON_CPU = (_cpu_planes, _cpu_lengths, _cpu_matrices)
_ON_ACCELERATORS = {"tpu": _matrices.TPU, "cuda": _matrices.GPU}

# A module, or an object, with `serves`, `tangent` and `step`.
Form = Any


class Operation(NamedTuple):
    """What is to be done with several layers: line 5, or (`is_step`) line 7 along a direction that may be tangent.

    `is_exact` says that line 5 is wanted to round-off, as not only line 7 sees it.
    """

    manifolds: tuple[Manifold, ...]
    is_step: bool
    is_tangent: bool = False
    is_exact: bool = False


def tangent(
    mixtures: Sequence[Mixture],
    points: Sequence[Float[Array, "..."]],
    gradients: Sequence[Float[Array, "..."]],
    is_exact: bool = True,
) -> Results:
    """Line 5 of Algorithm 1 for several layers: projected gradients, and the squared norm of each matrix.

    Args:
      mixtures: the manifolds of each layer's matrices, with `kind` and `radius` over its batch axes.
      points: of each layer, [*batch, n, p].
      gradients: of each layer, in the shape of its points.
      is_exact: whether the results are wanted to round-off. False leaves a part normal to the manifold, 2⁻⁸ of a
        gradient at most, where that is faster: `step` removes it.

    Returns:
      The tangent vectors and the squared norms [*batch] of each layer, in the wider dtype of points and gradients, at
      least float32. Squared norms may overflow.
    """
    layers = [Layer(x, g, m.kind, _radii(m, x)) for m, x, g in zip(mixtures, points, gradients, strict=True)]
    return _by_group(functools.partial(Operation, is_step=False, is_exact=is_exact), mixtures, layers, 1.0)


def step(
    mixtures: Sequence[Mixture],
    points: Sequence[Float[Array, "..."]],
    directions: Sequence[Float[Array, "..."]],
    radii: Sequence[Float[Array, "..."]] | None = None,
    factor: float | Float[Array, ""] = 1.0,
    is_tangent: bool = False,
    share_out: Mesh | None = None,
) -> Results:
    """Line 7 and eq. 2 for several layers: displacements to the next points, and ‖v‖_F/s of each matrix.

    Args:
      mixtures: the manifolds of each layer's matrices, with `kind` and `radius` over its batch axes.
      points: of each layer, [*batch, n, p].
      directions: of each layer, in the shape of its points. They are projected first.
      radii: of the points to reach [*batch]; None for those of `mixtures`.
      factor: v is so many times the tangent part of a direction: minus the learning rate.
      is_tangent: whether the directions are tangent already.
      share_out: a mesh over whose devices the work on large matrices is shared out; see `_share_out`.

    Returns:
      The displacements φ(v) - x and ‖v‖_F/s [*batch] (0 of Euclidean matrices) of each layer.
    """
    new = [None] * len(points) if radii is None else radii
    parts = zip(mixtures, points, directions, new, strict=True)
    layers = [Layer(x, w, m.kind, _radii(m, x), r) for m, x, w, r in parts]
    return _by_group(
        functools.partial(Operation, is_step=True, is_tangent=is_tangent), mixtures, layers, factor, share_out
    )


def form_for(manifolds: tuple[Manifold, ...], n: int, p: int, count: int, is_shared: bool = False) -> Form:
    """The form that serves `count` n×p matrices on these manifolds on CPU; `is_shared` as in `Program`."""
    # Joined, layers lose the axes along which they are shared out over devices.
    if is_shared:
        return _xla
    return next((form for form in _ON_CPU if form.serves(manifolds, n, p, count)), _xla)


def _count(layers: Sequence[Layer]) -> int:
    return sum(math.prod(layer.x.shape[:-2]) for layer in layers)


def _radii(mixture: Mixture, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(mixture.radius, x.dtype), x.shape[:-2])


def _by_group(
    operation: Callable[[tuple[Manifold, ...]], Operation],
    mixtures: Sequence[Mixture],
    layers: Sequence[Layer],
    factor: float | Array,
    share_out: Mesh | None = None,
) -> Results:
    """The operation on all layers that have one size, dtype and set of manifolds at a time."""
    places: dict[tuple, list[int]] = {}
    for place, (mixture, layer) in enumerate(zip(mixtures, layers, strict=True)):
        places.setdefault((mixture.manifolds, layer.x.shape[-2:], layer.x.dtype), []).append(place)
    found: dict[int, tuple[Array, Array]] = {}
    for (manifolds, (n, p), dtype), own in places.items():
        alike, own_factor = [layers[place] for place in own], jnp.asarray(factor, dtype)
        if share_out is not None and _share_out.serves(n, p, _count(alike)):
            own_step = functools.partial(_by_platform, operation(manifolds))
            results = _share_out.step(share_out, alike, own_factor, own_step)
        else:
            results = _by_platform(operation(manifolds), alike, own_factor)
        found |= dict(zip(own, zip(*results, strict=True), strict=True))
    return unpacked([found[place] for place in range(len(layers))])


def _by_platform(
    operation: Operation, layers: Sequence[Layer], factor: Float[Array, ""]
) -> tuple[list[Array], list[Array]]:
    def by(form: Form) -> Callable[..., Results]:
        return functools.partial(_run, form, operation)

    def of_instances(layers: Sequence[Layer], factors: Float[Array, "size"]) -> Results:
        """The matrices of all instances as those of one."""
        # v of line 7 is linear in the direction, and the factor of line 5 is 1.
        own = [layer._replace(w=layer.w * factors.reshape(-1, *(1,) * (layer.w.ndim - 1))) for layer in layers]
        return _by_platform(operation, own, jnp.ones_like(factors[0]))

    n, p = layers[0].x.shape[-2:]
    given = operation.manifolds, n, p, _count(layers)
    ways = {"cpu": lambda program: by(form_for(*given, program.is_shared))}
    for platform, form in _ON_ACCELERATORS.items():
        if form.serves(*given):
            own = by(form.exact if operation.is_exact else form)
            ways[platform] = lambda program, own=own: own
    like = [layer.x for layer in layers], [layer.radius for layer in layers]
    # A loop whose length is found at run time has no derivative: that is the reference's.
    return by_platform(by(_xla), ways, like, list(layers), factor, batched=of_instances)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _run(form: Form, operation: Operation, layers: Sequence[Layer], factor: Float[Array, ""]) -> Results:
    if operation.is_step:
        return form.step(operation.manifolds, layers, factor, operation.is_tangent)
    return form.tangent(operation.manifolds, layers)
