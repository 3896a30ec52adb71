"""TPU and GPU: matrices beyond the small ones, by products of as many passes as each of them needs.

A TPU multiplies bfloat16, and a float32 product at full precision takes six passes; a GPU's matrix units multiply TF32,
and full precision does without them. The reference takes full precision for every product. Here

- the Gram matrix, which says how far y is from the manifold, is exact: on TPU by four passes, since it is symmetric;
- `y (yᵀy - 1)`, which corrects y, takes one. It is as small as the deviation: an error of 2⁻⁸ of it stays below 5e-7 in
  the last turn, and what an earlier turn leaves, the next one sees in the Gram matrix;
- `s = sym(xᵀw)` takes one if only the polar factor follows. Then `x s` takes two on TPU, of all of x and s in bfloat16,
  and full precision on GPU. What both round is a symmetric matrix times x, on TPU 2⁻⁸ of w at most, and normal to the
  manifold. It is no part of the tangent vector: the polar factor removes it to first order, and a length sees its
  square. The tangent part has an error of 2⁻¹⁶ of `x s`. Where others see the tangent vector, both products take the
  six passes of full precision.

On TPU all passes are products of bfloat16, and those that sum over rows of several squares go by squares. XLA unrolls
the kernel of a product in VMEM, and takes 0.1 s to compile for each thousand cycles of it: three passes in one kernel
of 768×3072 take 3 s, and whatever XLA fuses with them gives one more.

Layers are not stacked. XLA compiles a kernel once for all layers of a shape, and one layer needs less memory at a time.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..linalg import identity, matmul, symmetric, transpose
from ..manifolds import Manifold, Stiefel
from . import _reference
from ._layers import Layers, Operation, Results, by_polar, is_wide, one_by_one, times

Product = Callable[[Array, Array], Array]

# Below so many multiplications a product costs little beside moving its operands, and stacked layers are faster.
_MULTIPLICATIONS = 16**3
# Rows of a square from which on XLA compiles the kernel of a product for half a second.
_LARGE = 512
# The deviation of a column of the Gram matrix from which one turn is enough.
_ENOUGH = {jnp.dtype("float32"): 2.0**-13, jnp.dtype("float64"): 2.0**-27}
_MOST_TURNS = 100


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The form of a platform; `splits` says that it makes float32 products of bfloat16 ones, as a TPU does."""

    splits: bool

    def serves(self, manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> bool:
        """Whether this form serves `count` n×p matrices on these manifolds."""
        del count
        return n * p * min(n, p) > _MULTIPLICATIONS and any(by_polar(manifold) for manifold in manifolds)

    @functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
    def run(self, operation: Operation, layers: Sequence[Layers], factor: Float[Array, ""]) -> Results:
        """See `_reference.run`."""
        # `Mixture` sets the radii.
        own = _Stiefel(splits=self.splits, operation=operation)
        manifolds = tuple(own if by_polar(manifold) else manifold for manifold in operation.manifolds)
        operation = operation._replace(manifolds=manifolds)
        return one_by_one(lambda layer: _reference.of_layer(operation, layer, factor), layers)


TPU, GPU = Matrices(splits=True), Matrices(splits=False)


@dataclasses.dataclass(frozen=True)
class _Stiefel(Stiefel):
    """The same manifold. Wide matrices are not transposed, which would cost a copy of each array."""

    splits: bool = True
    operation: Operation = dataclasses.field(default_factory=lambda: Operation((), is_step=False))

    def _project(self, x, g):
        if self.splits and x.dtype == jnp.float32:
            count = 3 if self.operation.is_exact else 1
            parts = _split(x, max(2, count))

            def of(*own):
                return functools.reduce(operator.add, _passes(_gram, own[:count], own[count:]))

            others = _split(g, count) if self.operation.is_exact else [g.astype(jnp.bfloat16)]
            products = _over_squares(self.operation.is_shared, of, *parts[:count], *others)
            return functools.reduce(operator.sub, _passes(times, parts, _split(symmetric(products), count)), g)
        return g - times(x, symmetric(_gram(x, g, _one_pass if self.operation.is_step else matmul)))

    def _retract(self, x, v):
        by_passes = functools.partial(_gram_by_passes, self.operation.is_shared)
        point, converged = _polar(x + v, by_passes if self.splits else _exact_gram)
        # One row or column tells a point from zeros; to measure them all would read x once more.
        one = x[..., :1, :] if x.shape[-2] <= x.shape[-1] else x[..., :1]
        length = jnp.sum(jnp.square(one), axis=(-2, -1), keepdims=True)
        return jnp.where(converged, point, jnp.where(jnp.abs(length - 1) < 0.1, x, identity(x)))


def _polar(
    y: Float[Array, "*b n p"], exact_gram: Callable[[Array], Array]
) -> tuple[Float[Array, "*b n p"], Bool[Array, "*b 1 1"]]:
    """Polar factors by the turns of first order of `linalg.orthonormalize`, and which converged."""
    enough, along = _ENOUGH[y.dtype], -1 if is_wide(y) else -2

    def unfinished(carry):
        _, bound, turns = carry
        return jnp.any(bound > enough) & (turns < _MOST_TURNS)

    def turn(carry):
        y, _, turns = carry
        products = exact_gram(y)
        eye = identity(products)
        squares = jnp.sum(jnp.square(y) - 1 / y.shape[along], axis=along, keepdims=True)
        e = jnp.where(eye > 0, squares, products - eye)
        size = jnp.max(jnp.sum(jnp.abs(e), axis=-1, keepdims=True), axis=-2, keepdims=True)
        # A matrix that is shrunk is far from done by either bound; its own would read the matrix once more.
        bound = jnp.sqrt(jnp.max(jnp.sum(jnp.square(e), axis=-1, keepdims=True), axis=-2, keepdims=True))
        shrink = jnp.where((turns == 0) & (size > 1), 1 / (1 + size), 1)
        e = shrink * e - (1 - shrink) * eye
        return jnp.sqrt(shrink) * (y - times(y, e, _one_pass) / 2), bound, turns + 1

    start = jnp.full_like(y[..., :1, :1], jnp.inf)
    y, bound, _ = lax.while_loop(unfinished, turn, (y, start, 0))
    return y, bound <= enough


def _passes(
    product: Callable[[Array, Array, Product], Array], first: Sequence[Array], second: Sequence[Array]
) -> list[Array]:
    """The products of the parts of two arrays that are not lost to round-off, the largest first."""
    pairs = sorted(itertools.product(range(len(first)), range(len(second))), key=sum)
    return [product(first[i], second[j], _one_pass) for i, j in pairs if i + j < len(first)]


def _exact_gram(y: Float[Array, "*b n p"]) -> Float[Array, "*b q q"]:
    """The smaller Gram matrix, exact to round-off."""
    return _gram(y, y, matmul)


def _gram_by_passes(is_shared: bool, y: Float[Array, "*b n p"]) -> Float[Array, "*b q q"]:
    """The same by four products of bfloat16."""
    if y.dtype != jnp.float32:
        return _exact_gram(y)

    def of(first, second, third):
        crossed = _gram(first, second, _one_pass) + _gram(first, third, _one_pass)
        return _gram(first, first, _one_pass) + _gram(second, second, _one_pass), crossed

    squares, crossed = _over_squares(is_shared, of, *_split(y, 3))
    return squares + (crossed + transpose(crossed))


def _split(x: Float[Array, "*b n p"], parts: int) -> list[Array]:
    """Arrays of bfloat16 that add up to x, the largest first."""
    found = []
    for _ in range(parts):
        found.append(lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16))
        x = x - found[-1].astype(x.dtype)
    # Behind a barrier, since XLA compiles the kernels of products for long where they make their operands.
    return lax.optimization_barrier(found)


def _over_squares(is_shared: bool, of: Callable[..., Any], *arrays: Float[Array, "*b n p"]) -> Any:
    """The sum of `of` over the squares that large arrays consist of, in a loop; of others at once."""
    *_, n, p = arrays[0].shape
    along, size = (-1, n) if n < p else (-2, p)
    count, rest = divmod(max(n, p), size)
    # Parts of an array that is shared out may lie on other devices.
    if size < _LARGE or count == 1 or rest or is_shared:
        return of(*arrays)

    *others, last = arrays

    def square(i: Array | int) -> Any:
        return of(*(lax.dynamic_slice_in_dim(x, i * size, size, x.ndim + along) for x in (*others, last)))

    def zeros(part: jax.ShapeDtypeStruct) -> Array:
        # Like an array, since it may differ between devices as arrays do.
        return jnp.zeros_like(last, part.dtype, shape=part.shape)

    # From zero, or XLA compiles the kernels of the first square once more; behind a barrier, or it makes the zeros of
    # all layers at once.
    start, last = lax.optimization_barrier((jax.tree.map(zeros, jax.eval_shape(square, 0)), last))
    return lax.fori_loop(0, count, lambda i, total: jax.tree.map(jnp.add, total, square(i)), start)


def _gram(a: Array, b: Array, product: Product) -> Array:
    return product(a, transpose(b)) if is_wide(a) else product(transpose(a), b)


def _one_pass(a: Array, b: Array) -> Array:
    dtype = jnp.float32 if a.dtype == jnp.bfloat16 else a.dtype
    return jnp.matmul(a, b, precision=lax.Precision.DEFAULT, preferred_element_type=dtype)
