from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import fgsgd_jax as fg


def clip_groups(plan: fg.Plan, longest: float) -> optax.GradientTransformation:
    """Shortens the gradient of every group of a plan to a norm of at most `longest`: ζ's rival.

    R/ζ falls as 1/(2+R) where R is large; clipped, the step keeps its length.
    """

    def init(params: Any) -> dict[str, Array]:
        del params
        return {path: jnp.asarray(collection.group) for path, collection in plan.collections.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params

        def clipped(path: Any, t: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in plan.collections:
                return t
            collection, group = plan.collections[name], state[name]
            grid = collection.view.split(t)
            squares = jnp.sum(jnp.square(grid), axis=(-2, -1))
            total = jax.ops.segment_sum(squares.ravel(), group.ravel(), collection.num_groups)
            scale = longest / jnp.maximum(jnp.sqrt(total), longest)
            return collection.view.merge(scale[group][..., None, None] * grid)

        return jax.tree_util.tree_map_with_path(clipped, updates), state

    return optax.GradientTransformation(init, update)
