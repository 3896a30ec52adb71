"""Lines 5 to 7 of one layer of small matrices in one kernel, for TPU.

A layer [n, p, C, D] is n·p planes, lanes last, as an HWIO kernel is in memory. The kernel reads it in blocks of rows
(input channels) and keeps it in VMEM until the groups' norms are known, so every array passes the memory once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ._pallas_entries import Entries, Points, reciprocal_zeta, squared_norm
from ._pallas_layer import Descent, LayerType

# What a vector register holds: this many rows of 32-bit numbers, and so many lanes.
_ROWS, _LANES = 8, 128
# Bytes of a block of one array, of which there are up to ten in VMEM: small enough to overlap copies and arithmetic,
# large enough to hide what a step of the grid costs.
_BLOCK = 1 << 20
# Bytes of VMEM that any kernel may take unasked, that Mosaic may want beside the arrays, and that there are on v5e.
_VMEM, _SPARE, _MOST = 16 << 20, 4 << 20, 112 << 20


def serves(layer: LayerType, shape: tuple[int, ...], *dtypes: jnp.dtype) -> bool:
    """Whether the kernel takes layers [n, p, C, D] of this shape, points and gradients being of these dtypes.

    The tangent parts and the points of a layer must find room in VMEM, beside the blocks of all arrays.
    """
    return layer.serves(shape, *dtypes) and 2 * _padded(shape, jnp.dtype(jnp.float32)) + 16 * _BLOCK <= _MOST


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
    if _lies_swapped(x.shape, x.dtype):

        def swapped(each: Array | None) -> Any:
            return None if each is None else jnp.swapaxes(each, -2, -1)

        turned = [swapped(each) for each in (x, g, m, kind, radius, new_radius, code)]
        found = _descend(dataclasses.replace(layer, swapped=True), scalars, *turned, interpret=interpret)
        return found._replace(displacement=swapped(found.displacement), momentum=swapped(found.momentum))
    return _descend(layer, scalars, x, g, m, kind, radius, new_radius, code, interpret)


def _lies_swapped(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether XLA lays rows along the lanes, as it does where less is padded then: 3×3×128×32 and the like."""

    def padded(rows: int, lanes: int) -> int:
        tile = min(_ROWS * 4 // dtype.itemsize, pl.next_power_of_2(rows))
        return pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, _LANES)

    *_, channels, width = shape
    return padded(width, channels) < padded(channels, width)


def _descend(layer, scalars, x, g, m, kind, radius, new_radius, code, interpret) -> Descent:
    n, p, channels, width = x.shape
    rows = _block_rows(x.shape, max(x.dtype.itemsize, g.dtype.itemsize))
    blocks = pl.cdiv(channels, rows)

    def moved(phase: int) -> Callable[..., Any]:
        """Blocks that are needed in one phase only stay where they begin or end in the other."""
        if phase == 0:
            return lambda turn, block: jnp.where(turn == 0, block, blocks - 1)
        return lambda turn, block: jnp.where(turn == 0, 0, block)

    whole = pl.BlockSpec(memory_space=pltpu.VMEM)

    def planes(phase: int) -> pl.BlockSpec:
        place = moved(phase)
        if blocks == 1:
            return whole
        return pl.BlockSpec((n, p, rows, width), lambda turn, block: (0, 0, place(turn, block), 0))

    def grid(phase: int | None = None) -> pl.BlockSpec:
        if blocks == 1:
            return whole
        place = (lambda turn, block: block) if phase is None else moved(phase)
        return pl.BlockSpec((rows, width), lambda turn, block: (place(turn, block), 0))

    arrays = {"scalars": scalars, "x": x, "g": g, "m": m, "kind": kind, "radius": radius}
    arrays |= {"new_radius": new_radius, "code": code}
    specs = {"scalars": pl.BlockSpec(memory_space=pltpu.SMEM), "x": planes(0), "g": planes(0), "m": planes(1)}
    specs |= {"kind": grid(0), "radius": grid(), "new_radius": grid(1), "code": grid(0)}
    arrays = {name: each for name, each in arrays.items() if each is not None}
    wide = jnp.promote_types(x.dtype, g.dtype)
    results = {"u": jax.ShapeDtypeStruct(x.shape, wide), "figures": jax.ShapeDtypeStruct((4,), jnp.float32)}
    places = {"u": planes(1), "figures": pl.BlockSpec(memory_space=pltpu.SMEM)}
    if m is not None:
        results["m_out"], places["m_out"] = jax.ShapeDtypeStruct(x.shape, jnp.float32), planes(1)
    padded = blocks * rows
    scratch = {"t": pltpu.VMEM((n, p, padded, width), jnp.float32)}
    scratch["usable"] = pltpu.SMEM((1,), jnp.int32)
    gathered = ("ratio", "above", "largest") if layer.grouping == "matrix" else ("ratio",)
    scratch |= {name: pltpu.VMEM((_ROWS, min(width, _LANES)), jnp.float32) for name in gathered}
    if layer.row_tables:
        # Members lie along the lanes: a column alone would be as large.
        scratch["by_row"] = pltpu.VMEM((padded, layer.row_tables), jnp.float32)
    # Eight rows of int8 are no tile: integers are widened by the block.
    scratch |= {f"{name}_wide": pltpu.VMEM((padded, width), jnp.int32) for name in ("kind", "code") if name in arrays}
    if blocks > 1:
        scratch["kept"] = pltpu.VMEM((n, p, padded, width), x.dtype)
    if layer.column_tables:
        scratch["by_column"] = pltpu.VMEM((layer.column_tables, _ROWS, width), jnp.float32)

    # What a kernel may take, XLA cannot use to keep arrays from kernel to kernel: so no more than it needs.
    block = [n, p, rows, width]
    buffers = [_padded(block[-len(each.shape) :], each.dtype) for each in [*arrays.values(), *results.values()]]
    needed = (1 if blocks == 1 else 2) * sum(buffers)
    needed += sum(_padded(each.shape, each.dtype) for each in scratch.values()) + _SPARE
    needed = max(needed, _VMEM)

    def kernel(*refs):
        names = [*arrays, *results, *scratch]
        _Kernel(layer, channels, rows, blocks, dict(zip(names, refs, strict=True))).run()

    found = pl.pallas_call(
        kernel,
        out_shape=list(results.values()),
        grid=(2, blocks) if blocks > 1 else (),
        in_specs=[specs[name] for name in arrays],
        out_specs=[places[name] for name in results],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary") if blocks > 1 else (), vmem_limit_bytes=needed
        ),
        interpret=interpret,
        name="fgsgd_descend",
    )(*arrays.values())
    found = dict(zip(results, found, strict=True))
    return Descent(found["u"], found.get("m_out"), found["figures"])


def _block_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of a block: all of a small layer's."""
    n, p, channels, width = shape
    row = n * p * pl.cdiv(width, _LANES) * _LANES * itemsize
    # int8 comes in tiles of 32 rows.
    rows = max(32, _BLOCK // row // 32 * 32)
    return channels if rows >= channels else rows


def _padded(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array in VMEM, whose tiles are never divided."""
    *leading, rows, lanes = (1, 1, *shape)[-max(2, len(shape)) :]
    tile = _ROWS * 4 // dtype.itemsize
    return math.prod(leading) * pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, _LANES) * _LANES * dtype.itemsize


class _Kernel:
    """The kernel's body. Its arrays are references; nothing of a block is in registers but one tile."""

    def __init__(self, layer: LayerType, channels: int, rows: int, blocks: int, refs: dict[str, Any]):
        self.layer, self.refs, self.channels, self.rows, self.blocks = layer, refs, channels, rows, blocks
        self.n, self.p, _, self.width = refs["x"].shape

    def run(self):
        if self.blocks == 1:
            self.begin()
            self.read(0)
            self.weigh()
            self.each_tile(0, self.move)
            return self.end()
        turn, block = pl.program_id(0), pl.program_id(1)
        first, last = block == 0, block == self.blocks - 1
        pl.when((turn == 0) & first)(self.begin)
        pl.when(turn == 0)(lambda: self.read(block))
        pl.when((turn == 0) & last)(self.weigh)
        pl.when(turn == 1)(lambda: self.each_tile(block, self.move))
        pl.when((turn == 1) & last)(self.end)

    def begin(self):
        for name in ("ratio", "above", "largest", "by_row", "by_column"):
            if name in self.refs:
                self.refs[name][...] = jnp.zeros_like(self.refs[name])

    def read(self, block):
        for name in ("kind", "code"):
            if name in self.refs:
                start = block * self.rows
                place = pl.ds(start if self.blocks == 1 else pl.multiple_of(start, self.rows), self.rows)
                self.refs[f"{name}_wide"][place, :] = self.refs[name][...].astype(jnp.int32)
        self.each_tile(block, self.measure)

    def each_tile(self, block, body):
        """`body(row in the block, row in the layer, rows, lanes)` of every tile."""
        _each(
            self.rows,
            _ROWS,
            lambda row: _each(self.width, _LANES, lambda lanes: body(row, self.place(block, row), lanes)),
        )

    def place(self, block, row):
        """The rows of the layer that are those of the block."""
        start = block * self.rows + row.start
        return pl.ds(start if self.blocks == 1 else pl.multiple_of(start, _ROWS), row.size)

    def measure(self, row, place, lanes):
        """Line 5 and the groups' squared norms."""
        points = self.points("x", row, row, place, lanes)
        t = points.project(self.planes("g", row, lanes))
        self.store("t", t, place, lanes)
        if self.blocks > 1:
            self.store("kept", points.x, place, lanes)
        squares = squared_norm(t)
        squares = self.inside(squares, place)
        code = self.code("code", place, lanes)
        tables = self.layer.row_tables
        if tables:
            table = lax.broadcasted_iota(jnp.int32, (place.size, tables), 1)
            sums = jnp.zeros(table.shape, jnp.float32)
            for index in range(tables):
                own = squares if code is None else jnp.where(code == self.layer.row_codes + index, squares, 0.0)
                sums = jnp.where(table == index, jnp.sum(own, axis=1, keepdims=True), sums)
            self.refs["by_row"][place, :] += sums
        for table in range(self.layer.column_tables):
            own = jnp.where(code == self.layer.column_codes + table, squares, 0.0)
            self.refs["by_column"][table, pl.ds(0, row.size), lanes] += own

    def weigh(self):
        """Line 6: 1/ζ of every group in place of its squared norm, and the figures."""
        tables = {}
        if self.layer.row_tables:
            tables["by_row"] = self.refs["by_row"][...]
        if self.layer.column_tables:
            tables["by_column"] = jnp.sum(self.refs["by_column"][...], axis=1, keepdims=True)
        total = functools.reduce(jnp.add, [jnp.sum(table) for table in tables.values()])
        usable = (total < jnp.inf).astype(jnp.int32)
        self.refs["usable"][0] = usable
        self.refs["figures"][2] = (1 - usable).astype(jnp.float32)
        if self.layer.grouping == "matrix":
            return
        if self.layer.grouping == "layer":
            tables = {"by_row": jnp.full((1, 1), total)}
        above, largest = 0.0, 0.0
        for name, table in tables.items():
            scale, r = self.zeta(jnp.where(usable > 0, table, 0.0))
            above += jnp.sum((scale < 1).astype(jnp.float32))
            largest = jnp.maximum(largest, jnp.max(r))
            if name == "by_row":
                self.refs[name][...] = jnp.broadcast_to(scale, self.refs[name].shape)
            else:
                self.refs[name][:, :1, :] = scale
        self.refs["figures"][0], self.refs["figures"][1] = above, largest

    def move(self, row, place, lanes):
        """Momentum, line 7 and eq. 2."""
        name, own = ("x", row) if self.blocks == 1 else ("kept", place)
        points = self.points(name, own, row, place, lanes)
        usable = self.refs["usable"][0] > 0
        t = [[jnp.where(usable, each, 0.0) for each in line] for line in self.planes("t", place, lanes)]
        scale = self.scale(t, place, lanes)
        m = self.planes("m", row, lanes) if "m" in self.refs else None
        v, m = self.layer.direction(points, t, scale, m, *(self.refs["scalars"][i] for i in (0, 1, 4)))
        displacement, ratio = points.displace(v, self.value("new_radius", row, lanes))
        self.store("u", displacement, row, lanes)
        if m is not None:
            self.store("m_out", m, row, lanes)
        self.gather("ratio", jnp.maximum, ratio, place, lanes)

    def scale(self, t, place, lanes) -> Any:
        """1/ζ of the group of every matrix."""
        if self.layer.grouping == "matrix":
            scale, r = self.zeta(squared_norm(t))
            self.gather("above", jnp.add, (scale < 1).astype(jnp.float32), place, lanes)
            self.gather("largest", jnp.maximum, r, place, lanes)
            return scale
        by_row: Any = self.refs["by_row"][place, :] if self.layer.row_tables else None
        if self.layer.grouping == "layer":
            return by_row
        code, scale = self.code("code", place, lanes), jnp.zeros((place.size, lanes.size), jnp.float32)
        for table in range(self.layer.row_tables):
            scale = jnp.where(code == self.layer.row_codes + table, by_row[:, table : table + 1], scale)
        for table in range(self.layer.column_tables):
            own = self.refs["by_column"][table, pl.ds(0, 1), lanes]
            scale = jnp.where(code == self.layer.column_codes + table, own, scale)
        return scale

    def gather(self, name, function, values, place, lanes):
        """Combines a figure of matrices with that of the tiles before."""
        own = self.refs[name].at[pl.ds(0, place.size), pl.ds(0, lanes.size)]
        own[...] = function(own[...], self.inside(values, place))

    def inside(self, values, place):
        """The values, zero in the rows of the last block that are not the layer's."""
        if self.rows * self.blocks == self.channels:
            return values
        index = place.start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        return jnp.where(index < self.channels, values, 0.0)

    def end(self):
        if self.layer.grouping == "matrix":
            self.refs["figures"][0] = jnp.sum(self.refs["above"][...])
            self.refs["figures"][1] = jnp.max(self.refs["largest"][...])
        self.refs["figures"][3] = jnp.max(self.refs["ratio"][...])

    def zeta(self, squares):
        return reciprocal_zeta(squares, self.refs["scalars"][2], self.refs["scalars"][3])

    def points(self, name, own, row, place, lanes) -> Points:
        x, kind = self.planes(name, own, lanes), self.code("kind", place, lanes)
        return Points(self.layer.manifolds, x, kind, self.value("radius", row, lanes))

    def planes(self, name, row, lanes) -> Entries:
        ref = self.refs[name]
        return [[ref[i, j, row, lanes].astype(jnp.float32) for j in range(self.p)] for i in range(self.n)]

    def value(self, name, row, lanes) -> Any:
        return self.refs[name][row, lanes] if name in self.refs else None

    def code(self, name, place, lanes) -> Any:
        return self.value(f"{name}_wide", place, lanes)

    def store(self, name, entries: Entries, row, lanes):
        ref = self.refs[name]
        for i, line in enumerate(entries):
            for j, entry in enumerate(line):
                ref[i, j, row, lanes] = entry.astype(ref.dtype)


def _each(total: int, step: int, body: Callable[[Any], None]) -> None:
    """`body` of every slice of so many, and of what is left."""
    full = total // step
    if full > 1:
        lax.fori_loop(np.int32(0), np.int32(full), lambda i, _: body(pl.ds(pl.multiple_of(i * step, step), step)), None)
    elif full:
        body(pl.ds(0, step))
    if total % step:
        body(pl.ds(full * step, total % step))
