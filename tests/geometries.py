"""The table of cases that every manifold goes through: kind x retraction x shape x dtype x radius.

Each law is one jitted function at module level that takes the manifold as a pytree argument: a case compiles once,
whatever its radius. Tolerances are multiples of the dtype's eps, relative to the radius.
"""

from __future__ import annotations

import itertools

import helpers as h
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg

CLASSES = {"euclidean": fg.Euclidean, "sphere": fg.Sphere, "oblique": fg.Oblique, "stiefel": fg.Stiefel}

# Radii across a batch: the array radius. The unbatched and the scalar-radius cases are below.
RADII = np.array([1.0, 0.004, 30.0, 1.0, 0.004, 30.0])
BATCH = len(RADII)

SMALL = {
    "square": (BATCH, 3, 3),
    "tall": (BATCH, 6, 3),
    "wide": (BATCH, 2, 5),
    "column": (BATCH, 4, 1),
    "row": (BATCH, 1, 4),
    "entry": (BATCH, 1, 1),
}
EMPTY = {"empty batch": (0, 3, 3)}
BIG = {"many": (4096, 3, 3), "large": (512, 128)}

KINDS = pytest.mark.parametrize("kind", h.KINDS)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
ALL = {**SMALL, **EMPTY, **BIG}

# A case costs seconds of compilation and milliseconds of arithmetic: `make test` runs one dtype of the small shapes,
# `make test-all` the whole table.
FAST = {("square", "float32"), ("wide", "float64"), ("entry", "float32")}
FAST_EXP = {("square", "float32")}


def cases(names, *manifolds):
    """`names`, a shape and a dtype for each of `manifolds`, marked slow where `make test` leaves them out."""
    found = []
    for which in manifolds:
        for (name, shape), dtype in itertools.product(ALL.items(), ("float32", "float64")):
            fast = (name, dtype) in (FAST_EXP if "exp" in which else FAST)
            words = (*filter(None, which), name, dtype)
            found.append(pytest.param(*which, shape, dtype, id="-".join(words), marks=() if fast else pytest.mark.slow))
    return pytest.mark.parametrize((*names, "shape", "dtype"), found)


RETRACTIONS = [("euclidean", None), ("sphere", None), ("oblique", None), *(("stiefel", r) for r in h.RETRACTIONS)]
STEPS = pytest.mark.parametrize(
    ("kind", "retraction"), RETRACTIONS, ids=["-".join(filter(None, pair)) for pair in RETRACTIONS]
)


def seed(*words):
    """The same in every process: Python's own string hash is salted."""
    return np.random.default_rng(list(repr(words).encode()))


def manifold(kind, radius=1.0, dtype="float64", retraction=None):
    settings = {"retraction": retraction} if retraction else {}
    return CLASSES[kind](**settings).with_radius(jnp.asarray(radius, dtype))


def radius_for(shape):
    """The array radius on small batches; one small number on the big ones."""
    return RADII if shape[0] == BATCH and len(shape) == 3 else 0.004


def unit_of(kind, s):
    """What lengths are measured in: the radius, where a manifold has one."""
    return s if kind != "euclidean" else np.ones_like(s)


def tol(dtype, shape):
    """Round-off of a sum over the matrix, with slack; for 3 x 3 in float32 it is 3e-6."""
    return h.EPS[dtype] * 8 * max(3, (shape[-2] * shape[-1]) ** 0.5)


def cast(dtype, *arrays):
    return tuple(jnp.asarray(np.asarray(a), dtype) for a in arrays)


def close(a, b, s, limit):
    """|a - b| in units of the radius."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.all(np.isfinite(a))
    gap = np.abs(a - b) / (h.spread(s) if a.ndim >= 2 else np.asarray(s))
    assert np.max(gap, initial=0) <= limit, f"{np.max(gap, initial=0):.3e} > {limit:.3e}"
