"""A two-dimensional convolution as a block-diagonal matrix."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._gram_iteration import gram_iteration
from ._spectral import spectral_norm

# Entries of the blocks that are in memory at a time.
_BLOCK_ENTRIES = 2**22


def torus_basis(offsets: np.ndarray, stride: int, size: int, twist: float = 0.0, *, half: bool = False) -> np.ndarray:
    """Fourier basis of one axis of a torus of `size` outputs and `size`·`stride` inputs: `[size, taps, 1, stride]`.

    Tap a reads input `stride·o + offsets[a]` for output o. Input s·q + r is the r-th phase of cell q, so the axis acts
    among cells as a convolution of stride 1. A `twist` of t turns the phase by 2πt around the torus once: the basis
    functions are `exp(2πi (k + t) q / size)`. Entry [k, a, 0, r] is the contribution of tap a to frequency k.

    `half` leaves out one of each pair of conjugate frequencies, for a twist of 0 or ½. It may be set for one of the
    two axes of a real kernel, of which conjugate frequencies have conjugate blocks.
    """
    cells, phases = np.divmod(offsets, stride)
    frequencies = np.arange(size) + twist
    angles = 2 * np.pi * (frequencies[frequencies <= size / 2] if half else frequencies) / size
    waves = np.exp(1j * angles[:, None] * cells)
    return waves[:, :, None, None] * (phases[:, None] == np.arange(stride))[:, None, :]


def unrolled_basis(offsets: np.ndarray, stride: int, inputs: int, outputs: int, wrap: bool) -> np.ndarray:
    """The axis as a matrix: `[1, taps, outputs, inputs]`, 1 where the tap leads from the input to the output."""
    read = stride * np.arange(outputs) + np.asarray(offsets)[:, None]
    read = read % inputs if wrap else read
    return (read[..., None] == np.arange(inputs))[None].astype(np.float64)


def block_norms(
    norm: Callable[[Array], Array],
    kernel: Float[Array, "*batch a b c d"],
    rows: Inexact[Array, "k a o i"],
    cols: Inexact[Array, "l b p j"],
) -> Float[Array, "*batch k l"]:
    """The `norm` of each diagonal block of a convolution's operator.

    Block (k, l) is the matrix `Σ_ab rows[k, a] ⊗ cols[l, b] ⊗ kernel[a, b]ᵀ` of (o·p·d)×(i·j·c) entries, where `rows`
    and `cols` are bases of the two spatial axes, each of a torus or unrolled. If both are of a torus, these are the
    values of the kernel's discrete Fourier transform (Sedghi, Gupta & Long, The Singular Values of Convolutional
    Layers, 2019): for windows of a few taps a product with few rows of the Fourier matrix, at exactly the frequencies
    that are asked for, instead of an FFT of the kernel padded to the image.
    """
    kernel, rows, cols = _alike(kernel, rows, cols)

    def of_row(row: Array) -> Array:
        return norm(_blocks(kernel, row[None], cols)[..., 0, :, :, :])

    at_a_time = max(1, _BLOCK_ENTRIES // max(1, _row_entries(kernel, rows, cols)))
    return jnp.moveaxis(lax.map(of_row, rows, batch_size=at_a_time), 0, -2)


def largest_block(
    kernel: Float[Array, "batch a b c d"], rows: Inexact[Array, "k a o i"], cols: Inexact[Array, "l b p j"]
) -> Float[Array, ""]:
    """The largest spectral norm of a diagonal block, of all kernels of a batch: exact, to round-off.

    Eigenvalues are costly beside the products of a Gram iteration. So its bounds order the blocks, and their exact
    norms are computed only until the largest found is no less than the bounds that are left.
    """
    bounds = block_norms(gram_iteration, kernel, rows, cols)
    kernel, rows, cols = _alike(kernel, rows, cols)
    order = jnp.argsort(bounds.ravel(), descending=True)

    def unsure(carry: tuple[Array, Array]) -> Array:
        index, largest = carry
        return (index < order.size) & (bounds.ravel()[order[jnp.minimum(index, order.size - 1)]] > largest)

    def look(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        index, largest = carry
        batch, row, col = jnp.unravel_index(order[index], bounds.shape)
        block = _blocks(kernel[batch], rows[row][None], cols[col][None])[0, 0]
        return index + 1, jnp.maximum(largest, spectral_norm(block))

    return lax.while_loop(unsure, look, (jnp.zeros((), jnp.int32), jnp.zeros((), bounds.dtype)))[1]


def _alike(kernel: Array, rows: Array, cols: Array) -> tuple[Array, Array, Array]:
    """All three complex if one is."""
    dtype = kernel.dtype
    if jnp.iscomplexobj(rows) or jnp.iscomplexobj(cols):
        dtype = jnp.complex64 if dtype == jnp.float32 else jnp.complex128
    return kernel.astype(dtype), rows.astype(dtype), cols.astype(dtype)


def _row_entries(kernel: Array, rows: Array, cols: Array) -> int:
    """Entries of the blocks of one row frequency."""
    (_, _, o, i), (l, _, p, j) = rows.shape, cols.shape
    return math.prod(kernel.shape[:-4]) * l * o * p * i * j * math.prod(kernel.shape[-2:])


def _blocks(kernel: Array, rows: Array, cols: Array) -> Array:
    """The blocks of all pairs of frequencies, `[*batch, k, l, o·p·d, i·j·c]`."""
    *lead, _, _, c, d = kernel.shape
    (k, _, o, i), (l, _, p, j) = rows.shape, cols.shape
    partial = jnp.einsum("lbpj,...abcd->...alpdjc", cols, kernel, precision=lax.Precision.HIGHEST)
    blocks = jnp.einsum("kaoi,...alpdjc->...klopdijc", rows, partial, precision=lax.Precision.HIGHEST)
    return blocks.reshape(*lead, k, l, o * p * d, i * j * c)
