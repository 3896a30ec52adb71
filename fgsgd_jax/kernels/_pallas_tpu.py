"""Lines 5 to 7 of one parameter of small matrices, for TPU: in one kernel, or in two around the groups' norms.

A layer [n, p, C, D] is n·p planes, lanes last, as an HWIO kernel is in memory. `descend` reads it in blocks of rows
(input channels) and keeps it in VMEM until the groups' norms are known, so every array passes the memory once. Where a
group's matrices are on several devices or in several layers, or where a layer is too large, `measure` writes the
squared norms and `move` computes the tangent parts again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ._pallas_entries import Entries, Points, masked, squared_norm
from ._pallas_layer import Descended, LayerType, Moved, Planes
from ._reference import reciprocal_zeta

# What a vector register holds: this many rows of 32-bit numbers, and so many lanes.
_ROWS, _LANES = 8, 128
# Bytes of a block of one array, of which there are up to ten in VMEM: small enough to overlap copies and arithmetic,
# large enough to hide what a step of the grid costs.
_BLOCK = 1 << 20
# Bytes of VMEM that any kernel may take unasked, that Mosaic may want beside the arrays, and that there are on v5e.
_VMEM, _SPARE, _MOST = 16 << 20, 4 << 20, 112 << 20


# The kernels take what there is arithmetic for.
unserved = LayerType.unserved


def descends(layer: LayerType, shape: tuple[int, ...]) -> bool:
    """Whether `descend` takes parameters of this shape [*layers, n, p, C, D].

    The tangent parts and the points must find room in VMEM, beside the blocks of all arrays.
    """
    fits = 2 * _padded(shape, jnp.dtype(jnp.float32)) + 16 * _BLOCK <= _MOST
    return len(shape) == 4 and layer.grouping != "custom" and fits


def descend(layer: LayerType, scalars: Float[Array, "5"], planes: Planes, interpret: bool = False) -> Descended:
    """See `_descend.descend`."""
    swapped = _lies_swapped(planes.x.shape, planes.x.dtype)
    layer, planes = dataclasses.replace(layer, swapped=swapped), _turned(planes, swapped)
    n, p, channels, width = planes.x.shape
    rows = _block_rows(n, p, channels, width, max(planes.x.dtype.itemsize, planes.g.dtype.itemsize))
    blocks = pl.cdiv(channels, rows)

    def at(place: Callable[..., Any], axes: tuple[int, ...] = ()) -> pl.BlockSpec:
        if blocks == 1:
            return pl.BlockSpec(memory_space=pltpu.VMEM)
        start = (0,) * len(axes)
        return pl.BlockSpec((*axes, rows, width), lambda turn, block: (*start, place(turn, block), 0))

    # Blocks that are needed in one turn only stay where they begin or end in the other.
    def read(turn, block):
        return jnp.where(turn == 0, block, blocks - 1)

    def moved(turn, block):
        return jnp.where(turn == 0, 0, block)

    def both(turn, block):
        return block

    results = {name: jax.ShapeDtypeStruct(planes.x.shape, jnp.float32) for name in ("u", "m_out")}
    if planes.m is None:
        del results["m_out"]
    results["figures"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    specs = {name: at(read, (n, p)) for name in ("x", "g")} | {name: at(moved, (n, p)) for name in ("m", "u", "m_out")}
    specs |= {"kind": at(read), "code": at(read), "radius": at(both), "new_radius": at(moved)}
    specs |= {name: pl.BlockSpec(memory_space=pltpu.SMEM) for name in ("scalars", "figures")}
    padded = blocks * rows
    scratch: dict[str, Any] = {"t": pltpu.VMEM((n, p, padded, width), jnp.float32)}
    scratch["usable"] = pltpu.SMEM((1,), jnp.int32)
    gathered = ("ratio", "above", "largest") if layer.grouping == "matrix" else ("ratio",)
    scratch |= {name: pltpu.VMEM((_ROWS, min(width, _LANES)), jnp.float32) for name in gathered}
    if layer.row_tables:
        # Members lie along the lanes: a column alone would be as large.
        scratch["by_row"] = pltpu.VMEM((padded, layer.row_tables), jnp.float32)
    if blocks > 1:
        scratch["kept"] = pltpu.VMEM((n, p, padded, width), planes.x.dtype)
    if layer.column_tables:
        scratch["by_column"] = pltpu.VMEM((layer.column_tables, _ROWS, width), jnp.float32)

    def body(refs):
        _Descent(layer, channels, rows, blocks, refs).run()

    grid = (2, blocks) if blocks > 1 else ()
    arrays = {"scalars": scalars} | planes.present()
    found = _call("fgsgd_descend", body, grid, arrays, results, specs, scratch, padded, interpret)
    displacement, momentum = _turned((found["u"], found.get("m_out")), swapped)
    return Descended(displacement, momentum, found["figures"])


def measure(layer: LayerType, planes: Planes, interpret: bool = False) -> Float[Array, "*layers C D"]:
    """See `_descend.measure`."""
    return _by_matrix("fgsgd_measure", _Measure, layer, planes.present(), {}, ("squares",), interpret)["squares"]


def move(
    layer: LayerType,
    scalars: Float[Array, "5"],
    planes: Planes,
    scale: Float[Array, "*layers C D"],
    interpret: bool = False,
) -> Moved:
    """See `_descend.move`."""
    arrays = planes.present() | {"scale": scale}
    results = ("u", "ratio") if planes.m is None else ("u", "m_out", "ratio")
    found = _by_matrix("fgsgd_move", _Move, layer, arrays, {"scalars": scalars}, results, interpret)
    return Moved(found["u"], found.get("m_out"), found["ratio"])


def _by_matrix(
    name: str,
    kernel: type["_Measure | _Move"],
    layer: LayerType,
    arrays: dict[str, Array],
    scalars: dict[str, Array],
    results: tuple[str, ...],
    interpret: bool,
) -> dict[str, Array]:
    """The results of a kernel that needs no other matrix for one: its grid runs over layers and blocks of rows."""
    x = arrays["x"]
    batch, swapped = x.shape[:-4], _lies_swapped(x.shape, x.dtype)
    flat = {name: each.reshape(-1, *each.shape[len(batch) :]) for name, each in arrays.items()}
    flat = _turned(flat, swapped)
    count, n, p, channels, width = flat["x"].shape
    rows = _block_rows(n, p, channels, width, max(flat["x"].dtype.itemsize, flat["g"].dtype.itemsize))
    blocks = pl.cdiv(channels, rows)
    tensor = pl.BlockSpec((None, n, p, rows, width), lambda layer, block: (layer, 0, 0, block, 0))
    values = pl.BlockSpec((None, rows, width), lambda layer, block: (layer, block, 0))
    specs: dict[str, Any] = dict.fromkeys(("x", "g", "m", "u", "m_out"), tensor)
    specs |= dict.fromkeys(("kind", "radius", "new_radius", "scale", "squares"), values)
    specs |= dict.fromkeys(("scalars", "ratio"), pl.BlockSpec(memory_space=pltpu.SMEM))
    shapes = {"squares": flat["radius"].shape, "ratio": (1,)}
    out = {name: jax.ShapeDtypeStruct(shapes.get(name, flat["x"].shape), jnp.float32) for name in results}
    scratch = {"largest": pltpu.VMEM((_ROWS, min(width, _LANES)), jnp.float32)} if "ratio" in results else {}

    def body(refs):
        kernel(layer, channels, rows, blocks, refs).run()

    found = _call(name, body, (count, blocks), scalars | flat, out, specs, scratch, rows, interpret)
    tensors = {name: each for name, each in found.items() if name != "ratio"}
    tensors = {name: each.reshape(*batch, *each.shape[1:]) for name, each in _turned(tensors, swapped).items()}
    return found | tensors


def _call(
    name: str,
    body: Callable[[dict[str, Any]], None],
    grid: tuple[int, ...],
    arrays: dict[str, Array],
    results: dict[str, jax.ShapeDtypeStruct],
    specs: Mapping[str, Any],
    scratch: dict[str, Any],
    wide: int,
    interpret: bool,
) -> dict[str, Array]:
    """The results by name of a kernel, whose body gets all references by name."""
    # Eight rows of int8 are no tile: integers are widened by the block.
    integers = [name for name in ("kind", "code") if name in arrays]
    scratch = scratch | {f"{name}_wide": pltpu.VMEM((wide, arrays[name].shape[-1]), jnp.int32) for name in integers}
    # What a kernel may take, XLA cannot use to keep arrays from kernel to kernel: so no more than it needs.
    blocks = {name: specs[name].block_shape or each.shape for name, each in (arrays | results).items()}
    needed = sum(_padded(blocks[name], each.dtype) for name, each in (arrays | results).items())
    needed = (2 if grid else 1) * needed + sum(_padded(each.shape, each.dtype) for each in scratch.values()) + _SPARE

    def kernel(*refs):
        body(dict(zip([*arrays, *results, *scratch], refs, strict=True)))

    found = pl.pallas_call(
        kernel,
        out_shape=list(results.values()),
        grid=grid,
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * len(grid), vmem_limit_bytes=max(needed, _VMEM)
        ),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict(zip(results, found, strict=True))


def _lies_swapped(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether XLA lays rows along the lanes, as it does where less is padded then: 3×3×128×32 and the like."""

    def padded(rows: int, lanes: int) -> int:
        tile = min(_ROWS * 4 // dtype.itemsize, pl.next_power_of_2(rows))
        return pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, _LANES)

    *_, channels, width = shape
    return padded(width, channels) < padded(channels, width)


def _turned(tree: Any, swapped: bool) -> Any:
    """All arrays with rows and columns in each other's place, if they lie so."""
    return jax.tree.map(lambda each: jnp.swapaxes(each, -2, -1), tree) if swapped else tree


def _block_rows(n: int, p: int, channels: int, width: int, itemsize: int) -> int:
    """Rows of a block: all of a small layer's."""
    row = n * p * pl.cdiv(width, _LANES) * _LANES * itemsize
    # int8 comes in tiles of 32 rows.
    rows = max(32, _BLOCK // row // 32 * 32)
    return channels if rows >= channels else rows


def _padded(shape: Sequence[int | None], dtype: Any) -> int:
    """Bytes of an array in VMEM, whose tiles are never divided."""
    *leading, rows, lanes = (1, 1, *(size for size in shape if size is not None))
    tile = _ROWS * 4 // dtype.itemsize
    return math.prod(leading) * pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, _LANES) * _LANES * dtype.itemsize


class _Kernel:
    """A kernel's body. Its arrays are references; nothing of a block is in registers but one tile."""

    def __init__(self, layer: LayerType, channels: int, rows: int, blocks: int, refs: dict[str, Any]):
        self.layer, self.refs, self.channels, self.rows, self.blocks = layer, refs, channels, rows, blocks
        self.n, self.p, _, self.width = refs["x"].shape

    def each_tile(self, body: Callable[[Any, Any], None]) -> None:
        """`body(rows of the block, lanes)` of every tile."""
        _each(self.rows, _ROWS, lambda row: _each(self.width, _LANES, lambda lanes: body(row, lanes)))

    def widen(self, name: str, place: Any) -> None:
        """The block's integers, at their place in the scratch array."""
        if name in self.refs:
            self.refs[f"{name}_wide"][place, :] = self.refs[name][...].astype(jnp.int32)

    def clear(self, *names: str) -> None:
        for name in names:
            if name in self.refs:
                self.refs[name][...] = jnp.zeros_like(self.refs[name])

    def gather(self, name: str, function: Callable[..., Array], values: Array, block: Any, row: Any, lanes: Any):
        """Combines a figure of matrices with that of the tiles before."""
        own = self.refs[name].at[pl.ds(0, row.size), pl.ds(0, lanes.size)]
        own[...] = function(own[...], self.inside(values, block, row))

    def inside(self, values: Array, block: Any, row: Any) -> Array:
        """The values, zero in the rows of the last block that are not the layer's."""
        if self.rows * self.blocks == self.channels:
            return values
        index = block * self.rows + row.start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        return jnp.where(index < self.channels, values, 0.0)

    def scalars(self, *places: int) -> list[Array]:
        return [self.refs["scalars"][place] for place in places]

    def planes(self, name: str, row: Any, lanes: Any) -> Entries:
        ref = self.refs[name]
        return [[ref[i, j, row, lanes].astype(jnp.float32) for j in range(self.p)] for i in range(self.n)]

    def value(self, name: str, row: Any, lanes: Any) -> Any:
        return self.refs[name][row, lanes] if name in self.refs else None

    def points(self, name: str, own: Any, place: Any, row: Any, lanes: Any) -> Points:
        """The points at `own` of an array, whose kinds are at `place`, and whose radii are in `row`."""
        x, kind = self.planes(name, own, lanes), self.value("kind_wide", place, lanes)
        return Points(self.layer.manifolds, x, kind, self.value("radius", row, lanes))

    def store(self, name: str, entries: Entries, row: Any, lanes: Any) -> None:
        ref = self.refs[name]
        for i, line in enumerate(entries):
            for j, entry in enumerate(line):
                ref[i, j, row, lanes] = entry.astype(ref.dtype)

    def take(self, points: Points, t: Entries, scale: Array, row: Any, lanes: Any) -> Array:
        """Momentum, line 7 and eq. 2, stored; and ‖v‖/s."""
        m = self.planes("m", row, lanes) if "m" in self.refs else None
        v, m = self.layer.direction(points, t, scale, m, *self.scalars(0, 1, 4))
        displacement, ratio = points.displace(v, self.value("new_radius", row, lanes))
        self.store("u", displacement, row, lanes)
        if m is not None:
            self.store("m_out", m, row, lanes)
        return ratio


class _Measure(_Kernel):
    def run(self) -> None:
        self.widen("kind", slice(None))
        self.each_tile(self.measure)

    def measure(self, row: Any, lanes: Any) -> None:
        """Line 5, and the squared norms."""
        t = self.points("x", row, row, row, lanes).project(self.planes("g", row, lanes))
        self.refs["squares"][row, lanes] = squared_norm(t)


class _Move(_Kernel):
    def run(self) -> None:
        layer, self.block = pl.program_id(0), pl.program_id(1)
        last = pl.num_programs(0) - 1
        pl.when((layer == 0) & (self.block == 0))(lambda: self.clear("largest"))
        self.widen("kind", slice(None))
        self.each_tile(self.move)
        pl.when((layer == last) & (self.block == self.blocks - 1))(self.end)

    def move(self, row: Any, lanes: Any) -> None:
        """Line 5 again, with 1/ζ; and what follows it."""
        points, scale = self.points("x", row, row, row, lanes), self.value("scale", row, lanes)
        usable = scale > 0
        t = masked(points.project(self.planes("g", row, lanes)), usable)
        ratio = self.take(points, t, jnp.where(usable, scale, 0.0), row, lanes)
        self.gather("largest", jnp.maximum, ratio, self.block, row, lanes)

    def end(self) -> None:
        self.refs["ratio"][0] = jnp.max(self.refs["largest"][...])


class _Descent(_Kernel):
    """All lines in two turns over the blocks. `place` is where rows of a block lie in what is kept of the layer."""

    def run(self) -> None:
        if self.blocks == 1:
            self.begin()
            self.read(0)
            self.weigh()
            self.each_tile(functools.partial(self.move, 0))
            return self.end()
        turn, block = pl.program_id(0), pl.program_id(1)
        first, last = block == 0, block == self.blocks - 1
        pl.when((turn == 0) & first)(self.begin)
        pl.when(turn == 0)(lambda: self.read(block))
        pl.when((turn == 0) & last)(self.weigh)
        pl.when(turn == 1)(lambda: self.each_tile(functools.partial(self.move, block)))
        pl.when((turn == 1) & last)(self.end)

    def begin(self) -> None:
        self.clear("ratio", "above", "largest", "by_row", "by_column")

    def read(self, block: Any) -> None:
        start = block * self.rows
        place = pl.ds(start if self.blocks == 1 else pl.multiple_of(start, self.rows), self.rows)
        self.widen("kind", place)
        self.widen("code", place)
        self.each_tile(functools.partial(self.measure, block))

    def place(self, block: Any, row: Any) -> Any:
        start = block * self.rows + row.start
        return pl.ds(start if self.blocks == 1 else pl.multiple_of(start, _ROWS), row.size)

    def measure(self, block: Any, row: Any, lanes: Any) -> None:
        """Line 5 and the groups' squared norms."""
        place = self.place(block, row)
        points = self.points("x", row, place, row, lanes)
        t = points.project(self.planes("g", row, lanes))
        self.store("t", t, place, lanes)
        if self.blocks > 1:
            self.store("kept", points.x, place, lanes)
        squares = self.inside(squared_norm(t), block, row)
        code = self.value("code_wide", place, lanes)
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

    def weigh(self) -> None:
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
            scale, r = reciprocal_zeta(jnp.where(usable > 0, table, 0.0), *self.scalars(2, 3))
            above += jnp.sum((scale < 1).astype(jnp.float32))
            largest = jnp.maximum(largest, jnp.max(r))
            if name == "by_row":
                self.refs[name][...] = jnp.broadcast_to(scale, self.refs[name].shape)
            else:
                self.refs[name][:, :1, :] = scale
        self.refs["figures"][0], self.refs["figures"][1] = above, largest

    def move(self, block: Any, row: Any, lanes: Any) -> None:
        """What follows line 6."""
        place = self.place(block, row)
        name, own = ("x", row) if self.blocks == 1 else ("kept", place)
        points = self.points(name, own, place, row, lanes)
        t = masked(self.planes("t", place, lanes), self.refs["usable"][0] > 0)
        ratio = self.take(points, t, self.scale(t, block, row, lanes), row, lanes)
        self.gather("ratio", jnp.maximum, ratio, block, row, lanes)

    def scale(self, t: Entries, block: Any, row: Any, lanes: Any) -> Any:
        """1/ζ of the group of every matrix."""
        if self.layer.grouping == "matrix":
            scale, r = reciprocal_zeta(squared_norm(t), *self.scalars(2, 3))
            self.gather("above", jnp.add, (scale < 1).astype(jnp.float32), block, row, lanes)
            self.gather("largest", jnp.maximum, r, block, row, lanes)
            return scale
        place = self.place(block, row)
        by_row: Any = self.refs["by_row"][place, :] if self.layer.row_tables else None
        if self.layer.grouping == "layer":
            return by_row
        code, scale = self.value("code_wide", place, lanes), jnp.zeros((row.size, lanes.size), jnp.float32)
        for table in range(self.layer.row_tables):
            scale = jnp.where(code == self.layer.row_codes + table, by_row[:, table : table + 1], scale)
        for table in range(self.layer.column_tables):
            own = self.refs["by_column"][table, pl.ds(0, 1), lanes]
            scale = jnp.where(code == self.layer.column_codes + table, own, scale)
        return scale

    def end(self) -> None:
        if self.layer.grouping == "matrix":
            self.refs["figures"][0] = jnp.sum(self.refs["above"][...])
            self.refs["figures"][1] = jnp.max(self.refs["largest"][...])
        self.refs["figures"][3] = jnp.max(self.refs["ratio"][...])


def _each(total: int, step: int, body: Callable[[Any], None]) -> None:
    """`body` of every slice of so many, and of what is left."""
    full = total // step
    if full > 1:
        lax.fori_loop(np.int32(0), np.int32(full), lambda i, _: body(pl.ds(pl.multiple_of(i * step, step), step)), None)
    elif full:
        body(pl.ds(0, step))
    if total % step:
        body(pl.ds(full * step, total % step))
