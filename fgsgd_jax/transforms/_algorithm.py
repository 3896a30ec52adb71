"""Algorithm 1 of the paper, line by line, on the constrained weights of a plan.

Points and directions are tensors by bucket, of each parameter or of all: see `to_buckets`. What belongs to a matrix is
a stack for each bucket, [paths, *layers, inputs, outputs]. Figures of parameters follow the buckets.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from .. import kernels
from ..groups import Bucket, Plan, Stacks, automatic, with_radius
from ..linalg import compute_dtype, largest, squared_norm
from ..manifolds import Mixture, Steepest
from ._states import ByPath, Refused

Scalar = float | Float[Array, ""]

# Of each bucket the tensors of its parameters, or one tensor [paths, *shape] of them all.
Tensors = tuple[tuple[Array, ...], ...]


class Projected(NamedTuple):
    """Line 5: the tangent vectors, the squared norm of every matrix, and which parameters are refused.

    The squared norms of a refused parameter are NaN.
    """

    tangents: Tensors
    squares: Stacks
    refused: Bool[Array, "paths"]


class Normalized(NamedTuple):
    """Line 6: 1/ζ of every matrix, and for each parameter the share of groups with ζ > 1 and the largest R."""

    inverse_zeta: Stacks
    zeta_share: Float[Array, "paths"]
    grad_norm: Float[Array, "paths"]


class Options(NamedTuple):
    """The numbers of a step: minus the learning rate, μ (0 without momentum), ρ, c, and the weight decay."""

    factor: Scalar
    momentum: Scalar
    rho: Scalar
    curvature: Scalar
    weight_decay: Scalar


class Step(NamedTuple):
    """What lines 5 to 7 are given of a plan's weights; `momentum` is None without, `new_radii` where ℜ stays."""

    points: ByPath
    gradients: ByPath
    momentum: ByPath | None
    kinds: Stacks
    groups: Stacks
    radii: Stacks
    new_radii: Stacks | None
    options: Options


class Descent(NamedTuple):
    """What they result in: displacements, momentum, and for each parameter its figures and whether it is refused."""

    displacements: ByPath
    momentum: ByPath | None
    zeta_share: Float[Array, "paths"]
    grad_norm: Float[Array, "paths"]
    step_ratio: Float[Array, "paths"]
    refused: Bool[Array, "paths"]


def to_buckets(plan: Plan, *trees: ByPath) -> list[Tensors]:
    """The constrained weights by bucket, all trees in the widest dtype of the bucket, at least float32.

    Many small ones become one array here, once in a step: see `kernels.are_many`. In all trees the same are together.
    """
    found = []
    for bucket in plan.buckets:
        owns = [[tree[path] for path in bucket.paths] for tree in trees]
        dtypes = [{leaf.dtype for leaf in own} for own in owns]
        dtype = compute_dtype(*set().union(*dtypes))
        as_one = kernels.are_many(len(bucket.paths), bucket.shape) and all(len(own) == 1 for own in dtypes)
        whole = [[kernels.pack(own)] if as_one else own for own in owns]
        found.append([tuple(part.astype(dtype) for part in own) for own in whole])
    return [tuple(columns) for columns in zip(*found, strict=True)] if found else [() for _ in trees]


def from_buckets(plan: Plan, tensors: Tensors, *like: ByPath) -> ByPath:
    """Undoes `to_buckets`: weights by path, in the widest of the dtypes that they have in these trees."""
    found = {}
    for bucket, own in zip(plan.buckets, tensors, strict=True):
        parts = own if len(own) == len(bucket.paths) else kernels.unpack(own[0])
        for path, part in zip(bucket.paths, parts, strict=True):
            found[path] = part.astype(max((tree[path].dtype for tree in like), key=lambda dtype: dtype.itemsize))
    return found


def to_matrices(plan: Plan, tensors: Tensors) -> list[list[Array]]:
    """The matrices of each tensor, [_, *layers, inputs, outputs, rows, cols]: of one parameter, or of all."""
    pairs = zip(plan.buckets, tensors, strict=True)
    return [[bucket.view.split(x if len(own) < len(bucket.paths) else x[None]) for x in own] for bucket, own in pairs]


def from_matrices(plan: Plan, matrices: Sequence[Sequence[Array]]) -> Tensors:
    """Undoes `to_matrices`."""
    pairs = [(bucket, list(map(bucket.view.merge, own))) for bucket, own in zip(plan.buckets, matrices, strict=True)]
    return tuple(tuple(own if len(own) < len(bucket.paths) else [x[0] for x in own]) for bucket, own in pairs)


def on_buckets(
    function: Callable[..., Any], plan: Plan, trees: Sequence[ByPath], *args: Any, like: Any, moves: bool = False
) -> Any:
    """`function` of the constrained weights by bucket and further arguments. Its first result is given back by path.

    That is sharded like the first of the trees. Its dtypes are those of the last tree, or if it `moves` weights the
    widest of all trees. `like` is as in `automatic`, for the other results.
    """

    def by_bucket(trees: Sequence[ByPath], *args: Any) -> Any:
        found, *others = function(*to_buckets(plan, *trees), *args)
        return from_buckets(plan, found, *(trees if moves else trees[-1:])), *others

    constrained = [{path: tree[path] for path in plan.collections} for tree in trees]
    return automatic(by_bucket, constrained, *args, like=(constrained[0], *like))


def on_matrices(function: Callable[..., Array], plan: Plan, own: Sequence[Mixture], *tensors: Tensors) -> Tensors:
    """`function(mixture, x, …)` of the matrices of each bucket, those of all its parameters in one array."""
    found = []
    for mixture, *parts in zip(own, *(to_matrices(plan, each) for each in tensors), strict=True):
        found.append(jnp.split(function(mixture, *map(jnp.concatenate, parts)), len(parts[0])))
    return from_matrices(plan, found)


def project(
    plan: Plan, kinds: Stacks, radii: Stacks, points: Tensors, gradients: Tensors, *, is_exact: bool = True
) -> Projected:
    """Line 5: gradL(ω) = Π_ω(∂L/∂ω); `is_exact` as in `kernels.tangent`."""
    x, g = to_matrices(plan, points), to_matrices(plan, gradients)
    tangents, squares = kernels.tangent(mixtures(plan, kinds, radii), x, g, is_exact)
    return Projected(from_matrices(plan, tangents), *refuse(squares))


def refuse(squares: Iterable[Array]) -> tuple[Stacks, Bool[Array, "paths"]]:
    """The squared norms of every matrix, NaN in a refused parameter; and which those are."""
    marked, refused = [], []
    for square in squares:
        finite = jnp.isfinite(jnp.sum(square, axis=range(1, square.ndim), keepdims=True))
        marked.append(jnp.where(finite, square, jnp.nan))
        refused.append(~finite.ravel())
    return tuple(marked), _figure(refused, jnp.dtype(bool))


def steepest(
    plan: Plan, kinds: Stacks, points: Tensors, vectors: Tensors, method: Steepest, tangent: bool, coarse: bool
) -> Tensors:
    """Directions of steepest ascent along the vectors, of the length of the radius."""
    own = mixtures(plan, kinds, map(with_radius, radii_of(plan, kinds, points)))
    return on_matrices(lambda on, x, g: on.steepest(x, g, method, tangent, coarse), plan, own, points, vectors)


def check_options(rho: Scalar, curvature: Scalar) -> None:
    """Raises for a negative ρ or c; tracers, as `optax.inject_hyperparams` passes, cannot be looked at."""
    for name, value in (("rho", rho), ("curvature", curvature)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name}={value}: give a number of 0 or more (ρ is a distance, c a bound of |curvature|)")


def normalize(plan: Plan, groups: Stacks, squares: Stacks, rho: Scalar, curvature: Scalar) -> Normalized:
    """Line 6 and eqs. 3 to 7: 1/ζ of every matrix, from R of its group."""
    inverse_zeta, shares, norms = [], [], []
    for bucket, group, square in zip(plan.buckets, groups, squares, strict=True):
        own, table = sums_of_groups(bucket, square, group)
        scale, _ = kernels.reciprocal_zeta(own, rho, curvature)
        inverse_zeta.append(jnp.broadcast_to(scale, square.shape))
        scales, r = kernels.reciprocal_zeta(table, rho, curvature)
        shares.append(jnp.sum(scales < 1, axis=1, dtype=r.dtype) / bucket.num_groups)
        norms.append(largest(jnp.where(jnp.isnan(r), 0, r), 1))
    return Normalized(tuple(inverse_zeta), _figure(shares), _figure(norms))


def sums_of_groups(
    bucket: Bucket, squares: Float[Array, "paths *grid"], group: Any
) -> tuple[Float[Array, "paths *#grid"], Float[Array, "paths _"]]:
    """For every matrix the sum over its group, and for every parameter the sums of all its groups.

    The second has a place for each group that there could be, 0 where there is none.

    Rows and columns are summed by masks, which needs no scattered additions and keeps shardings.
    """
    count, numbers = len(squares), bucket.num_groups
    match bucket.grouping:
        case "matrix":
            return squares, squares.reshape(count, -1)
        case "layer":
            total = jnp.sum(squares, axis=(-2, -1), keepdims=True)
            return total, total.reshape(count, -1)
        case "custom":
            # The numbers run on over the layers that a parameter stacks.
            keys = group.reshape(count, -1) + numbers * jnp.arange(count, dtype=group.dtype)[:, None]
            sums = jax.ops.segment_sum(squares.ravel(), keys.ravel(), count * numbers).reshape(count, numbers)
            return jnp.take_along_axis(sums, group.reshape(count, -1), axis=1).reshape(group.shape), sums
    # Members of rows, of columns, or first those of rows and then those of columns: see `groups_of`.
    axes = {"row": (-1,), "column": (-2,), "row or column": (-1, -2)}[bucket.grouping]
    own, tables = jnp.zeros_like(squares), []
    for code, axis in enumerate(axis for axis in axes for _ in range(bucket.members)):
        sums = jnp.sum(jnp.where(group == code, squares, 0), axis=axis, keepdims=True)
        own = jnp.where(group == code, sums, own)
        tables.append(sums.reshape(count, -1))
    return own, jnp.concatenate(tables, axis=1)


def scaled(plan: Plan, tangents: Tensors, factors: Stacks) -> Tensors:
    """Every matrix times its own factor; no direction where that is NaN, as of a refused parameter."""
    result = []
    for bucket, own, factor in zip(plan.buckets, tangents, factors, strict=True):
        # A NaN that is not selected would still be one in derivatives.
        factor = jnp.where(factor > 0, factor, 0)
        parts = kernels.unstack(factor) if len(own) == len(bucket.paths) else [factor]
        entries = [jnp.broadcast_to(part[..., None, None], (*part.shape, *bucket.view.grid[2:])) for part in parts]
        pairs = [(t, bucket.view.merge(part.astype(t.dtype))) for t, part in zip(own, entries, strict=True)]
        result.append(tuple(jnp.where(part > 0, t * part, 0) for t, part in pairs))
    return tuple(result)


def retract(
    plan: Plan,
    kinds: Stacks,
    radii: Stacks,
    points: Tensors,
    directions: Tensors,
    *,
    new_radii: Stacks | None = None,
    factor: Scalar = 1.0,
    is_tangent: bool = False,
    share_out: Mesh | None = None,
) -> tuple[Tensors, Float[Array, "paths"]]:
    """Line 7 and eq. 2: the displacements φ_ω(v) - ω, and the largest ‖v‖/s of each parameter.

    v is `factor` times a direction, projected at ω unless it `is_tangent`. The points reached are set to `new_radii` if
    those are given.
    """
    own = mixtures(plan, kinds, radii)
    x, w = to_matrices(plan, points), to_matrices(plan, directions)
    displacements, ratios = kernels.step(own, x, w, new_radii, factor, is_tangent, share_out)
    return from_matrices(plan, displacements), _figure([largest(ratio, range(1, ratio.ndim)) for ratio in ratios])


def radii_of(plan: Plan, kinds: Stacks, points: Tensors) -> Stacks:
    """The radii at which the weights lie."""
    pairs = zip(mixtures(plan, kinds), to_matrices(plan, points), strict=True)
    return tuple(mixture.radius_of(jnp.concatenate(x)) for mixture, x in pairs)


def rescale(plan: Plan, kinds: Stacks, points: Tensors, updates: Tensors, radii: Stacks) -> Tensors:
    """Line 8: displacements to the points ω + u, brought to exactly the radii ℜ."""

    def displaced(on: Mixture, x: Array, moves: Array) -> Array:
        return on.with_radius(jnp.asarray(on.radius, x.dtype)).rescale(x + moves) - x

    return on_matrices(displaced, plan, mixtures(plan, kinds, radii), points, updates)


def squared_norms(plan: Plan, tensors: Tensors) -> Stacks:
    """The squared norm of every matrix."""
    return tuple(squared_norm(jnp.concatenate(own)) for own in to_matrices(plan, tensors))


# The rule everywhere: a leaf whose squared norm is not finite (NaN, infinite, or a norm above 10¹⁹ in float32, after
# which ζ leaves nothing of a step and no second moment is a number) counts as zero. So nothing that is not finite
# reaches a weight, a momentum buffer or a moment, and all other leaves move as if nothing had happened.


def none_refused(plan: Plan) -> Refused:
    """The counts of refused gradients before the first step."""
    free = {path: jnp.zeros((), jnp.int32) for path in plan if path not in plan.collections}
    return Refused(jnp.zeros(len(plan.collections), jnp.int32), free)


def without_refused(plan: Plan, tensors: Tensors, squares: Stacks) -> Tensors:
    """The tensors, zero where the parameter is refused and the squared norms of its matrices are NaN."""
    return scaled(plan, tensors, tuple(jnp.where(jnp.isnan(square), square, 1) for square in squares))


def projected(
    plan: Plan, kinds: Stacks, radii: Stacks | None, points: Tensors, gradients: Tensors
) -> tuple[Tensors, Bool[Array, "paths"]]:
    """Line 5 alone: tangent vectors, zero where they are refused, and which are.

    The radii are those at which the points lie, if None is given.
    """
    found = project(plan, kinds, radii_of(plan, kinds, points) if radii is None else radii, points, gradients)
    return without_refused(plan, found.tangents, found.squares), found.refused


def without_refused_free(before: Refused, free: ByPath) -> tuple[ByPath, Refused]:
    """The leaves without a collection, zero where they are refused, and the counts with one more for each of those."""
    kept, counts = {}, {}
    for path, g in free.items():
        if not jnp.issubdtype(g.dtype, jnp.inexact):
            continue
        size = jnp.abs(g)
        fine = jnp.isfinite(jnp.sum(jnp.square(size.astype(compute_dtype(size.dtype)))))
        kept[path], counts[path] = lax.select(fine, g, jnp.zeros_like(g)), before.free[path] + (~fine).astype(jnp.int32)
    return free | kept, before._replace(free=before.free | counts)


def no_figure(plan: Plan, leaves: ByPath) -> Float[Array, "paths"]:
    """A figure for each parameter, none measured yet."""
    dtypes = {leaves[path].dtype for path in plan.collections if path in leaves}
    return jnp.zeros(len(plan.collections), compute_dtype(*dtypes))


def mixtures(plan: Plan, kinds: Stacks, radii: Iterable[Array] | None = None) -> list[Mixture]:
    """The manifolds of each bucket's matrices, at radius 1 if none is given."""
    own = [1.0] * len(kinds) if radii is None else radii
    return [
        Mixture(bucket.kinds, None if isinstance(kind, tuple) else kind, radius)
        for bucket, kind, radius in zip(plan.buckets, kinds, own, strict=True)
    ]


def _figure(parts: list[Array], dtype: jnp.dtype | None = None) -> Array:
    """A figure for each parameter from those of each bucket."""
    if not parts:
        return jnp.zeros(0, dtype or jnp.float32)
    dtype = np.result_type(*(part.dtype for part in parts))
    return jnp.concatenate([part.astype(dtype) for part in parts])
