"""Convolutions as operators: how much they can stretch an image."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..groups import by_path
from ..linalg import (
    block_norms,
    compute_dtype,
    gram_iteration,
    largest,
    largest_block,
    norm,
    spectral_norm,
    torus_basis,
    unrolled_basis,
)
from ._geometry import Axis, ConvGeometry

# A block of the operator of up to so many rows or columns costs next to nothing, so axes are unrolled up to here.
_UNROLLED_SIDE = 256
# With more frequencies per tap than these, a twist moves the maximum by a percent or two at most.
_TWISTED_FREQUENCIES = 8
# With more channels than these the antiperiodic torus is the only one tried: each costs as much again.
_FEW_CHANNELS = 128

Scales = Mapping[str, Float[Array, " outputs"]]


class ConvNorms(NamedTuple):
    """Three spectral norms of a layer. For a Dense layer they agree, up to the bound's slack."""

    reshaped: Float[Array, ""]
    """of the kernel as a matrix of A·B·C rows and D columns: no bound of the convolution"""
    circular: Float[Array, ""]
    """of the convolution on a torus of the input's size"""
    certified: Float[Array, ""]
    """an upper bound for the convolution as it is, round-off included"""


def conv_norms(
    params: Any, geometries: Mapping[str, ConvGeometry], scales: Scales | None = None
) -> dict[str, ConvNorms]:
    """Operator norms of the layers: how much each can stretch its input, in the Euclidean norm.

    * `reshaped` is the norm of the kernel as an (A·B·C)×D matrix. A kernel for which it is 1 need not be a 1-Lipschitz
      convolution: the convolution's norm can be up to √(A·B) times as large, or smaller.
    * `circular` is the exact norm with circular padding at the layer's input size (the next multiple of the stride),
      by Fourier transform of the taps. Padding with zeros can give more or less.
    * `certified` is an upper bound for the layer as its geometry says, with its padding, stride, groups and dilation,
      by Gram iteration. A convolution with zero padding is a part of the convolution on a large enough torus, and of
      one with twisted boundary conditions too, since the part does not see where the torus closes. The bound is the
      least over such tori and over √(overlap of the patches) times the norm of the reshaped kernel. Axes with few
      pixels and channels are unrolled instead, without any slack. All rounding is accounted for.

    Args:
      params: the parameters. Leaves of two axes (inputs first) count as Dense layers; leaves of one axis or none are
        left out.
      geometries: the geometry of each convolution, by the path of its kernel (HWIO).
      scales: factors on the outputs of layers, by path, that count as part of them: batch normalization in evaluation
        multiplies by scale/√(variance + ε).

    Returns:
      The norms by path, in the units of outputs per input (none).

    Raises:
      ValueError: for a path without a leaf, or a kernel whose geometry is missing or does not fit.

    References:
      Sedghi, Gupta & Long, The Singular Values of Convolutional Layers, 2019.
      Delattre et al., Spectral Norm of Convolutional Layers with Circular and Zero Paddings, 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"blur": jnp.ones((3, 3, 1, 1)) / 9}
      >>> norms = fg.conv_norms(params, {"blur": fg.ConvGeometry((8, 8))})["blur"]
      >>> [round(float(x), 3) for x in norms]  # (1 + 2 cos(π/9))²/9 is that of zero padding
      [0.333, 1.0, 0.921]
    """
    leaves = by_path(params)
    for path in [*geometries, *(scales or {})]:
        if path not in leaves:
            raise ValueError(f"there is no parameter {path!r} to these geometries and scales: {list(leaves)[:8]} …")
    result = {}
    for path, leaf in leaves.items():
        if path not in geometries and leaf.ndim < 2:
            continue
        scale = None if scales is None else scales.get(path)
        kernel = scaled_kernel(path, leaf, scale)
        if path in geometries:
            check_fits(path, kernel, geometries[path])
            result[path] = _of_kernel(kernel, geometries[path])
        elif leaf.ndim == 2:
            result[path] = _of_matrix(kernel)
        else:
            raise ValueError(
                f"{path} has shape {leaf.shape} and no geometry: give it one, as in "
                f"geometries={{{path!r}: ConvGeometry((32, 32))}}, or leave it out of params; of a stack, give the "
                f"layers one by one, as in {{f'{path}/{{n}}': layer for n, layer in enumerate(stack)}}"
            )
    return result


def scaled_kernel(path: str, leaf: Array, scale: Array | None) -> Array:
    """The kernel with the factor on its outputs taken in, in the dtype of constraint arithmetic."""
    kernel = jnp.asarray(leaf).astype(compute_dtype(leaf.dtype))
    if scale is None:
        return kernel
    if scale.shape != leaf.shape[-1:]:
        raise ValueError(
            f"{path}: its scale has shape {scale.shape}, it needs one number per output: {leaf.shape[-1:]}"
        )
    return kernel * jnp.asarray(scale, kernel.dtype).reshape((1,) * (kernel.ndim - 1) + (-1,))


def check_fits(path: str, kernel: Array, geometry: ConvGeometry) -> None:
    """Raises if the kernel and the geometry are not of one layer."""
    if kernel.ndim != 4 or kernel.shape[-1] % geometry.groups:
        raise ValueError(
            f"{path}: a kernel of shape {kernel.shape} does not fit {geometry}: it needs four axes (height, width, "
            "inputs per group, outputs) and outputs that the groups divide"
        )


def folded(kernel: Array, geometry: ConvGeometry) -> tuple[Array, Axis, Axis]:
    """The kernel per group of channels, `[groups, taps, taps, C, D]`, with only its taps that read; and the axes."""
    rows, cols = geometry.axes((kernel.shape[0], kernel.shape[1]))
    return _fold(kernel, rows.fold, cols.fold, geometry.groups), rows, cols


@functools.partial(jax.jit, static_argnums=3)
def _fold(kernel: Array, rows: np.ndarray | Array, cols: np.ndarray | Array, groups: int) -> Array:
    rows, cols = (jnp.asarray(fold, kernel.dtype) for fold in (rows, cols))
    taps = jnp.einsum("hwcd,ha,wb->abcd", kernel, rows, cols, precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(taps.reshape(*taps.shape[:-1], groups, -1), -2, 0)


@jax.jit
def _of_matrix(matrix: Array) -> ConvNorms:
    measured = spectral_norm(matrix)
    return ConvNorms(measured, measured, gram_iteration(matrix))


def _of_kernel(kernel: Array, geometry: ConvGeometry) -> ConvNorms:
    taps, rows, cols = folded(kernel, geometry.on_torus())
    circular = _circular(taps, *_tori(rows, half=True), *_tori(cols))
    taps, rows, cols = folded(kernel, geometry)
    part = _least_of_largest(taps, *_coverings(rows, cols, taps.shape))
    overlap = _overlap_bound(taps, rows.fan_out * cols.fan_out, rows.fan_in * cols.fan_in)
    return _summary(kernel, circular, part, overlap)


@jax.jit
def _summary(kernel: Array, circular: Array, part: Array, overlap: Array) -> ConvNorms:
    reshaped = spectral_norm(kernel.reshape(-1, kernel.shape[-1]))
    certified = jnp.minimum(part, overlap) + _slack(kernel, len(part))
    return ConvNorms(reshaped, circular, largest(certified))


@jax.jit
def _circular(taps: Array, rows: np.ndarray | Array, cols: np.ndarray | Array) -> Array:
    return largest_block(taps, jnp.asarray(rows), jnp.asarray(cols))


@jax.jit
def _least_of_largest(taps: Array, rows: list, cols: list) -> Array:
    """Per group of channels the least, over pairs of bases, of the largest bound of a block."""
    # All bases of an axis in one array: a program for each pair would take longer to compile than to run.
    norms = block_norms(gram_iteration, taps, jnp.concatenate(rows), jnp.concatenate(cols))
    for axis, bases in ((-2, rows), (-1, cols)):
        pieces = jnp.split(norms, np.cumsum([len(basis) for basis in bases])[:-1], axis=axis)
        norms = jnp.concatenate([jnp.max(piece, axis=axis, keepdims=True) for piece in pieces], axis=axis)
    return jnp.min(norms, axis=(-2, -1))


def _coverings(rows: Axis, cols: Axis, shape: tuple[int, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Bases of either axis: every pair is of an operator that has the convolution as a part."""
    *_, inputs, outputs = shape

    def side(*unrolled: bool) -> int:
        flags = zip((rows, cols), unrolled, strict=True)
        (o, i), (p, j) = ((axis.outputs, axis.inputs) if flag else (1, axis.stride) for axis, flag in flags)
        return min(o * p * outputs, i * j * inputs)

    small_first = (True, False) if rows.inputs <= cols.inputs else (False, True)
    choices = [(True, True), small_first, small_first[::-1]]
    unrolled = next((choice for choice in choices if side(*choice) <= _UNROLLED_SIDE), (False, False))
    few = min(inputs, outputs) <= _FEW_CHANNELS
    row_bases = _unrolled(rows) if unrolled[0] else _tori(rows, half=True, plain=few)
    col_bases = _unrolled(cols) if unrolled[1] else _tori(cols, half=unrolled[0], plain=few)
    return row_bases, col_bases


def _unrolled(axis: Axis) -> list[np.ndarray]:
    return [unrolled_basis(axis.offsets, axis.stride, axis.inputs, axis.outputs, axis.wrap)]


def _tori(axis: Axis, half: bool = False, plain: bool = True) -> list[np.ndarray]:
    """Bases of the tori that have the axis as a part: the antiperiodic one, where it helps, and perhaps the plain."""
    if axis.wrap:
        if axis.inputs % axis.stride == 0:
            # A single tap has the same norm at all frequencies.
            size = axis.outputs if len(axis.offsets) > 1 else 1
            return [torus_basis(axis.offsets, axis.stride, size, half=half)]
        # The outputs left out by the stride only lower the norm.
        return [torus_basis(axis.offsets, 1, axis.inputs, half=half)]
    cells = axis.offsets // axis.stride
    # Outputs and inputs, in cells, may meet around the torus through no tap: only then does the axis not see it.
    size = max(-(-axis.inputs // axis.stride) - cells.min(), axis.outputs + cells.max())
    taps = cells.max() - cells.min() + 1
    if taps == 1:
        size = 1
    twists = ((0.5, 0.0) if plain else (0.5,)) if 1 < size <= _TWISTED_FREQUENCIES * taps else (0.0,)
    return [torus_basis(axis.offsets, axis.stride, int(size), twist, half=half) for twist in twists]


def _slack(kernel: Array, groups: int) -> Array:
    """Bound, per group, of what rounding of the bases and of the sums over taps changes in the operator."""
    height, width, inputs, _ = kernel.shape
    roundings = 4 * (height + width) + 16
    taps = norm(kernel.reshape(height * width, inputs, groups, -1), (-3, -1))
    return roundings * float(jnp.finfo(kernel.dtype).eps) * jnp.sum(taps, axis=0)


@jax.jit
def _overlap_bound(taps: Array, fan_out: int | Array, fan_in: int | Array) -> Array:
    """√(patches that share an input) ‖kernel as (A·B·C)×D‖, or the same of the transposed convolution."""
    groups, _, _, inputs, outputs = taps.shape
    as_patches = gram_iteration(taps.reshape(groups, -1, outputs))
    transposed = gram_iteration(jnp.moveaxis(taps, -2, -1).reshape(groups, -1, inputs))
    roots = [jnp.sqrt(jnp.asarray(count, taps.dtype)) for count in (fan_out, fan_in)]
    return jnp.minimum(as_patches * roots[0], transposed * roots[1]) * (1 + 8 * float(jnp.finfo(taps.dtype).eps))
