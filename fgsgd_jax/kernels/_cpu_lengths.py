"""CPU: spheres and oblique matrices of any shape. Their sums are as fast as the passes that make what is summed."""

import functools
import math
import operator
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..linalg import matmul
from ..manifolds import Euclidean, Manifold, Mixture, Oblique, Sphere
from ._layers import Layer, Layers, Operation, Results, jitted, joined, split

# So many slices are added up in one loop over their entries; of 16 and more XLA on CPU makes several.
_SLICES = 8


def serves(manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> bool:
    """Whether this form serves `count` n×p matrices on these manifolds."""
    return n * p * count > 0 and all(type(manifold) in (Euclidean, Sphere, Oblique) for manifold in manifolds)


@jitted
def run(operation: Operation, layers: Sequence[Layers], factor: Float[Array, ""]) -> Results:
    """See `_reference.run`."""
    layer = joined(layers)
    mixture = Mixture(operation.manifolds, layer.kind)
    if not operation.is_step:
        t = _tangent(mixture, layer)
        return split(t, total(jnp.square(t), whole=True)[..., 0, 0], layers)
    v = factor * (layer.w if operation.is_tangent else _tangent(mixture, layer))
    y = layer.x + v
    squares = _lengths(mixture, jnp.square(y), jnp.square(layer.radius))
    # A tangent step gives at least s². Next to nothing, overflow and NaN mean that there is no step to take.
    radius, info = layer.radius[..., None, None], jnp.finfo(y.dtype)
    fine = (squares > jnp.square(radius) * (info.tiny / info.eps)) & jnp.isfinite(squares)
    reached = radius if layer.new_radius is None else layer.new_radius[..., None, None]
    scale = reached / jnp.sqrt(jnp.where(fine, squares, 1))

    def somewhere() -> Array:
        """The point itself where no step can be taken; a fixed point where its length is not that of one."""
        squares = _lengths(mixture, jnp.square(layer.x), jnp.square(layer.radius))
        is_point = jnp.abs(squares / jnp.square(radius) - 1) < 0.1
        origins = mixture.select(lambda m, _, x: jnp.broadcast_to(m.origin(x.shape[-2:], x.dtype), x.shape), layer.x)
        start = jnp.where(is_point, layer.x, origins * radius) * (reached / radius)
        return jnp.where(fine, y * scale, start)

    # Behind the branches the subtraction would be a pass of its own.
    displacement = lax.cond(jnp.all(fine), lambda: y * scale - layer.x, lambda: somewhere() - layer.x)
    ratio = jnp.sqrt(total(jnp.square(v), whole=True)) / radius
    return split(displacement, mixture.constrained(ratio[..., 0, 0]), layers)


def _tangent(mixture: Mixture, layer: Layer) -> Array:
    lengths = _lengths(mixture, layer.x * layer.w, jnp.zeros_like(layer.radius))
    return layer.w - layer.x * (lengths / jnp.square(layer.radius)[..., None, None])


def _lengths(mixture: Mixture, entries: Array, otherwise: Array) -> Array:
    """Sums over the columns of oblique matrices, over all of those on spheres; of Euclidean ones `otherwise`."""

    def of(manifold: Manifold, _: Array | None, entries: Array) -> Array:
        is_free = isinstance(manifold, Euclidean)
        return otherwise[..., None, None] if is_free else total(entries, whole=isinstance(manifold, Sphere))

    return mixture.select(of, entries)


def total(x: Float[Array, "*batch n p"], whole: bool) -> Float[Array, "*batch 1 #p"]:
    """Sums over the columns, or over the whole matrices."""
    # XLA on CPU reduces over these axes up to thirty times slower than it adds slices, which it fuses with what they
    # are slices of. The rows that remain are summed by a product with ones.
    if whole:
        x = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1], 1)
    rows = x.shape[-2]
    height = rows // _SLICES
    if height < 2:
        return functools.reduce(operator.add, jnp.split(x, rows, axis=-2))
    slices = [lax.slice_in_dim(x, i * height, (i + 1) * height, axis=-2) for i in range(_SLICES)]
    result = _sum_of_rows(functools.reduce(operator.add, slices))
    if _SLICES * height < rows:
        result += _sum_of_rows(lax.slice_in_dim(x, _SLICES * height, None, axis=-2))
    return result


def _sum_of_rows(x: Array) -> Array:
    """The total over the rows, by a product with ones."""
    *batch, n, p = x.shape
    if p > 1:
        # As many rows of ones as matrices: for one, XLA on CPU would transpose x.
        return matmul(jnp.ones((*batch, 1, n), x.dtype), x)
    return jnp.swapaxes(row_totals(jnp.swapaxes(x, -2, -1)), -2, -1)


def row_totals(x: Float[Array, "*batch n p"]) -> Float[Array, "*batch n 1"]:
    """The sum of each row."""
    *batch, p = x.shape
    # Of a product with one column, XLA on CPU makes the slow sum again.
    ones = (lax.broadcasted_iota(jnp.int32, (p, 2), 1) == 0).astype(x.dtype)
    return matmul(x.reshape(math.prod(batch), p), ones)[:, :1].reshape(*batch, 1)
