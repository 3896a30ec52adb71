"""The 2→1 norm of the paper."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._norm import norm


def two_to_one(x: Float[Array, "*batch n p"]) -> Float[Array, "*batch"]:
    """Sum of the Euclidean norms of the rows (Ozay 2019, caption of Table 1)."""
    return jnp.sum(norm(x, -1), axis=-1)
