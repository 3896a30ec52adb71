"""Line 6 of Algorithm 1: the scale of a group's steps."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def reciprocal_zeta(
    squares: Float[Array, "..."], rho: float | Float[Array, ""], curvature: float | Float[Array, ""]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """1/ζ and R of groups by their R², with ζ = max(1, R² Γ)^½ and Γ = max((2ρ + R)², 1 + c(ρ + R)): eqs. 5 and 7."""
    # Where R is infinite, 0·∞ would be NaN; where ζ overflows, nothing is left of the step.
    r = jnp.minimum(jnp.sqrt(squares), float(jnp.finfo(squares.dtype).max))
    root_gamma = jnp.maximum(2 * rho + r, jnp.sqrt(jnp.maximum(0, 1 + curvature * (rho + r))))
    return 1 / jnp.maximum(1, r * root_gamma), r
