"""The two operations of a step, and which form serves which matrices on which backend."""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ..manifolds import Manifold, Mixture
from . import _cpu_chunks, _cpu_lengths, _cpu_planes, _share_out, _xla
from ._layers import Layer, Results

# In the order of preference. What none of them serves, and every other backend, gets the reference.
_ON_CPU = (_cpu_planes, _cpu_lengths, _cpu_chunks)

Operation = Literal["tangent", "step"]


def tangent(
    mixtures: Sequence[Mixture], points: Sequence[Float[Array, "..."]], gradients: Sequence[Float[Array, "..."]]
) -> Results:
    """Line 5 of Algorithm 1 for several layers: projected gradients, and the squared norm of each matrix.

    Args:
      mixtures: the manifolds of each layer's matrices, with `kind` and `radius` over its batch axes.
      points: of each layer, [*batch, n, p].
      gradients: of each layer, in the shape of its points.

    Returns:
      The tangent vectors and the squared norms [*batch] of each layer, in the wider dtype of points and gradients, at
      least float32. Squared norms may overflow.
    """
    layers = [Layer(x, g, m.kind, _radii(m, x)) for m, x, g in zip(mixtures, points, gradients, strict=True)]
    return _by_group("tangent", False, mixtures, layers, 1.0)


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
    return _by_group("step", is_tangent, mixtures, layers, factor, share_out)


def form_for(manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> ModuleType:
    """The form that serves `count` n×p matrices on these manifolds on CPU."""
    # Joined, layers lose the axes along which they are shared out over devices.
    if jax.device_count() > 1:
        return _xla
    return next((form for form in _ON_CPU if form.serves(manifolds, n, p, count)), _xla)


def _radii(mixture: Mixture, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(mixture.radius, x.dtype), x.shape[:-2])


def _by_group(
    operation: Operation,
    is_tangent: bool,
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
        count = sum(math.prod(layers[place].x.shape[:-2]) for place in own)
        form = form_for(manifolds, n, p, count)
        own_factor = jnp.asarray(factor, dtype)
        alike = [layers[place] for place in own]
        if share_out is not None and _share_out.serves(n, p, count):
            results = _share_out.step(share_out, manifolds, alike, own_factor, is_tangent)
        else:
            run = _run if form is _xla else _run_on_cpu
            results = run(operation, is_tangent, manifolds, form, alike, own_factor)
        found |= dict(zip(own, zip(*results, strict=True), strict=True))
    pairs = [found[place] for place in range(len(layers))]
    return [array for array, _ in pairs], [figure for _, figure in pairs]


def _run(
    operation: Operation,
    is_tangent: bool,
    manifolds: tuple[Manifold, ...],
    form: ModuleType,
    layers: Sequence[Layer],
    factor: Array,
) -> Results:
    if operation == "tangent":
        return form.tangent(manifolds, layers)
    return form.step(manifolds, layers, factor, is_tangent)


# A loop whose length is found at run time has no derivative: that is the reference's.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _run_on_cpu(operation, is_tangent, manifolds, form, layers, factor) -> Results:
    def of(form):
        return functools.partial(_run, operation, is_tangent, manifolds, form)

    return lax.platform_dependent(_varying(layers, factor), factor, cpu=of(form), default=of(_xla))


def _varying(layers: Sequence[Layer], factor: Array) -> Sequence[Layer]:
    """The layers, in `shard_map` of a type that differs between devices where that of any argument does."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return layers
    nothing = sum(jnp.zeros_like(leaf, factor.dtype, shape=()) for leaf in jax.tree.leaves((layers, factor)))
    return jax.tree.map(lambda a: a + nothing if jnp.issubdtype(a.dtype, jnp.floating) else a, layers)


@_run_on_cpu.defjvp
def _run_on_cpu_jvp(operation, is_tangent, manifolds, form, primals, tangents):
    def reference(*args):
        return _run(operation, is_tangent, manifolds, _xla, *args)

    return _run_on_cpu(operation, is_tangent, manifolds, form, *primals), jax.jvp(reference, primals, tangents)[1]
