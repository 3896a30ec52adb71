"""All n×p matrices."""

import dataclasses

import jax.numpy as jnp

from ..linalg import compute_dtype, msign
from ._manifold import Manifold


@dataclasses.dataclass(frozen=True)
class Euclidean(Manifold):
    """All matrices: no constraint. `radius` has no effect, `random_point` is standard Gaussian.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> fg.Euclidean().retract(jnp.ones((2, 2)), jnp.ones((2, 2))).tolist()
      [[2.0, 2.0], [2.0, 2.0]]
    """

    def _project(self, x, g):
        return g

    def _retract(self, x, v):
        return x + v

    def _exp(self, x, v):
        return x + v

    def _log(self, x, y):
        return y - x

    def _nearest(self, x):
        return x

    def _steepest(self, x, g, method, tangent, coarse):
        return msign(g, coarse)

    def _violation(self, x):
        return jnp.zeros(x.shape[:-2], x.dtype)

    def _curvature_bounds(self, shape):
        return 0.0, 0.0

    def _squared_length(self, shape):
        return 1

    def _scale(self, x):
        # One, so that a Euclidean weight moves exactly as any optimizer moves it.
        return jnp.ones((1,) * x.ndim, compute_dtype(x.dtype))

    def radius_of(self, x):
        """One: a Euclidean weight has no radius."""
        return jnp.ones(x.shape[:-2], compute_dtype(x.dtype))

    def dim(self, shape):
        """The number of entries, n·p."""
        return shape[0] * shape[1]

    def origin(self, shape, dtype=jnp.float32):
        """The zero matrix."""
        return jnp.zeros(shape, dtype)
