"""Lines 5 to 7 of one layer of small matrices in two kernels, for GPU through Triton.

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
from ._pallas_entries import Entries, Points, squared_norm
from ._pallas_layer import Descent, LayerType

# Matrices of a block, one a thread; blocks that run at the same time, four for each of an H100's processors.
_MATRICES, _WARPS, _PROGRAMS = 128, 4, 528
# Entries of the largest matrix.
_MOST, _MOST_POLAR = 32, 12


def serves(layer: LayerType, shape: tuple[int, ...], *dtypes: jnp.dtype) -> bool:
    """Whether the kernels take layers [n, p, C, D] of this shape, points and gradients being of these dtypes.

    With more entries Triton takes long to compile: 8 s for St(4, 3), minutes for St(9, 3).
    """
    n, p, *_ = shape
    polar = any(isinstance(manifold, Stiefel) for manifold in layer.manifolds)
    return layer.serves(shape, *dtypes) and n * p <= (_MOST_POLAR if polar else _MOST)


def descend(
    layer: LayerType,
    scalars: Array,
    x: Array,
    g: Array,
    m: Array | None,
    kind: Array | None,
    radius: Array,
    new_radius: Array | None,
    code: Array | None,
    interpret: bool = False,
) -> Descent:
    """One step of one layer; see `LayerType` and `Descent`."""
    squares = measure(layer, x, g, kind, radius, interpret)
    scale, groups = layer.weigh(squares, code, scalars)
    return move(layer, scalars, x, g, m, kind, radius, new_radius, scale, interpret)._replace(measured=groups)


def measure(
    layer: LayerType, x: Array, g: Array, kind: Array | None, radius: Array, interpret: bool = False
) -> Float[Array, "C D"]:
    """Line 5, of which the squared norms of the tangent parts are kept."""
    arrays = {"x": x, "g": g, "kind": kind, "radius": radius}
    results = {"squares": jax.ShapeDtypeStruct((radius.size,), jnp.float32)}
    return _call(_measure, "fgsgd_measure", layer, x.shape, arrays, results, interpret)["squares"].reshape(radius.shape)


def move(
    layer: LayerType,
    scalars: Array,
    x: Array,
    g: Array,
    m: Array | None,
    kind: Array | None,
    radius: Array,
    new_radius: Array | None,
    scale: Float[Array, "C D"],
    interpret: bool = False,
) -> Descent:
    """Momentum, line 7 and eq. 2, with 1/ζ of the group of every matrix: 0 in a layer that is refused."""
    arrays = {"x": x, "g": g, "m": m, "kind": kind, "radius": radius, "new_radius": new_radius}
    arrays |= {"scale": scale, "scalars": scalars}
    results = {"u": jax.ShapeDtypeStruct((x.size,), jnp.promote_types(x.dtype, g.dtype))}
    if m is not None:
        results["m_out"] = jax.ShapeDtypeStruct((x.size,), jnp.float32)
    results["ratio"] = jax.ShapeDtypeStruct((1 if interpret else _PROGRAMS,), jnp.float32)
    found = _call(_move, "fgsgd_move", layer, x.shape, arrays, results, interpret)
    u, m_out = (found[name].reshape(x.shape) if name in found else None for name in ("u", "m_out"))
    assert u is not None
    return Descent(u, m_out, None, found["ratio"])


def _call(
    body: Callable, name: str, layer: LayerType, shape: tuple[int, ...], arrays: dict, results: dict, interpret: bool
) -> dict[str, Array]:
    """The results of a kernel, whose body gets all references by name."""
    n, p, channels, width = shape
    flat = {name: each.reshape(-1) for name, each in arrays.items() if each is not None}
    # As data: a number in the program would make it another one.
    flat["count"] = jnp.full((1,), channels * width, jnp.int32)

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

    start: Array
    inside: Array

    def __init__(self, n: int, p: int, size: int, refs: dict[str, Any]):
        self.n, self.p, self.size, self.refs = n, p, size, refs
        self.count = refs["count"][0]

    def each(self, body: Callable[[Array], Array], start: Array) -> Array:
        """Carries a value through `body` for every block of the program."""
        program, programs = pl.program_id(0), pl.num_programs(0)
        blocks = _quotient(self.count, self.size)

        def turn(turn, carry):
            self.start = (program + turn * programs) * self.size
            # A GPU reads past the end if it is not told to stop.
            self.inside = self.start + jnp.arange(self.size, dtype=jnp.int32) < self.count
            return body(carry)

        return lax.fori_loop(jnp.int32(0), _quotient(blocks - program, programs), turn, start)

    def load(self, name: str, plane: int = 0) -> Array:
        value = plgpu.load(self.own(name, plane), mask=self.inside, other=0)
        return value.astype(jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else jnp.float32)

    def store(self, name: str, value: Array, plane: int = 0) -> None:
        plgpu.store(self.own(name, plane), value.astype(self.refs[name].dtype), mask=self.inside)

    def own(self, name: str, plane: int) -> Any:
        # By a slice: an array of indices would bring the layer's size into the program, to count from the end.
        return self.refs[name].at[pl.ds(self.start + plane * self.count, self.size)]

    def planes(self, name: str) -> Entries:
        return [[self.load(name, i * self.p + j) for j in range(self.p)] for i in range(self.n)]

    def store_planes(self, name: str, entries: Entries) -> None:
        for i, line in enumerate(entries):
            for j, entry in enumerate(line):
                self.store(name, entry, i * self.p + j)

    def points(self, layer: LayerType) -> Points:
        kind = self.load("kind") if "kind" in self.refs else None
        return Points(layer.manifolds, self.planes("x"), kind, self.load("radius"))


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
        # A refused gradient may be anything but a number.
        t = [[jnp.where(scale > 0, each, 0.0) for each in line] for line in points.project(block.planes("g"))]
        v, m = layer.direction(points, t, scale, m, rate, momentum, decay)
        displacement, ratio = points.displace(v, block.load("new_radius") if "new_radius" in block.refs else None)
        block.store_planes("u", displacement)
        if m is not None:
            block.store_planes("m_out", m)
        return jnp.maximum(largest, jnp.where(block.inside, ratio, 0.0))

    ratio = block.each(moved, jnp.zeros(block.size, jnp.float32))
    block.refs["ratio"][pl.program_id(0)] = jnp.max(ratio)
