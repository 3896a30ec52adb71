"""Polar factor of a well-conditioned matrix, by products alone."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._largest import largest
from ._norm import norm
from ._polar import polar_differential
from ._products import MATRICES_LAST, Layout, layout_for

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
    return layout.give(_orthonormalized(layout.take(y), fallback, lambda y: y, y, layout=layout))


@jax.custom_jvp
def orthonormalize_sum(x: Float[Array, "*batch n p"], v: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """`orthonormalize` of `x + v`, or `x`, which is orthonormal, where there is no polar factor.

    Where `v` is longer than eps^-½, it is cut to that: beyond, x is lost to round-off in x + v and with it the rank.
    """
    layout = layout_for(x.shape)
    y = layout.apart(operator.add, layout.apart(layout.take, x), layout.take(v))
    return layout.give(_orthonormalized(y, x, lambda x, v: x + shortened(v), x, v, layout=layout))


def _orthonormalized(y: Array, fallback: Array, far: Callable[..., Array], *args: Array, layout: Layout) -> Array:
    """The polar factor of `y`, which is that of `far(*args)` and found from it where it is far from orthonormal.

    `y` and the answer are in the layout, all other matrices are not.
    """
    e = layout.apart(lambda y: gram_less_eye(y, layout), y)
    furthest = largest(layout.apart(lambda e: infinity_norm(e, layout), e))

    def by_gram(y, e, fallback, *args):
        del fallback, args
        root = inverse_root_less_eye(e, furthest, layout)
        return layout.apart(lambda y, root: layout.matmul(y, root + layout.eye(root)), y, root)

    def by_iteration(y, e, fallback, *args):
        del y, e
        return iterate(layout.take(far(*args)), layout.take(fallback), layout)

    return lax.cond(furthest <= LARGEST_DEVIATION, by_gram, by_iteration, y, e, fallback, *args)


def shortened(v: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """`v` cut to length eps^-½."""
    longest = jnp.finfo(v.dtype).eps ** -0.5
    return v * (longest / jnp.maximum(norm(v, (-2, -1), keepdims=True), longest))


def gram_less_eye(y: Array, layout: Layout) -> Array:
    """`yᵀy - I`, whose `infinity_norm` is the `furthest` of `inverse_root_less_eye`."""
    g = layout.gram(y, y)
    return g - layout.eye(g)


def infinity_norm(a: Array, layout: Layout) -> Array:
    """Of each matrix (axes of length 1): an upper bound of the spectral norm of a symmetric one."""
    return layout.max(layout.sum(jnp.abs(a), 1), 0)


def inverse_root_less_eye(e: Array, furthest: Float[Array, ""], layout: Layout) -> Array:
    """`(I + e)^-½ - I` by products of p×p matrices only, as many as `furthest`, the largest norm of `e`, asks for.

    It is at most LARGEST_DEVIATION. Factors and Grams are held less the identity: terms of a product that are small
    beside its ones are lost from their sum, and all in one direction, which is 3e-6 of the diagonal at p = 256.
    """
    factor, square = _quintic_less_eye(e, layout)
    if layout is MATRICES_LAST:
        # Of large matrices a much lower bound of the spectral norm.
        furthest = jnp.minimum(furthest, jnp.sqrt(largest(infinity_norm(square, layout))))
    exact = e.dtype == jnp.float64
    steps = 1 + exact + sum(jnp.int32(furthest > bound) for bound in _STEPS_FOR_DEVIATION[:-1])

    def step(_, carry):
        root, e, square = carry

        def next_deviation(e, square):
            # (I - e/2 + 3/8 e²)² (I + e) - I, multiplied out.
            return layout.matmul(e, 0.625 * layout.eye(e) - 0.234375 * e + 0.140625 * square)

        e = layout.apart(layout.matmul, square, layout.apart(next_deviation, e, square))
        factor, square = _quintic_less_eye(e, layout)
        return layout.apart(lambda root, factor: root + factor + layout.matmul(root, factor), root, factor), e, square

    def of_order_four(factor, e, square):
        return layout.apart(
            lambda factor, e, square: factor + layout.matmul(square, 0.2734375 * square - 0.3125 * e), factor, e, square
        )

    def by_steps(*carry):
        return lax.fori_loop(1, steps, step, carry)[0]

    if exact:
        return by_steps(factor, e, square)
    order_four = (furthest > _STEPS_FOR_DEVIATION[0]) & (furthest <= _ORDER_FOUR_BELOW)
    return lax.cond(order_four, of_order_four, by_steps, factor, e, square)


def iterate(y: Array, fallback: Array, layout: Layout) -> Array:
    """Polar factor of `y` by quintic steps on scaled matrices until they converge; `fallback` where they do not.

    The identity where `fallback` is nothing like orthonormal.
    """
    # First by the largest entry, so that no product overflows or vanishes; then by the Gram's ∞-norm, which puts
    # all singular values into (0, 1], where the iteration converges.
    top = layout.apart(lambda y: layout.max(jnp.abs(y)), y)
    usable = (top > 0) & jnp.isfinite(top)
    z = jnp.where(usable, y / jnp.where(usable, top, 1), 0)
    bound = layout.apart(lambda z: infinity_norm(layout.gram(z, z), layout), z)
    z = z / jnp.sqrt(jnp.where(usable, bound, 1))

    # From here one more step reaches round-off.
    enough = 2.0**-18 if y.dtype == jnp.float64 else _STEPS_FOR_DEVIATION[0]

    def deviation(e):
        return layout.apart(lambda e: infinity_norm(e, layout), e)

    def with_deviation(z):
        return z, layout.apart(lambda z: gram_less_eye(z, layout), z)

    def nearer(z, e):
        factor, _ = _quintic_less_eye(e, layout)
        return layout.apart(lambda z, factor: z + layout.matmul(z, factor), z, factor)

    def unconverged(carry):
        _, e, iteration = carry
        return (largest(deviation(e)) > enough) & (iteration < _MOST_ITERATIONS)

    def step(carry):
        z, e, iteration = carry
        return *with_deviation(nearer(z, e)), iteration + 1

    z, e, _ = lax.while_loop(unconverged, step, (*with_deviation(z), 0))
    return jnp.where(deviation(e) <= enough, nearer(z, e), _orthonormal(fallback, layout))


def _orthonormal(x: Array, layout: Layout) -> Array:
    """`x`, or the identity where its columns are far from orthonormal."""
    deviation = layout.apart(lambda x: infinity_norm(gram_less_eye(x, layout), layout), x)
    return jnp.where(deviation <= _STEPS_FOR_DEVIATION[1], x, layout.eye(x))


def _quintic_less_eye(e: Array, layout: Layout) -> tuple[Array, Array]:
    """Less I, the Taylor polynomial of `(I + e)^-½` of order 2; and `e²`."""
    square = layout.apart(layout.matmul, e, e)
    return 0.375 * square - 0.5 * e, square


@orthonormalize.defjvp
def _orthonormalize_jvp(primals, tangents):
    y, fallback = primals
    u = orthonormalize(y, fallback)
    return u, polar_differential(u, y, tangents[0])


@orthonormalize_sum.defjvp
def _orthonormalize_sum_jvp(primals, tangents):
    x, v = primals
    u = orthonormalize_sum(x, v)
    return u, polar_differential(u, x + shortened(v), tangents[0] + tangents[1])
