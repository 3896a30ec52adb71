"""Line 6 of Algorithm 1: the gradient's norm over a group, and its normalization by ζ."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""]


def check_options(rho: Scalar, curvature: Scalar) -> None:
    """Raises for a negative ρ or c; tracers, as `optax.inject_hyperparams` passes, cannot be looked at."""
    for name, value in (("rho", rho), ("curvature", curvature)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name}={value}: give a number of 0 or more (ρ is a distance, c a bound of |curvature|)")


def group_norms(
    t: Float[Array, "layers inputs outputs rows cols"],
    group: Int[Array, "layers inputs outputs"] | None,
    num_groups: int,
) -> Float[Array, "layers groups"]:
    """R of eq. 6: the root of the sum of squares over each group of each layer."""
    squares = jnp.sum(jnp.square(t), axis=(-2, -1))
    layers = squares.shape[0]
    if group is None:
        squares = squares.reshape(layers, num_groups, -1).sum(axis=-1)
    else:
        numbers = group + num_groups * jnp.arange(layers, dtype=group.dtype)[:, None, None]
        squares = jax.ops.segment_sum(squares.ravel(), numbers.ravel(), layers * num_groups)
        squares = squares.reshape(layers, num_groups)
    return jnp.sqrt(squares)


def reciprocal_zeta(r: Float[Array, "..."], rho: Scalar, curvature: Scalar) -> Float[Array, "..."]:
    """1/ζ with ζ = max(1, R² Γ)^½ and Γ = max((2ρ + R)², 1 + c(ρ + R)): eqs. 5 and 7."""
    # Beyond this ζ would overflow; a step of length 1/R is already nothing there.
    r = jnp.minimum(r, jnp.finfo(r.dtype).max ** 0.25)
    root_gamma = jnp.maximum(2 * rho + r, jnp.sqrt(jnp.maximum(0, 1 + curvature * (rho + r))))
    return 1 / jnp.maximum(1, r * root_gamma)


def of_matrices(
    values: Float[Array, "layers groups"],
    group: Int[Array, "layers inputs outputs"] | None,
    grid: tuple[int, int],
) -> Float[Array, "layers inputs outputs"]:
    """The value of each matrix's group."""
    layers, num_groups = values.shape
    if group is None:
        return values.reshape(layers, *(grid if num_groups > 1 else (1, 1)))
    return jnp.take_along_axis(values, group.reshape(layers, -1), axis=1).reshape(group.shape)
