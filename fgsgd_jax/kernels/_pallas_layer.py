"""What the Pallas kernels are told of a parameter, and what they answer."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..manifolds import Euclidean, Manifold
from ._pallas_entries import Entries, Points, mapped, unserved


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
        return self.column_tables if self.swapped else 0

    @property
    def column_codes(self) -> int:
        """The code of the first table along columns."""
        return 0 if self.swapped else self.row_tables

    def _tables(self, axis: str) -> int:
        return self.members if axis in self.grouping.split(" or ") else 0

    def unserved(self, n: int, p: int, *dtypes: jnp.dtype) -> str | None:
        """Why there is no arithmetic for n×p matrices of these dtypes; None if there is. There is none in float64."""
        for dtype in dtypes:
            if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
                return f"the kernels take float32 and bfloat16, not {jnp.dtype(dtype).name}"
        return next((why for manifold in self.manifolds if (why := unserved(manifold, n, p))), None)

    def direction(
        self, points: Points, t: Entries, scale: Array, m: Entries | None, rate: Array, momentum: Array, decay: Array
    ) -> tuple[Entries, Entries | None]:
        """The step's tangent vectors, from tangent parts t and 1/ζ; and the buffer, which is stored unprojected."""
        t = mapped(lambda t: scale * t, t)
        if all(isinstance(manifold, Euclidean) for manifold in self.manifolds):
            t = mapped(lambda t, x: t + decay * x, t, points.x)
        w, followed = t, functools.partial(mapped, lambda t, m: t + momentum * m, t)
        if m is not None:
            m = followed(m)
            w = points.project(followed(m) if self.nesterov else m)
        return mapped(lambda w: rate * w, w), m


class Planes(NamedTuple):
    """The arrays of one parameter: tensors entry by entry, and a value for each matrix.

    Points, gradients, momentum (None: there is none), kinds as in `Mixture` (None: there is one manifold), radii, those
    of the points to reach (None: the same), and the codes of the matrices' groups as in `groups.groups_of`
    (None: their places are enough).
    """

    x: Float[Array, "*layers n p C D"]
    g: Float[Array, "*layers n p C D"]
    m: Float[Array, "*layers n p C D"] | None
    kind: Int[Array, "*layers C D"] | None
    radius: Float[Array, "*layers C D"]
    new_radius: Float[Array, "*layers C D"] | None = None
    code: Int[Array, "*layers C D"] | None = None

    def present(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}


class Moved(NamedTuple):
    """Displacements and momentum, and the largest ‖v‖/s of parts of the parameter."""

    displacement: Float[Array, "*layers n p C D"]
    momentum: Float[Array, "*layers n p C D"] | None
    ratios: Float[Array, "_"]


class Descended(NamedTuple):
    """Displacements and momentum, and the parameter's figures.

    These are the number of groups with ζ > 1, the largest R, whether the gradient is refused, and the largest ‖v‖/s.
    """

    displacement: Float[Array, "n p C D"]
    momentum: Float[Array, "n p C D"] | None
    figures: Float[Array, "4"]
