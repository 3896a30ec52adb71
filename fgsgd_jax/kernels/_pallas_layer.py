"""What a Pallas kernel is told of a layer, and what it answers."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..manifolds import Euclidean, Manifold
from ._pallas_entries import Entries, Points, reciprocal_zeta


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is static: layers with the same of it, and arrays of the same shapes, share a compiled kernel.

    `grouping` says what the groups are, as in `groups._buckets.Bucket`; the codes of matrices are then below `members`
    for groups of rows, and from there on for groups of columns where there are both.
    """

    manifolds: tuple[Manifold, ...]
    grouping: str
    members: int
    nesterov: bool = False
    # Whether rows and columns have changed places since the codes were given.
    swapped: bool = False

    @property
    def has_groups(self) -> bool:
        """Whether groups are parts of rows and columns, and matrices have codes."""
        return self.grouping in ("row", "column", "row or column")

    @property
    def row_tables(self) -> int:
        """Tables of sums along rows; one of all matrices where groups are neither rows nor columns."""
        return self._tables("column" if self.swapped else "row") if self.has_groups else 1

    @property
    def column_tables(self) -> int:
        """Tables of sums along columns."""
        return self._tables("row" if self.swapped else "column") if self.has_groups else 0

    @property
    def row_codes(self) -> int:
        """The code of the first table along rows."""
        return self.members if self.swapped and self.grouping == "row or column" else 0

    @property
    def column_codes(self) -> int:
        """The code of the first table along columns."""
        return 0 if self.swapped or self.grouping != "row or column" else self.members

    def _tables(self, axis: str) -> int:
        return self.members if axis in self.grouping.split(" or ") else 0

    def direction(
        self, points: Points, t: Entries, scale: Array, m: Entries | None, rate: Array, momentum: Array, decay: Array
    ) -> tuple[Entries, Entries | None]:
        """The step's tangent vectors, from tangent parts t and 1/ζ; and the buffer, which is stored unprojected."""
        t = [[scale * each for each in row] for row in t]
        if all(isinstance(manifold, Euclidean) for manifold in self.manifolds):
            t = [[t + decay * x for t, x in zip(*rows, strict=True)] for rows in zip(t, points.x, strict=True)]
        if m is None:
            return [[rate * each for each in row] for row in t], None

        def followed(m: Entries) -> Entries:
            return [[t + momentum * m for t, m in zip(*rows, strict=True)] for rows in zip(t, m, strict=True)]

        m = followed(m)
        w = points.project(followed(m) if self.nesterov else m)
        return [[rate * each for each in row] for row in w], m

    def weigh(self, squares: Float[Array, "C D"], code: Array | None, scalars: Array) -> tuple[Array, Array]:
        """Line 6: 1/ζ of each matrix's group, 0 where the layer is refused; and the first of the figures of `Descent`.

        By masks, so that nothing is scattered and shardings stay.
        """
        usable = jnp.isfinite(jnp.sum(squares))
        squares = jnp.where(usable, squares, 0.0)
        if self.grouping == "matrix":
            own, tables = squares, [squares]
        elif not self.has_groups:
            own = jnp.sum(squares, keepdims=True)
            tables = [own]
        else:
            own, tables = jnp.zeros_like(squares), []
            axes = [(self.row_codes, self.row_tables, 1), (self.column_codes, self.column_tables, 0)]
            for index, axis in ((first + table, axis) for first, count, axis in axes for table in range(count)):
                sums = jnp.sum(jnp.where(code == index, squares, 0.0), axis=axis, keepdims=True)
                own = jnp.where(code == index, sums, own)
                tables.append(sums)
        scale = jnp.where(usable, jnp.broadcast_to(self.zeta(own, scalars)[0], squares.shape), 0.0)
        found = [self.zeta(table, scalars) for table in tables]
        above = sum(jnp.sum(own < 1, dtype=jnp.float32) for own, _ in found)
        largest = functools.reduce(jnp.maximum, (jnp.max(r) for _, r in found))
        return scale, jnp.stack([above, largest, 1.0 - usable.astype(jnp.float32)])

    def zeta(self, squares: Array, scalars: Array) -> tuple[Array, Array]:
        """1/ζ and R of groups by their R²."""
        return reciprocal_zeta(squares, scalars[2], scalars[3])


class Descent(NamedTuple):
    """A layer's displacement and momentum, and its figures in one small array.

    Those are the number of groups with ζ > 1, the largest R, 1 where the gradient was refused, and the largest ‖v‖/s.
    """

    displacement: Float[Array, "n p C D"]
    momentum: Float[Array, "n p C D"] | None
    figures: Float[Array, "4"]
