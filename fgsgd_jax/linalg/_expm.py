"""Matrix exponential."""

import jax
from jaxtyping import Array, Float


def expm(a: Float[Array, "*batch p p"]) -> Float[Array, "*batch p p"]:
    """Matrix exponential at full precision on every backend (Padé, scaling and squaring: `jax.scipy`)."""
    with jax.default_matmul_precision("highest"):
        return jax.scipy.linalg.expm(a)
