"""Polar factor of a well-conditioned matrix, by products alone."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._largest import largest
from ._polar import polar_differential
from ._products import Layout, layout_for

# One quintic step maps the Gram's deviation e = ‖yᵀy - I‖ to 5/8 e³ (to leading order). So for float32 one step
# is enough below the first bound, two below the second, three below the third; float64 takes one more. The polynomial
# of order 4 maps it to 1/2 e⁵, for two p×p products where two steps take five: enough for float32 below its own bound.
_STEPS_FOR_DEVIATION = (2.0**-7, 0.2, 0.7)
_ORDER_FOUR_BELOW = 0.05
LARGEST_DEVIATION = _STEPS_FOR_DEVIATION[-1]
_MOST_ITERATIONS = 64


@jax.custom_jvp
def orthonormalize(y: Float[Array, "*batch n p"], fallback: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Polar factor of `y`, n ≥ p, by Newton–Schulz steps on its Gram matrix.

    Near the manifold (singular values of `y` within about 0.5 of 1) it costs two n·p² products: the Gram and the
    application of a polynomial in it, of an order that is chosen from the measured deviation of the whole batch.
    Because the Gram is that of `y` itself, errors of earlier calls are corrected, not carried along. Anywhere else
    it iterates on scaled matrices until it converges. Matrices for which it does not (rank-deficient, not finite)
    are replaced by `fallback`, and by the identity where that is nothing like a point of the manifold either.

    The order is a decision at run time, inside jit; under `vmap` all branches run.
    """
    layout = layout_for(y.shape)
    y, fallback = layout.take(y), layout.take(fallback)
    g = layout.gram(y, y)
    furthest = largest(deviation(g, layout))

    def by_gram(y, g, fallback):
        del fallback
        return layout.matmul(y, inverse_root(g, furthest, layout))

    def by_iteration(y, g, fallback):
        del g
        return iterate(y, fallback, layout)

    return layout.give(lax.cond(furthest <= LARGEST_DEVIATION, by_gram, by_iteration, y, g, fallback))


def deviation(g: Array, layout: Layout) -> Array:
    """∞-norm of `g - I` of each matrix (axes of length 1): an upper bound of the spectral norm."""
    return _infinity_norm(g - layout.eye(g), layout)


def _infinity_norm(a: Array, layout: Layout) -> Array:
    return layout.max(layout.sum(jnp.abs(a), 1), 0)


def inverse_root(g: Array, furthest: Float[Array, ""], layout: Layout) -> Array:
    """`g^-½` by products of p×p matrices only, as many as `furthest`, the largest `deviation`, asks for.

    It is at most LARGEST_DEVIATION. Factors and Grams are held less the identity: terms of a product that are small
    beside its ones are lost from their sum, and all in one direction, which is 3e-6 of the diagonal at p = 256.
    """
    eye = layout.eye(g)
    e = g - eye
    factor, square = _quintic_less_eye(e, layout)
    # Of large matrices a much lower bound of the spectral norm.
    furthest = jnp.minimum(furthest, jnp.sqrt(largest(_infinity_norm(square, layout))))
    exact = g.dtype == jnp.float64
    steps = 1 + exact + sum(jnp.int32(furthest > bound) for bound in _STEPS_FOR_DEVIATION[:-1])

    def step(_, carry):
        root, e, square = carry
        # (I - e/2 + 3/8 e²)² (I + e) - I, multiplied out.
        rest = 0.625 * eye - 0.234375 * e + 0.140625 * square
        e = layout.matmul(layout.matmul(e, square), rest)
        factor, square = _quintic_less_eye(e, layout)
        return root + factor + layout.matmul(root, factor), e, square

    def of_order_four(factor, e, square):
        return factor + layout.matmul(square, 0.2734375 * square - 0.3125 * e)

    def by_steps(*carry):
        return lax.fori_loop(1, steps, step, carry)[0]

    if exact:
        return eye + by_steps(factor, e, square)
    order_four = (furthest > _STEPS_FOR_DEVIATION[0]) & (furthest <= _ORDER_FOUR_BELOW)
    return eye + lax.cond(order_four, of_order_four, by_steps, factor, e, square)


def iterate(y: Array, fallback: Array, layout: Layout) -> Array:
    """Polar factor of `y` by quintic steps on scaled matrices until they converge; `fallback` where they do not.

    The identity where `fallback` is nothing like orthonormal.
    """
    # First by the largest entry, so that no product overflows or vanishes; then by the Gram's ∞-norm, which puts
    # all singular values into (0, 1], where the iteration converges.
    top = layout.max(jnp.abs(y))
    usable = (top > 0) & jnp.isfinite(top)
    z = jnp.where(usable, y / jnp.where(usable, top, 1), 0)
    bound = layout.max(layout.sum(jnp.abs(layout.gram(z, z)), 1), 0)
    z = z / jnp.sqrt(jnp.where(usable, bound, 1))

    # From here one more step reaches round-off.
    enough = 2.0**-18 if y.dtype == jnp.float64 else _STEPS_FOR_DEVIATION[0]

    def unconverged(carry):
        _, g, iteration = carry
        return (largest(deviation(g, layout)) > enough) & (iteration < _MOST_ITERATIONS)

    def step(carry):
        z, g, iteration = carry
        z = layout.matmul(z, _quintic(g, layout))
        return z, layout.gram(z, z), iteration + 1

    z, g, _ = lax.while_loop(unconverged, step, (z, layout.gram(z, z), 0))
    z, converged = layout.matmul(z, _quintic(g, layout)), deviation(g, layout) <= enough
    return jnp.where(converged, z, _orthonormal(fallback, layout))


def _orthonormal(x: Array, layout: Layout) -> Array:
    """`x`, or the identity where its columns are far from orthonormal."""
    near = deviation(layout.gram(x, x), layout) <= _STEPS_FOR_DEVIATION[1]
    eye = jnp.eye(*(x.shape[axis] for axis in layout.axes), dtype=x.dtype)
    return jnp.where(near, x, layout.take(jnp.broadcast_to(eye, layout.give(x).shape)))


def _quintic(g: Array, layout: Layout) -> Array:
    """`15/8 I - 5/4 g + 3/8 g²`: the Taylor polynomial of `g^-½` about I, of order 2."""
    eye = layout.eye(g)
    return eye + _quintic_less_eye(g - eye, layout)[0]


def _quintic_less_eye(e: Array, layout: Layout) -> tuple[Array, Array]:
    """The polynomial of `g = I + e` less I, and `e²`."""
    square = layout.matmul(e, e)
    return 0.375 * square - 0.5 * e, square


@orthonormalize.defjvp
def _orthonormalize_jvp(primals, tangents):
    y, fallback = primals
    u = orthonormalize(y, fallback)
    return u, polar_differential(u, y, tangents[0])
