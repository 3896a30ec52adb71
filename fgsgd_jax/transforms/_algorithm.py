"""Algorithm 1 of the paper, line by line, on the constrained weights of a plan.

Points and directions are tensors in the shapes of the parameters, by bucket: see `to_buckets`. What belongs to a matrix
is a stack for each bucket, [paths, *layers, inputs, outputs]. Figures of parameters follow the buckets.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from .. import kernels
from ..groups import Bucket, Plan, Stacks, automatic, buckets, widest, with_radius
from ..linalg import largest, squared_norm
from ..manifolds import Mixture, Steepest, compute_dtype
from ._states import ByPath, Refused
from ._zeta import Scalar, of_groups

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
    """The constrained tensors by bucket; those of many small parameters as one, [paths, *shape].

    The time to compile a program of hundreds of parameters is that of taking them together and apart, so a step should
    do it once. In all trees the same are together.
    """
    result: list[list[tuple[Array, ...]]] = [[] for _ in trees]
    for bucket in buckets(plan):
        owns = [bucket.own(leaves) for leaves in trees]
        as_one = kernels.are_many(len(bucket.paths), bucket.shape)
        as_one = as_one and all(len({leaf.dtype for leaf in own}) == 1 for own in owns)
        for tensors, own in zip(result, owns, strict=True):
            tensors.append((kernels.pack(own),) if as_one else own)
    return list(map(tuple, result))


def from_buckets(plan: Plan, tensors: Tensors) -> ByPath:
    """Undoes `to_buckets`."""
    result = {}
    for bucket, own in zip(buckets(plan), tensors, strict=True):
        parts = kernels.unpack(own[0]) if bucket.as_one(own) else own
        result |= dict(zip(bucket.paths, parts, strict=True))
    return result


def on_buckets(function: Callable[..., Any], plan: Plan, trees: Sequence[ByPath], *args: Any, like: Any) -> Any:
    """`function` of the constrained tensors by bucket and further arguments. Its first result is given back by path.

    That is shared out as the first of the trees. `like` is as in `automatic`, for the other results.
    """

    def by_bucket(trees: Sequence[ByPath], *args: Any) -> Any:
        found, *others = function(*to_buckets(plan, *trees), *args)
        return from_buckets(plan, found), *others

    constrained = [{path: tree[path] for path in plan.collections} for tree in trees]
    return automatic(by_bucket, constrained, *args, like=(constrained[0], *like))


def project(
    plan: Plan, kinds: Stacks, radii: Stacks, points: Tensors, gradients: Tensors, *, is_exact: bool = True
) -> Projected:
    """Line 5: gradL(ω) = Π_ω(∂L/∂ω); `is_exact` as in `kernels.tangent`."""
    tangents, norms = kernels.tangent(*_matrices(plan, kinds, radii, points, gradients), is_exact)
    return Projected(_tensors(plan, points, tangents), *refuse(plan, _like(points, norms)))


def refuse(plan: Plan, norms: Tensors) -> tuple[Stacks, Bool[Array, "paths"]]:
    """The squared norms of every matrix as stacks, NaN in a refused parameter; and which those are."""
    squares, refused = [], []
    for bucket, own in zip(buckets(plan), norms, strict=True):
        square = _stacked(bucket, own)
        finite = _finite(square)
        squares.append(jnp.where(finite.reshape(-1, *(1,) * len(bucket.grid)), square, jnp.nan))
        refused.append(~finite)
    return tuple(squares), _figure(refused, jnp.dtype(bool))


def steepest(
    plan: Plan, kinds: Stacks, points: Tensors, vectors: Tensors, method: Steepest, tangent: bool, coarse: bool
) -> Tensors:
    """Directions of steepest ascent along the vectors, of the length of the radius, in the dtypes of the vectors."""
    directions = []
    parts = zip(buckets(plan), kinds, radii_of(plan, kinds, points), points, vectors, strict=True)
    for bucket, kind, radius, own, vector in parts:
        x, mixture = bucket.matrices(own), mixture_of(bucket, kind).at(with_radius(radius))
        found = mixture.steepest(x, bucket.matrices(vector).astype(x.dtype), method, tangent, coarse)
        directions.append(bucket.tensors(found, vector))
    return tuple(directions)


def normalize(plan: Plan, groups: Stacks, squares: Stacks, rho: Scalar, curvature: Scalar) -> Normalized:
    """Line 6 and eqs. 3 to 7: 1/ζ of every matrix, from R of its group."""
    inverse_zeta, shares, norms = [], [], []
    for bucket, group, square in zip(buckets(plan), groups, squares, strict=True):
        by_place = bucket.grouping in ("layer", "matrix")
        own, tables = of_groups(bucket.flat(square), None if by_place else bucket.flat(group), bucket)
        scale, _ = kernels.reciprocal_zeta(own, rho, curvature)
        inverse_zeta.append(bucket.unflat(jnp.broadcast_to(scale, (len(scale), *bucket.view.grid[:2]))))
        scales, r = kernels.reciprocal_zeta(
            jnp.concatenate([bucket.by_path(table) for table in tables], axis=1), rho, curvature
        )
        above = jnp.sum(scales < 1, axis=1, dtype=r.dtype)
        shares.append(above / bucket.num_groups)
        norms.append(largest(jnp.where(jnp.isnan(r), 0, r), 1))
    return Normalized(tuple(inverse_zeta), _figure(shares), _figure(norms))


def scaled(plan: Plan, tangents: Tensors, factors: Stacks) -> Tensors:
    """Every matrix times its own factor; no direction where that is NaN, as of a refused parameter."""

    def of(bucket: Bucket, tangent: Array, factor: Array) -> Array:
        factor = factor.astype(tangent.dtype)[..., None, None]
        factor = bucket.view.merge(jnp.broadcast_to(factor, (*factor.shape[:-2], *bucket.view.grid[2:])))
        return jnp.where(factor > 0, tangent * factor, 0)

    parts = zip(buckets(plan), tangents, factors, strict=True)
    return tuple(
        tuple(of(bucket, *pair) for pair in zip(own, _parts(bucket, own, stacked), strict=True))
        for bucket, own, stacked in parts
    )


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
    mixtures, x, w = _matrices(plan, kinds, radii, points, directions)
    new = None
    if new_radii is not None:
        parts = zip(buckets(plan), points, new_radii, strict=True)
        flat = [radius for bucket, own, stacked in parts for radius in _parts(bucket, own, stacked, True)]
        new = [radius.astype(own.dtype) for radius, own in zip(flat, x, strict=True)]
    moves, norms = kernels.step(mixtures, x, w, new, factor, is_tangent, share_out)
    longest = [
        largest(_stacked(bucket, own), range(1, 1 + len(bucket.grid)))
        for bucket, own in zip(buckets(plan), _like(points, norms), strict=True)
    ]
    # Gradients may be coarser than the weights.
    displacements = jax.tree.map(
        lambda move, x, w: move.astype(widest((x.dtype, w.dtype))), _tensors(plan, points, moves), points, directions
    )
    return displacements, _figure(longest)


def radii_of(plan: Plan, kinds: Stacks, points: Tensors) -> Stacks:
    """The radii at which the weights lie."""
    parts = zip(buckets(plan), kinds, points, strict=True)
    return tuple(mixture_of(bucket, kind).radius_of(bucket.matrices(own)) for bucket, kind, own in parts)


def rescale(plan: Plan, kinds: Stacks, points: Tensors, updates: Tensors, radii: Stacks) -> Tensors:
    """Line 8: displacements to the points ω + u, brought to exactly the radii ℜ."""
    displacements = []
    for bucket, kind, own, update, radius in zip(buckets(plan), kinds, points, updates, radii, strict=True):
        x = bucket.matrices(own)
        mixture = mixture_of(bucket, kind).at(radius.astype(x.dtype))
        like = [max(pair, key=lambda tensor: tensor.dtype.itemsize) for pair in zip(own, update, strict=True)]
        moves = mixture.rescale(x + bucket.matrices(update).astype(x.dtype)) - x
        displacements.append(bucket.tensors(moves, like))
    return tuple(displacements)


def squared_norms(plan: Plan, tensors: Tensors) -> Stacks:
    """The squared norm of every matrix."""
    return tuple(squared_norm(bucket.matrices(own)) for bucket, own in zip(buckets(plan), tensors, strict=True))


# The rule everywhere: a leaf whose squared norm is not finite (NaN, infinite, or a norm above 10¹⁹ in float32, after
# which ζ leaves nothing of a step and no second moment is a number) counts as zero. So nothing that is not finite
# reaches a weight, a momentum buffer or a moment, and all other leaves move as if nothing had happened.


def none_refused(plan: Plan) -> Refused:
    """The counts of refused gradients before the first step."""
    free = {path: jnp.zeros((), jnp.int32) for path in plan if path not in plan.collections}
    return Refused(jnp.zeros(len(plan.collections), jnp.int32), free)


def without_refused(plan: Plan, tangents: Tensors, refused: Bool[Array, "paths"]) -> Tensors:
    """The tangent vectors, zero where the parameter is refused."""
    result, start = [], 0
    for bucket, own in zip(buckets(plan), tangents, strict=True):
        flags = _parts(bucket, own, refused[start : start + len(bucket.paths)])
        flags = [flag.reshape(*flag.shape, *(1,) * len(bucket.shape)) for flag in flags]
        result.append(tuple(jnp.where(flag, 0, tangent) for flag, tangent in zip(flags, own, strict=True)))
        start += len(bucket.paths)
    return tuple(result)


def refused(plan: Plan, tensors: Tensors) -> Bool[Array, "paths"]:
    """Which of the constrained parameters are refused, by the squared norms of `tensors`."""
    return _figure([~_finite(square) for square in squared_norms(plan, tensors)], jnp.dtype(bool))


def projected(
    plan: Plan, kinds: Stacks, radii: Stacks | None, points: Tensors, gradients: Tensors
) -> tuple[Tensors, Bool[Array, "paths"]]:
    """Line 5 alone: tangent vectors in the dtypes of the gradients, zero where they are refused, and which are.

    The radii are those at which the points lie, if None is given.
    """
    found = project(plan, kinds, radii_of(plan, kinds, points) if radii is None else radii, points, gradients)
    tangents = without_refused(plan, found.tangents, found.refused)
    return jax.tree.map(lambda t, g: t.astype(g.dtype), tangents, gradients), found.refused


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


def _finite(squares: Float[Array, "paths *grid"]) -> Bool[Array, "paths"]:
    """Whether all squared norms of a parameter are finite."""
    return jnp.isfinite(jnp.sum(squares, axis=tuple(range(1, squares.ndim))))


def _figure(parts: list[Array], dtype: jnp.dtype | None = None) -> Array:
    """A figure for each parameter from those of each bucket."""
    if not parts:
        return jnp.zeros(0, dtype or jnp.float32)
    dtype = widest(part.dtype for part in parts)
    return jnp.concatenate([part.astype(dtype) for part in parts])


def _stacked(bucket: Bucket, own: Sequence[Array]) -> Array:
    """The values of a bucket's matrices, of each parameter or of all, as one array."""
    return own[0] if bucket.as_one(own) else kernels.stack(own)


def _parts(bucket: Bucket, like: Sequence[Array], stacked: Array, restacked: bool = False) -> list[Array]:
    """Undoes `_stacked`: values for each of the tensors `like`; `restacked` as in `kernels.unstack`."""
    return [stacked] if bucket.as_one(like) else kernels.unstack(stacked, restacked)


def _like(points: Tensors, values: list[Array]) -> Tensors:
    """What belongs to each of the tensors, by bucket."""
    return jax.tree.unflatten(jax.tree.structure(points), values)


def _tensors(plan: Plan, points: Tensors, matrices: list[Array]) -> Tensors:
    """The tensors that these matrices make up."""
    pairs = zip(buckets(plan), _like(points, matrices), strict=True)
    return tuple(tuple(map(bucket.view.merge, own)) for bucket, own in pairs)


def _matrices(
    plan: Plan, kinds: Stacks, radii: Stacks, points: Tensors, vectors: Tensors
) -> tuple[list[Mixture], list[Array], list[Array]]:
    """The manifolds, points and vectors of each tensor as matrices, in the dtype of constraint arithmetic."""
    found = []
    for bucket, kind, radius, *own in zip(buckets(plan), kinds, radii, points, vectors, strict=True):
        own_kinds = _parts(bucket, own[0], kind, True) if len(bucket.kinds) > 1 else [()] * len(own[0])
        own_radii = _parts(bucket, own[0], radius, True)
        for kind, radius, *pair in zip(own_kinds, own_radii, *own, strict=True):
            dtype = widest(compute_dtype(tensor.dtype) for tensor in pair)
            x, w = (bucket.view.split(tensor.astype(dtype)) for tensor in pair)
            found.append((mixture_of(bucket, kind).at(radius.astype(dtype)), x, w))
    mixtures, x, w = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    return mixtures, x, w
