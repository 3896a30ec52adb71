"""Putting weights on their manifolds, and measuring how well they lie there."""

import functools
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..manifolds import Mixture
from ._buckets import Bucket, buckets, kinds_of
from ._paths import by_path, from_paths
from ._plan import Plan

Radii = dict[str, Float[Array, "inputs outputs"]]


def initialize(key: PRNGKeyArray, params: Any, plan: Plan) -> Any:
    """Draws every constrained weight uniformly on its manifold of radius γ.

    This is the paper's initialization (line 2 of Algorithm 1, λ = 1). Euclidean matrices and unconstrained parameters
    are returned as they are. A parameter's draw depends on the key and its path alone.

    Args:
      key: a JAX random key.
      params: the parameters, for their structure, shapes, dtypes and the Euclidean weights.
      plan: the plan of these parameters.

    Returns:
      Parameters of the same structure.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.ones((3, 3, 4, 6))}
      >>> plan = fg.plan(params, [("kernel", fg.Each(fg.Sphere()))])
      >>> params = fg.initialize(jax.random.key(0), params, plan)
      >>> bool(fg.violation(params, plan)["kernel"] < 1e-6)
      True
    """
    leaves = checked_leaves(params, plan)
    for bucket, kind in zip(layout := buckets(plan), kinds_of(plan, layout).values, strict=True):
        keys = jnp.stack([jax.random.fold_in(key, zlib.crc32(path.encode())) for path in bucket.paths])
        matrices = _draw(bucket.kinds, keys, kind, _gammas(plan, bucket, leaves), bucket.stack(leaves))
        leaves |= bucket.unstack(matrices, leaves)
    return from_paths(leaves, params)


def nearest(params: Any, plan: Plan, radii: Radii | Literal["fitted"] | None = None) -> Any:
    """Moves every constrained weight to the nearest point of its manifold.

    Use it for weights that were trained without the constraint, or averaged.

    Args:
      params: the parameters.
      plan: the plan of these parameters.
      radii: of the manifolds: None for the plan's γ, `fg.radii(opt_state)` for those of a training, `"fitted"` for the
        radius of each matrix's own scale (the least-squares fit of the manifold to it).

    Returns:
      Parameters of the same structure; Euclidean and unconstrained ones as they are.

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
    leaves = checked_leaves(params, plan)
    for bucket, kind in zip(layout := buckets(plan), kinds_of(plan, layout).values, strict=True):
        x = bucket.stack(leaves)
        if radii is None:
            matrices = _nearest(bucket.kinds, kind, _gammas(plan, bucket, leaves), x)
        elif isinstance(radii, str):
            matrices = _nearest_fitted(bucket.kinds, kind, x)
        else:
            matrices = _nearest(bucket.kinds, kind, _radii(radii, bucket, leaves), x)
        leaves |= bucket.unstack(matrices, leaves)
    return from_paths(leaves, params)


def violation(params: Any, plan: Plan, radii: Radii | Literal["fitted"] | None = None) -> dict[str, Float[Array, ""]]:
    """How far every constrained weight is from its manifold.

    Args:
      params: the parameters.
      plan: the plan of these parameters.
      radii: of the manifolds, by path: None for the plan's γ, `fg.radii(opt_state)`, or `"fitted"` for each matrix's
        own.

    Returns:
      For the path of every constrained parameter, the largest violation of its matrices: the largest absolute entry of
      the defining equation's residual at radius 1 (no unit).
    """
    leaves, result = checked_leaves(params, plan), {}
    for bucket, kind in zip(layout := buckets(plan), kinds_of(plan, layout).values, strict=True):
        x = bucket.stack(leaves)
        if isinstance(radii, str):
            scales = Mixture(bucket.kinds, kind).radius_of(x)
        else:
            scales = _gammas(plan, bucket, leaves) if radii is None else _radii(radii, bucket, leaves)
        for path, value in zip(bucket.paths, _violation(bucket.kinds, kind, scales, x), strict=True):
            if plan.collections[path].constrained:
                result[path] = value
    return result


def checked_leaves(params: Any, plan: Plan) -> dict[str, Array]:
    """The leaves by path, if they are those of the plan."""
    leaves = by_path(params)
    for path in dict.fromkeys([*plan, *leaves]):
        if path not in leaves:
            raise ValueError(f"the plan has a parameter {path!r} that these parameters lack: make the plan from them")
        if path not in plan.entries:
            raise ValueError(f"the parameter {path!r} is not in the plan: make the plan from these parameters")
        if leaves[path].shape != plan.entries[path].shape:
            raise ValueError(
                f"{path}: its shape is {leaves[path].shape}, the plan was made for {plan.entries[path].shape}"
            )
    return leaves


def gammas(plan: Plan, bucket: Bucket, dtype: jnp.dtype) -> Float[np.ndarray, "layers inputs outputs"]:
    """γ of every matrix of a bucket."""
    grid = bucket.view.grid[:2]
    return np.stack([np.broadcast_to(np.asarray(plan.collections[path].gamma, dtype), grid) for path in bucket.paths])


def _gammas(plan: Plan, bucket: Bucket, leaves: dict[str, Array]) -> Array:
    return jnp.asarray(gammas(plan, bucket, bucket.dtype(leaves)))


def _radii(radii: Radii, bucket: Bucket, leaves: dict[str, Array]) -> Array:
    grid, dtype = bucket.view.grid[:2], bucket.dtype(leaves)
    if missing := [path for path in bucket.paths if path not in radii]:
        raise ValueError(
            f"radii has no entry for {missing[0]!r}: pass fg.radii(opt_state) of a state made by this plan"
        )
    return jnp.stack([jnp.broadcast_to(jnp.asarray(radii[path], dtype), grid) for path in bucket.paths])


@functools.partial(jax.jit, static_argnums=0)
def _draw(kinds, keys, kind, radius, x):
    def of_layer(key, kind, radius, x):
        return Mixture(kinds, kind, radius).random_point(key, x)

    return jax.vmap(of_layer)(keys, kind, radius, x)


@functools.partial(jax.jit, static_argnums=0)
def _nearest(kinds, kind, radius, x):
    return Mixture(kinds, kind, radius).nearest(x)


@functools.partial(jax.jit, static_argnums=0)
def _nearest_fitted(kinds, kind, x):
    # The nearest point of radius 1 has the same direction at every radius; the best radius is <x, y> / <y, y>.
    y = Mixture(kinds, kind).nearest(x)
    unit = Mixture(kinds, kind).radius_of(y)
    length = jnp.sum(x * y, axis=(-2, -1)) / jnp.maximum(jnp.sum(y * y, axis=(-2, -1)), jnp.finfo(x.dtype).tiny)
    free = Mixture(kinds, kind).constrained(jnp.ones_like(unit)) == 0
    return jnp.where(free[..., None, None], x, length[..., None, None] * y)


@functools.partial(jax.jit, static_argnums=0)
def _violation(kinds, kind, radius, x):
    return jnp.max(Mixture(kinds, kind, radius).violation(x), axis=(1, 2))
