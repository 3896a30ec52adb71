"""Putting weights on their manifolds, and measuring how well they lie there."""

import functools
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from ..linalg import largest, squared_norm
from ..manifolds import Euclidean, Mixture
from ._as_plan import Rules, as_plan
from ._automatic import automatic
from ._buckets import Bucket, buckets, gammas, kinds_of
from ._paths import by_path, from_paths
from ._plan import Plan

Radii = dict[str, Float[Array, "*layers inputs outputs"]]


def initialize(key: PRNGKeyArray, params: Any, plan: Plan | Rules) -> Any:
    """Draws every constrained weight uniformly on its manifold of radius γ.

    This is the paper's initialization (line 2 of Algorithm 1, λ = 1). Euclidean matrices and unconstrained parameters
    are returned as they are. A parameter's draw depends on the key and its path alone.

    Args:
      key: a JAX random key.
      params: the parameters, for their structure, shapes, dtypes and the Euclidean weights.
      plan: the plan of these parameters, or its rules.

    Returns:
      Parameters of the same structure.

    Raises:
      ValueError: parameters that are not those of the plan.

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
    leaves = checked_leaves(params, plan)
    for bucket, kind, gamma in _buckets(plan, leaves):
        own = _of_bucket(bucket, leaves)
        hashes = np.array([[zlib.crc32(name.encode()) for name in bucket.layer_names(path)] for path in bucket.paths])
        leaves |= automatic(
            functools.partial(_uniform, bucket), key, hashes.astype(np.uint32), kind, gamma, own, like=own
        )
    return from_paths(_placed(leaves, params), params)


def nearest(params: Any, plan: Plan | Rules, radii: Radii | Literal["fitted"] | None = None) -> Any:
    """Moves every constrained weight to the nearest point of its manifold.

    Use it for weights that were trained without the constraint, or averaged.

    Args:
      params: the parameters.
      plan: the plan of these parameters, or its rules.
      radii: of the manifolds: None for the plan's γ, `fg.radii(opt_state)` for those of a training, `"fitted"` for the
        radius of each matrix's own scale (the least-squares fit of the manifold to it).

    Returns:
      Parameters of the same structure; Euclidean and unconstrained ones as they are.

    Raises:
      ValueError: parameters that are not those of the plan, or radii without an entry.

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
    leaves = checked_leaves(params, plan)
    for bucket, kind, gamma in _buckets(plan, leaves):
        radius = _radii(radii, bucket, gamma)
        own = _of_bucket(bucket, leaves)
        leaves |= automatic(functools.partial(_nearest, bucket), kind, radius, own, like=own)
    return from_paths(_placed(leaves, params), params)


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
      ValueError: parameters that are not those of the plan, or radii without an entry.

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
    for bucket, kind, gamma in _buckets(plan, leaves):
        if all(isinstance(manifold, Euclidean) for manifold in bucket.kinds):
            continue
        radius = _radii(radii, bucket, gamma)
        own, like = _of_bucket(bucket, leaves), jnp.zeros(len(bucket.paths))
        found = automatic(functools.partial(_violation, bucket), kind, radius, own, like=like)
        result |= dict(zip(bucket.paths, found, strict=True))
    return {path: result[path] for path in plan.collections if path in result}


def checked_leaves(params: Any, plan: Plan) -> dict[str, Any]:
    """The leaves by path, arrays of JAX or NumPy, if they are those of the plan."""
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


def _buckets(plan: Plan, leaves: dict[str, Array]) -> Iterator[tuple[Bucket, Array | None, Array]]:
    """The buckets of a plan with the kinds and γ of their matrices [paths, *layers, inputs, outputs]."""
    for bucket, kind, gamma in zip(buckets(plan), kinds_of(plan), gammas(plan, leaves), strict=True):
        yield bucket, kind if len(bucket.kinds) > 1 else None, gamma


def _placed(leaves: dict[str, Array], like: Any) -> dict[str, Array]:
    """The leaves shared out as those of `like` are: a compiled program may choose anew."""

    def placed(leaf, before):
        sharding = None if isinstance(before, Tracer) else getattr(before, "sharding", None)
        spread = sharding is not None and len(sharding.device_set) > 1
        return jax.device_put(leaf, sharding) if spread and not isinstance(leaf, Tracer) else leaf

    before = by_path(like)
    return {path: placed(leaf, before[path]) for path, leaf in leaves.items()}


def _of_bucket(bucket: Bucket, leaves: dict[str, Array]) -> dict[str, Array]:
    return {path: leaves[path] for path in bucket.paths}


def _radii(radii: Radii | str | None, bucket: Bucket, gamma: Array) -> Array | None:
    """The radii of a bucket's matrices; None for those fitted to the weights."""
    if radii is None or isinstance(radii, str):
        return None if radii else gamma
    if missing := [path for path in bucket.paths if path not in radii]:
        raise ValueError(
            f"radii has no entry for {missing[0]!r}: pass fg.radii(opt_state) of a state made by this plan"
        )
    return jnp.stack([jnp.broadcast_to(jnp.asarray(radii[path]), bucket.grid) for path in bucket.paths])


# One program per bucket, with the stacking inside: run one by one, its slices are compiled one by one.


@functools.partial(jax.jit, static_argnums=0)
def _uniform(bucket: Bucket, key, hashes, kind, radius, leaves):
    x = bucket.matrices(leaves)
    # A layer of a stack is drawn as it would be alone.
    shape = bucket.shape[len(bucket.layers) :]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes.ravel())
    z = jax.vmap(lambda key: jax.random.normal(key, shape, x.dtype))(keys)
    mixture = Mixture(bucket.kinds, kind, radius.astype(x.dtype))
    return bucket.tensors(mixture.from_gaussian(bucket.view.split(z).reshape(x.shape), x), leaves)


@functools.partial(jax.jit, static_argnums=0)
def _nearest(bucket: Bucket, kind, radius, leaves):
    x = bucket.matrices(leaves)
    if radius is not None:
        return bucket.tensors(Mixture(bucket.kinds, kind, radius.astype(x.dtype)).nearest(x), leaves)
    # The nearest point of radius 1 has the same direction at every radius; the best radius is <x, y> / <y, y>.
    y = Mixture(bucket.kinds, kind).nearest(x)
    unit = Mixture(bucket.kinds, kind).radius_of(y)
    length = jnp.sum(x * y, axis=(-2, -1)) / jnp.maximum(squared_norm(y), jnp.finfo(x.dtype).tiny)
    free = Mixture(bucket.kinds, kind).constrained(jnp.ones_like(unit)) == 0
    return bucket.tensors(jnp.where(free[..., None, None], x, length[..., None, None] * y), leaves)


@functools.partial(jax.jit, static_argnums=0)
def _violation(bucket: Bucket, kind, radius, leaves):
    x = bucket.matrices(leaves)
    mixture = Mixture(bucket.kinds, kind)
    mixture = mixture.at(mixture.radius_of(x) if radius is None else radius.astype(x.dtype))
    return largest(bucket.by_path(mixture.violation(x)), 1)
