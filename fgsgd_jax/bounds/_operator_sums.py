"""Norms of a layer's operator as a matrix that are sums over its entries: exact, without forming it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from ._conv_norms import folded
from ._geometry import Axis, ConvGeometry


class OperatorSums(NamedTuple):
    """Of the matrix that maps a layer's input, as a vector, to its output."""

    frobenius: float
    two_to_one: float
    """sum of the Euclidean norms of its rows: of the weights that enter each output unit"""
    inputs: int
    outputs: int


def operator_sums(kernel: Array, geometry: ConvGeometry | None) -> OperatorSums:
    """Norms and shape of the operator of a convolution, or of a Dense layer (no geometry; inputs first)."""
    if geometry is None:
        squares = np.square(np.asarray(kernel, np.float64))
        inputs, outputs = squares.shape
        return OperatorSums(float(np.sqrt(squares.sum())), float(np.sqrt(squares.sum(axis=0)).sum()), inputs, outputs)
    taps, rows, cols = folded(kernel, geometry)
    groups, *_, channels, filters = taps.shape
    # Entries of a row of the operator: those taps of a filter that read the image and not its padding.
    squares = np.square(np.asarray(taps, np.float64)).sum(axis=-2)
    (row_reads, row_counts), (col_reads, col_counts) = (_distinct_reads(axis) for axis in (rows, cols))
    by_unit = np.einsum("oa,pb,gabd->opgd", row_reads, col_reads, squares)
    positions = (row_counts[:, None] * col_counts)[..., None, None]
    return OperatorSums(
        frobenius=float(np.sqrt(np.sum(positions * by_unit))),
        two_to_one=float(np.sum(positions * np.sqrt(by_unit))),
        inputs=rows.inputs * cols.inputs * groups * channels,
        outputs=rows.outputs * cols.outputs * groups * filters,
    )


def _distinct_reads(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Which taps read the image, for every case that occurs along the axis, and how often it does."""
    reads, counts = np.unique(axis.reads, axis=0, return_counts=True)
    return reads.astype(np.float64), counts.astype(np.float64)
