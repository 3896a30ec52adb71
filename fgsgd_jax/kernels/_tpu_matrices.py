"""TPU: matrices beyond the small ones, by products of as many passes as each of them needs.

A TPU multiplies bfloat16, and a float32 product at full precision takes six passes. The reference takes six for every
product. Here

- the Gram matrix, which says how far y is from the manifold, is exact by four passes, since it is symmetric;
- `y (yᵀy - 1)`, which corrects y, takes one. It is as small as the deviation: an error of 2⁻⁸ of it stays below 5e-7 in
  the last turn, and what an earlier turn leaves, the next one sees in the Gram matrix;
- `x sym(xᵀw)` takes three, with an error of 2⁻¹⁷ of its terms: that of a projected gradient;
- `sym(xᵀw)` takes three for a gradient, whose length is measured. Before a step it takes one: its error is a symmetric
  matrix times x, normal to the manifold, and the polar factor removes that to first order.

Layers are not stacked. XLA compiles a kernel once for all layers of a shape, and keeps in VMEM what one layer needs.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..linalg import identity, transpose
from ..manifolds import Manifold, Stiefel
from . import _reference
from ._layers import Layer, Results, unpacked

Product = Callable[[Array, Array], Array]

# Below so many multiplications a product costs little beside moving its operands, and stacked layers are faster.
_MULTIPLICATIONS = 16**3
# The deviation of a column of the Gram matrix from which one turn is enough.
_ENOUGH = {jnp.dtype("float32"): 2.0**-13, jnp.dtype("float64"): 2.0**-27}
_MOST_TURNS = 100


def serves(manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> bool:
    """Whether this form serves `count` n×p matrices on these manifolds."""
    del count
    return n * p * min(n, p) > _MULTIPLICATIONS and any(_by_polar(manifold) for manifold in manifolds)


def tangent(manifolds: tuple[Manifold, ...], layers: Sequence[Layer]) -> Results:
    """See `_reference.tangent`."""
    return unpacked([_reference.tangent_of(_as(_Stiefel, manifolds))(layer) for layer in layers])


def step(
    manifolds: tuple[Manifold, ...], layers: Sequence[Layer], factor: Float[Array, ""], is_tangent: bool
) -> Results:
    """See `_reference.step`."""
    return unpacked([_reference.step_of(_as(_InStep, manifolds), factor, is_tangent)(layer) for layer in layers])


def _by_polar(manifold: Manifold) -> bool:
    return type(manifold) is Stiefel and manifold.retraction == "polar"


def _as(cls: type[Stiefel], manifolds: tuple[Manifold, ...]) -> tuple[Manifold, ...]:
    # Radii are those of the layers.
    return tuple(cls() if _by_polar(manifold) else manifold for manifold in manifolds)


@dataclasses.dataclass(frozen=True)
class _Stiefel(Stiefel):
    """The same manifold. Wide matrices are not transposed, which would cost a copy of each array."""

    def _project(self, x, g):
        return _tangent(x, _gram(x, g, _three_passes), g)

    def _retract(self, x, v):
        point, converged = _polar(x + v)
        # One column tells a point from zeros; to measure them all would read x once more.
        column = x[..., :1, :] if _is_wide(x) else x[..., :1]
        length = jnp.sum(jnp.square(column), axis=(-2, -1), keepdims=True)
        return jnp.where(converged, point, jnp.where(jnp.abs(length - 1) < 0.1, x, identity(x)))


@dataclasses.dataclass(frozen=True)
class _InStep(_Stiefel):
    def _project(self, x, g):
        return _tangent(x, _gram(x, g, _one_pass), g)


def _tangent(x: Array, products: Array, w: Array) -> Array:
    return w - _times(x, (products + transpose(products)) / 2, _three_passes)


def _polar(y: Float[Array, "*b n p"]) -> tuple[Float[Array, "*b n p"], Bool[Array, "*b 1 1"]]:
    """Polar factors by the iteration of `linalg.orthonormalize`, and which converged."""
    enough, along = _ENOUGH[y.dtype], -1 if _is_wide(y) else -2

    def unfinished(carry):
        _, bound, turns = carry
        return jnp.any(bound > enough) & (turns < _MOST_TURNS)

    def turn(carry):
        y, _, turns = carry
        products = _exact_gram(y)
        eye = identity(products)
        squares = jnp.sum(jnp.square(y) - 1 / y.shape[along], axis=along, keepdims=True)
        e = jnp.where(eye > 0, squares, products - eye)
        size = jnp.max(jnp.sum(jnp.abs(e), axis=-1, keepdims=True), axis=-2, keepdims=True)
        shrink = jnp.where((turns == 0) & (size > 1), 1 / (1 + size), 1)
        e = shrink * e - (1 - shrink) * eye
        bound = jnp.sqrt(jnp.max(jnp.sum(jnp.square(e), axis=-2, keepdims=True), axis=-1, keepdims=True))
        return jnp.sqrt(shrink) * (y - _times(y, e, _one_pass) / 2), bound, turns + 1

    start = jnp.full((*y.shape[:-2], 1, 1), jnp.inf, y.dtype) + 0 * y[..., :1, :1]
    y, bound, _ = lax.while_loop(unfinished, turn, (y, start, 0))
    return y, bound <= enough


def _exact_gram(y: Float[Array, "*b n p"]) -> Float[Array, "*b q q"]:
    """The smaller Gram matrix, exact to round-off."""
    if y.dtype != jnp.float32:
        return _gram(y, y, _exact)
    first = lax.reduce_precision(y, 8, 7)
    second = lax.reduce_precision(y - first, 8, 7)
    third = y - first - second
    # Behind a barrier, since XLA compiles the kernels of products for long where they make their operands.
    first, second, third = lax.optimization_barrier([part.astype(jnp.bfloat16) for part in (first, second, third)])
    crossed = _gram(first, second, _one_pass) + _gram(first, third, _one_pass)
    return _gram(first, first, _one_pass) + (_gram(second, second, _one_pass) + (crossed + transpose(crossed)))


def _gram(a: Array, b: Array, product: Product) -> Array:
    return product(a, transpose(b)) if _is_wide(a) else product(transpose(a), b)


def _times(x: Array, symmetric: Array, product: Product) -> Array:
    return product(symmetric, x) if _is_wide(x) else product(x, symmetric)


def _is_wide(x: Array) -> bool:
    return x.shape[-2] < x.shape[-1]


def _one_pass(a: Array, b: Array) -> Array:
    dtype = jnp.float32 if a.dtype == jnp.bfloat16 else a.dtype
    return jnp.matmul(a, b, precision=lax.Precision.DEFAULT, preferred_element_type=dtype)


def _three_passes(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGH)


def _exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
