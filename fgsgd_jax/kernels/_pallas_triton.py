"""Lines 5 to 7 of one parameter of small matrices in two kernels, for GPU through Triton.

A layer [n, p, C, D] is n·p planes, as an HWIO kernel is in memory; a thread takes one matrix at a time. The first
kernel writes the squared norms of the tangent parts, XLA adds them up over groups, and the second kernel computes those
parts again and takes the step. So one number a matrix lies between them, and the kernels are the same whatever the
groups are and however many matrices a layer has: a network's layers share two, compiled once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ..manifolds import Stiefel
from ._pallas_entries import Entries, Points, masked, squared_norm
from ._pallas_layer import LayerType, Moved, Planes

# Matrices of a block, one a thread; blocks that run at the same time, four for each of an H100's processors.
_MATRICES, _WARPS, _PROGRAMS = 128, 4, 528
# Entries of the largest matrix.
_MOST, _MOST_POLAR = 32, 12


def unserved(layer: LayerType, n: int, p: int, *dtypes: jnp.dtype) -> str | None:
    """Why the kernels do not take n×p matrices of these dtypes; None if they do.

    With more entries Triton takes long to compile: 8 s for St(4, 3), minutes for St(9, 3).
    """
    polar = any(isinstance(manifold, Stiefel) for manifold in layer.manifolds)
    most = _MOST_POLAR if polar else _MOST
    if n * p > most:
        return f"on GPU the kernels take matrices of up to {most} entries, these are {n}×{p}"
    return layer.unserved(n, p, *dtypes)


def descends(layer: LayerType, shape: tuple[int, ...]) -> bool:
    """Whether all lines are one kernel: they never are."""
    del layer, shape
    return False


def measure(layer: LayerType, planes: Planes, interpret: bool = False) -> Float[Array, "*layers C D"]:
    """See `_descend.measure`."""
    results = {"squares": jax.ShapeDtypeStruct((planes.radius.size,), jnp.float32)}
    found = _call(_measure, "fgsgd_measure", layer, planes.present(), results, interpret)
    return found["squares"].reshape(planes.radius.shape)


def move(
    layer: LayerType,
    scalars: Float[Array, "5"],
    planes: Planes,
    scale: Float[Array, "*layers C D"],
    interpret: bool = False,
) -> Moved:
    """See `_descend.move`."""
    shape = planes.x.shape
    arrays = planes.present() | {"scale": scale, "scalars": scalars}
    names = ("u",) if planes.m is None else ("u", "m_out")
    results = {name: jax.ShapeDtypeStruct((math.prod(shape),), jnp.float32) for name in names}
    results["ratio"] = jax.ShapeDtypeStruct((1 if interpret else _PROGRAMS,), jnp.float32)
    found = _call(_move, "fgsgd_move", layer, arrays, results, interpret)
    tensors = {name: found[name].reshape(shape) for name in names}
    return Moved(tensors["u"], tensors.get("m_out"), found["ratio"])


def _call(
    body: Callable, name: str, layer: LayerType, arrays: dict[str, Array], results: dict[str, Any], interpret: bool
) -> dict[str, Array]:
    """The results of a kernel, whose body gets all references by name."""
    *batch, n, p, channels, width = arrays["x"].shape
    flat = {name: each.reshape(-1) for name, each in arrays.items()}
    # As data: numbers in the program would make it another one.
    flat["counts"] = jnp.array([channels * width, math.prod(batch)], jnp.int32)

    def kernel(*refs):
        # Interpretation moves a slice that goes past the end, whatever the mask says.
        size = math.gcd(channels * width, _MATRICES) if interpret else _MATRICES
        body(layer, _Block(n, p, size, dict(zip([*flat, *results], refs, strict=True))))

    # On a GPU a reference is an address: the block says where it begins, and its length would be one more number.
    spec = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec((_MATRICES,), lambda program: (0,))
    found = pl.pallas_call(
        kernel,
        out_shape=list(results.values()),
        grid=(1 if interpret else _PROGRAMS,),
        in_specs=[spec] * len(flat),
        out_specs=[spec] * len(results),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*flat.values())
    return dict(zip(results, found, strict=True))


class _Block:
    """The references, and of all matrices those that the threads of a program look at."""

    layer: Array
    start: Array
    inside: Array

    def __init__(self, n: int, p: int, size: int, refs: dict[str, Any]):
        self.n, self.p, self.size, self.refs = n, p, size, refs
        self.count, self.layers = refs["counts"][0], refs["counts"][1]

    def each(self, body: Callable[[Array], Array], start: Array) -> Array:
        """Carries a value through `body` for every block of the program."""
        program, programs = pl.program_id(0), pl.num_programs(0)
        of_layer = _quotient(self.count, self.size)

        def turn(turn, carry):
            block = program + turn * programs
            self.layer = lax.div(block, of_layer)
            self.start = (block - self.layer * of_layer) * self.size
            # A GPU reads past the end if it is not told to stop.
            self.inside = self.start + jnp.arange(self.size, dtype=jnp.int32) < self.count
            return body(carry)

        return lax.fori_loop(jnp.int32(0), _quotient(of_layer * self.layers - program, programs), turn, start)

    def load(self, name: str) -> Array:
        return self._load(name, self.layer)

    def store(self, name: str, value: Array) -> None:
        self._store(name, self.layer, value)

    def planes(self, name: str) -> Entries:
        return [[self._load(name, self._plane(i, j)) for j in range(self.p)] for i in range(self.n)]

    def store_planes(self, name: str, entries: Entries) -> None:
        for i, line in enumerate(entries):
            for j, entry in enumerate(line):
                self._store(name, self._plane(i, j), entry)

    def points(self, layer: LayerType) -> Points:
        kind = self.load("kind") if "kind" in self.refs else None
        return Points(layer.manifolds, self.planes("x"), kind, self.load("radius"))

    def _plane(self, i: int, j: int) -> Array:
        return (self.layer * self.n + i) * self.p + j

    def _load(self, name: str, plane: Array) -> Array:
        value = plgpu.load(self._own(name, plane), mask=self.inside, other=0)
        return value.astype(jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else jnp.float32)

    def _store(self, name: str, plane: Array, value: Array) -> None:
        plgpu.store(self._own(name, plane), value.astype(self.refs[name].dtype), mask=self.inside)

    def _own(self, name: str, plane: Array) -> Any:
        # By a slice: an array of indices would bring the layer's size into the program, to count from the end.
        return self.refs[name].at[pl.ds(self.start + plane * self.count, self.size)]


def _quotient(count: Array, size: Array | int) -> Array:
    """Rounded up, in the width of the count."""
    size = jnp.asarray(size, count.dtype)
    return lax.div(count + (size - 1), size)


def _measure(layer: LayerType, block: _Block) -> None:
    def measured(carry):
        block.store("squares", squared_norm(block.points(layer).project(block.planes("g"))))
        return carry

    block.each(measured, jnp.int32(0))


def _move(layer: LayerType, block: _Block) -> None:
    rate, momentum, decay = (block.refs["scalars"][index] for index in (0, 1, 4))

    def moved(largest):
        points, scale = block.points(layer), block.load("scale")
        m = block.planes("m") if "m" in block.refs else None
        usable = scale > 0
        t = masked(points.project(block.planes("g")), usable)
        scale = jnp.where(usable, scale, 0.0)
        v, m = layer.direction(points, t, scale, m, rate, momentum, decay)
        displacement, ratio = points.displace(v, block.load("new_radius") if "new_radius" in block.refs else None)
        block.store_planes("u", displacement)
        if m is not None:
            block.store_planes("m_out", m)
        return jnp.maximum(largest, jnp.where(block.inside, ratio, 0.0))

    ratio = block.each(moved, jnp.zeros(block.size, jnp.float32))
    block.refs["ratio"][pl.program_id(0)] = jnp.max(ratio)
