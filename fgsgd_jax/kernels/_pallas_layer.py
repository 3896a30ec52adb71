"""What a Pallas kernel is told of a layer, and what it answers."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float

from ..manifolds import Euclidean, Manifold
from ._pallas_entries import Entries, Points


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

    @property
    def row_tables(self) -> int:
        """Tables of sums along rows. Where groups are neither rows nor columns, one of all matrices is wanted anyway."""
        return {"row": self.members, "row or column": self.members, "column": 0}.get(self.grouping, 1)

    @property
    def column_tables(self) -> int:
        """Tables of sums along columns."""
        return self.members if self.grouping in ("column", "row or column") else 0

    @property
    def row_codes(self) -> int:
        """The first code of a group of columns."""
        return self.members if self.grouping == "row or column" else 0

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


class Descent(NamedTuple):
    """A layer's displacement and momentum, and its figures in one small array.

    Those are the number of groups with ζ > 1, the largest R, the largest ‖v‖/s, and 1 where the gradient was refused.
    """

    displacement: Float[Array, "n p C D"]
    momentum: Float[Array, "n p C D"] | None
    figures: Float[Array, "4"]
