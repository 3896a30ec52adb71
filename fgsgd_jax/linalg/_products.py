"""Matrix products at full precision, in two layouts.

JAX multiplies float32 in TF32 on recent GPUs and in bfloat16 on TPUs unless told otherwise, which is
enough to lose a constraint in one step. Every product of the package that a constraint depends on is
one of these.
"""

import dataclasses
import functools
import math
import operator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._largest import largest

# A product of so few multiplications is written out, if there are many matrices: beside batched products on CPU that
# was 3.5 times faster for 190,000 3×3 matrices. Few matrices are not worth the longer compilation.
_FEW_MULTIPLICATIONS = 128
_MANY_MATRICES = 1024


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which two axes of an array are the rows and columns of its matrices, and how those are multiplied.

    `MATRICES_LAST` is the package's convention, `[*batch, n, p]`, with products by the backend. `MATRICES_FIRST`,
    `[n, p, *batch]`, writes products of small matrices out entry by entry, each entry a vector over the batch.
    """

    axes: tuple[int, int]

    def take(self, x: Array) -> Array:
        """`x [*batch, n, p]` in this layout."""
        return x if self.axes == (-2, -1) else jnp.moveaxis(x, (-2, -1), self.axes)

    def give(self, x: Array) -> Array:
        """`x` as `[*batch, n, p]` again."""
        return x if self.axes == (-2, -1) else jnp.moveaxis(x, self.axes, (-2, -1))

    def over_matrices(self, values: Array) -> Array:
        """One value for each matrix, shaped to multiply the matrices."""
        return jnp.expand_dims(values, self.axes)

    def transpose(self, a: Array) -> Array:
        """The transposed matrices."""
        return jnp.swapaxes(a, *self.axes)

    def matmul(self, a: Array, b: Array) -> Array:
        """`a @ b` at the precision of its dtype on every backend."""
        if self.axes == (-2, -1):
            return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

        def entry(i: int, j: int) -> Array:
            return functools.reduce(operator.add, (a[i, k] * b[k, j] for k in range(a.shape[1])))

        return jnp.stack([jnp.stack([entry(i, j) for j in range(b.shape[1])]) for i in range(a.shape[0])])

    def gram(self, a: Array, b: Array) -> Array:
        """`aᵀb`."""
        return self.matmul(self.transpose(a), b)

    def eye(self, g: Array) -> Array:
        """The identity in the shape of `g`, which is square."""
        return jnp.broadcast_to(
            jnp.expand_dims(jnp.eye(g.shape[0 if self.axes == (0, 1) else -1], dtype=g.dtype), self._batch_axes(g)),
            g.shape,
        )

    def sum(self, x: Array, axis: int | None = None) -> Array:
        """The sum over the rows (0), the columns (1) or both; axes of length 1 stay."""
        return self._reduce(jnp.sum, operator.add, x, axis)

    def max(self, x: Array, axis: int | None = None) -> Array:
        """The maximum of non-negative entries, like `sum`."""
        return self._reduce(largest, jnp.maximum, x, axis)

    def _reduce(self, whole, pair, x: Array, axis: int | None) -> Array:
        axes = self.axes if axis is None else (self.axes[axis],)
        if self.axes == (-2, -1):
            return whole(x, axis=axes, keepdims=True)
        # XLA on CPU reduces over leading axes 80 times slower than it adds their few slices.
        for one in axes:
            x = functools.reduce(pair, jnp.split(x, x.shape[one], axis=one))
        return x

    def _batch_axes(self, g: Array) -> tuple[int, ...]:
        return tuple(range(g.ndim - 2)) if self.axes == (-2, -1) else tuple(range(2, g.ndim))


MATRICES_LAST = Layout((-2, -1))
MATRICES_FIRST = Layout((0, 1))


def layout_for(shape: tuple[int, ...]) -> Layout:
    """The layout in which arithmetic on matrices of `shape` [*batch, n, p] is fastest."""
    *batch, n, p = shape
    few = 0 < n * p * min(n, p) <= _FEW_MULTIPLICATIONS
    return MATRICES_FIRST if few and math.prod(batch) >= _MANY_MATRICES else MATRICES_LAST


def matmul(a: Float[Array, "*batch n k"], b: Float[Array, "*batch k p"]) -> Float[Array, "*batch n p"]:
    """`a @ b` at the precision of its dtype on every backend."""
    layout = MATRICES_LAST
    if a.ndim == b.ndim and a.shape[-2] * a.shape[-1] * b.shape[-1] <= _FEW_MULTIPLICATIONS:
        layout = layout_for(max(a.shape, b.shape, key=math.prod))
    return layout.give(layout.matmul(layout.take(a), layout.take(b)))


def gram(a: Float[Array, "*batch n p"], b: Float[Array, "*batch n q"]) -> Float[Array, "*batch p q"]:
    """`aᵀb` at the precision of its dtype on every backend."""
    return matmul(jnp.swapaxes(a, -1, -2), b)


def sym(a: Float[Array, "*batch p p"]) -> Float[Array, "*batch p p"]:
    """Symmetric part, `(a + aᵀ)/2`."""
    return (a + jnp.swapaxes(a, -1, -2)) / 2
