"""One step on a batch of matrices, tangent projection and retraction, as each library does it.

A library that is not installed, or does not run on the device at hand, gives no step but the reason.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import cores

import fgsgd_jax as fg

# Optax's Muon iteration, with the coefficients and the number of steps that optax.contrib.muon takes by default.
_MUON = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Step:
    """`run(x, v)` on the library's own arrays, which `give` makes from NumPy's and `take` turns back."""

    run: Callable[[Any, Any], Any]
    give: Callable[[np.ndarray], Any] = jnp.asarray
    take: Callable[[Any], np.ndarray] = np.asarray
    packages: tuple[str, ...] = ()
    # What only bounds the time from below does not stay on the manifold.
    floor: bool = False


def steps(manifold: fg.Manifold, shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Step]]]:
    """The name of every step from x along -projection(g), and what makes it or raises ImportError with the reason."""
    stiefel = isinstance(manifold, fg.Stiefel)
    yield "fgsgd_jax", lambda: _compiled(functools.partial(own_step, manifold), shape)
    yield "copy", lambda: _compiled(lambda x, g: x - g, shape, floor=True)
    if stiefel:
        yield "products", lambda: _compiled(_products, shape, floor=True)
        yield "jnp.linalg.qr", lambda: _compiled(_qr_by_hand, shape)
        yield "Muon's iteration", lambda: _compiled(_muon, shape, packages=("optax",))
    else:
        yield "normalized by hand", lambda: _by_hand(manifold, shape)
    yield "geoopt", lambda: _geoopt(manifold, shape)
    yield "riemannax", lambda: _riemannax(manifold, shape)
    yield "geojax", lambda: _geojax(manifold, shape)
    yield "pymanopt", lambda: _pymanopt(manifold, shape)


def own_step(manifold: fg.Manifold, x: jax.Array, g: jax.Array) -> jax.Array:
    """As an update does it, with the displacement added."""
    return x + own_displacement(manifold, x, g)


def own_displacement(manifold: fg.Manifold, x: jax.Array, g: jax.Array) -> jax.Array:
    """Lines 5 and 7, by the kernels of an update."""
    # Version 0.1, which versions.py measures with this file, has neither.
    from fgsgd_jax import kernels
    from fgsgd_jax.manifolds import Mixture

    ((displacement,),), _ = kernels.step([Mixture((manifold,), None)], [[x]], [[g]], factor=-1.0)
    return displacement


def violation(manifold: fg.Manifold, x: np.ndarray) -> float:
    """The largest absolute entry of the defining equation's residual, in float64 and by no library's own code."""
    x = np.asarray(x, np.float64)
    if isinstance(manifold, fg.Stiefel):
        x = x if x.shape[-2] >= x.shape[-1] else np.swapaxes(x, -1, -2)
        return float(np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1])).max())
    return float(np.abs(np.sqrt((x**2).sum(_axes(manifold))) - 1).max())


def _axes(manifold: fg.Manifold) -> tuple[int, ...]:
    return (-2,) if isinstance(manifold, fg.Oblique) else (-2, -1)


def _compiled(function, shape, **about) -> Step:
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Step(jax.jit(function).lower(x, x).compile(), **about)


def _products(x, g):
    """As many products of the same sizes as a projection and one step of the iteration have, and nothing else."""
    with jax.default_matmul_precision("highest"):
        v = x @ (jnp.swapaxes(x, -1, -2) @ g)
        return v @ (jnp.swapaxes(v, -1, -2) @ v)


def _tangent(x, g):
    a = jnp.swapaxes(x, -1, -2) @ g
    return g - x @ ((a + jnp.swapaxes(a, -1, -2)) / 2)


def _qr_by_hand(x, g):
    with jax.default_matmul_precision("highest"):
        q, r = jnp.linalg.qr(x - _tangent(x, g))
        return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def _muon(x, g):
    from optax.contrib import _muon

    with jax.default_matmul_precision("highest"):
        return jax.vmap(lambda y: _muon.orthogonalize_via_newton_schulz(y, jnp.asarray(_MUON)))(x - _tangent(x, g))


def _by_hand(manifold, shape) -> Step:
    """Spheres as vectors: with a last axis of length 1, XLA's reductions on CPU take 16 times as long."""
    vectors = isinstance(manifold, fg.Sphere)
    axis = -1 if vectors else -2

    def step(x, g):
        y = x - (g - x * jnp.sum(x * g, axis, keepdims=True))
        return y / jnp.sqrt(jnp.sum(y * y, axis, keepdims=True))

    step = _compiled(step, (shape[0], shape[1] * shape[2]) if vectors else shape)
    if not vectors:
        return step
    give = lambda x: jnp.asarray(x.reshape(shape[0], -1))  # noqa: E731
    return Step(step.run, give, lambda x: np.asarray(x).reshape(shape))


def on_torch() -> tuple[Any, Any, Callable[[Any], Any]]:
    """PyTorch on as many threads as JAX has cores, its device, and what waits for a result there."""
    import torch

    platform = jax.default_backend()
    if platform == "gpu" and not torch.cuda.is_available():
        raise ImportError("this PyTorch does not see the GPU")
    if platform not in ("cpu", "gpu"):
        raise ImportError(f"PyTorch does not run on {platform}")
    torch.set_num_threads(cores())
    # Or products run in TF32, in which no point is feasible.
    torch.backends.cuda.matmul.allow_tf32 = False
    if platform == "cpu":
        return torch, torch.device("cpu"), lambda result: result

    def wait(result):
        torch.cuda.synchronize()
        return result

    return torch, torch.device("cuda"), wait


def _geoopt(manifold, shape) -> Step:
    torch, device, wait = on_torch()
    import geoopt

    columns = isinstance(manifold, fg.Oblique)
    space = geoopt.EuclideanStiefel() if isinstance(manifold, fg.Stiefel) else geoopt.Sphere()

    def give(x):
        # Its spheres are along the last axis, where they lie together in memory.
        x = x if isinstance(manifold, fg.Stiefel) else np.swapaxes(x, -1, -2) if columns else x[..., 0]
        return torch.from_numpy(np.array(x, order="C")).to(device)

    def take(x):
        x = x.cpu().numpy()
        return x if isinstance(manifold, fg.Stiefel) else np.swapaxes(x, -1, -2) if columns else x[..., None]

    def run(x, g):
        with torch.no_grad():
            return wait(space.retr(x, -space.proju(x, g)))

    return Step(run, give, take, ("geoopt", "torch"))


def _riemannax(manifold, shape) -> Step:
    import importlib.metadata

    importlib.metadata.version("riemannax")
    try:
        from riemannax import manifolds
    except ImportError:
        # The wheel of 0.0.3 has the package's folders, but not the package.
        import manifolds
    n, p = shape[-2:]
    stiefel = isinstance(manifold, fg.Stiefel)
    space = manifolds.Stiefel(n, p) if stiefel else manifolds.Sphere()

    def one(x, g):
        return space.retr(x, -space.proj(x, g))

    # Points of its sphere are vectors: here the columns.
    return _compiled(jax.vmap(one if stiefel else jax.vmap(one, -1, -1)), shape, packages=("riemannax",))


def _geojax(manifold, shape) -> Step:
    import geojax

    n, p = shape[-2:]
    if isinstance(manifold, fg.Sphere):
        space = geojax.Sphere(n)
    else:
        space = (geojax.StiefelEuclidean if isinstance(manifold, fg.Stiefel) else geojax.Oblique)((n, p))

    def one(x, g):
        return space.exp(x, -space.tangent_project(x, g))

    return _compiled(
        jax.vmap(jax.vmap(one, -1, -1) if isinstance(manifold, fg.Sphere) else one), shape, packages=("geojax",)
    )


def _pymanopt(manifold, shape) -> Step:
    import pymanopt.manifolds

    if jax.default_backend() != "cpu":
        raise ImportError("NumPy runs on the CPU only")
    batch, n, p = shape
    if isinstance(manifold, fg.Stiefel):
        space = pymanopt.manifolds.Stiefel(n, p, k=batch)
        give = (lambda x: x[0]) if batch == 1 else (lambda x: x)
        take = (lambda x: x[None]) if batch == 1 else (lambda x: x)
    else:
        # All columns of all matrices beside each other.
        space = pymanopt.manifolds.Oblique(n, batch * p)
        give = lambda x: np.ascontiguousarray(np.moveaxis(x, 1, 0).reshape(n, -1))  # noqa: E731
        take = lambda x: np.moveaxis(x.reshape(n, batch, p), 0, 1)  # noqa: E731
    return Step(lambda x, g: space.retraction(x, -space.projection(x, g)), give, take, ("pymanopt", "numpy"))
