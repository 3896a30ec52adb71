"""Views: a tensor as a grid of matrices."""

import dataclasses
import math
import re

import einops
from jaxtyping import Array, Float

SLICES = "h w i o -> i o h w"


@dataclasses.dataclass(frozen=True)
class View:
    """An einops pattern whose right side is `inputs outputs rows cols`, with the sizes of its axes.

    Built by `View.of` for tensors of one shape. `split` and `merge` work on all leading axes at once.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> heads = fg.View.of("e (h d) -> 1 h e d", (32, 16), h=4)  # a query projection, a matrix for each head
      >>> heads.grid
      (1, 4, 32, 4)
      >>> x = jnp.arange(512.0).reshape(32, 16)
      >>> heads.split(x).shape, bool((heads.merge(heads.split(x)) == x).all())
      ((1, 4, 32, 4), True)
    """

    pattern: str
    sizes: tuple[tuple[str, int], ...]

    @staticmethod
    def of(pattern: str, shape: tuple[int, ...], **sizes: int) -> "View":
        """The view of tensors of `shape`.

        Args:
          pattern: as in einops, to `inputs outputs rows cols`; `1` stands for an axis of length 1.
          shape: of the tensors.
          **sizes: of the axes that the shape leaves open.

        Raises:
          ValueError: a pattern that is none, or does not fit the shape.
        """
        match = re.fullmatch(r"\s*([^>]+?)\s*->\s*([^>]+?)\s*", pattern)
        if match is None or "..." in pattern:
            raise ValueError(f"view {pattern!r}: write an einops pattern like {SLICES!r}, without '...'")
        left, right = (_axes(side, pattern) for side in match.groups())
        if len(right) != 4:
            raise ValueError(
                f"view {pattern!r}: the right side has {len(right)} axes; it must be `inputs outputs rows cols`"
            )
        if len(left) != len(shape):
            raise ValueError(f"view {pattern!r} takes tensors with {len(left)} axes, this one has shape {shape}")
        names = [name for axis in left for name in axis]
        if len(set(names)) < len(names) or sorted(names) != sorted(name for axis in right for name in axis):
            raise ValueError(f"view {pattern!r}: every axis must stand once on either side")
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ValueError(f"view {pattern!r}: the size of an axis is a whole number of 1 or more, not {wrong}")
        known = dict(sizes)
        for axis, length in zip(left, shape, strict=True):
            open_names = [name for name in axis if name not in known]
            given = math.prod(known[name] for name in axis if name in known)
            if len(open_names) > 1:
                raise ValueError(
                    f"view {pattern!r}: give the sizes of all but one of {open_names}, as in {open_names[-1]}=4"
                )
            if length % given if open_names else length != given:
                raise ValueError(f"view {pattern!r}: an axis of {length} is not made of {axis} with sizes {known}")
            if open_names:
                known[open_names[0]] = length // given
        if unknown := set(sizes) - set(names):
            raise ValueError(f"view {pattern!r} has no axis {sorted(unknown)}")
        left_side, right_side = match.groups()
        return View(f"{left_side} -> {right_side}", tuple((name, int(known[name])) for name in names))

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Inputs, outputs, rows, columns."""
        sizes = dict(self.sizes)
        right = self.pattern.split("->")[1]
        inputs, outputs, rows, cols = (math.prod(sizes[name] for name in axis) for axis in _axes(right, self.pattern))
        return inputs, outputs, rows, cols

    @property
    def mixes_channels(self) -> bool:
        """Whether a point takes in all inputs or all outputs: one matrix per layer, head or neuron."""
        inputs, outputs, *_ = _axes(self.pattern.split("->")[1], self.pattern)
        return not inputs or not outputs

    def split(self, x: Float[Array, "..."]) -> Float[Array, "*batch inputs outputs rows cols"]:
        """The grid of matrices of a tensor."""
        left, right = self.pattern.split("->")
        return einops.rearrange(x, f"... {left} -> ... {right}", **dict(self.sizes))

    def split_broadcast(self, x: Float[Array, "..."]) -> Float[Array, "inputs outputs rows cols"]:
        """`split` of an array that broadcasts against the tensor: its axes of length 1 stay so."""
        left, right = self.pattern.split("->")
        sizes = dict(self.sizes)
        for axis, length in zip(_axes(left, self.pattern), x.shape, strict=True):
            if length == 1:
                sizes |= dict.fromkeys(axis, 1)
        return einops.rearrange(x, f"{left} -> {right}", **sizes)

    def merge(self, grid: Float[Array, "*batch inputs outputs rows cols"]) -> Float[Array, "..."]:
        """The tensor of a grid of matrices: undoes `split`."""
        left, right = self.pattern.split("->")
        return einops.rearrange(grid, f"... {right} -> ... {left}", **dict(self.sizes))


def _axes(side: str, pattern: str) -> list[list[str]]:
    """The axes of one side of a pattern, each as the names that it is composed of; `1` is of none."""
    tokens = re.findall(r"\(([^()]*)\)|([^\s()]+)", side)
    if re.sub(r"\([^()]*\)|[^\s()]+|\s", "", side):
        raise ValueError(f"view {pattern!r}: unbalanced parentheses")
    axes = [composed.split() if composed or not single else [single] for composed, single in tokens]
    axes = [[name for name in axis if name != "1"] for axis in axes]
    for name in (name for axis in axes for name in axis):
        if not name.isidentifier():
            raise ValueError(f"view {pattern!r}: {name!r} is not the name of an axis")
    return axes
