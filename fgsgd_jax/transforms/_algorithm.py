"""Algorithm 1 of the paper, line by line, on the constrained weights of a plan.

Points and directions are tensors by path, in the shapes of the parameters; those of a bucket of many small parameters
may be packed as one tensor, see `packed`. What belongs to a matrix is a stack for each bucket of parameters of one
shape, [paths, *layers, inputs, outputs]. Figures of parameters follow the buckets.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from .. import kernels
from ..groups import Bucket, Plan, Stacks, buckets, widest, with_radius
from ..linalg import largest, squared_norm
from ..manifolds import Mixture, Steepest, compute_dtype
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


def packed(plan: Plan, *trees: ByPath) -> list[ByPath]:
    """The tensors with those of buckets of many small parameters as one, [paths, *shape], at the key of the bucket.

    The time to compile a program of hundreds of parameters is that of taking them together and apart, so a step should
    do it once. All trees are packed alike.
    """
    result = [dict(tree) for tree in trees]
    for bucket in buckets(plan):
        if kernels.are_many(len(bucket.paths), bucket.shape) and all(
            len({leaves[path].dtype for path in bucket.paths}) == 1 for leaves in trees
        ):
            for leaves in result:
                leaves[_key(bucket)] = kernels.pack([leaves.pop(path) for path in bucket.paths])
    return result


def unpacked(plan: Plan, tensors: ByPath) -> ByPath:
    """Undoes `packed`."""
    result = dict(tensors)
    for bucket in buckets(plan):
        if (key := _key(bucket)) in result:
            result |= dict(zip(bucket.paths, kernels.unpack(result.pop(key)), strict=True))
    return result


def names(bucket: Bucket, tensors: ByPath) -> tuple[str, ...]:
    """The paths of a bucket in these tensors, or its key if they are packed."""
    key = _key(bucket)
    return (key,) if key in tensors else bucket.paths


def _key(bucket: Bucket) -> str:
    # No path has this character.
    return f"{bucket.paths[0]}\0"


def matrices(bucket: Bucket, tensors: ByPath) -> Float[Array, "paths *layers inputs outputs rows cols"]:
    """The matrices of a bucket of packed or other tensors."""
    if (key := _key(bucket)) not in tensors:
        return bucket.matrices(tensors)
    return bucket.view.split(tensors[key].astype(compute_dtype(tensors[key].dtype)))


def project(plan: Plan, kinds: Stacks, radii: Stacks, points: ByPath, gradients: ByPath) -> Projected:
    """Line 5: gradL(ω) = Π_ω(∂L/∂ω)."""
    tangents, norms = kernels.tangent(*_matrices(plan, kinds, radii, points, gradients))
    return Projected(_tensors(plan, points, tangents), *refuse(plan, points, norms))


def refuse(plan: Plan, like: ByPath, norms: list[Array]) -> tuple[Stacks, Bool[Array, "paths"]]:
    """The squared norms of every matrix as stacks, NaN in a refused parameter; and which those are.

    `norms` are those of tensors that are packed as `like`.
    """
    squares, refused = [], []
    for bucket, own in zip(buckets(plan), _by_bucket(plan, like, norms), strict=True):
        square = _stacked(bucket, own)
        finite = _finite(square)
        squares.append(jnp.where(finite.reshape(-1, *(1,) * len(bucket.grid)), square, jnp.nan))
        refused.append(~finite)
    return tuple(squares), _figure(refused, jnp.dtype(bool))


def steepest(
    plan: Plan, kinds: Stacks, points: ByPath, vectors: ByPath, method: Steepest, tangent: bool, coarse: bool
) -> ByPath:
    """Directions of steepest ascent along the vectors, of the length of the radius, in the dtypes of the vectors."""
    directions: ByPath = {}
    for bucket, kind, radius in zip(buckets(plan), kinds, radii_of(plan, kinds, points), strict=True):
        x, mixture = matrices(bucket, points), mixture_of(bucket, kind).at(with_radius(radius))
        found = mixture.steepest(x, matrices(bucket, vectors).astype(x.dtype), method, tangent, coarse)
        directions |= tensors_of(bucket, found, {name: vectors[name] for name in names(bucket, vectors)})
    return directions


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
        for name, factor in zip(names(bucket, tangents), _parts(bucket, tangents, stacked), strict=True):
            factor = factor.astype(tangents[name].dtype)[..., None, None]
            factor = bucket.view.merge(jnp.broadcast_to(factor, (*factor.shape[:-2], *bucket.view.grid[2:])))
            result[name] = jnp.where(factor > 0, tangents[name] * factor, 0)
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
        pairs = zip(buckets(plan), new_radii, strict=True)
        flat = [radius for bucket, stacked in pairs for radius in _parts(bucket, points, stacked, True)]
        new = [radius.astype(own.dtype) for radius, own in zip(flat, x, strict=True)]
    moves, norms = kernels.step(mixtures, x, w, new, factor, is_tangent, share_out)
    longest = [
        largest(_stacked(bucket, own), range(1, 1 + len(bucket.grid)))
        for bucket, own in zip(buckets(plan), _by_bucket(plan, points, norms), strict=True)
    ]
    moves = _tensors(plan, points, moves)
    # Gradients may be coarser than the weights.
    dtypes = {path: widest((points[path].dtype, directions[path].dtype)) for path in moves}
    return {path: move.astype(dtypes[path]) for path, move in moves.items()}, _figure(longest)


def radii_of(plan: Plan, kinds: Stacks, points: ByPath) -> Stacks:
    """The radii at which the weights lie."""
    pairs = zip(buckets(plan), kinds, strict=True)
    return tuple(mixture_of(bucket, kind).radius_of(matrices(bucket, points)) for bucket, kind in pairs)


def rescale(plan: Plan, kinds: Stacks, points: ByPath, updates: ByPath, radii: Stacks) -> ByPath:
    """Line 8: displacements to the points ω + u, brought to exactly the radii ℜ."""
    displacements: ByPath = {}
    for bucket, kind, radius in zip(buckets(plan), kinds, radii, strict=True):
        x = matrices(bucket, points)
        mixture = mixture_of(bucket, kind).at(radius.astype(x.dtype))
        own = names(bucket, points)
        like = {path: max(points[path], updates[path], key=lambda leaf: leaf.dtype.itemsize) for path in own}
        moves = mixture.rescale(x + matrices(bucket, updates).astype(x.dtype)) - x
        displacements |= tensors_of(bucket, moves, like)
    return displacements


def squared_norms(plan: Plan, tensors: ByPath) -> Stacks:
    """The squared norm of every matrix."""
    return tuple(squared_norm(matrices(bucket, tensors)) for bucket in buckets(plan))


def refused(plan: Plan, tensors: ByPath) -> Bool[Array, "paths"]:
    """Which of the constrained parameters are refused, by the squared norms of `tensors`."""
    return _figure([~_finite(square) for square in squared_norms(plan, tensors)], jnp.dtype(bool))


# The rule everywhere: a leaf whose squared norm is not finite (NaN, infinite, or a norm above 10¹⁹ in float32, after
# which ζ leaves nothing of a step and no second moment is a number) counts as zero. So nothing that is not finite
# reaches a weight, a momentum buffer or a moment, and all other leaves move as if nothing had happened.


def none_refused(plan: Plan) -> Refused:
    """The counts of refused gradients before the first step."""
    free = {path: jnp.zeros((), jnp.int32) for path in plan if path not in plan.collections}
    return Refused(jnp.zeros(len(plan.collections), jnp.int32), free)


def without_refused(plan: Plan, tangents: ByPath, refused: Bool[Array, "paths"]) -> ByPath:
    """The tangent vectors, zero where the parameter is refused."""
    result, start = {}, 0
    for bucket in buckets(plan):
        end = start + len(bucket.paths)
        flags = _parts(bucket, tangents, refused[start:end])
        for name, flag in zip(names(bucket, tangents), flags, strict=True):
            flag = flag.reshape(*flag.shape, *(1,) * len(bucket.shape))
            result[name] = jnp.where(flag, 0, tangents[name])
        start = end
    return result


def projected(
    plan: Plan, kinds: Stacks, radii: Stacks | None, points: ByPath, gradients: ByPath
) -> tuple[ByPath, Bool[Array, "paths"]]:
    """Line 5 alone: tangent vectors in the dtypes of the gradients, zero where they are refused, and which are.

    The radii are those at which the points lie, if None is given.
    """
    points, gradients = packed(plan, points, gradients)
    found = project(plan, kinds, radii_of(plan, kinds, points) if radii is None else radii, points, gradients)
    tangents = without_refused(plan, found.tangents, found.refused)
    return unpacked(plan, {name: t.astype(gradients[name].dtype) for name, t in tangents.items()}), found.refused


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


def _by_bucket(plan: Plan, like: ByPath, values: list[Array]) -> list[list[Array]]:
    """What follows the parameters of all buckets, packed as `like`, for each bucket."""
    rest = iter(values)
    return [[next(rest) for _ in names(bucket, like)] for bucket in buckets(plan)]


def _stacked(bucket: Bucket, own: list[Array]) -> Array:
    """The values of a bucket's matrices as one array, which they are if it is packed."""
    return kernels.stack(own) if own[0].ndim == len(bucket.grid) else own[0]


def _parts(bucket: Bucket, like: ByPath, stacked: Array, restacked: bool = False) -> list[Array]:
    """Values that are stacked by parameter, as the tensors `like` are: by parameter, or all at once if it is packed.

    `restacked` as in `kernels.unstack`.
    """
    return [stacked] if _key(bucket) in like else kernels.unstack(stacked, restacked)


def tensors_of(bucket: Bucket, own: Array, like: ByPath) -> ByPath:
    """Undoes `matrices`: tensors in the dtypes of `like`, and packed as it is."""
    if (key := _key(bucket)) not in like:
        return bucket.tensors(own, like)
    return {key: bucket.view.merge(own).astype(like[key].dtype)}


def _tensors(plan: Plan, like: ByPath, matrices: list[Array]) -> ByPath:
    """The tensors of the matrices of all parameters, by path or packed as `like`."""
    pairs = zip(buckets(plan), _by_bucket(plan, like, matrices), strict=True)
    return {
        name: bucket.view.merge(own)
        for bucket, parts in pairs
        for name, own in zip(names(bucket, like), parts, strict=True)
    }


def _matrices(
    plan: Plan, kinds: Stacks, radii: Stacks, points: ByPath, vectors: ByPath
) -> tuple[list[Mixture], list[Array], list[Array]]:
    """The manifolds, points and vectors of every parameter as matrices, in the dtype of constraint arithmetic."""
    mixtures, x, w = [], [], []
    for bucket, kind, radius in zip(buckets(plan), kinds, radii, strict=True):
        own = names(bucket, points)
        own_kinds = _parts(bucket, points, kind, True) if len(bucket.kinds) > 1 else [()] * len(own)
        own_radii = _parts(bucket, points, radius, True)
        for path, own_kind, own_radius in zip(own, own_kinds, own_radii, strict=True):
            dtype = widest(compute_dtype(tree[path].dtype) for tree in (points, vectors))
            mixtures.append(mixture_of(bucket, own_kind).at(own_radius.astype(dtype)))
            x.append(bucket.view.split(points[path].astype(dtype)))
            w.append(bucket.view.split(vectors[path].astype(dtype)))
    return mixtures, x, w
