"""What the shapes of a layer's input and output say, whatever the framework."""

import math


def einsum_axes(subscripts: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the input, and of the kernel, that the two share: contracted ones and those the kernel has one each for.

    Args:
      subscripts: of an einsum with two operands, the input and the kernel.
      ndim: number of axes of the input.
    """
    operands, _ = subscripts.replace(" ", "").split("->")
    features, kernel = operands.split(",")
    before, ellipsis, after = features.partition("...")
    positions = {label: axis for axis, label in enumerate(before)}
    positions |= {label: ndim - len(after) + axis for axis, label in enumerate(after if ellipsis else "")}
    kernel = kernel.replace("...", "")
    shared = [label for label in kernel if label in positions]
    return tuple(positions[label] for label in shared), tuple(kernel.index(label) for label in shared)


def output_positions(shape: tuple[int, ...], features: int = 1, spatial: int | None = None) -> int:
    """H_out·W_out of an output of `shape`, whose last `features` axes are output channels.

    The `spatial` axes before them are positions; if not given, all axes but the first, the batch.
    """
    end = len(shape) - features
    return math.prod(shape[end - spatial if spatial is not None else min(1, end) : end])
