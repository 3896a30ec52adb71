"""What a convolution does with its kernel: the record that operator norms are computed from."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

Pair = tuple[int, int]


class Axis(NamedTuple):
    """One spatial axis: output o reads input `stride·o + offsets[t]` through tap t; modulo `inputs` if `wrap`.

    The taps are those that ever read an input, each offset once: `fold` (window × taps, zeros and ones) adds up the
    kernel's entries that have become one tap.
    """

    inputs: int
    outputs: int
    stride: int
    wrap: bool
    offsets: np.ndarray
    fold: np.ndarray

    @property
    def reads(self) -> np.ndarray:
        """Whether output o reads an input through tap t, not padding: `[outputs, taps]`."""
        read = self.stride * np.arange(self.outputs)[:, None] + self.offsets
        return np.ones_like(read, bool) if self.wrap else (read >= 0) & (read < self.inputs)

    @property
    def fan_in(self) -> int:
        """The most inputs that an output reads."""
        return int(self.reads.sum(axis=1).max())

    @property
    def fan_out(self) -> int:
        """The most outputs that read one input."""
        read = self.stride * np.arange(self.outputs)[:, None] + self.offsets
        return int(np.bincount((read % self.inputs)[self.reads], minlength=1).max())


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a two-dimensional convolution: what the shape of its kernel (HWIO) does not say.

    Args:
      size: height and width of its input, in pixels.
      strides: of the outputs; one number stands for both axes, here and below.
      padding: as in `flax.linen.Conv`: `"SAME"`, `"VALID"`, `"CIRCULAR"`, a number, or (before, after) for each axis.
      groups: `feature_group_count`: blocks of channels that do not mix.
      dilation: `kernel_dilation`.

    Raises:
      ValueError: for an invalid geometry; the message says what to write instead.

    Example:
      >>> import fgsgd_jax as fg
      >>> fg.ConvGeometry((32, 32), strides=2, padding=1).output_size((3, 3))
      (16, 16)
    """

    size: Pair
    strides: int | Pair = 1
    padding: str | int | Sequence[int | Pair] = "SAME"
    groups: int = 1
    dilation: int | Pair = 1

    def __post_init__(self):
        for name in ("size", "strides", "dilation"):
            value = _pair(name, getattr(self, name))
            if min(value) < 1:
                raise ValueError(f"ConvGeometry({name}={getattr(self, name)!r}): both numbers must be positive")
            object.__setattr__(self, name, value)
        if self.groups < 1:
            raise ValueError(f"ConvGeometry(groups={self.groups!r}): write the number of groups, 1 for none")
        if isinstance(self.padding, str):
            if self.padding not in ("SAME", "VALID", "CIRCULAR"):
                raise ValueError(
                    f"ConvGeometry(padding={self.padding!r}): write 'SAME', 'VALID', 'CIRCULAR', a number, or "
                    "((top, bottom), (left, right))"
                )
        else:
            sides = tuple(_pair("padding", side) for side in _pair("padding", self.padding))
            object.__setattr__(self, "padding", sides)

    def output_size(self, window: Pair) -> Pair:
        """Height and width of the output for a kernel of this window (height, width)."""
        rows, cols = self.axes(window)
        return rows.outputs, cols.outputs

    def axes(self, window: Pair) -> tuple[Axis, Axis]:
        """The two spatial axes for a kernel of this window."""
        rows, cols = (self._axis(index, window[index]) for index in range(2))
        return rows, cols

    def on_torus(self) -> "ConvGeometry":
        """The same convolution with circular padding, on an input of whole strides."""
        sizes = zip(_pair("size", self.size), _pair("strides", self.strides), strict=True)
        rows, cols = (-(-size // stride) * stride for size, stride in sizes)
        return dataclasses.replace(self, padding="CIRCULAR", size=(rows, cols))

    def _axis(self, index: int, window: int) -> Axis:
        inputs, stride, dilation = (_pair("", pair)[index] for pair in (self.size, self.strides, self.dilation))
        span = (window - 1) * dilation + 1
        wrap = self.padding == "CIRCULAR"
        if self.padding in ("SAME", "CIRCULAR"):
            outputs = -(-inputs // stride)
            before = (span - 1) // 2 if wrap else max((outputs - 1) * stride + span - inputs, 0) // 2
        else:
            # __post_init__ left pairs of pairs only, which the annotation, a user's, does not say.
            before, after = (0, 0) if self.padding == "VALID" else cast(tuple[Pair, Pair], self.padding)[index]
            outputs = (inputs + before + after - span) // stride + 1
        if outputs < 1:
            raise ValueError(
                f"{self}: a window that spans {span} does not fit an input of {inputs} with this padding; check size "
                "and padding"
            )
        offsets = np.arange(window) * dilation - before
        read = stride * np.arange(outputs)[:, None] + offsets
        used = np.ones(window, bool) if wrap else ((read >= 0) & (read < inputs)).any(axis=0)
        # A window that reads nothing but padding: one tap, of weight zero.
        taps = np.unique(offsets[used] % inputs if wrap else offsets[used]) if used.any() else np.zeros(1, int)
        fold = used[:, None] & ((offsets % inputs if wrap else offsets)[:, None] == taps)
        return Axis(inputs, outputs, stride, wrap, taps, fold.astype(np.float64))


def _pair(name: str, value) -> tuple:
    pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"ConvGeometry({name}={value!r}): write one number, or one for each of the two axes")
    return pair
