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
from ._products import Layout, upright_layout_for
from ._total import sum_of_rows, total

# One quintic step maps the Gram's deviation e = ‖yᵀy - I‖ to 5/8 e³ (to leading order). So for float32 one step
# is enough below the first bound, two below the second, three below the third; float64 takes one more. The polynomial
# of order 4 maps it to 1/2 e⁵, for two p×p products where two steps take five: enough for float32 below its own bound.
_STEPS_FOR_DEVIATION = (0.005, 0.2, 0.7)
_ORDER_FOUR_BELOW = 0.04
_MOST_ITERATIONS = 64
# From so many rows on, products in float32 leave a Gram matrix's diagonal 2e-7 off. Many small matrices have fewer.
_TALL = 128
# The parts in which a column's squares are added up.
_PARTS = 8


@jax.custom_jvp
def orthonormalize(y: Float[Array, "*batch n p"], fallback: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Polar factor of `y` by Newton–Schulz steps on its Gram matrix: orthonormal columns, or rows for n < p.

    Near the manifold (singular values of `y` within about 0.5 of 1) it costs two n·p² products: the Gram and the
    application of a polynomial in it, of an order that is chosen from the measured deviation of the whole batch.
    Because the Gram is that of `y` itself, errors of earlier calls are corrected, not carried along. Anywhere else
    it iterates on scaled matrices until it converges: those of `within_reach(y, fallback)`. Matrices for which it does
    not (rank-deficient, not finite) are replaced by `fallback`, and by the identity where that is nothing like a point
    of the manifold either.

    The order is a decision at run time, inside jit; under `vmap` all branches run.
    """
    layout = upright_layout_for(y.shape)
    return layout.give(_orthonormalized(layout.take(y), fallback, layout))


@jax.custom_jvp
def orthonormalize_sum(x: Float[Array, "*batch n p"], v: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """`orthonormalize(x + v, x)`, which is formed where the terms are."""
    layout = upright_layout_for(x.shape)
    return layout.give(
        _orthonormalized(layout.apart(operator.add, layout.apart(layout.take, x), layout.take(v)), x, layout)
    )


def _orthonormalized(y: Array, fallback: Array, layout: Layout) -> Array:
    """The answer in the layout, in which `y` is given, but not `fallback`."""
    e, square = gram_less_eye(y, layout)

    def by_gram(root, y, fallback):
        del fallback
        return layout.apart(lambda y, root: layout.matmul(y, root + layout.eye(root)), y, root)

    def by_iteration(y, fallback):
        return iterate(layout.take(within_reach(layout.give(y), fallback)), layout.take(fallback), layout)

    furthest = largest(layout.apart(lambda square: spectral_bounds(square, layout), square))
    return with_inverse_root(furthest, e, square, by_gram, by_iteration, y, fallback, layout=layout)


def within_reach(y: Float[Array, "*batch n p"], x: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """`y`, or what lies eps^-½ from `x` on the way: from beyond, y holds nothing of x, and may lack its rank."""
    longest = jnp.finfo(y.dtype).eps ** -0.5
    length = norm(y - x, (-2, -1), keepdims=True)
    return jnp.where(length > longest, x + (y - x) * (longest / jnp.maximum(length, longest)), y)


def deviation(y: Array, layout: Layout) -> Array:
    """`yᵀy - I`.

    Grams are held less the identity: terms of a product that are small beside its ones are lost from their sum, and all
    in one direction, which is 3e-6 of the diagonal at p = 256.
    """
    g = layout.gram(y, y)
    e = g - layout.eye(g)
    if y.shape[layout.axes[0]] < _TALL:
        return e
    # A product adds up a column's squares to 1 one by one, and rounds every sum: off by 1e-6 at n = 768. With one batch
    # axis nothing is sharded; slices of sharded rows would be gathered.
    squares = jnp.square(y)
    sums = total(squares, layout.axes[:1], _PARTS, layout) if y.ndim == 3 else sum_of_rows(squares, _PARTS, layout)
    return jnp.where(layout.eye(e) > 0, sums - 1, e)


def gram_less_eye(y: Array, layout: Layout) -> tuple[Array, Array]:
    """`e = yᵀy - I` and `e²`."""
    e = layout.apart(lambda y: deviation(y, layout), y)
    return e, layout.apart(layout.matmul, e, e)


def spectral_bounds(square: Array, layout: Layout) -> Array:
    """Bounds of the spectral norms of symmetric e with these squares, axes of length 1: p^¼ times them at most."""
    return jnp.sqrt(jnp.sqrt(layout.sum(jnp.square(square))))


def with_inverse_root(
    furthest: Float[Array, ""],
    e: Array,
    square: Array,
    use: Callable[..., Array],
    otherwise: Callable[..., Array],
    *args: Array,
    layout: Layout,
) -> Array:
    """`use(root, *args)` with `root = (I + e)^-½ - I`; `otherwise(*args)` where e is too large for a polynomial in it.

    By as few products of p×p matrices as `furthest`, the largest of the `spectral_bounds`, allows.
    """

    def by_one_step(e, square, *args):
        return use(_quintic_less_eye(e, square), *args)

    def by_order_four(e, square, *args):
        def root(e, square):
            return _quintic_less_eye(e, square) + layout.matmul(square, 0.2734375 * square - 0.3125 * e)

        return use(layout.apart(root, e, square), *args)

    def by_steps(e, square, *args):
        return use(_by_steps(e, square, furthest, layout), *args)

    def by_other_means(e, square, *args):
        del e, square
        return otherwise(*args)

    bounds, branches = (_STEPS_FOR_DEVIATION[-1],), (by_steps, by_other_means)
    if e.dtype != jnp.float64:
        bounds, branches = (
            (_STEPS_FOR_DEVIATION[0], _ORDER_FOUR_BELOW, *bounds),
            (by_one_step, by_order_four, *branches),
        )
    # Of NaN none is true.
    index = sum(jnp.int32(~(furthest <= bound)) for bound in bounds)
    return lax.switch(index, branches, e, square, *args)


def _by_steps(e: Array, square: Array, furthest: Float[Array, ""], layout: Layout) -> Array:
    """The inverse root less I by quintic steps."""
    steps = 1 + (e.dtype == jnp.float64) + sum(jnp.int32(furthest > bound) for bound in _STEPS_FOR_DEVIATION[:-1])

    def step(_, carry):
        root, e, square = carry

        def next_deviation(e, square):
            # (I - e/2 + 3/8 e²)² (I + e) - I, multiplied out.
            return layout.matmul(e, 0.625 * layout.eye(e) - 0.234375 * e + 0.140625 * square)

        e = layout.apart(layout.matmul, square, layout.apart(next_deviation, e, square))
        square = layout.apart(layout.matmul, e, e)

        def composed(root, e, square):
            factor = _quintic_less_eye(e, square)
            return root + factor + layout.matmul(root, factor)

        return layout.apart(composed, root, e, square), e, square

    return lax.fori_loop(1, steps, step, (_quintic_less_eye(e, square), e, square))[0]


def _quintic_less_eye(e: Array, square: Array) -> Array:
    """The Taylor polynomial of `(I + e)^-½` of order 2, less I."""
    return 0.375 * square - 0.5 * e


def iterate(y: Array, fallback: Array, layout: Layout) -> Array:
    """Polar factor of `y` by quintic steps on scaled matrices until they converge; `fallback` where they do not.

    The identity where `fallback` is nothing like orthonormal.
    """
    # First by the largest entry, so that no product overflows or vanishes; then by the Gram's ∞-norm, which puts
    # all singular values into (0, 1], where the iteration converges.
    top = layout.apart(lambda y: layout.max(jnp.abs(y)), y)
    usable = (top > 0) & jnp.isfinite(top)
    z = jnp.where(usable, y / jnp.where(usable, top, 1), 0)
    bound = layout.apart(lambda z: _infinity_norm(layout.gram(z, z), layout), z)
    z = z / jnp.sqrt(jnp.where(usable, bound, 1))

    # From here one more step reaches round-off.
    enough = 2.0**-18 if y.dtype == jnp.float64 else _STEPS_FOR_DEVIATION[0]

    def bounds(square):
        return layout.apart(lambda square: spectral_bounds(square, layout), square)

    def nearer(z, e, square):
        return layout.apart(lambda z, e, square: z + layout.matmul(z, _quintic_less_eye(e, square)), z, e, square)

    def unconverged(carry):
        *_, square, iteration = carry
        return (largest(bounds(square)) > enough) & (iteration < _MOST_ITERATIONS)

    def step(carry):
        *parts, iteration = carry
        z = nearer(*parts)
        return z, *gram_less_eye(z, layout), iteration + 1

    *parts, _ = lax.while_loop(unconverged, step, (z, *gram_less_eye(z, layout), 0))
    return jnp.where(bounds(parts[-1]) <= enough, nearer(*parts), _orthonormal(fallback, layout))


def _orthonormal(x: Array, layout: Layout) -> Array:
    """`x`, or the identity where its columns are far from orthonormal."""
    bounds = spectral_bounds(gram_less_eye(x, layout)[1], layout)
    return jnp.where(bounds <= _STEPS_FOR_DEVIATION[1], x, layout.eye(x))


def _infinity_norm(a: Array, layout: Layout) -> Array:
    return layout.max(layout.sum(jnp.abs(a), 1), 0)


@orthonormalize.defjvp
def _orthonormalize_jvp(primals, tangents):
    y, near = jax.jvp(within_reach, primals, tangents)
    u = orthonormalize(*primals)
    return u, _differential(u, y, near)


@orthonormalize_sum.defjvp
def _orthonormalize_sum_jvp(primals, tangents):
    (x, v), (dx, dv) = primals, tangents
    y, near = jax.jvp(within_reach, (x + v, x), (dx + dv, dx))
    u = orthonormalize_sum(x, v)
    return u, _differential(u, y, near)


def _differential(u: Array, y: Array, dy: Array) -> Array:
    if y.shape[-2] >= y.shape[-1]:
        return polar_differential(u, y, dy)
    return jnp.swapaxes(polar_differential(*(jnp.swapaxes(each, -2, -1) for each in (u, y, dy))), -2, -1)
