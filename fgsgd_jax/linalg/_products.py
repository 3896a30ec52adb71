"""Matrix products at full precision, in two layouts.

JAX multiplies float32 in TF32 on recent GPUs and in bfloat16 on TPUs unless told otherwise, which is
enough to lose a constraint in one step. Every product of the package that a constraint depends on is
one of these.
"""

import abc
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._largest import largest

# A product of so few multiplications is written out, if there are many matrices: on CPU that is faster than batched
# products. Few matrices are not worth the longer compilation.
_FEW_MULTIPLICATIONS = 128
_MANY_MATRICES = 1024


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
    """Which two axes of an array are the rows and columns of its matrices, and how those are multiplied."""

    axes: tuple[int, int]

    @abc.abstractmethod
    def take(self, x: Array) -> Array:
        """`x [*batch, n, p]` in this layout."""

    @abc.abstractmethod
    def give(self, x: Array) -> Array:
        """`x` as `[*batch, n, p]` again."""

    @abc.abstractmethod
    def join(self, parts: Iterable[Array]) -> Array:
        """The matrices of all parts, each batched in its own way, along one batch axis."""

    @abc.abstractmethod
    def part(self, x: Array, start: int, batch: tuple[int, ...]) -> Array:
        """The matrices of `x`, of one batch axis, that follow `start`, batched in the shape `batch`: undoes `join`."""

    @abc.abstractmethod
    def matmul(self, a: Array, b: Array) -> Array:
        """`a @ b` at the precision of its dtype on every backend."""

    @abc.abstractmethod
    def eye(self, g: Array) -> Array:
        """The identity in the shape of `g`, which is square."""

    @abc.abstractmethod
    def sum(self, x: Array, axis: int | None = None) -> Array:
        """The sum over the rows (0), the columns (1) or both; axes of length 1 stay."""

    @abc.abstractmethod
    def max(self, x: Array, axis: int | None = None) -> Array:
        """The maximum of non-negative entries, like `sum`."""

    def over_matrices(self, values: Array) -> Array:
        """One value for each matrix, shaped to multiply the matrices."""
        return jnp.expand_dims(values, self.axes)

    def transpose(self, a: Array) -> Array:
        """The transposed matrices."""
        return jnp.swapaxes(a, *self.axes)

    def gram(self, a: Array, b: Array) -> Array:
        """`aᵀb`."""
        return self.matmul(self.transpose(a), b)

    def _over(self, axis: int | None) -> tuple[int, ...]:
        return self.axes if axis is None else (self.axes[axis],)


class _MatricesLast(Layout):
    """The package's convention, `[*batch, n, p]`, with products by the backend."""

    def take(self, x: Array) -> Array:
        return x

    def give(self, x: Array) -> Array:
        return x

    def join(self, parts: Iterable[Array]) -> Array:
        return jnp.concatenate([part.reshape(-1, *part.shape[-2:]) for part in parts])

    def part(self, x: Array, start: int, batch: tuple[int, ...]) -> Array:
        return lax.slice_in_dim(x, start, start + math.prod(batch)).reshape(*batch, *x.shape[1:])

    def matmul(self, a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def eye(self, g: Array) -> Array:
        return jnp.broadcast_to(jnp.eye(g.shape[-1], dtype=g.dtype), g.shape)

    def sum(self, x: Array, axis: int | None = None) -> Array:
        return jnp.sum(x, axis=self._over(axis), keepdims=True)

    def max(self, x: Array, axis: int | None = None) -> Array:
        return largest(x, axis=self._over(axis), keepdims=True)


class _MatricesFirst(Layout):
    """`[n, p, *batch]`: products of small matrices are written out, each entry a vector over the batch."""

    def take(self, x: Array) -> Array:
        return jnp.moveaxis(x, (-2, -1), (0, 1))

    def give(self, x: Array) -> Array:
        return jnp.moveaxis(x, (0, 1), (-2, -1))

    def join(self, parts: Iterable[Array]) -> Array:
        return jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)

    def part(self, x: Array, start: int, batch: tuple[int, ...]) -> Array:
        return lax.slice_in_dim(x, start, start + math.prod(batch), axis=-1).reshape(*x.shape[:2], *batch)

    def matmul(self, a: Array, b: Array) -> Array:
        def entry(i: int, j: int) -> Array:
            return functools.reduce(operator.add, (a[i, k] * b[k, j] for k in range(a.shape[1])))

        return jnp.stack([jnp.stack([entry(i, j) for j in range(b.shape[1])]) for i in range(a.shape[0])])

    def eye(self, g: Array) -> Array:
        return self.take(MATRICES_LAST.eye(self.give(g)))

    def sum(self, x: Array, axis: int | None = None) -> Array:
        return self._one_by_one(operator.add, x, axis)

    def max(self, x: Array, axis: int | None = None) -> Array:
        return self._one_by_one(jnp.maximum, x, axis)

    def _one_by_one(self, pair: Callable[[Array, Array], Array], x: Array, axis: int | None) -> Array:
        # XLA on CPU reduces over leading axes far slower than it combines their few slices.
        for one in self._over(axis):
            x = functools.reduce(pair, jnp.split(x, x.shape[one], axis=one))
        return x


MATRICES_LAST = _MatricesLast((-2, -1))
MATRICES_FIRST = _MatricesFirst((0, 1))


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
