"""Algorithm 1 of the paper, line by line, on the constrained weights of a plan.

Points and directions are tensors by path, in the shapes of the parameters. What belongs to a matrix is a stack for each
bucket of parameters of one shape, [paths, *layers, inputs, outputs]. Figures of parameters follow the buckets.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from .. import kernels
from ..groups import Bucket, Plan, Stacks, buckets, widest
from ..linalg import largest, squared_norm
from ..manifolds import Mixture, compute_dtype
from ._states import ByPath, Refused
from ._zeta import Scalar, of_groups, reciprocal_zeta


class Projected(NamedTuple):
    """Line 5: the tangent vectors by path, the squared norm of every matrix, and which parameters are refused.

    The squared norms of a refused parameter are NaN.
    """

    tangents: ByPath
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


def project(plan: Plan, kinds: Stacks, radii: Stacks, points: ByPath, gradients: ByPath) -> Projected:
    """Line 5: gradL(ω) = Π_ω(∂L/∂ω)."""
    tangents, norms = kernels.tangent(*_matrices(plan, kinds, radii, points, gradients))
    return Projected(_tensors(plan, tangents), *refuse(plan, norms))


def refuse(plan: Plan, norms: list[Array]) -> tuple[Stacks, Bool[Array, "paths"]]:
    """The squared norms of every matrix as stacks, NaN in a refused parameter; and which those are."""
    squares, refused = [], []
    for bucket, own in zip(buckets(plan), _by_bucket(plan, norms), strict=True):
        square = kernels.stack(own)
        finite = jnp.isfinite(jnp.sum(square, axis=tuple(range(1, square.ndim))))
        squares.append(jnp.where(finite.reshape(-1, *(1,) * len(bucket.grid)), square, jnp.nan))
        refused.append(~finite)
    return tuple(squares), _figure(refused, jnp.dtype(bool))


def normalize(plan: Plan, groups: Stacks, squares: Stacks, rho: Scalar, curvature: Scalar) -> Normalized:
    """Line 6 and eqs. 3 to 7: 1/ζ of every matrix, from R of its group."""
    inverse_zeta, shares, norms = [], [], []
    for bucket, group, square in zip(buckets(plan), groups, squares, strict=True):
        by_place = bucket.grouping in ("layer", "matrix")
        own, tables = of_groups(bucket.flat(square), None if by_place else bucket.flat(group), bucket)
        scale = reciprocal_zeta(jnp.sqrt(own), rho, curvature)
        inverse_zeta.append(bucket.unflat(jnp.broadcast_to(scale, (len(scale), *bucket.view.grid[:2]))))
        r = jnp.sqrt(jnp.concatenate([bucket.by_path(table) for table in tables], axis=1))
        above = jnp.sum(reciprocal_zeta(r, rho, curvature) < 1, axis=1, dtype=r.dtype)
        shares.append(above / bucket.num_groups)
        norms.append(largest(jnp.where(jnp.isnan(r), 0, r), 1))
    return Normalized(tuple(inverse_zeta), _figure(shares), _figure(norms))


def scaled(plan: Plan, tangents: ByPath, factors: Stacks) -> ByPath:
    """Every matrix times its own factor; no direction where that is NaN, as of a refused parameter."""
    result = {}
    for bucket, stacked in zip(buckets(plan), factors, strict=True):
        for path, factor in zip(bucket.paths, kernels.unstack(stacked), strict=True):
            factor = factor.astype(tangents[path].dtype)[..., None, None]
            factor = bucket.view.merge(jnp.broadcast_to(factor, (*bucket.grid, *bucket.view.grid[2:])))
            result[path] = jnp.where(factor > 0, tangents[path] * factor, 0)
    return result


def retract(
    plan: Plan,
    kinds: Stacks,
    radii: Stacks,
    points: ByPath,
    directions: ByPath,
    *,
    new_radii: Stacks | None = None,
    factor: Scalar = 1.0,
    is_tangent: bool = False,
    share_out: Mesh | None = None,
) -> tuple[ByPath, Float[Array, "paths"]]:
    """Line 7 and eq. 2: the displacements φ_ω(v) - ω, and the largest ‖v‖/s of each parameter.

    v is `factor` times a direction, projected at ω unless it `is_tangent`. The points reached are set to `new_radii` if
    those are given.
    """
    mixtures, x, w = _matrices(plan, kinds, radii, points, directions)
    new = None
    if new_radii is not None:
        flat = [radius for stacked in new_radii for radius in kernels.unstack(stacked, restacked=True)]
        new = [radius.astype(own.dtype) for radius, own in zip(flat, x, strict=True)]
    moves, norms = kernels.step(mixtures, x, w, new, factor, is_tangent, share_out)
    longest = [
        largest(kernels.stack(own), range(1, 1 + len(bucket.grid)))
        for bucket, own in zip(buckets(plan), _by_bucket(plan, norms), strict=True)
    ]
    moves = _tensors(plan, moves)
    # Gradients may be coarser than the weights.
    dtypes = {path: widest((points[path].dtype, directions[path].dtype)) for path in moves}
    return {path: move.astype(dtypes[path]) for path, move in moves.items()}, _figure(longest)


def radii_of(plan: Plan, kinds: Stacks, points: ByPath) -> Stacks:
    """The radii at which the weights lie."""
    pairs = zip(buckets(plan), kinds, strict=True)
    return tuple(mixture_of(bucket, kind).radius_of(bucket.matrices(points)) for bucket, kind in pairs)


def rescale(plan: Plan, kinds: Stacks, points: ByPath, updates: ByPath, radii: Stacks) -> ByPath:
    """Line 8: displacements to the points ω + u, brought to exactly the radii ℜ."""
    displacements: ByPath = {}
    for bucket, kind, radius in zip(buckets(plan), kinds, radii, strict=True):
        x = bucket.matrices(points)
        mixture = mixture_of(bucket, kind).at(radius.astype(x.dtype))
        like = {path: max(points[path], updates[path], key=lambda leaf: leaf.dtype.itemsize) for path in bucket.paths}
        displacements |= bucket.tensors(mixture.rescale(x + bucket.matrices(updates).astype(x.dtype)) - x, like)
    return displacements


def squared_norms(plan: Plan, tensors: ByPath) -> Stacks:
    """The squared norm of every matrix."""
    return tuple(squared_norm(bucket.matrices(tensors)) for bucket in buckets(plan))


# The rule everywhere: a leaf whose squared norm is not finite (NaN, infinite, or a norm above 10¹⁹ in float32, after
# which ζ leaves nothing of a step and no second moment is a number) counts as zero. So nothing that is not finite
# reaches a weight, a momentum buffer or a moment, and all other leaves move as if nothing had happened.


def none_refused(plan: Plan) -> Refused:
    """The counts of refused gradients before the first step."""
    free = {path: jnp.zeros((), jnp.int32) for path in plan if path not in plan.collections}
    return Refused(jnp.zeros(len(plan.collections), jnp.int32), free)


def without_refused(tangents: ByPath, refused: Bool[Array, "paths"]) -> ByPath:
    """The tangent vectors, zero where the parameter is refused."""
    return {path: jnp.where(flag, 0, t) for (path, t), flag in zip(tangents.items(), refused, strict=True)}


def without_refused_free(free: ByPath) -> tuple[ByPath, ByPath]:
    """The leaves without a collection, zero where they are refused, and whether they are."""
    kept, refused = {}, {}
    for path, g in free.items():
        if not jnp.issubdtype(g.dtype, jnp.inexact):
            continue
        size = jnp.abs(g)
        fine = jnp.isfinite(jnp.sum(jnp.square(size.astype(compute_dtype(size.dtype)))))
        kept[path], refused[path] = lax.select(fine, g, jnp.zeros_like(g)), ~fine
    return free | kept, refused


def counted(before: Refused, constrained: Bool[Array, "paths"], free: ByPath) -> Refused:
    """The counts of refused gradients with one more for each of these."""
    counts = {path: before.free[path] + flag.astype(jnp.int32) for path, flag in free.items()}
    return Refused(before.constrained + constrained.astype(jnp.int32), before.free | counts)


def no_figure(plan: Plan, leaves: ByPath) -> Float[Array, "paths"]:
    """A figure for each parameter, none measured yet."""
    dtypes = [compute_dtype(leaves[path].dtype) for path in plan.collections if path in leaves]
    return jnp.zeros(len(plan.collections), widest([*dtypes, jnp.dtype(jnp.float32)]))


def mixture_of(bucket: Bucket, kind: Array | tuple[()]) -> Mixture:
    """The manifolds of a bucket's matrices, at radius 1."""
    return Mixture(bucket.kinds, None if isinstance(kind, tuple) else kind)


def _figure(parts: list[Array], dtype: jnp.dtype | None = None) -> Array:
    """A figure for each parameter from those of each bucket."""
    if not parts:
        return jnp.zeros(0, dtype or jnp.float32)
    dtype = widest(part.dtype for part in parts)
    return jnp.concatenate([part.astype(dtype) for part in parts])


def _by_bucket(plan: Plan, values: list[Array]) -> list[list[Array]]:
    """What follows the parameters of all buckets, for each bucket."""
    rest = iter(values)
    return [[next(rest) for _ in bucket.paths] for bucket in buckets(plan)]


def _tensors(plan: Plan, matrices: list[Array]) -> ByPath:
    """The tensors of the matrices of all parameters, by path."""
    pairs = zip(buckets(plan), _by_bucket(plan, matrices), strict=True)
    return {
        path: bucket.view.merge(own) for bucket, parts in pairs for path, own in zip(bucket.paths, parts, strict=True)
    }


def _matrices(
    plan: Plan, kinds: Stacks, radii: Stacks, points: ByPath, vectors: ByPath
) -> tuple[list[Mixture], list[Array], list[Array]]:
    """The manifolds, points and vectors of every parameter as matrices, in the dtype of constraint arithmetic."""
    mixtures, x, w = [], [], []
    for bucket, kind, radius in zip(buckets(plan), kinds, radii, strict=True):
        own_kinds = kernels.unstack(kind, restacked=True) if len(bucket.kinds) > 1 else [()] * len(bucket.paths)
        own_radii = kernels.unstack(radius, restacked=True)
        for path, own_kind, own_radius in zip(bucket.paths, own_kinds, own_radii, strict=True):
            dtype = widest(compute_dtype(tree[path].dtype) for tree in (points, vectors))
            mixtures.append(mixture_of(bucket, own_kind).at(own_radius.astype(dtype)))
            x.append(bucket.view.split(points[path].astype(dtype)))
            w.append(bucket.view.split(vectors[path].astype(dtype)))
    return mixtures, x, w
