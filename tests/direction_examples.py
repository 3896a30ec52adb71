"""Directions of steepest descent by the library and by NumPy, and matrices to take them at."""

import functools

import helpers as h
import jax
import numpy as np

import fgsgd_jax as fg

MANIFOLDS = {"euclidean": fg.Euclidean, "sphere": fg.Sphere, "oblique": fg.Oblique, "stiefel": fg.Stiefel}
WHOLE = "i o -> 1 1 i o"


@functools.cache
def directions(kind, method="polar", tangent=True, coarse=False):
    def steepest(x, g, s):
        return MANIFOLDS[kind](radius=s).steepest(x, g, method, tangent=tangent, coarse=coarse)

    return jax.jit(steepest)


def steepest(kind, x, g, s=1.0, tangent=True):
    """The rule of each manifold by singular value decompositions."""
    t = h.project(kind, x, g, s) if tangent else g
    s = 1.0 if kind == "euclidean" else s
    if kind == "sphere":
        return h.spread(s) * t / h.norm(t)[..., None, None]
    if kind == "oblique":
        return h.spread(s) * t / np.linalg.norm(t, axis=-2, keepdims=True)
    u, sigma, vt = np.linalg.svd(t, full_matrices=False)
    # A skew matrix of odd size has a singular value of 0, and so has what is tangent at a square one.
    return h.spread(s) * ((u * (sigma > 1e-9 * sigma[..., :1])[..., None, :]) @ vt)


def examples(kind, shape, s=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return h.nearest(kind, rng.standard_normal(shape), s), rng.standard_normal(shape)


# --- the sign of singular values
