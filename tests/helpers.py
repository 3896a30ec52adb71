"""Inputs conditioned by property, and the geometry again in float64 NumPy: what the tests judge the library by.

Nothing here imports the library. Every function takes the manifold's name, so that a formula here and the formula
there can only agree by both being right. Points are batched over leading axes, the radius over the batch.
"""

from __future__ import annotations

import typing

import beartype
import numpy as np
import scipy.linalg

KINDS = ("euclidean", "sphere", "oblique", "stiefel")
RETRACTIONS = ("polar", "qr", "cayley", "exp")

EPS = {"float32": float(np.finfo(np.float32).eps), "float64": float(np.finfo(np.float64).eps)}


def transpose(x):
    return np.swapaxes(x, -1, -2)


def sym(a):
    return (a + transpose(a)) / 2


def inner(u, v):
    return np.sum(u * v, axis=(-2, -1))


def norm(v):
    return np.sqrt(inner(v, v))


def spread(s):
    """A radius over the batch, ready to multiply matrices."""
    return np.asarray(s, np.float64)[..., None, None]


def upright(method):
    """A Stiefel formula for n >= p, made to act on the transpose of wide matrices."""

    def wrapped(x, *rest, **kwargs):
        if x.shape[-2] >= x.shape[-1]:
            return method(x, *rest, **kwargs)
        rest = [transpose(r) if np.ndim(r) >= 2 and np.shape(r)[-2:] == x.shape[-2:] else r for r in rest]
        return transpose(method(transpose(x), *rest, **kwargs))

    return wrapped


# --- the constraint


def violation(kind, x, s=1.0):
    x = np.asarray(x, np.float64) / spread(s)
    if kind == "euclidean":
        return np.zeros(x.shape[:-2])
    if kind == "sphere":
        return np.abs(norm(x) - 1)
    if kind == "oblique":
        return np.max(np.abs(np.linalg.norm(x, axis=-2) - 1), axis=-1)
    x = x if x.shape[-2] >= x.shape[-1] else transpose(x)
    return np.max(np.abs(transpose(x) @ x - np.eye(x.shape[-1])), axis=(-2, -1))


def dim(kind, n, p):
    n_, p_ = max(n, p), min(n, p)
    return {
        "euclidean": n * p,
        "sphere": n * p - 1,
        "oblique": (n - 1) * p,
        "stiefel": n_ * p_ - p_ * (p_ + 1) // 2,
    }[kind]


@upright
def _project_stiefel(x, g, s):
    return g - x @ sym(transpose(x) @ g) / spread(s) ** 2


def project(kind, x, g, s=1.0):
    if kind == "euclidean":
        return g
    if kind == "sphere":
        return g - inner(x, g)[..., None, None] * x / spread(s) ** 2
    if kind == "oblique":
        return g - np.sum(x * g, axis=-2, keepdims=True) * x / spread(s) ** 2
    return _project_stiefel(x, g, s)


def polar(a):
    u, _, vt = np.linalg.svd(a, full_matrices=False)
    return u @ vt


def nearest(kind, a, s=1.0):
    if kind == "euclidean":
        return a
    if kind == "sphere":
        return spread(s) * a / norm(a)[..., None, None]
    if kind == "oblique":
        return spread(s) * a / np.linalg.norm(a, axis=-2, keepdims=True)
    return spread(s) * polar(a)


# --- moving


def qf(a):
    q, r = np.linalg.qr(a)
    signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))
    return q * np.where(signs == 0, 1, signs)[..., None, :]


def cayley(x, v):
    """Wen and Yin 2013, on the unit Stiefel manifold, with the n x n system written out."""
    eye = np.eye(x.shape[-2])
    half = eye - x @ transpose(x) / 2
    w = half @ v @ transpose(x)
    w = w - transpose(w)
    return np.linalg.solve(eye - w / 2, (eye + w / 2) @ x)


def exp_unit_stiefel(x, v):
    """Edelman, Arias and Smith 1998, eq. 2.42: the geodesic of the embedded metric."""
    p = x.shape[-1]
    a = transpose(x) @ v
    eye = np.broadcast_to(np.eye(p), a.shape)
    block = np.block([[a, -transpose(v) @ v], [eye, a]])
    left = np.concatenate([x, v], axis=-1)
    return left @ scipy.linalg.expm(block)[..., :p] @ scipy.linalg.expm(-a)


@upright
def _stiefel_step(x, v, s, step):
    s = spread(s)
    return s * step(x / s, v / s)


def _great_circles(x, v, s, axis):
    angle = np.sqrt(np.sum(v * v, axis=axis, keepdims=True)) / s
    return x * np.cos(angle) + v * np.sinc(angle / np.pi)


def exp(kind, x, v, s=1.0):
    if kind == "euclidean":
        return x + v
    if kind == "sphere":
        return _great_circles(x, v, spread(s), (-2, -1))
    if kind == "oblique":
        return _great_circles(x, v, spread(s), -2)
    return _stiefel_step(x, v, s, step=exp_unit_stiefel)


def retract(kind, retraction, x, v, s=1.0):
    if kind != "stiefel":
        return nearest(kind, x + v, s)
    if retraction == "exp":
        return exp(kind, x, v, s)
    steps = {"polar": lambda x, v: polar(x + v), "qr": lambda x, v: qf(x + v), "cayley": cayley}
    return _stiefel_step(x, v, s, step=steps[retraction])


# --- curvature


@upright
def _second_form_stiefel(x, u, v, s):
    return -x @ sym(transpose(u) @ v) / spread(s) ** 2


def second_form(kind, x, u, v, s=1.0):
    """The embedding's second fundamental form II(u, v)."""
    if kind == "euclidean":
        return np.zeros_like(u)
    if kind == "sphere":
        return -inner(u, v)[..., None, None] * x / spread(s) ** 2
    if kind == "oblique":
        return -np.sum(u * v, axis=-2, keepdims=True) * x / spread(s) ** 2
    return _second_form_stiefel(x, u, v, s)


def sectional_curvature(kind, x, u, v, s=1.0):
    """By the Gauss equation, of the plane that u and v span."""
    uu, vv, uv = (second_form(kind, x, a, b, s) for a, b in ((u, u), (v, v), (u, v)))
    area = inner(u, u) * inner(v, v) - inner(u, v) ** 2
    return (inner(uu, vv) - inner(uv, uv)) / area


# --- inputs


def point(kind, rng, shape, s=1.0):
    return np.asarray(nearest(kind, rng.standard_normal(shape), s)).reshape(shape)


def tangent(kind, rng, x, s=1.0, length=None):
    """A tangent vector of Gaussian direction; of the given norm over the batch, where the manifold has any."""
    v = project(kind, x, rng.standard_normal(x.shape), s)
    if length is None:
        return v
    size = norm(v)[..., None, None]
    return np.where(size > 1e-9, v / np.maximum(size, 1e-300) * spread(length), 0.0)


def with_singular_values(rng, values, n, p):
    """An n x p matrix with the given singular values and random singular vectors."""
    u = polar(rng.standard_normal((n, len(values))))
    v = polar(rng.standard_normal((p, len(values))))
    return u @ np.diag(values) @ v.T


def slope(t, gap):
    """Of the straight line through log gap over log t."""
    return np.polyfit(np.log(t), np.log(gap), 1)[0]


# --- what a program contains


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    from jax.extend import core

    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(sub, core.ClosedJaxpr):
                    yield from equations(sub.jaxpr)
                elif isinstance(sub, core.Jaxpr):
                    yield from equations(sub)


# --- run-time type checks


def typechecked(function):
    """Beartype, for jaxtyping's import hook: it decorates functions, outside whose class `Self` has no meaning."""
    hints = getattr(function, "__annotations__", None)
    if hints:
        function.__annotations__ = {name: typing.Any if hint is typing.Self else hint for name, hint in hints.items()}
    return beartype.beartype(function)
