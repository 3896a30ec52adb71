"""Putting weights on their manifolds, and measuring how well they lie there."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from ..linalg import compute_dtype, largest, norm, squared_norm
from ..manifolds import Euclidean, Mixture
from ._as_plan import Rules, as_plan
from ._automatic import automatic
from ._buckets import Bucket
from ._collection import Collection
from ._paths import array_leaves, from_paths
from ._plan import Plan
from ._stacks import gammas, kinds_of

Radii = dict[str, Float[Array | np.ndarray, "*layers inputs outputs"]]


def initialize(key: PRNGKeyArray, params: Any, plan: Plan | Rules) -> Any:
    """Draws every constrained weight uniformly on its manifold of radius γ.

    This is the paper's initialization (line 2 of Algorithm 1, λ = 1). Euclidean matrices and unconstrained parameters
    are returned as they are. A parameter's draw depends on the key and its path alone.

    Args:
      key: a JAX random key.
      params: the parameters, for their structure, shapes, dtypes and the Euclidean weights. An array that stands at two
        paths is two parameters and is drawn twice, as it would be trained twice: share weights in the model.
      plan: the plan of these parameters, or its rules.

    Returns:
      Parameters of the same structure, all in buffers of their own.

    Raises:
      ValueError: for parameters that are not those of the plan.
      TypeError: for a parameter without values, such as a `jax.ShapeDtypeStruct`.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1, line 2 and eq. 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.ones((3, 3, 4, 6))}
      >>> plan = fg.plan(params, [("kernel", fg.Each(fg.Sphere()))])
      >>> params = fg.initialize(jax.random.key(0), params, plan)
      >>> bool(fg.violation(params, plan)["kernel"] < 1e-6)
      True
    """
    plan = as_plan(plan, params)
    leaves, found = checked_leaves(params, plan), {}
    for part in _parts(plan, leaves):
        names = [part.bucket.layer_names(path) for path in part.paths]
        hashes = np.array([[zlib.crc32(name.encode()) for name in own] for own in names]).astype(np.uint32)
        drawn = automatic(_uniform, part.bucket, key, hashes, part.kind, part.gamma, part.tensors, like=part.tensors)
        found |= dict(zip(part.paths, drawn, strict=True))
    return _placed(found, leaves, params)


def nearest(params: Any, plan: Plan | Rules, radii: Radii | Literal["fitted"] | None = None) -> Any:
    """Moves every constrained weight to the nearest point of its manifold.

    Use it for weights that were trained without the constraint, or averaged.

    Args:
      params: the parameters.
      plan: the plan of these parameters, or its rules.
      radii: of the manifolds: None for the plan's γ, `fg.radii(opt_state)` for those of a training, `"fitted"` for the
        radius of each matrix's own scale (the least-squares fit of the manifold to it).

    Returns:
      Parameters of the same structure, in buffers of their own; Euclidean and unconstrained ones have the same values.

    Raises:
      ValueError: for parameters that are not those of the plan, and radii without an entry. Outside jit also for a
        matrix of zeros with `"fitted"` radii; inside it stays zero, and `fg.metrics` counts it.
      TypeError: for a parameter without values, such as a `jax.ShapeDtypeStruct`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": 2 * jnp.eye(3)}
      >>> plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))])
      >>> float(fg.nearest(params, plan)["kernel"][0, 0])
      1.0
      >>> float(fg.nearest(params, plan, radii="fitted")["kernel"][0, 0])
      2.0
    """
    plan = as_plan(plan, params)
    leaves, found = checked_leaves(params, plan), {}
    if radii == "fitted":
        check_scales(plan, leaves)
    for part in _parts(plan, leaves):
        radius = _radii(radii, part)
        reached = automatic(_nearest, part.bucket, part.kind, radius, part.tensors, like=part.tensors)
        found |= dict(zip(part.paths, reached, strict=True))
    return _placed(found, leaves, params)


def violation(
    params: Any, plan: Plan | Rules, radii: Radii | Literal["fitted"] | None = None
) -> dict[str, Float[Array, ""]]:
    """How far every constrained weight is from its manifold.

    Args:
      params: the parameters.
      plan: the plan of these parameters, or its rules.
      radii: of the manifolds, by path: None for the plan's γ, `fg.radii(opt_state)`, or `"fitted"` for each matrix's
        own.

    Returns:
      For the path of every constrained parameter, the largest violation of its matrices: the largest absolute entry of
      the defining equation's residual at radius 1 (no unit).

    Raises:
      ValueError: for parameters that are not those of the plan, or radii without an entry.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"dense": 2 * jnp.eye(3)}
      >>> plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))])
      >>> float(fg.violation(params, plan)["dense"])  # 2² - 1
      3.0
      >>> bool(fg.violation(params, plan, radii="fitted")["dense"] < 1e-6)
      True
    """
    plan = as_plan(plan, params)
    leaves, result = checked_leaves(params, plan), {}
    for part in _parts(plan, leaves):
        if part.bucket.is_euclidean:
            continue
        radius, like = _radii(radii, part), jnp.zeros(len(part.paths))
        found = automatic(_violation, part.bucket, part.kind, radius, part.tensors, like=like)
        result |= dict(zip(part.paths, found, strict=True))
    return {path: result[path] for path in plan.collections if path in result}


def checked_leaves(params: Any, plan: Plan) -> dict[str, Any]:
    """The leaves by path, arrays of JAX or NumPy, if they are those of the plan."""
    leaves = array_leaves(params)
    for path in dict.fromkeys([*plan, *leaves]):
        if path not in leaves:
            raise ValueError(f"the plan has a parameter {path!r} that these parameters lack: make the plan from them")
        if path not in plan.entries:
            raise ValueError(f"the parameter {path!r} is not in the plan: make the plan from these parameters")
        if leaves[path].shape != plan.entries[path].shape:
            raise ValueError(
                f"{path}: its shape is {leaves[path].shape}, the plan was made for {plan.entries[path].shape}"
            )
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            raise TypeError(
                f"{path}: the numbers of the parameters are needed, this is {leaves[path]}; to find shapes alone, "
                "trace the call, as in jax.eval_shape(lambda params: fg.initialize(key, params, plan), params)"
            )
    return leaves


def check_scales(plan: Plan, leaves: dict[str, Any]) -> None:
    """Raises for a matrix of zeros, which has no scale of its own; under jit nothing can be said."""
    if any(isinstance(leaves[path], (Tracer, jax.ShapeDtypeStruct)) for path in plan.collections):
        return
    with jax.ensure_compile_time_eval():
        for part in _parts(plan, leaves):
            like = jnp.zeros(len(part.paths), bool)
            found = automatic(_without_scale, part.bucket, part.kind, part.tensors, like=like)
            for path in itertools.compress(part.paths, np.asarray(found)):
                raise ValueError(
                    f"{path}: {_first_without_scale(plan.collections[path], leaves[path])}: no radius can be fitted to "
                    f"it, and of radius 0 it would never move. Leave the parameter free by a rule ({path!r}, None) "
                    "before the others, or draw this parameter alone, with its scheme: "
                    f"fg.initialize(key, params, [({path!r}, scheme), ('*', None)])"
                )


def _first_without_scale(collection: Collection, leaf: Array) -> str:
    """The first matrix that has no scale: its place and its norm, in words."""
    matrices = collection.view.split(np.asarray(leaf).astype(np.float64))
    free = [isinstance(kind, Euclidean) for kind in collection.kinds]
    norms = np.where(np.array(free)[collection.kind], 1, np.linalg.norm(matrices, axis=(-2, -1)))
    place = tuple(int(index) for index in np.argwhere(~is_scale(norms, compute_dtype(leaf.dtype)))[0])
    *layers, row, column = place
    stack = f"of layer {'/'.join(map(str, layers))} " if layers else ""
    return f"its matrix {stack}at input {row}, output {column} of the grid has the norm {norms[place]:.3g}"


class _Part(NamedTuple):
    """Some parameters of a bucket, which itself has numbers for paths: its parts share their compiled programs."""

    bucket: Bucket
    paths: tuple[str, ...]
    kind: Array | None
    gamma: Array
    tensors: tuple[Array, ...]


# Parameters per program: the time to compile it grows with them.
_PARAMETERS = 32


def _parts(plan: Plan, leaves: dict[str, Array]) -> Iterator[_Part]:
    """The weights of a plan by shape and structure, a few at a time."""
    layout = []
    for bucket in plan.buckets:
        count = len(bucket.paths)
        size = -(-count // -(-count // _PARAMETERS))
        # The last part is filled up with its last parameter, so that all are of one size.
        paths = bucket.paths + bucket.paths[-1:] * (-count % size)
        starts = range(0, len(paths), size)
        layout += [dataclasses.replace(bucket, paths=paths[start : start + size]) for start in starts]
    for bucket, kind, gamma in zip(layout, kinds_of(plan, layout), gammas(plan, leaves, layout), strict=True):
        numbered = dataclasses.replace(bucket, paths=tuple(map(str, range(len(bucket.paths)))))
        own = tuple(leaves[path] for path in bucket.paths)
        yield _Part(numbered, bucket.paths, kind if len(bucket.kinds) > 1 else None, gamma, own)


def _placed(found: dict[str, Array], before: dict[str, Array], like: Any) -> Any:
    """The tree of `like` with what was found, shared out as before: a compiled program may choose anew.

    Free leaves are copied: whoever donates the parameters and the result must not hand in a buffer twice.
    """

    def placed(path: str) -> Any:
        leaf, given = found.get(path, before[path]), before[path]
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
            return leaf
        if leaf is given:
            return leaf.copy()
        sharding = None if isinstance(given, Tracer) else getattr(given, "sharding", None)
        spread = sharding is not None and len(sharding.device_set) > 1
        return jax.device_put(leaf, sharding) if spread else leaf

    return from_paths({path: placed(path) for path in before}, like)


def _radii(radii: Radii | str | None, part: _Part) -> Array | None:
    """The radii of a part's matrices; None for those fitted to the weights."""
    if radii is None or isinstance(radii, str):
        return None if radii else part.gamma
    if missing := [path for path in part.paths if path not in radii]:
        raise ValueError(
            f"radii has no entry for {missing[0]!r}: pass fg.radii(opt_state) of a state made by this plan"
        )
    return jnp.stack([jnp.broadcast_to(jnp.asarray(radii[path]), part.bucket.grid) for path in part.paths])


# One call per part, with the stacking inside: run one by one, its slices are compiled one by one.


@functools.partial(jax.jit, static_argnums=0)
def _uniform(bucket: Bucket, key, hashes, kind, radius, tensors):
    x = bucket.matrices(tensors)
    # A layer of a stack is drawn as it would be alone.
    shape = bucket.shape[len(bucket.layers) :]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes.ravel()).reshape(len(x), -1)

    def drawn(own: Any) -> Array:
        keys, kind, radius, x = own
        # In a loop, which nothing is fused with: XLA on TPU would compile the draw once more for each of its uses.
        z = bucket.view.split(lax.map(lambda key: jax.random.normal(key, shape, radius.dtype), keys))
        z = z.reshape(*radius.shape, *z.shape[-2:])
        return Mixture(bucket.kinds, kind, radius).from_gaussian(z, z if x is None else x)

    # One parameter at a time, so that the memory is that of one.
    is_free = any(isinstance(manifold, Euclidean) for manifold in bucket.kinds)
    return bucket.tensors(lax.map(drawn, (keys, kind, radius.astype(x.dtype), x if is_free else None)), tensors)


@functools.partial(jax.jit, static_argnums=0)
def _nearest(bucket: Bucket, kind, radius, tensors):
    x = bucket.matrices(tensors)
    if radius is not None:
        return bucket.tensors(Mixture(bucket.kinds, kind, radius.astype(x.dtype)).nearest(x), tensors)
    # The nearest point of radius 1 has the same direction at every radius; the best radius is <x, y> / <y, y>.
    mixture = Mixture(bucket.kinds, kind)
    y = mixture.nearest(x)
    length = jnp.sum(x * y, axis=(-2, -1)) / jnp.maximum(squared_norm(y), jnp.finfo(x.dtype).tiny)
    free = mixture.constrained(jnp.ones_like(length)) == 0
    return bucket.tensors(jnp.where(free[..., None, None], x, length[..., None, None] * y), tensors)


def is_scale(length: Any, dtype: Any) -> Any:
    """Whether a length can be a radius: its square is far from zero, and finite."""
    info = jnp.finfo(dtype)
    return (length > 2**10 * float(info.tiny) ** 0.5) & (length < float(info.max) ** 0.5)


def with_radius(radius: Array) -> Array:
    """Fitted radii, next to nothing where there is none: a division by zero would make NaN of the weight."""
    return jnp.where(is_scale(radius, radius.dtype), radius, float(jnp.finfo(radius.dtype).tiny) ** 0.5)


@functools.partial(jax.jit, static_argnums=0)
def _without_scale(bucket: Bucket, kind, tensors):
    x = bucket.matrices(tensors)
    length = norm(x, (-2, -1))
    on = Mixture(bucket.kinds, kind).constrained(jnp.ones_like(length)) > 0
    return jnp.any(on & ~is_scale(length, x.dtype), axis=range(1, on.ndim))


@functools.partial(jax.jit, static_argnums=0)
def _violation(bucket: Bucket, kind, radius, tensors):
    x = bucket.matrices(tensors)
    mixture = Mixture(bucket.kinds, kind)
    mixture = mixture.with_radius(mixture.radius_of(x) if radius is None else radius.astype(x.dtype))
    return largest(mixture.violation(x), range(1, x.ndim - 2))
