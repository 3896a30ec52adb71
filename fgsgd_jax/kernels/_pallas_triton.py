"""Lines 5 to 7 of one layer of small matrices in two kernels, for GPU through Triton.

A layer [n, p, C, D] is n·p planes, as an HWIO kernel is in memory; each is taken as one row of C·D numbers, a thread to
each matrix. The first kernel writes the squared norms of the tangent parts; XLA adds them up over groups; the second
kernel computes those parts again and takes the step. So one number a matrix is what lies between them, and both are
the same for all groups. (Sums over rows and columns inside the first one take Triton two to four times as long to
compile, and leave less to do at the same time.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from ._pallas_entries import Entries, Points, squared_norm
from ._pallas_layer import Descent, Layer

_MATRICES, _WARPS = 128, 4


def descend(
    layer: Layer,
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
    """One step of one layer; see `Layer` and `Descent`."""
    n, p, channels, width = x.shape
    count = channels * width
    planes = {"x": x, "g": g, "kind": kind, "radius": radius}
    squares = {"squares": jax.ShapeDtypeStruct((count,), jnp.float32)}
    found = _call(_measure, "fgsgd_measure", layer, count, planes, squares, interpret)
    scale, figures = layer.weigh(found["squares"].reshape(channels, width), code, scalars)
    planes |= {"m": m, "new_radius": new_radius, "scale": scale, "scalars": scalars}
    results = {"u": jax.ShapeDtypeStruct((n, p, count), jnp.promote_types(x.dtype, g.dtype))}
    results |= {} if m is None else {"m_out": jax.ShapeDtypeStruct((n, p, count), jnp.float32)}
    results["ratio"] = jax.ShapeDtypeStruct((pl.cdiv(count, _MATRICES),), jnp.float32)
    found = _call(_move, "fgsgd_move", layer, count, planes, results, interpret)
    figures = jnp.append(figures, jnp.max(found["ratio"]))
    return Descent(found["u"].reshape(x.shape), None if m is None else found["m_out"].reshape(x.shape), figures)


def _call(body: Any, name: str, layer: Layer, count: int, arrays: dict, results: dict, interpret: bool) -> dict:
    """The results of a kernel, whose body gets all references by name."""

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name == "scalars":
            return pl.BlockSpec(shape, lambda block: (0,))
        if name == "ratio":
            return pl.BlockSpec((1,), lambda block: (block,))
        leading = shape[:-1]
        return pl.BlockSpec((*leading, _MATRICES), lambda block: (*(0 for _ in leading), block))

    arrays = {name: each for name, each in arrays.items() if each is not None}
    flat = {name: each if each.ndim == 1 else each.reshape(*each.shape[:-2], -1) for name, each in arrays.items()}

    def kernel(*refs):
        body(layer, _Block(count, dict(zip([*flat, *results], refs, strict=True))))

    found = pl.pallas_call(
        kernel,
        out_shape=list(results.values()),
        grid=(pl.cdiv(count, _MATRICES),),
        in_specs=[spec(name, each.shape) for name, each in flat.items()],
        out_specs=[spec(name, each.shape) for name, each in results.items()],
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*flat.values())
    return dict(zip(results, found, strict=True))


class _Block:
    """The references of some matrices that follow each other."""

    def __init__(self, count: int, refs: dict[str, Any]):
        self.refs = refs
        # A GPU reads past the end if it is not told to stop.
        index = pl.program_id(0) * _MATRICES + jnp.arange(_MATRICES)
        self.inside = index < count if count % _MATRICES else None

    def load(self, name: str, *place: int) -> Array | None:
        if name not in self.refs:
            return None
        value = plgpu.load(_at(self.refs[name], *place), mask=self.inside, other=None if self.inside is None else 0)
        return value.astype(jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else jnp.float32)

    def store(self, name: str, value: Array, *place: int) -> None:
        ref = self.refs[name]
        plgpu.store(_at(ref, *place), value.astype(ref.dtype), mask=self.inside)

    def planes(self, name: str) -> Entries | None:
        if name not in self.refs:
            return None
        n, p = self.refs[name].shape[:2]
        return [[self.load(name, i, j) for j in range(p)] for i in range(n)]

    def store_planes(self, name: str, entries: Entries) -> None:
        for i, line in enumerate(entries):
            for j, entry in enumerate(line):
                self.store(name, entry, i, j)

    def points(self, layer: Layer) -> Points:
        return Points(layer.manifolds, self.planes("x"), self.load("kind"), self.load("radius"))


def _at(ref: Any, *indices: int) -> Any:
    """A part of a reference. With Python's own numbers, masks fail in interpret mode (JAX 0.10)."""
    return ref.at[tuple(jnp.int32(index) for index in indices)] if indices else ref


def _measure(layer: Layer, block: _Block) -> None:
    """Line 5, of which the squared norms are kept."""
    block.store("squares", squared_norm(block.points(layer).project(block.planes("g"))))


def _move(layer: Layer, block: _Block) -> None:
    """Momentum, line 7 and eq. 2."""
    points, scale, scalars = block.points(layer), block.load("scale"), block.refs["scalars"]
    # A refused gradient may be anything but a number.
    t = [[jnp.where(scale > 0, each, 0.0) for each in line] for line in points.project(block.planes("g"))]
    v, m = layer.direction(points, t, scale, block.planes("m"), *(scalars[index] for index in (0, 1, 4)))
    displacement, ratio = points.displace(v, block.load("new_radius"))
    block.store_planes("u", displacement)
    if m is not None:
        block.store_planes("m_out", m)
    inside = True if block.inside is None else block.inside
    block.refs["ratio"][0] = jnp.max(jnp.where(inside, ratio, 0.0))
