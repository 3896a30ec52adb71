"""Lines 5 to 7 of one parameter by the kernels of a platform, and what these kernels serve."""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _pallas_tpu, _pallas_triton
from ._pallas_layer import Descended, LayerType, Moved, Planes


class Form(NamedTuple):
    """The kernels of a platform; interpreted, they run on any."""

    kernels: ModuleType
    interpret: bool = False


FORMS = {"tpu": Form(_pallas_tpu), "cuda": Form(_pallas_triton)}


def unserved(platform: str, layer: LayerType, grid: Sequence[int], n: int, p: int, *dtypes: jnp.dtype) -> str | None:
    """Why there are no kernels for n×p matrices over this grid, points and gradients being of these dtypes."""
    if platform not in FORMS:
        return f"there are no kernels for {platform}"
    if grid[-2] * grid[-1] <= n * p:
        # A vector unit takes one entry of many matrices at a time.
        return f"the kernels take more matrices than a matrix has entries, these are {grid[-2]}×{grid[-1]} of {n}×{p}"
    return FORMS[platform].kernels.unserved(layer, n, p, *dtypes)


def descends(platform: str, layer: LayerType, x: Float[Array, "*layers n p C D"]) -> bool:
    """Whether `descend` takes all lines at once, or `measure` and `move` are needed."""
    return FORMS[platform].kernels.descends(layer, x.shape)


def descend(platform: str, layer: LayerType, scalars: Float[Array, "5"], planes: Planes) -> Descended:
    """Lines 5 to 7 with momentum; the scalars are minus the learning rate, μ, ρ, c and the weight decay."""
    return _run(platform, "descend", layer, scalars, planes)


def measure(platform: str, layer: LayerType, planes: Planes) -> Float[Array, "*layers C D"]:
    """Line 5, of which the squared norms of the tangent parts are kept."""
    return _run(platform, "measure", layer, planes)


def move(
    platform: str,
    layer: LayerType,
    scalars: Float[Array, "5"],
    planes: Planes,
    inverse_zeta: Float[Array, "*layers C D"],
) -> Moved:
    """Momentum, line 7 and eq. 2, with 1/ζ of the group of every matrix, which is 0 or NaN where it is refused."""
    return _run(platform, "move", layer, scalars, planes, inverse_zeta)


def planes(x: Float[Array, "*layers C D n p"]) -> Float[Array, "*layers n p C D"]:
    """Matrices entry by entry."""
    return jnp.moveaxis(x, (-2, -1), (-4, -3))


def matrices(x: Float[Array, "*layers n p C D"]) -> Float[Array, "*layers C D n p"]:
    """Undoes `planes`."""
    return jnp.moveaxis(x, (-4, -3), (-2, -1))


def _run(platform: str, name: str, layer: LayerType, *arrays: Any) -> Any:
    form = FORMS[platform]
    return _jitted(form.kernels, name)(layer, *arrays, interpret=form.interpret)


@functools.cache
def _jitted(kernels: ModuleType, name: str) -> Any:
    """One function of all layers of one type and shape, so that they share what is compiled."""
    return jax.jit(getattr(kernels, name), static_argnums=0, static_argnames="interpret")
