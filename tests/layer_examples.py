"""Matrices of several layers on several manifolds, with some that no step can be taken from."""

import dataclasses
import functools
import math

import helpers as h
import jax.numpy as jnp
import numpy as np

import fgsgd_jax as fg
from fgsgd_jax.kernels._layers import Layers
from fgsgd_jax.manifolds import Mixture

MIX = (fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean())
LENGTHS = (fg.Oblique(), fg.Euclidean(), fg.Sphere())
OTHER_RETRACTIONS = (fg.Stiefel(retraction="qr"), fg.Sphere(), fg.Stiefel(retraction="cayley"))

# Two of one shape, and a larger one of another. A core's cache does not hold the 7×7 matrices of the second, nor those
# of the third of thousands of entries.
FEW, MANY, LARGE = ((3, 5), (40, 7), (3, 5)), ((3, 5), (40, 18), (3, 5)), ((2, 5), (4, 10), (2, 5))


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Matrices of several layers in one row, [count, n, p], in float64 as they are in `dtype`."""

    manifolds: tuple
    grids: tuple
    dtype: str
    kind: np.ndarray
    radius: np.ndarray
    new_radius: np.ndarray
    x: np.ndarray
    w: np.ndarray

    def on(self, kind):
        """Which matrices are on manifolds of a class."""
        return np.isin(self.kind, [i for i, m in enumerate(self.manifolds) if isinstance(m, kind)])

    @property
    def constrained(self):
        return ~self.on(fg.Euclidean)

    @property
    def has_direction(self):
        return np.all(np.isfinite(self.w), axis=(-2, -1))

    @property
    def places(self):
        """The layers of each grid, by number: they go together."""
        return [[n for n, own in enumerate(self.grids) if own == grid] for grid in dict.fromkeys(self.grids)]

    def parts(self, a):
        """What belongs to each layer."""
        ends = np.cumsum([math.prod(grid) for grid in self.grids])[:-1]
        pairs = zip(np.split(a, ends), self.grids, strict=True)
        return [jnp.asarray(part.reshape(*grid, *a.shape[1:])) for part, grid in pairs]

    def layers(self, w, new_radius):
        x, w, radius, new = (self.parts(a.astype(self.dtype)) for a in (self.x, w, self.radius, self.new_radius))
        kind = self.parts(self.kind)

        def values(given, places):
            return jnp.concatenate([given[n] for n in places])

        return [
            Layers(
                tuple(x[n] for n in places),
                tuple(w[n] for n in places),
                values(kind, places) if len(self.manifolds) > 1 else None,
                values(radius, places),
                values(new, places) if new_radius else None,
            )
            for places in self.places
        ]

    def in_one_row(self, results):
        """Arrays and figures of all layers, as the matrices of this example are in a row."""
        arrays, figures = {}, {}
        for places, (own, values) in zip(self.places, results, strict=True):
            arrays |= dict(zip(places, own, strict=True))
            figures |= dict(zip(places, jnp.split(values, len(places)), strict=True))
        numbers = range(len(self.grids))
        flat = [arrays[n].reshape(-1, *arrays[n].shape[len(self.grids[n]) :]) for n in numbers]
        return jnp.concatenate(flat), jnp.concatenate([figures[n].ravel() for n in numbers])

    def mixtures(self):
        return [Mixture(self.manifolds, layers.kind, layers.radius) for layers in self.layers(self.w, False)]

    def violations(self, displacement, radius):
        """Of the points that are reached, at the given radii."""
        points = np.asarray(self.x.astype(self.dtype) + displacement, np.float64)
        found = np.zeros(len(points))
        for index, manifold in enumerate(self.manifolds):
            on = self.kind == index
            found[on] = h.violation(type(manifold).__name__.lower(), points[on], radius[on])
        return found

    def limit(self, length):
        """Of what two ways of computing a step of so many radii may differ by, in radii."""
        # Rounding a direction to `dtype` changes a polar factor as much as the sum is long, and others more.
        others = [isinstance(m, fg.Stiefel) and m.retraction != "polar" for m in self.manifolds]
        eps = h.EPS[self.dtype]
        reach = np.where(self.on(fg.Stiefel), min(length, eps**-0.5), np.where(self.on(fg.Euclidean), length, 30))
        reach = np.where(np.array(others)[self.kind] & (length > 30), np.inf, reach)
        return 64 * eps * h.spread(1 + reach)

    @property
    def violation_limit(self):
        """Round-off of a sum over a column."""
        return 8 * h.EPS[self.dtype] * max(1, self.x.shape[-2] / 8) ** 0.5


@functools.cache
def example(manifolds, shape, grids, dtype):
    """Points at radii from 0.004 to 2, with directions of about a radius; of every manifold three odd ones."""
    rng = np.random.default_rng(0)
    count = sum(math.prod(grid) for grid in grids)
    kind = rng.integers(0, len(manifolds), count).astype(np.int8)
    radius = np.exp(rng.uniform(np.log(0.004), np.log(2), count))
    radius[:15] = 1
    odd = {index: np.arange(3) + 20 + 7 * index for index in range(len(manifolds))}
    for index, (no_number, no_step, no_point) in odd.items():
        kind[[no_number, no_step, no_point]] = index
    x = h.spread(radius) * rng.standard_normal((count, *shape))
    for index, manifold in enumerate(manifolds):
        on = kind == index
        x[on] = h.nearest(type(manifold).__name__.lower(), x[on], radius[on])
    w = h.spread(radius) * rng.standard_normal((count, *shape)) / math.prod(shape) ** 0.5
    for no_number, no_step, no_point in odd.values():
        w[no_number, 0, 0] = np.nan
        w[no_step] = 0
        x[no_point] = w[no_point] = 0
    rounded = [np.asarray(a.astype(dtype), np.float64) for a in (radius, radius * rng.uniform(1, 2, count), x, w)]
    return Example(manifolds, grids, dtype, kind, *rounded)
