"""Matrices with columns of one length."""

import dataclasses

import jax.numpy as jnp

from ._sphere import Spherical


@dataclasses.dataclass(frozen=True)
class Oblique(Spherical):
    """Matrices whose every column has Euclidean norm `radius`: a product of p spheres of dimension n - 1.

    Dimension p (n - 1), which is 0 for a single row. Sectional curvature in [0, 1]/s²: planes across two columns
    are flat. Every map is the sphere's, column by column. (The paper says "orthogonal columns"; its norms, ‖ω‖_F = √B,
    are those of unit columns, the standard definition.)

    References:
      Absil & Gallivan, Joint Diagonalization on the Oblique Manifold for Independent Component Analysis, 2006.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> fg.Oblique().nearest(jnp.array([[3.0, 0.0], [0.0, 5.0]])).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
      >>> fg.Oblique().dim((3, 3)), fg.Oblique().dim((1, 3))
      (6, 0)
    """

    _axes = (-2,)

    def dim(self, shape):
        """Dimension p (n - 1)."""
        return (shape[0] - 1) * shape[1]

    def _curvature_bounds(self, shape):
        n, p = shape
        circles = n == 2
        return (0.0 if circles or p > 1 else 1.0), (0.0 if circles else 1.0)

    def _squared_length(self, shape):
        return shape[1]

    def origin(self, shape, dtype=jnp.float32):
        """All entries equal."""
        return jnp.full(shape, shape[0] ** -0.5, dtype)
