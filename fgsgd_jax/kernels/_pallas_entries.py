"""The maps of many small matrices, entry by entry: the mathematics that the Pallas kernels for TPU and GPU share.

A matrix is a list of rows, a row a list of entries, and an entry an array that holds this entry of every matrix. So
nothing is transposed or joined, every operation fills the vector units whatever n and p are, and no branch is taken at
run time. Points have radius 1 here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from operator import add
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..manifolds import Euclidean, Manifold, Oblique, Sphere, Stiefel

Entries = list[list[Array]]

# Newton's turns, of which the first ones are scaled. A tangent step from a square matrix with p ≤ 3 leaves two
# different singular values, for which two are enough up to 10⁵ radii; more values than two need more.
_TURNS, _SCALED = 4, 2
_MORE_TURNS, _MORE_SCALED = 6, 4
# How far the squared norm of a matrix may be from p before it is taken for anything but orthonormal.
_FAR = 0.1
# Entries of the largest matrix: 7×7 stems and a little more. Beyond, unrolling no longer pays.
_MOST = 64


def unserved(manifold: Manifold, n: int, p: int) -> str | None:
    """Why there is no map here for n×p matrices on this manifold; None if there is. Types are those below exactly."""
    if type(manifold) not in (Euclidean, Sphere, Oblique, Stiefel):
        return f"there are no kernels for {type(manifold).__name__}"
    if type(manifold) is Stiefel and manifold.retraction != "polar":
        return f"the kernels retract by polar factors, not by {manifold.retraction!r}"
    if n * p > _MOST:
        return f"the kernels take matrices of up to {_MOST} entries, these are {n}×{p}"
    return None


def project(manifold: Manifold, x: Entries, g: Entries) -> Entries:
    """Π_x(g)."""
    match manifold:
        case Sphere():
            inner = _dot(_flat(x), _flat(g))
            return mapped(lambda x, g: g - inner * x, x, g)
        case Oblique():
            inner = [_dot(*columns) for columns in zip(_transposed(x), _transposed(g), strict=True)]
            return [[g - c * x for x, g, c in zip(*rows, inner, strict=True)] for rows in zip(x, g, strict=True)]
        case Stiefel():
            upright, back = _upright(x)
            x, g = upright(x), upright(g)
            products = _product(_transposed(x), g)
            symmetric = mapped(lambda a, b: 0.5 * (a + b), products, _transposed(products))
            return back(mapped(lambda g, normal: g - normal, g, _product(x, symmetric)))
    return g


def retract(manifold: Manifold, x: Entries, v: Entries, squares: Array) -> Entries:
    """φ_x(v), with ‖v‖² at hand. Where there is no such point, x; or the origin if x is none."""
    y = mapped(add, x, v)
    match manifold:
        case Sphere():
            return _shaped(_unit(_flat(y), _flat(x)), len(x[0]))
        case Oblique():
            return _transposed([_unit(*columns) for columns in zip(_transposed(y), _transposed(x), strict=True)])
        case Stiefel():
            # Beyond eps^-½ radii x + v holds too little of x: the step is shortened to that length.
            longest = float(jnp.finfo(squares.dtype).eps ** -0.5)
            length = jnp.sqrt(squares)
            factor = jnp.where(length > longest, longest / length, 1.0)
            y = mapped(lambda x, v: x + factor * v, x, v)
            upright, back = _upright(x)
            return back(_orthonormal(upright(y), upright(x)))
    return y


def masked(x: Entries, usable: Array) -> Entries:
    """x, or zeros where it is refused: such a gradient may be anything but a number."""
    return mapped(lambda each: jnp.where(usable, each, 0.0), x)


def squared_norm(x: Entries) -> Array:
    """‖x‖_F²."""
    return _dot(_flat(x), _flat(x))


@dataclasses.dataclass(frozen=True)
class Points:
    """Matrices at their radii, each on the one of `manifolds` that `kind` says (None if there is one)."""

    manifolds: tuple[Manifold, ...]
    x: Entries
    kind: Array | None
    radius: Array

    def project(self, g: Entries) -> Entries:
        """Line 5: the tangent parts of g."""
        return self._select([project(manifold, self._unit, g) for manifold in self.manifolds])

    def displace(self, v: Entries, new_radius: Array | None) -> tuple[Entries, Array]:
        """Line 7 and eq. 2: what leads from x to φ_x(v), at the new radius if given; and ‖v‖/s, 0 if Euclidean."""
        v = mapped(lambda v: v * self._inverse, v)
        squares = squared_norm(v)
        y = self._select([retract(manifold, self._unit, v, squares) for manifold in self.manifolds])
        radius = self._but_euclidean(self.radius if new_radius is None else new_radius, 1.0)
        ratio = self._but_euclidean(jnp.sqrt(squares), 0.0)
        # NaN counts as infinite, as in `linalg.largest`.
        ratio = jnp.where(ratio == ratio, ratio, jnp.inf)
        return mapped(lambda y, x: radius * y - x, y, self.x), ratio

    @functools.cached_property
    def _inverse(self) -> Array:
        return 1 / self._but_euclidean(self.radius, 1.0)

    @functools.cached_property
    def _unit(self) -> Entries:
        return mapped(lambda x: x * self._inverse, self.x)

    def _select(self, choices: Sequence[Entries]) -> Entries:
        chosen = choices[-1]
        for index, choice in enumerate(choices[:-1]):
            chosen = mapped(lambda a, b, index=index: jnp.where(self.kind == index, a, b), choice, chosen)
        return chosen

    def _but_euclidean(self, values: Array, otherwise: float) -> Array:
        for index, manifold in enumerate(self.manifolds):
            if isinstance(manifold, Euclidean):
                on = jnp.full_like(values, True, dtype=bool) if self.kind is None else self.kind == index
                values = jnp.where(on, otherwise, values)
        return values


def _unit(y: list[Array], x: list[Array]) -> list[Array]:
    """The vector y over its length; where that cannot be computed x, or one of equal entries if x is far from unit."""
    squares = _dot(y, y)
    info = jnp.finfo(squares.dtype)
    # Next to nothing, overflow and NaN: the vector has no direction.
    usable = (squares > float(info.tiny / info.eps)) & (squares < jnp.inf)
    squares = jnp.where(usable, squares, 1.0)
    scale = _refined(lax.rsqrt(squares), squares)
    known, origin = jnp.abs(_dot(x, x) - 1.0) < _FAR, len(y) ** -0.5
    return [jnp.where(usable, a * scale, jnp.where(known, b, origin)) for a, b in zip(y, x, strict=True)]


def _refined(root: Array, squares: Array) -> Array:
    """squares^-½ by a Newton step from about it: devices' own are off by some units or more."""
    return root * (1.5 - 0.5 * squares * root * root)


def _orthonormal(y: Entries, x: Entries) -> Entries:
    """The polar factor of the upright y; where it has none, x, or the identity if x is nothing like orthonormal."""
    n, p = len(y), len(y[0])
    if p == 1:
        return [[each] for each in _unit(_flat(y), _flat(x))]
    if n > p:
        q, r = _gram_schmidt(y)
        u = _product(q, _newton(r, _MORE_TURNS, _MORE_SCALED))
    else:
        u = _newton(y, *((_TURNS, _SCALED) if p <= 3 else (_MORE_TURNS, _MORE_TURNS)))
    usable = jnp.abs(squared_norm(u) - p) < _FAR * p
    known = jnp.abs(squared_norm(x) - p) < _FAR * p
    eye = [[1.0 if i == j else 0.0 for j in range(p)] for i in range(n)]
    return mapped(lambda u, x, e: jnp.where(usable, u, jnp.where(known, x, e)), u, x, eye)


def _newton(y: Entries, turns: int, scaled: int) -> Entries:
    """The polar factor of a square matrix: y ← ½ (μ y + y⁻ᵀ/μ), the first turns with μ² = ‖y⁻¹‖_F/‖y‖_F.

    Higham, *Functions of Matrices*, section 8.6.
    """

    def turn(y: Entries, scaled: bool) -> Entries:
        inverse, factor = _inverse_transpose(y)
        mine, its = 0.5, 0.5 * factor
        if scaled:
            # Neither square overflows where the quotient does not.
            mu = jnp.sqrt(jnp.abs(factor) * jnp.sqrt(squared_norm(inverse) / squared_norm(y)))
            mine, its = mine * mu, its / mu
        return mapped(lambda y, c: mine * y + its * c, y, inverse)

    if turns == scaled:
        # Of the larger matrices. Unrolled, their turns would be thousands of operations.
        return lax.fori_loop(0, turns, lambda _, y: turn(y, True), y)
    for index in range(turns):
        y = turn(y, index < scaled)
    return y


def _inverse_transpose(y: Entries) -> tuple[Entries, Array | float]:
    """y⁻ᵀ as a matrix and a factor: cofactors and 1/det for p ≤ 3, q r⁻ᵀ above. Neither has pivots to choose."""
    if len(y) == 2:
        (a, b), (c, d) = y
        return [[d, -c], [-b, a]], 1 / (a * d - b * c)
    if len(y) == 3:
        cofactors = [
            [
                y[(i + 1) % 3][(j + 1) % 3] * y[(i + 2) % 3][(j + 2) % 3]
                - y[(i + 1) % 3][(j + 2) % 3] * y[(i + 2) % 3][(j + 1) % 3]
                for j in range(3)
            ]
            for i in range(3)
        ]
        return cofactors, 1 / _dot(y[0], cofactors[0])
    q, r = _gram_schmidt(y)
    return _times_inverse_transpose(q, r), 1.0


def _times_inverse_transpose(q: Entries, r: Entries) -> Entries:
    """Returns q r⁻ᵀ for an upper triangle r, by substitution from the last column."""
    p = len(r)
    columns = _transposed(q)
    solved: list[list[Array]] = [[]] * p
    for j in reversed(range(p)):
        inverse = 1 / r[j][j]
        column = columns[j]
        for k in range(j + 1, p):
            column = [c - r[j][k] * s for c, s in zip(column, solved[k], strict=True)]
        solved[j] = [inverse * c for c in column]
    return _transposed(solved)


def _gram_schmidt(y: Entries) -> tuple[Entries, Entries]:
    """Factors y = q r, with orthonormal columns and an upper triangle, each column made orthogonal twice."""
    p = len(y[0])
    q: list[list[Array]] = []
    zero = jnp.zeros_like(y[0][0])
    r = [[zero] * p for _ in range(p)]
    for j, column in enumerate(_transposed(y)):
        for _ in range(2 if j else 0):
            products = [_dot(unit, column) for unit in q]
            for i, (unit, product) in enumerate(zip(q, products, strict=True)):
                column = [c - product * u for c, u in zip(column, unit, strict=True)]
                r[i][j] = r[i][j] + product
        squares = _dot(column, column)
        inverse = _refined(lax.rsqrt(squares), squares)
        r[j][j] = squares * inverse
        q.append([inverse * c for c in column])
    return _transposed(q), r


def _upright(x: Entries) -> tuple[Callable[[Entries], Entries], Callable[[Entries], Entries]]:
    """Transposition if the matrices are wider than tall (the smaller Gram), and what undoes it."""
    if len(x) < len(x[0]):
        return _transposed, _transposed
    return (lambda x: x), (lambda x: x)


def _product(a: Entries, b: Entries) -> Entries:
    columns = _transposed(b)
    return [[_dot(row, column) for column in columns] for row in a]


def _dot(a: list[Array], b: list[Array]) -> Array:
    return functools.reduce(add, (x * y for x, y in zip(a, b, strict=True)))


def mapped(function: Callable[..., Array], *matrices: list[list[Any]]) -> Entries:
    return [[function(*entries) for entries in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _transposed(x: Entries) -> Entries:
    return [list(column) for column in zip(*x, strict=True)]


def _flat(x: Entries) -> list[Array]:
    return [entry for row in x for entry in row]


def _shaped(x: list[Array], cols: int) -> Entries:
    return [x[start : start + cols] for start in range(0, len(x), cols)]
