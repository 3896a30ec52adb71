"""Dealing the slices of a layer over manifolds: fixed counts, random positions, the same on every platform."""

import hashlib

import numpy as np
from jaxtyping import Int


class Bits:
    """Random 64-bit keys that depend on nothing but the seed and the path.

    Only the raw stream of Philox is used: NumPy promises that it never changes, unlike its shuffles.
    """

    def __init__(self, seed: int, path: str):
        digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
        self._stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def keys(self, *shape: int) -> np.ndarray:
        """An array of independent keys."""
        return np.asarray(self._stream.random_raw(int(np.prod(shape)))).reshape(shape)

    def ranks(self, rows: int, cols: int) -> np.ndarray:
        """One random permutation of 0 … cols - 1 in each row."""
        return np.argsort(np.argsort(self.keys(rows, cols), axis=1, kind="stable"), axis=1, kind="stable")


def part_sizes(bits: Bits, rows: int, cols: int, parts: int, first: int = 0) -> Int[np.ndarray, "rows parts"]:
    """Sizes of near-equal parts of each row: ⌊cols/parts⌋, and one more for randomly drawn parts.

    The sums over the rows do not depend on the draw: they too are near equal, the larger ones beginning at
    part `first`.
    """
    size, extra = divmod(cols, parts)
    sizes = np.full((rows, parts), size)
    if not extra:
        return sizes
    each, left_over = divmod(rows * extra, parts)
    remaining = each + ((np.arange(parts) - first) % parts < left_over)
    keys = bits.keys(rows, parts)
    for row in range(rows):
        # A part whose remaining extras need every row left must have this one; the others are drawn.
        needed = np.where(remaining == rows - row, 0, np.where(remaining > 0, 1, 2))
        chosen = np.lexsort((keys[row], needed))[:extra]
        sizes[row, chosen] += 1
        remaining[chosen] -= 1
    return sizes[np.argsort(bits.keys(rows), kind="stable")]


def members(bits: Bits, rows: int, cols: int, parts: int, first: int = 0) -> Int[np.ndarray, "rows cols"]:
    """The part of each entry, every row being permuted at random and cut by `part_sizes`."""
    ends = np.cumsum(part_sizes(bits, rows, cols, parts, first), axis=1)
    ranks = bits.ranks(rows, cols)
    return np.sum(ranks[:, :, None] >= ends[:, None, :], axis=2)


def numbered(labels: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """The labels replaced by 0, 1, … in their order: empty parts have no number."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
