"""The definition of one step, from the manifolds' own methods: any manifold, any shape, any backend, differentiable.

It is a form too. The arrays of a mixture are joined along the first axis, so that the program does not grow with their
number, and sharded axes stay as they are.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..linalg import squared_norm
from ..manifolds import Mixture
from ._layers import Layer, Layers, Operation, Results, jitted


def tangent(
    mixture: Mixture, x: Float[Array, "*b n p"], g: Float[Array, "*b n p"]
) -> tuple[Float[Array, "*b n p"], Float[Array, "*b"]]:
    """Line 5 of Algorithm 1: the projection of `g` at `x`, and the squared norms, which may overflow."""
    t = mixture.project(x, g)
    return t, squared_norm(t)


def reciprocal_zeta(
    squares: Float[Array, "..."], rho: float | Float[Array, ""], curvature: float | Float[Array, ""]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Line 6: 1/ζ and R of groups by R², with ζ = max(1, R² Γ)^½, Γ = max((2ρ + R)², 1 + c(ρ + R)): eqs. 5 and 7."""
    # Where R is infinite, 0·∞ would be NaN; where ζ overflows, nothing is left of the step.
    r = jnp.minimum(jnp.sqrt(squares), float(jnp.finfo(squares.dtype).max))
    root_gamma = jnp.maximum(2 * rho + r, jnp.sqrt(jnp.maximum(0, 1 + curvature * (rho + r))))
    return 1 / jnp.maximum(1, r * root_gamma), r


def step(
    mixture: Mixture,
    x: Float[Array, "*b n p"],
    w: Float[Array, "*b n p"],
    radius: Float[Array, "*b"] | None,
    factor: Float[Array, ""],
    is_tangent: bool,
) -> tuple[Float[Array, "*b n p"], Float[Array, "*b"]]:
    """Line 7 and eq. 2: the displacement to the new point, and ‖v‖_F/s (0 if Euclidean).

    v is `factor` times `w`, projected at x first unless it `is_tangent`. The point reached is set to the
    new `radius` if that is given.
    """
    v = factor * (w if is_tangent else mixture.project(x, w))
    y = mixture.retract(x, v)
    if radius is not None:
        y = y * (radius / mixture.radius)[..., None, None]
    return y - x, mixture.constrained(jnp.sqrt(squared_norm(v)) / jnp.asarray(mixture.radius, v.dtype))


def of_layer(operation: Operation, layer: Layer, factor: Float[Array, ""]) -> tuple[Array, Array]:
    """The operation on matrices in one array."""
    mixture = Mixture(operation.manifolds, layer.kind, layer.radius)
    if not operation.is_step:
        return tangent(mixture, layer.x, layer.w)
    return step(mixture, layer.x, layer.w, layer.new_radius, factor, operation.is_tangent)


@jitted
def run(operation: Operation, layers: Sequence[Layers], factor: Float[Array, ""]) -> Results:
    """The operation on several layers: of all, arrays like their directions, and a figure for each matrix."""
    pairs = [(own, of_layer(operation, own.whole(), factor)) for own in layers]
    return [(own.parts(result), figures) for own, (result, figures) in pairs]
