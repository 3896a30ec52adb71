"""Lines 5 to 7 of parameters of one type by the kernels of a platform, and what these kernels serve."""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Shaped

from . import _pallas_tpu, _pallas_triton
from ._by_platform import Program
from ._layers import unstack
from ._pallas_layer import Descended, LayerType, Moved, Planes


class PallasForm(NamedTuple):
    """The kernels of a platform; interpreted, they run on any."""

    kernels: ModuleType
    interpret: bool = False


PALLAS = {"tpu": PallasForm(_pallas_tpu), "cuda": PallasForm(_pallas_triton)}


class Place(NamedTuple):
    """How parameters lie on a mesh: for each, the PartitionSpec of the axes [*layers, C, D] of its matrices.

    `mesh` is None where it is that of the context.
    """

    mesh: Mesh | AbstractMesh | None
    specs: Sequence[Any]


def unserved(
    platform: str, program: Program, layer: LayerType, grid: Sequence[int], n: int, p: int, *dtypes: jnp.dtype
) -> str | None:
    """Why there are no kernels for n×p matrices over this grid, points and gradients being of these dtypes."""
    if program.is_exported and platform != "tpu":
        return "an exported program may hold no Triton kernels"
    if grid[-2] * grid[-1] <= n * p:
        # A vector unit takes one entry of many matrices at a time.
        return f"the kernels take more matrices than a matrix has entries, these are {grid[-2]}×{grid[-1]} of {n}×{p}"
    return PALLAS[platform].kernels.unserved(layer, n, p, *dtypes)


def descends(platform: str, layer: LayerType, parameters: Sequence[Planes], place: Place | None) -> bool:
    """Whether `descend` takes all lines at once, or `measure` and `move` are needed: no device may lack a norm."""
    whole = place is None or not any(_axes(spec) for spec in place.specs)
    return whole and PALLAS[platform].kernels.descends(layer, parameters[0].x.shape)


def descend(
    platform: str,
    layer: LayerType,
    scalars: Float[Array, "5"],
    parameters: Sequence[Planes],
    place: Place | None = None,
) -> list[Descended]:
    """Lines 5 to 7 with momentum; the scalars are minus the learning rate, μ, ρ, c and the weight decay."""
    run = _jitted(platform, "descend", layer)

    def out(planes: Planes, spec: PartitionSpec) -> Descended:
        return Descended(*_results(planes, spec))

    return _each(place, lambda axes, scalars, planes: run(scalars, planes), out, scalars, parameters)


def measure(
    platform: str, layer: LayerType, parameters: Sequence[Planes], place: Place | None = None
) -> list[Float[Array, "*layers C D"]]:
    """Line 5, of which the squared norms of the tangent parts are kept."""
    run = _jitted(platform, "measure", layer)
    parameters = [planes._replace(m=None, new_radius=None, code=None) for planes in parameters]
    return _each(place, lambda axes, scalars, planes: run(planes), lambda planes, spec: spec, None, parameters)


def move(
    platform: str,
    layer: LayerType,
    scalars: Float[Array, "5"],
    parameters: Sequence[Planes],
    inverse_zeta: Sequence[Float[Array, "*layers C D"]],
    place: Place | None = None,
) -> list[Moved]:
    """Momentum, line 7 and eq. 2, with 1/ζ of the group of every matrix, which is 0 or NaN where it is refused.

    The scalars are those of `descend`.
    """
    run = _jitted(platform, "move", layer)
    parameters = [planes._replace(code=None) for planes in parameters]

    def one(axes: Sequence[str], scalars: Array, planes: Planes, scale: Array) -> Moved:
        moved = run(scalars, planes, scale)
        return moved._replace(ratios=lax.pmax(moved.ratios, axes)) if axes else moved

    def out(planes: Planes, spec: PartitionSpec) -> Moved:
        return Moved(*_results(planes, spec))

    return _each(place, one, out, scalars, parameters, inverse_zeta)


def by_parameter(
    platform: str, program: Program, stacked: Shaped[Array, "parts *grid"]
) -> list[Shaped[Array, "*grid"]]:
    """One value for each matrix, of parameters of one grid, by parameter."""
    if platform == "tpu" and not (program.is_shared or program.is_exported):
        # A TPU may lay the parameters along the lanes, from where each would take a copy of its own.
        row_major = Layout(tuple(range(stacked.ndim)))
        stacked = lax.optimization_barrier(with_layout_constraint(stacked, row_major))
    return unstack(stacked)


def planes(x: Float[Array, "*layers C D n p"]) -> Float[Array, "*layers n p C D"]:
    """Matrices entry by entry."""
    return jnp.moveaxis(x, (-2, -1), (-4, -3))


def matrices(x: Float[Array, "*layers n p C D"]) -> Float[Array, "*layers C D n p"]:
    """Undoes `planes`."""
    return jnp.moveaxis(x, (-4, -3), (-2, -1))


def _jitted(platform: str, name: str, layer: LayerType) -> Callable[..., Any]:
    """A kernel: one function of all layers of one type and shape, so that they share what is compiled."""
    form = PALLAS[platform]
    return functools.partial(_one_function(form.kernels, name), layer, interpret=form.interpret)


@functools.cache
def _one_function(kernels: ModuleType, name: str) -> Any:
    return jax.jit(getattr(kernels, name), static_argnums=0, static_argnames="interpret")


def _each(
    place: Place | None,
    one: Callable[..., Any],
    out: Callable[[Planes, PartitionSpec], Any],
    scalars: Array | None,
    parameters: Sequence[Planes],
    *values: Sequence[Array],
) -> list[Any]:
    """`one(axes, scalars, planes, *values)` of every parameter, of the part that a device has if `axes` share it out.

    `out` says how its result is shared out.
    """
    rows = list(zip(parameters, *values, strict=True))
    if place is None:
        return [one((), scalars, *row) for row in rows]
    leaves, structure = jax.tree.flatten((scalars, rows))
    specs = [PartitionSpec()] * (scalars is not None)
    for planes, spec in zip(parameters, place.specs, strict=True):
        specs += [_tensor(spec) if name in ("x", "g", "m") else spec for name in planes.present()]
        specs += [spec] * len(values)
    outs = [out(planes, spec) for planes, spec in zip(parameters, place.specs, strict=True)]
    out_specs, results = jax.tree.flatten(outs, is_leaf=lambda node: isinstance(node, PartitionSpec))

    def part(*leaves: Array) -> list[Array]:
        scalars, rows = jax.tree.unflatten(structure, leaves)
        found = [one(_axes(spec), scalars, *row) for spec, row in zip(place.specs, rows, strict=True)]
        return jax.tree.leaves(found)

    shared = jax.shard_map(part, mesh=place.mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)
    return jax.tree.unflatten(results, shared(*leaves))


def _results(planes: Planes, spec: PartitionSpec) -> tuple[Any, Any, Any]:
    """How displacements, momentum and figures are shared out."""
    return _tensor(spec), None if planes.m is None else _tensor(spec), PartitionSpec()


def _tensor(spec: PartitionSpec) -> PartitionSpec:
    """How [*layers, n, p, C, D] is shared out, if [*layers, C, D] is as `spec` says."""
    *layers, channels, width = spec
    return PartitionSpec(*layers, None, None, channels, width)


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of the mesh over which it shares out."""
    parts = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    return tuple(axis for part in parts for axis in part)
