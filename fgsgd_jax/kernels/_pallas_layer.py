"""What a Pallas kernel is told of a layer, and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..manifolds import Euclidean, Manifold
from ._pallas_entries import Entries, Points, reciprocal_zeta, serves


@dataclasses.dataclass(frozen=True)
class LayerType:
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

    def serves(self, shape: tuple[int, ...], *dtypes: jnp.dtype) -> bool:
        """Whether there is arithmetic for layers [n, p, C, D] of this shape; there is none in float64."""
        n, p, *_ = shape
        narrow = all(jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16) for dtype in dtypes)
        return narrow and self.grouping != "custom" and all(serves(manifold, n, p) for manifold in self.manifolds)

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

    def weigh(
        self, squares: Float[Array, "C D"], code: Array | None, scalars: Array
    ) -> tuple[Float[Array, "C D"], Float[Array, "groups"]]:
        """Line 6: 1/ζ of each matrix's group, 0 where the layer is refused; and R² of the groups (0 of absent ones).

        By masks, so that nothing is scattered and shardings stay.
        """
        axes = {1: (self.row_codes, self.row_tables), 0: (self.column_codes, self.column_tables)}
        codes = [(first + table, axis) for axis, (first, count) in axes.items() for table in range(count)]
        if self.has_groups:
            tables = [jnp.sum(jnp.where(code == index, squares, 0.0), axis, keepdims=True) for index, axis in codes]
        else:
            tables = [squares if self.grouping == "matrix" else jnp.sum(squares, keepdims=True)]
        groups = jnp.concatenate([table.reshape(-1) for table in tables])
        scale = reciprocal_zeta(tables[0], *scalars[2:4])[0]
        for (index, _), table in zip(codes[1:], tables[1:], strict=True):
            scale = jnp.where(code == index, reciprocal_zeta(table, *scalars[2:4])[0], scale)
        usable = jnp.isfinite(jnp.sum(groups))
        return jnp.broadcast_to(jnp.where(usable, scale, 0.0), squares.shape), groups


class Descent(NamedTuple):
    """A layer's displacement and momentum, and what `figures` makes the layer's figures of.

    `measured` is these figures where the kernel has them, otherwise R² of the groups; `ratios` then has the largest
    ‖v‖/s of parts of the layer.
    """

    displacement: Float[Array, "n p C D"]
    momentum: Float[Array, "n p C D"] | None
    measured: Float[Array, "_"] | None
    ratios: Float[Array, "_"] | None = None


def figures(scalars: Array, descents: Sequence[Descent]) -> Float[Array, "layers 4"]:
    """Of layers of one shape: the numbers of groups with ζ > 1, the largest R, whether refused, and the largest ‖v‖/s.

    Together, since every kernel for a figure of one layer would be one more to launch.
    """

    def stacked(parts: Sequence[Array | None]) -> Array:
        return jnp.concatenate([part for part in parts if part is not None]).reshape(len(descents), -1)

    measured = stacked([each.measured for each in descents])
    if descents[0].ratios is None:
        return measured
    ratios = stacked([each.ratios for each in descents])
    usable = jnp.isfinite(jnp.sum(measured, axis=1))
    own, r = reciprocal_zeta(jnp.where(usable[:, None], measured, 0.0), *scalars[2:4])
    above = jnp.sum(own < 1, axis=1, dtype=jnp.float32)
    return jnp.stack([above, jnp.max(r, axis=1), (~usable).astype(jnp.float32), jnp.max(ratios, axis=1)], axis=1)
