"""Polar factor of a well-conditioned matrix, by products alone."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ._polar import polar_differential
from ._products import gram, matmul

# One quintic step maps the Gram's deviation e = ‖yᵀy - I‖ to 5/8 e³ (to leading order). So for float32 one step
# is enough below the first bound, two below the second, three below the third; float64 takes one more.
_STEPS_FOR_DEVIATION = (2.0**-7, 0.2, 0.7)
_MOST_ITERATIONS = 64


def _quintic(g: Array) -> Array:
    """`15/8 I - 5/4 g + 3/8 g²`: the Taylor polynomial of `g^-½` about I, of order 2."""
    eye = jnp.broadcast_to(jnp.eye(g.shape[-1], dtype=g.dtype), g.shape)
    return 1.875 * eye - 1.25 * g + 0.375 * matmul(g, g)


def _inverse_root(g: Array, steps: Int[Array, ""]) -> Array:
    """`g^-½` by quintic steps among p×p matrices only, for `g` near the identity."""

    def step(_, carry):
        root, factor, g = carry
        g = matmul(matmul(factor, g), factor)
        factor = _quintic(g)
        return matmul(root, factor), factor, g

    factor = _quintic(g)
    return lax.fori_loop(1, steps, step, (factor, factor, g))[0]


def _deviation(g: Array) -> Float[Array, "..."]:
    """∞-norm of `g - I`: an upper bound of the spectral norm."""
    eye = jnp.broadcast_to(jnp.eye(g.shape[-1], dtype=g.dtype), g.shape)
    return jnp.max(jnp.sum(jnp.abs(g - eye), axis=-1), axis=-1, initial=0.0)


@jax.custom_jvp
def orthonormalize(y: Float[Array, "*batch n p"], fallback: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Polar factor of `y`, n ≥ p, by Newton–Schulz steps on its Gram matrix.

    Near the manifold (singular values of `y` within about 0.5 of 1) it costs two n·p² products: the Gram and the
    application of a polynomial in it, whose number of p×p steps is chosen from the measured deviation of
    the whole batch. Because the Gram is that of `y` itself, errors of earlier calls are corrected, not
    carried along. Anywhere else it iterates on scaled matrices until it converges. Matrices for which it
    does not (rank-deficient, not finite) are replaced by `fallback`.

    The number of steps is a decision at run time, inside jit; under `vmap` all branches run.
    """
    g = gram(y, y)
    deviation = jnp.max(_deviation(g), initial=0.0)
    # Comparisons with NaN are false: a batch with one NaN takes the safe branch.
    beyond = jnp.asarray([~(deviation <= bound) for bound in _STEPS_FOR_DEVIATION])
    steps = 1 + jnp.sum(beyond, dtype=jnp.int32) + (1 if y.dtype == jnp.float64 else 0)

    def near(y, g, fallback):
        del fallback
        return matmul(y, _inverse_root(g, steps))

    def far(y, g, fallback):
        # First by the largest entry, so that no product overflows or vanishes; then by the Gram's ∞-norm, which puts
        # all singular values into (0, 1], where the iteration converges.
        del g
        largest = jnp.max(jnp.abs(y), axis=(-2, -1), keepdims=True, initial=0.0)
        usable = (largest > 0) & jnp.isfinite(largest)
        z = jnp.where(usable, y / jnp.where(usable, largest, 1), 0)
        bound = jnp.max(jnp.sum(jnp.abs(gram(z, z)), axis=-1), axis=-1, initial=0.0)[..., None, None]
        z = z / jnp.sqrt(jnp.where(usable, bound, 1))

        # From here one more step reaches round-off.
        enough = 2.0**-18 if y.dtype == jnp.float64 else _STEPS_FOR_DEVIATION[0]

        def unconverged(carry):
            _, g, iteration = carry
            return (jnp.max(_deviation(g), initial=0.0) > enough) & (iteration < _MOST_ITERATIONS)

        def step(carry):
            z, g, iteration = carry
            z = matmul(z, _quintic(g))
            return z, gram(z, z), iteration + 1

        z, g, _ = lax.while_loop(unconverged, step, (z, gram(z, z), 0))
        z, converged = matmul(z, _quintic(g)), _deviation(g) <= enough
        return jnp.where(converged[..., None, None], z, fallback)

    return lax.cond(beyond[-1], far, near, y, g, fallback)


@orthonormalize.defjvp
def _orthonormalize_jvp(primals, tangents):
    y, fallback = primals
    u = orthonormalize(y, fallback)
    return u, polar_differential(u, y, tangents[0])
