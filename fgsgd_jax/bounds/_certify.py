"""Certificates: which of Proposition 1's statements hold for the weights as they are."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from ..groups import Collection, Plan, checked_leaves
from ..linalg import Interval, enclosed_frobenius, enclosed_spectral, enclosed_two_to_one
from ._layers import LayerStack, concatenations
from ._unit_norms import Norms

_SHOWN = 20


class Statement(NamedTuple):
    """Whether a norm is at most `limit`, for every group of a layer; it lies between `lower` and `upper`."""

    lower: Float64[np.ndarray, " groups"]
    upper: Float64[np.ndarray, " groups"]
    limit: float

    @property
    def holds(self) -> Bool[np.ndarray, " groups"]:
        """Where the statement is certain."""
        return self.upper <= self.limit

    @property
    def violated(self) -> Bool[np.ndarray, " groups"]:
        """Where its negation is certain. Neither is where the limit lies within the round-off of float64."""
        return self.lower > self.limit

    @property
    def margin(self) -> Float64[np.ndarray, " groups"]:
        """What certainly is left to the limit; negative where the statement is not certain."""
        return np.nextafter(self.limit - self.upper, -np.inf)


class Violation(NamedTuple):
    """A group whose norm could not be certified."""

    path: str
    group: int
    manifold: str
    norm: str
    """`frobenius`, `spectral` or `two_to_one`"""
    lower: float
    upper: float
    limit: float

    @property
    def certain(self) -> bool:
        """False where the limit lies between `lower` and `upper`."""
        return self.lower > self.limit

    def __str__(self) -> str:
        where = f"{self.upper - self.limit:.2g} above" if self.certain else "at the round-off of"
        name = f"{self.path} group {self.group} ({self.manifold})"
        return f"{name}: {self.norm} norm {self.upper:.6g}, {where} the limit"


class Certificate(NamedTuple):
    """The statements of all groups, by path, and what does not hold."""

    statements: dict[str, Norms]
    """of each path, a `Statement` for each norm"""
    manifolds: dict[str, tuple[str, ...]]
    """of each path, the name of the manifold of each group"""

    @property
    def holds(self) -> bool:
        """Whether every statement is certain for every group."""
        return all(bool(statement.holds.all()) for norms in self.statements.values() for statement in norms)

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return sum(len(norms.frobenius.upper) for norms in self.statements.values())

    def violations(self) -> Iterator[Violation]:
        """Every statement that is not certain, one by one."""
        for path, norms in self.statements.items():
            for name, statement in norms._asdict().items():
                for group in np.flatnonzero(~statement.holds):
                    yield Violation(
                        path,
                        int(group),
                        self.manifolds[path][group],
                        name,
                        float(statement.lower[group]),
                        float(statement.upper[group]),
                        statement.limit,
                    )

    def __str__(self) -> str:
        lines = []
        for name in Norms._fields:
            found = [getattr(norms, name) for norms in self.statements.values()]
            held = sum(int(statement.holds.sum()) for statement in found)
            margin = min((float(statement.margin.min()) for statement in found), default=np.inf)
            lines.append(f"{name} norm: {held} of {self.groups} groups certified, least margin {margin:.3g}")
        named = [str(violation) for violation, _ in zip(self.violations(), range(_SHOWN + 1), strict=False)]
        lines += [f"  {line}" for line in named[:_SHOWN]] + (["  …"] if len(named) > _SHOWN else [])
        return "\n".join(lines)


def certify(params: Any, plan: Plan, tolerance: float = 0.0) -> Certificate:
    """Certifies, group by group, that the Frobenius, the spectral and the 2→1 norm are at most 1.

    That is what Proposition 1 claims of groups of rescaled weights. It follows from the manifolds alone for `PO` with
    λ ≥ 1, and for `PI` where m·H_out·W_out ≥ A·B or with Glorot's γ; not for `Whole`, nor for a Euclidean member, nor
    for a whole layer; and the geometric mean of Remark 1 is a lower bound and certifies nothing. So the weights
    themselves are measured, concatenated as in `norms`, in float64 with all roundings accounted for: what is
    certified is true of the exact norms of the numbers stored, and what is not is named.

    Rounded arithmetic cannot tell a norm of exactly 1 from one that is larger by round-off, and weights that should
    have norm 1 have it only to the round-off of their dtype. Give that as `tolerance`.

    Args:
      params: the parameters, concrete arrays: this is not for use inside jit.
      plan: the plan of these parameters. Weights without a collection have no groups and are left out.
      tolerance: the limit is 1 + tolerance.

    Returns:
      The certificate: print it, or read its `statements` and `violations()`.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 4, Tables 1 and 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((3, 3, 4, 6))}
      >>> plan = fg.plan(params, [("kernel", fg.PO([fg.Stiefel()]))])
      >>> params = fg.initialize(jax.random.key(0), params, plan)
      >>> fg.certify(params, plan).holds
      True
      >>> params["kernel"] = params["kernel"].at[..., 5].multiply(2)
      >>> print(fg.certify(params, plan))
      frobenius norm: 6 of 6 groups certified, least margin 0.27
      spectral norm: 6 of 6 groups certified, least margin 0.578
      two_to_one norm: 5 of 6 groups certified, least margin -0.265
        kernel group 5 (Stiefel): two_to_one norm 1.26491, 0.26 above the limit
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r}: write a number ≥ 0")
    leaves = checked_leaves(params, plan)
    statements, manifolds = {}, {}
    for bucket in plan.buckets:
        stack = LayerStack(bucket, tuple(plan.collections[path] for path in bucket.paths))
        found = _enclosed(stack, [np.asarray(leaves[path]).astype(np.float64) for path in bucket.paths])
        for index, path in enumerate(bucket.paths):
            statements[path] = Norms(
                *(Statement(lower[index], upper[index], 1.0 + tolerance) for lower, upper in found)
            )
            manifolds[path] = _names(plan.collections[path])
    return Certificate(
        {path: statements[path] for path in plan.collections}, {path: manifolds[path] for path in plan.collections}
    )


def _enclosed(stack: LayerStack, tensors: list[np.ndarray]) -> list[Interval]:
    """Intervals of the three norms, each `[paths, groups]`."""
    view, count = stack.bucket.view, len(tensors)
    *_, rows, columns = view.grid
    grids = [view.split(tensor) for tensor in tensors]
    matrices = np.concatenate([np.stack(grids).reshape(-1, rows, columns), np.zeros((1, rows, columns))])
    result = [Interval(*np.zeros((2, count * stack.bucket.num_groups))) for _ in Norms._fields]
    for numbers, members in concatenations(stack):
        side_by_side = np.moveaxis(matrices[members], -3, -2).reshape(len(members), rows, -1)
        for interval, of in zip(result, (enclosed_frobenius, enclosed_spectral, enclosed_two_to_one), strict=True):
            interval.lower[numbers], interval.upper[numbers] = of(side_by_side)
    return [Interval(*(bound.reshape(count, -1) for bound in interval)) for interval in result]


def _names(collection: Collection) -> tuple[str, ...]:
    """The manifold of each group."""
    member = np.zeros(collection.num_groups, int)
    member[collection.group] = collection.member
    return tuple(type(collection.manifolds[index]).__name__ for index in member)
