from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import fgsgd_jax as fg

from ._paths import mapped


def clip_groups(plan: fg.Plan, longest: float) -> optax.GradientTransformation:
    """Shortens the gradient of every group of a plan to a norm of at most `longest`: ζ's rival.

    R/ζ falls as 1/(2+R) where R is large; clipped, the step keeps its length.
    """

    def init(params: Any) -> dict[str, Array]:
        del params
        return {path: jnp.asarray(collection.group) for path, collection in plan.collections.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params

        def clipped(path: str, t: Array) -> Array:
            if path not in plan.collections:
                return t
            collection, group = plan.collections[path], state[path]
            grid = collection.view.split(t)
            squares = jnp.sum(jnp.square(grid), axis=(-2, -1))
            total = jax.ops.segment_sum(squares.ravel(), group.ravel(), collection.num_groups)
            scale = longest / jnp.maximum(jnp.sqrt(total), longest)
            return collection.view.merge(scale[group][..., None, None] * grid)

        return mapped(clipped, updates), state

    return optax.GradientTransformation(init, update)
