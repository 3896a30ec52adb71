"""The definition of one step, from the manifolds' own methods: any manifold, any shape, any backend, differentiable."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..linalg import squared_norm
from ..manifolds import Manifold, Mixture
from ._layers import Layer


def tangent(
    mixture: Mixture, x: Float[Array, "*b n p"], g: Float[Array, "*b n p"]
) -> tuple[Float[Array, "*b n p"], Float[Array, "*b"]]:
    """Line 5 of Algorithm 1: the projection of `g` at `x`, and the squared norms, which may overflow."""
    t = mixture.project(x, g)
    return t, squared_norm(t)


def step(
    mixture: Mixture,
    x: Float[Array, "*b n p"],
    w: Float[Array, "*b n p"],
    radius: Float[Array, "*b"] | None,
    factor: Float[Array, ""],
    tangent: bool,
) -> tuple[Float[Array, "*b n p"], Float[Array, "*b"]]:
    """Line 7 and eq. 2: the displacement to the new point, and ‖v‖_F/s (0 if Euclidean).

    v is `factor` times the tangent part of `w`, which is all of it if it is `tangent`. The point reached is set to the
    new `radius` if that is given.
    """
    v = factor * (w if tangent else mixture.project(x, w))
    y = mixture.retract(x, v)
    if radius is not None:
        y = y * (radius / mixture.radius)[..., None, None]
    return y - x, mixture.constrained(jnp.sqrt(squared_norm(v)) / jnp.asarray(mixture.radius, v.dtype))


def tangent_of(manifolds: tuple[Manifold, ...]) -> Callable[[Layer], tuple[Array, Array]]:
    """`tangent` of a layer on these manifolds."""
    return lambda layer: tangent(Mixture(manifolds, layer.kind, layer.radius), layer.x, layer.w)


def step_of(
    manifolds: tuple[Manifold, ...], factor: Float[Array, ""], is_tangent: bool
) -> Callable[[Layer], tuple[Array, Array]]:
    """`step` of a layer on these manifolds."""

    def of(layer: Layer) -> tuple[Array, Array]:
        mixture = Mixture(manifolds, layer.kind, layer.radius)
        return step(mixture, layer.x, layer.w, layer.new_radius, factor, is_tangent)

    return of
