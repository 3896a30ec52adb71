"""Matrix products at full precision, in the layouts in which they are fast.

JAX multiplies float32 in TF32 on recent GPUs and in bfloat16 on TPUs unless told otherwise, which is
enough to lose a constraint in one step. Every product of the package that a constraint depends on is
one of these.
"""

import abc
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout as MemoryLayout, with_layout_constraint
from jaxtyping import Array, Float

from ._largest import largest

# Matrices whose products take so few multiplications are multiplied side by side, if there are many: on CPU that is
# faster than batched products, unless they are longer. Few matrices are not worth the longer compilation.
_FEW_MULTIPLICATIONS, _LONGEST = 768, 32
_MANY_MATRICES = 1024
# So many numbers of each entry lie together, that the entries of a few matrices' worth of lanes stay in a core's L1
# cache, and that a loop over them is worth starting.
_LANES, _FEWEST_LANES = 256, 64
# The entries of a matrix whose transposition costs more than it saves: in a batch, and of any.
_LARGE, _LARGER = 2**17, 2**19
# Numbers below each other in rows of so many are in different parts of the cache.
_FAR_APART = 64
# On CPU arrays of so many entries of blocks, as of 16 blocks of 3×3 matrices, stay in a core's L2 cache together.
_ENTRIES = 144
# Fewer blocks are not worth a turn of the loop over them.
_FEWEST_BLOCKS = 4
# So many numbers of larger matrices do, in each of the arrays of a step; fewer than so many do all together.
_NUMBERS, _FEW_NUMBERS = 2**16, 2**20


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
    def take_kept(self, x: Array) -> Array:
        """What `take` makes of matrices of which `keep` made `x`."""

    @abc.abstractmethod
    def keep_given(self, x: Array) -> Array:
        """What `keep` makes of the matrices that `give` makes of `x`."""

    @abc.abstractmethod
    def take_part(self, x: Array, start: Array, count: int) -> Array:
        """`take_kept` of so many of the matrices from `start` on, computed once."""

    @abc.abstractmethod
    def put_part(self, x: Array, part: Array, start: Array) -> Array:
        """`x` with a new `part` in the place of what `take_part` takes."""

    @abc.abstractmethod
    def take_values(self, values: Array) -> Array:
        """One value for each matrix `[*batch]`, shaped to multiply the matrices in this layout."""

    @abc.abstractmethod
    def give_values(self, values: Array) -> Array:
        """Undoes `take_values`."""

    @abc.abstractmethod
    def of_part(self, count: int) -> "Layout":
        """The same layout for so many of the matrices."""

    @abc.abstractmethod
    def join(self, parts: Sequence[Array]) -> Array:
        """The matrices of all parts `[*batch, n, p]`, each batched in its own way, along one batch axis.

        Where they are fewer than in the layout, the first ones follow again.
        """

    @abc.abstractmethod
    def split(self, x: Array, batches: Iterable[tuple[int, ...]]) -> list[Array]:
        """The matrices `[count, n, p]` in parts batched in these ways: undoes `join`."""

    @abc.abstractmethod
    def keep(self, x: Array) -> Array:
        """Matrices `[*batch, n, p]` in the order that they have in memory, where they come from kernels."""

    @abc.abstractmethod
    def kept(self, x: Array) -> Array:
        """Undoes `keep`."""

    @abc.abstractmethod
    def matmul(self, a: Array, b: Array) -> Array:
        """`a @ b` at the precision of its dtype on every backend."""

    @abc.abstractmethod
    def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, compiled so that its results are computed once, whatever uses them."""

    @abc.abstractmethod
    def sum(self, x: Array, axis: int | None = None) -> Array:
        """The sum over the rows (0), the columns (1) or both; axes of length 1 stay."""

    @abc.abstractmethod
    def max(self, x: Array, axis: int | None = None) -> Array:
        """The maximum of non-negative entries, like `sum`."""

    def eye(self, x: Array) -> Array:
        """Identity matrices of the size of those of `x`, against which they broadcast."""
        shape = [1] * x.ndim
        for axis in self.axes:
            shape[axis] = x.shape[axis]
        rows, cols = (lax.broadcasted_iota(jnp.int32, shape, x.ndim + axis) for axis in self.axes)
        return (rows == cols).astype(x.dtype)

    def transpose(self, a: Array) -> Array:
        """The transposed matrices."""
        return jnp.swapaxes(a, *self.axes)

    def gram(self, a: Array, b: Array) -> Array:
        """`aᵀb`."""
        return self.matmul(self.transpose(a), b)

    def symmetric(self, a: Array) -> Array:
        """Symmetric part, `(a + aᵀ)/2`."""
        return (a + self.transpose(a)) / 2

    def _over(self, axis: int | None) -> tuple[int, ...]:
        return self.axes if axis is None else (self.axes[axis],)


class _MatricesLast(Layout):
    """The package's convention, `[*batch, n, p]`, with products by the backend."""

    axes = (-2, -1)

    def take(self, x: Array) -> Array:
        return x

    def give(self, x: Array) -> Array:
        return x

    def take_kept(self, x: Array) -> Array:
        return x

    def keep_given(self, x: Array) -> Array:
        return x

    def take_part(self, x: Array, start: Array, count: int) -> Array:
        # Else XLA on CPU takes the part anew where it is transposed, five times as slowly.
        return _alone(lambda x, start: lax.dynamic_slice_in_dim(x, start, count), x, start)

    def put_part(self, x: Array, part: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, part, start, 0)

    def take_values(self, values: Array) -> Array:
        return values[..., None, None]

    def give_values(self, values: Array) -> Array:
        return values[..., 0, 0]

    def of_part(self, count: int) -> Layout:
        return self

    def join(self, parts: Sequence[Array]) -> Array:
        return jnp.concatenate([part.reshape(-1, *part.shape[-2:]) for part in parts])

    def split(self, x: Array, batches: Iterable[tuple[int, ...]]) -> list[Array]:
        parts, start = [], 0
        for batch in batches:
            end = start + math.prod(batch)
            parts.append(lax.slice_in_dim(x, start, end).reshape(*batch, *x.shape[1:]))
            start = end
        return parts

    def keep(self, x: Array) -> Array:
        return x

    def kept(self, x: Array) -> Array:
        return x

    def matmul(self, a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        # The backend's products are never computed twice.
        return function(*args)

    def gram(self, a: Array, b: Array) -> Array:
        if a.shape[-2] * a.shape[-1] > _LARGER:
            # Else XLA on CPU copies the transposed matrix where there is only one.
            return jnp.einsum("...kn,...kp->...np", a, b, precision=lax.Precision.HIGHEST)
        if math.prod(a.shape[:-2]) == 1 or a.shape[-2] * a.shape[-1] > _LARGE:
            return super().gram(a, b)

        def transposed_first(a, b):
            # XLA on CPU multiplies batches of transposed small matrices at half the speed.
            return self.matmul(lax.optimization_barrier(self.transpose(a)), b)

        return lax.platform_dependent(a, b, cpu=transposed_first, default=super().gram)

    def symmetric(self, a: Array) -> Array:
        if a.shape[-1] < _FAR_APART:
            return super().symmetric(a)

        def transposed_first(a):
            # XLA on CPU takes three times as long to add entries that are far apart.
            return (a + _row_major(self.transpose(a))) / 2

        return lax.platform_dependent(a, cpu=transposed_first, default=super().symmetric)

    def sum(self, x: Array, axis: int | None = None) -> Array:
        if axis is None:
            # Over one axis, in which the entries lie together: XLA on CPU takes much longer over two.
            return jnp.sum(x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]), axis=-1)[..., None, None]
        return jnp.sum(x, axis=self._over(axis), keepdims=True)

    def max(self, x: Array, axis: int | None = None) -> Array:
        return largest(x, axis=self._over(axis), keepdims=True)


class _TransposesLast(_MatricesLast):
    """`[*batch, p, n]`: arithmetic on the transposes of matrices that are wider than tall, which are nowhere formed."""

    axes = (-1, -2)

    def matmul(self, a: Array, b: Array) -> Array:
        return super().matmul(b, a)

    def gram(self, a: Array, b: Array) -> Array:
        return jnp.einsum("...pk,...nk->...pn", b, a, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class _LanesLast(Layout):
    """`[*blocks, n, p, lanes]`: products of small matrices as sums of outer products, each over many matrices at once.

    XLA on CPU compiles a sum of outer products of slices to one loop without branches, which reads each block from the
    cache; entries that are computed one by one and stacked become a loop each, over the whole array. `transposed` says
    that `take` and `give` transpose the matrices; those that are kept never are.
    """

    batch: tuple[int, ...]
    transposed: bool = False
    axes = (-3, -2)

    def take(self, x: Array) -> Array:
        return self._taken(jnp.swapaxes(x, -2, -1) if self.transposed else x)

    def give(self, x: Array) -> Array:
        x = self._given(x)
        return jnp.swapaxes(x, -2, -1) if self.transposed else x

    def take_kept(self, x: Array) -> Array:
        if len(self.batch) > 1:
            return self._taken(self.kept(x))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, self._lanes), 2, 0)

    def keep_given(self, x: Array) -> Array:
        if len(self.batch) > 1:
            return self.keep(self._given(x))
        return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1)

    def take_part(self, x: Array, start: Array, count: int) -> Array:
        part = self.of_part(count)
        return part.apart(lambda x, start: part.take_kept(lax.dynamic_slice_in_dim(x, start, count, axis=-1)), x, start)

    def put_part(self, x: Array, part: Array, start: Array) -> Array:
        count = part.shape[0] * part.shape[-1]
        own = self.of_part(count).apart(self.of_part(count).keep_given, part)
        return lax.dynamic_update_slice_in_dim(x, own, start, axis=-1)

    def take_values(self, values: Array) -> Array:
        return self._blocks(values, 0)[..., None, None, :]

    def give_values(self, values: Array) -> Array:
        return self._whole(values[..., 0, 0, :], 0)

    def of_part(self, count: int) -> Layout:
        return dataclasses.replace(self, batch=(count,))

    def join(self, parts: Sequence[Array]) -> Array:
        entries = [jnp.moveaxis(part, (-2, -1), (0, 1)).reshape(*part.shape[-2:], -1) for part in parts]
        return self.kept(jnp.concatenate([*entries, *repeated(entries, *self.batch)], axis=-1))

    def split(self, x: Array, batches: Iterable[tuple[int, ...]]) -> list[Array]:
        entries, batches = self.keep(x), list(batches)
        sizes = [math.prod(batch) for batch in batches]
        starts = list(itertools.accumulate(sizes[:-1], initial=0))

        def split(entries, starts):
            own = zip(starts, sizes, strict=True)
            return [lax.dynamic_slice_in_dim(entries, start, size, axis=-1) for start, size in own]

        def split_at_run_time(entries):
            # XLA on CPU compiles a kernel for each part whose start it knows, and else one for each size.
            return split(entries, _alone(lambda one: [start * one for start in starts], jnp.ones((), jnp.uint32)))

        parts = lax.platform_dependent(entries, cpu=split_at_run_time, default=functools.partial(split, starts=starts))
        parts = [part.reshape(*entries.shape[:2], *batch) for part, batch in zip(parts, batches, strict=True)]
        return [jnp.moveaxis(part, (0, 1), (-2, -1)) for part in parts]

    def keep(self, x: Array) -> Array:
        # Entry by entry: to form blocks costs nothing in the cache, but a pass over the memory for a whole network.
        return jnp.moveaxis(x, (-2, -1), (0, 1))

    def kept(self, x: Array) -> Array:
        return jnp.moveaxis(x, (0, 1), (-2, -1))

    def matmul(self, a: Array, b: Array) -> Array:
        inner = range(a.shape[-2])
        return functools.reduce(operator.add, (a[..., k, None, :] * b[..., None, k, :, :] for k in inner))

    def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        def in_order(*args):
            # Else blocks would stay transposed in memory, to be formed again for each of their uses.
            return jax.tree.map(_row_major, function(*args)) if len(self.batch) == 1 else function(*args)

        return lax.platform_dependent(*args, cpu=functools.partial(_alone, in_order), default=function)

    def sum(self, x: Array, axis: int | None = None) -> Array:
        return self._one_by_one(operator.add, x, axis)

    def max(self, x: Array, axis: int | None = None) -> Array:
        return self._one_by_one(jnp.maximum, x, axis)

    def _one_by_one(self, pair: Callable[[Array, Array], Array], x: Array, axis: int | None) -> Array:
        # XLA on CPU reduces over leading axes far slower than it combines their few slices.
        for one in self._over(axis):
            x = functools.reduce(pair, jnp.split(x, x.shape[one], axis=one))
        return x

    def _taken(self, x: Array) -> Array:
        return jnp.moveaxis(self._blocks(x, 2), (-3, -2, -1), (-1, -3, -2))

    def _given(self, x: Array) -> Array:
        return self._whole(jnp.moveaxis(x, (-1, -3, -2), (-3, -2, -1)), 2)

    @property
    def _lanes(self) -> int:
        """Of one batch axis: as many as divide it well, else all."""
        (count,) = self.batch
        return next((n for n in range(_LANES, _FEWEST_LANES - 1, -1) if count % n == 0), count)

    @property
    def _longest(self) -> int:
        """The batch axis that becomes the lanes where there are several: they may be sharded, and stay apart."""
        return max(range(len(self.batch)), key=self.batch.__getitem__)

    def _blocks(self, x: Array, behind: int) -> Array:
        if len(self.batch) == 1:
            return x.reshape(-1, self._lanes, *x.shape[1:])
        return jnp.moveaxis(x, self._longest, -1 - behind)

    def _whole(self, x: Array, behind: int) -> Array:
        if len(self.batch) == 1:
            return x.reshape(-1, *x.shape[2:])
        return jnp.moveaxis(x, -1 - behind, self._longest)


MATRICES_LAST, _TRANSPOSES_LAST = _MatricesLast(), _TransposesLast()


def _alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, compiled for itself: a branch of which the compiler does not see that it is always taken."""
    results = jax.eval_shape(function, *args)

    def zeros(*args):
        # Made of the arguments, so that in `shard_map` they differ between devices where those do.
        numbers = [0 * leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(args)]
        nothing = functools.reduce(operator.add, numbers)
        return jax.tree.map(lambda result: jnp.broadcast_to(nothing.astype(result.dtype), result.shape), results)

    return lax.cond(lax.optimization_barrier(jnp.ones((), bool)), function, zeros, *args)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, MemoryLayout(tuple(range(x.ndim))))


def layout_for(shape: tuple[int, ...]) -> Layout:
    """The layout in which arithmetic on matrices of `shape` [*batch, n, p] is fastest."""
    *batch, n, p = shape
    few = few_multiplications(shape) and min(n, p) > 0 and max(n, p) <= _LONGEST
    return _LanesLast(tuple(batch)) if few and math.prod(batch) >= _MANY_MATRICES else MATRICES_LAST


def few_multiplications(shape: tuple[int, ...]) -> bool:
    """Whether products of matrices of `shape` [*batch, n, p] cost little beside moving them."""
    *_, n, p = shape
    return n * p * min(n, p) <= _FEW_MULTIPLICATIONS


def upright_layout_for(shape: tuple[int, ...]) -> Layout:
    """The same of those matrices or, where they are wider than tall, of their transposes."""
    *batch, n, p = shape
    layout = layout_for((*batch, max(n, p), min(n, p)))
    if n >= p:
        return layout
    return dataclasses.replace(layout, transposed=True) if isinstance(layout, _LanesLast) else _TRANSPOSES_LAST


def filled_up(shape: tuple[int, int, int]) -> int:
    """The number of matrices at which a batch of `shape` [count, n, p], or a little longer, is handled fastest."""
    if layout_for(shape) is MATRICES_LAST:
        return shape[0]
    blocks = -(-shape[0] // _LANES)
    chunks = _fewest_chunks(shape)
    return -(-blocks // chunks) * chunks * _LANES


def chunks_of(shape: tuple[int, ...]) -> int:
    """Into how many equal parts to divide matrices of `shape` [count, n, p], so that each stays in the cache.

    1 if no number does well, and for more than one batch axis: those may be sharded.
    """
    *batch, n, p = shape
    if len(batch) != 1:
        return 1
    (count,) = batch
    if layout_for(shape) is MATRICES_LAST:
        if count * n * p <= _FEW_NUMBERS:
            return 1
        most = max(1, _NUMBERS // (n * p))
        return next((count // size for size in range(most, most // 2, -1) if count % size == 0), 1)
    fewest = _fewest_chunks((count, n, p))
    return next((chunks for chunks in range(fewest, 2 * fewest) if count % (chunks * _LANES) == 0), 1)


def _fewest_chunks(shape: tuple[int, int, int]) -> int:
    count, n, p = shape
    return -(-count // (_LANES * max(_FEWEST_BLOCKS, _ENTRIES // (n * p))))


def repeated(parts: Iterable[Array], count: int) -> Iterator[Array]:
    """The first of the parts, cut along the last axis to what they lack in `count`."""
    parts = list(parts)
    missing = count - sum(part.shape[-1] for part in parts)
    while missing:
        for part in parts:
            yield part[..., :missing]
            missing -= min(missing, part.shape[-1])


def matmul(a: Float[Array, "*batch n k"], b: Float[Array, "*batch k p"]) -> Float[Array, "*batch n p"]:
    """`a @ b` at the precision of its dtype on every backend."""
    layout = _layout_of_product(a.shape[:-2], b.shape[:-2], a.shape[-2], a.shape[-1], b.shape[-1])
    return layout.give(layout.matmul(layout.take(a), layout.take(b)))


def gram(a: Float[Array, "*batch n p"], b: Float[Array, "*batch n q"]) -> Float[Array, "*batch p q"]:
    """`aᵀb` at the precision of its dtype on every backend."""
    layout = _layout_of_product(a.shape[:-2], b.shape[:-2], a.shape[-1], a.shape[-2], b.shape[-1])
    return layout.give(layout.gram(layout.take(a), layout.take(b)))


def _layout_of_product(a: tuple[int, ...], b: tuple[int, ...], n: int, k: int, p: int) -> Layout:
    """The layout for `n×k @ k×p` in batches of the shapes `a` and `b`."""
    if a != b or n * k * p > _FEW_MULTIPLICATIONS:
        return MATRICES_LAST
    return layout_for((*a, n, k) if n * min(n, k) > p * min(p, k) else (*a, k, p))
