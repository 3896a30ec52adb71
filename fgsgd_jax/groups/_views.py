"""Views: a tensor as a grid of matrices."""

import dataclasses
import difflib
import functools
import math
import re
from typing import TypeVar

import einops
import numpy as np
from jaxtyping import Array, Float

AnyArray = TypeVar("AnyArray", Array, np.ndarray)

# The patterns of the named views by number of axes. "heads" is decided by the lengths of the axes, too.
_NAMED = {
    "slices": {3: "w i o -> i o w 1", 4: "h w i o -> i o h w"},
    "matrix": {2: "i o -> 1 1 i o", 4: "h w i o -> 1 1 (h w i) o"},
    "filters": {2: "i o -> 1 o i 1", 3: "w i o -> 1 o (w i) 1", 4: "h w i o -> 1 o (h w i) 1"},
    "neurons": {2: "i o -> 1 o i 1", 4: "h w i o -> 1 o (h w i) 1"},
    "rows": {2: "v e -> v 1 e 1"},
    "heads": {},
}
_HEADS_IN, _HEADS_OUT = "e h d -> 1 h e d", "h d e -> h 1 d e"
_DEFAULTS = {2: "matrix", 4: "slices"}
_LARGEST_WINDOW = 11  # AlexNet's first layer

# What to write where neither the default nor a name is enough, by number of axes.
_NO_MATRIX = 'the scheme None, or a pattern that makes a matrix of it, as in view="o -> 1 1 o 1" for a bias or a scale'
_REMEDIES = {
    0: _NO_MATRIX,
    1: _NO_MATRIX,
    2: 'view="matrix", view="neurons" or view="rows"; for heads that are projected together, view="e (h d) -> 1 h e d" '
    'or view="(h d) e -> h 1 d e" with h=… heads',
    3: 'layers=1 for a stack of matrices; view="heads" for the projections of attention, or where their shape leaves '
    f'it open view="{_HEADS_IN}" or view="{_HEADS_OUT}", and view="e h d -> 1 1 e (h d)" for all heads as one matrix; '
    'view="slices" or view="filters" for a one-dimensional convolution',
    4: 'layers=1 for a stack, with the view of one layer, as in layers=1, view="heads"; for a kernel view="slices", '
    'view="filters" or a pattern, as in view="h w i o -> 1 1 (h w i) o"',
    5: "layers=1 for a stack of kernels; a pattern for a three-dimensional convolution, as in "
    'view="d h w i o -> i o (d h) w"',
}


@dataclasses.dataclass(frozen=True)
class View:
    """An einops pattern whose right side is `inputs outputs rows cols`, with the sizes of its axes.

    Built by `View.of` for tensors of one shape. `split` and `merge` work on all leading axes at once.

    Common patterns have names:

    | name | tensors | a matrix is |
    |---|---|---|
    | `"slices"` | kernels (h, w, i, o) and (w, i, o) | the window between one input and one output channel |
    | `"filters"` | kernels; (i, o) | the column of all that enters one output channel |
    | `"neurons"` | (i, o); kernels (h, w, i, o) | the column of all that enters one neuron |
    | `"matrix"` | (i, o); kernels (h, w, i, o) | the whole layer, all inputs × outputs |
    | `"rows"` | (v, e) | one row, as of an embedding |
    | `"heads"` | projections of attention, (e, h, d) and (h, d, e) | the e×d or d×e matrix of one head |

    `"slices"` is the default for tensors of four axes, `"matrix"` for those of two. `"heads"` finds the axis of the
    model by its length, which is at least the product of the other two. A shape that could be meant in several ways
    is refused: a window above 11×11, or five axes, may be a stack of layers.

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
          pattern: as in einops, to `inputs outputs rows cols`; `1` stands for an axis of length 1. Or a name.
          shape: of the tensors.
          **sizes: of the axes that the shape leaves open.

        Raises:
          ValueError: for an invalid pattern, one that does not fit the shape, or a name that the shape leaves open.
        """
        if pattern in _NAMED:
            pattern = _pattern_of(pattern, shape)
        match = re.fullmatch(r"\s*([^>]+?)\s*->\s*([^>]+?)\s*", pattern)
        if match is None or "..." in pattern:
            close = difflib.get_close_matches(pattern, _NAMED, n=1)
            raise ValueError(
                f"view {pattern!r}: write one of the names {', '.join(map(repr, _NAMED))}"
                + (f" ({close[0]!r}?)" if close else "")
                + f" or an einops pattern like {_NAMED['slices'][4]!r}, without '...'"
            )
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
        return View(" -> ".join(match.groups()), tuple((name, int(known[name])) for name in names))

    @functools.cached_property
    def grid(self) -> tuple[int, int, int, int]:
        """Inputs, outputs, rows, columns."""
        sizes = dict(self.sizes)
        inputs, outputs, rows, cols = (math.prod(sizes[name] for name in axis) for axis in self.axes[1])
        return inputs, outputs, rows, cols

    @property
    def axes(self) -> tuple[list[list[str]], list[list[str]]]:
        """The names that make up each axis of a tensor, and each of inputs, outputs, rows and columns."""
        left, right = self.pattern.split("->")
        return _axes(left, self.pattern), _axes(right, self.pattern)

    @property
    def mixes_channels(self) -> bool:
        """Whether one matrix covers all inputs or all outputs: one per layer, head or neuron."""
        inputs, outputs, *_ = self.axes[1]
        return not inputs or not outputs

    def split(self, x: Float[AnyArray, "..."]) -> Float[AnyArray, "*batch inputs outputs rows cols"]:
        """The grid of matrices of a tensor."""
        left, right = self.pattern.split("->")
        return einops.rearrange(x, f"... {left} -> ... {right}", **dict(self.sizes))

    def split_broadcast(self, x: Float[Array, "..."]) -> Float[Array, "*batch inputs outputs rows cols"]:
        """`split` of an array that broadcasts against the tensor: its axes of length 1 stay so."""
        axes, sizes = self.axes[0], dict(self.sizes)
        for axis, length in zip(axes, x.shape[x.ndim - len(axes) :], strict=True):
            if length == 1:
                sizes |= dict.fromkeys(axis, 1)
        return View(self.pattern, tuple(sizes.items())).split(x)

    def merge(self, grid: Float[Array, "*batch inputs outputs rows cols"]) -> Float[Array, "..."]:
        """The tensor of a grid of matrices: undoes `split`."""
        left, right = self.pattern.split("->")
        return einops.rearrange(grid, f"... {right} -> ... {left}", **dict(self.sizes))


def default_view(shape: tuple[int, ...]) -> str:
    """The name of the view that tensors of `shape` have if none is given."""
    if len(shape) not in _DEFAULTS or _has_large_window(shape):
        raise ValueError(f"its shape does not say what its axes are; write {_remedy(shape)}")
    return _DEFAULTS[len(shape)]


def doubt(name: str, shape: tuple[int, ...]) -> str | None:
    """What to tell the reader of a plan where `name` takes for a kernel what could be a stack; else None."""
    if name not in _NAMED or name == "heads" or len(shape) < 3 or (len(shape) == 4 and shape[0] == shape[1]):
        return None
    window = "×".join(map(str, shape[:-2]))
    return f"taken for a kernel with a window of {window}; if its first axis stacks layers, write layers=1"


def _pattern_of(name: str, shape: tuple[int, ...]) -> str:
    if name == "heads" and len(shape) == 3:
        first, middle, last = shape
        way_in, way_out = first >= middle * last, last >= first * middle
        if way_in != way_out:
            return _HEADS_IN if way_in else _HEADS_OUT
    elif len(shape) in _NAMED[name] and not (name in ("matrix", "neurons") and _has_large_window(shape)):
        return _NAMED[name][len(shape)]
    raise ValueError(f"view={name!r} does not say enough about tensors of shape {shape}; write {_remedy(shape)}")


def _has_large_window(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and max(shape[:2]) > _LARGEST_WINDOW


def _remedy(shape: tuple[int, ...]) -> str:
    return _REMEDIES.get(len(shape), "layers=k, if the first k axes stack layers, or an einops pattern, view=…")


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
