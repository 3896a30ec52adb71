"""Schemes: how the manifolds are dealt over a layer's grid of matrices (section 3 of the paper)."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from ..manifolds import Manifold
from ._deal import Bits, members, numbered

Dealt = tuple[Int[np.ndarray, "*layers inputs outputs"], Int[np.ndarray, "*layers inputs outputs"]]


class Scheme(abc.ABC):
    """A rule that gives every matrix of a grid its manifold (`member`) and its group (`group`).

    `view` is the name of a view (see `View`) or an einops pattern to `inputs outputs rows cols`, whose open axis sizes
    follow by name, as in `Each(Stiefel(), view="(i a) (o b) -> i o a b", a=4, b=4)`. Without a view,
    four-dimensional kernels (HWIO) are cut into their spatial slices and two-dimensional ones are one matrix; other
    tensors need one.

    `layers=k` says that the first k axes stack layers, as `nnx.scan`, `nn.scan` and `vmap` make them. The view is that
    of one layer. Every layer is dealt on its own: layer 2 of `"blocks/kernel"` as if it stood at the path
    `"blocks/kernel/2"`.

    Args:
      manifolds: those that are dealt, one or more.
      view: a name or an einops pattern; None for `"slices"` of a kernel, `"matrix"` of a tensor of two axes.
      layers: how many leading axes of the tensor stack layers.
      **sizes: of axes that the pattern leaves open.

    Raises:
      ValueError: without a manifold, or if `layers` is not a number of axes.
      TypeError: for something that is not a manifold of single matrices.

    Example:
      A scheme of your own is a subclass with one method.

      >>> import numpy as np
      >>> import fgsgd_jax as fg
      >>> class Checkerboard(fg.Scheme):
      ...     def deal(self, inputs, outputs, bits):
      ...         member = np.indices((inputs, outputs)).sum(0) % len(self.manifolds)
      ...         return member, member
      >>> Checkerboard([fg.Sphere(), fg.Stiefel()]).deal(2, 3, None)[0].tolist()
      [[0, 1, 0], [1, 0, 1]]
    """

    def __init__(self, manifolds: Sequence[Manifold], view: str | None = None, *, layers: int = 0, **sizes: int):
        self.manifolds = tuple(manifolds)
        self.view = view
        self.layers = layers
        self.sizes = sizes
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 0:
            raise ValueError(
                f"layers={layers!r}: write how many leading axes of the tensor stack layers, as in layers=1"
            )
        if not self.manifolds:
            raise ValueError(f"{type(self).__name__}([]): give at least one manifold")
        for manifold in self.manifolds:
            if not isinstance(manifold, Manifold):
                raise TypeError(
                    f"{type(self).__name__}: {manifold!r} is not a manifold of one matrix; write Sphere(), Oblique(), "
                    "Stiefel() or Euclidean()"
                )

    def __repr__(self) -> str:
        arguments = [", ".join(type(m).__name__ for m in self.manifolds)]
        arguments += [f"view={self.view!r}"] if self.view else []
        arguments += [f"layers={self.layers}"] if self.layers else []
        arguments += [f"{name}={size}" for name, size in self.sizes.items()]
        return f"{type(self).__name__}({', '.join(arguments)})"

    @abc.abstractmethod
    def deal(self, inputs: int, outputs: int, bits: Bits) -> Dealt:
        """`member` and `group` of every matrix of an inputs×outputs grid.

        Args:
          inputs: rows of the grid.
          outputs: columns of the grid.
          bits: the plan's source of randomness, a function of seed and path.

        Returns:
          Two integer arrays inputs × outputs: the index of each matrix's manifold, and the number of its group, from
          0 without gaps. The members of a group share one manifold.
        """

    def deal_layers(
        self, layers: tuple[int, ...], inputs: int, outputs: int, bits: Callable[[tuple[int, ...]], Bits]
    ) -> Dealt:
        """`deal` for every layer of a stack; the numbers of the groups run on from layer to layer.

        Args:
          layers: lengths of the axes that stack layers; () for a single layer.
          inputs: rows of a layer's grid.
          outputs: columns of a layer's grid.
          bits: the source of randomness of the layer at an index.

        Returns:
          Two integer arrays [*layers, inputs, outputs].
        """
        return _stacked([self.deal(inputs, outputs, bits(index)) for index in np.ndindex(layers)], layers)

    def dealt_at_once(self, inputs: int, outputs: int) -> int:
        """How many matrices (or half-columns) are dealt over the manifolds in one go."""
        return inputs * outputs


class _Single(Scheme):
    def __init__(self, manifold: Manifold, view: str | None = None, *, layers: int = 0, **sizes: int):
        super().__init__([manifold], view, layers=layers, **sizes)


class Whole(_Single):
    """One manifold, the whole layer one group.

    Args:
      manifold: of every matrix of the layer.
      view: see `Scheme`.
      layers: see `Scheme`.
      **sizes: see `Scheme`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> orthogonal = fg.Whole(fg.Stiefel())
      >>> fg.plan({"dense": jnp.ones((8, 4))}, [("dense", orthogonal)])["dense"].view.pattern
      'i o -> 1 1 i o'
    """

    def deal(self, inputs: int, outputs: int, bits: Bits) -> Dealt:
        """All zeros."""
        del bits
        return np.zeros((inputs, outputs), int), np.zeros((inputs, outputs), int)


class Each(_Single):
    """One manifold, every matrix a group of its own: as in optimizers on a single manifold.

    Args:
      manifold: of every matrix of the layer.
      view: see `Scheme`.
      layers: see `Scheme`.
      **sizes: see `Scheme`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> tiles = fg.Each(fg.Stiefel(), view="(i a) (o b) -> i o a b", a=4, b=4)
      >>> fg.plan({"dense": jnp.ones((8, 12))}, [("dense", tiles)])["dense"].num_groups
      6
    """

    def deal(self, inputs: int, outputs: int, bits: Bits) -> Dealt:
        """One group a matrix."""
        del bits
        return np.zeros((inputs, outputs), int), np.arange(inputs * outputs).reshape(inputs, outputs)


class PI(Scheme):
    """POMs for input channels.

    For every input channel the outputs are permuted at random and cut into m near-equal parts, part k on manifold k:
    m·C groups.

    Args:
      manifolds: the m manifolds.
      view: see `Scheme`.
      layers: see `Scheme`.
      **sizes: see `Scheme`.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> rules = [("kernel", fg.PI([fg.Sphere(), fg.Stiefel()]))]
      >>> collection = fg.plan({"kernel": jnp.ones((3, 3, 4, 6))}, rules)["kernel"]
      >>> collection.num_groups, collection.member.sum(1).tolist()  # of each input's 6 slices, 3 are Stiefel
      (8, [3, 3, 3, 3])
    """

    def deal(self, inputs: int, outputs: int, bits: Bits) -> Dealt:
        """Row by row."""
        return _dealt_by_row(bits, inputs, outputs, len(self.manifolds))

    def dealt_at_once(self, inputs: int, outputs: int) -> int:
        """A row."""
        return outputs


class PO(Scheme):
    """POMs for output channels.

    For every output channel the inputs are permuted at random and cut into m near-equal parts: m·D groups.

    Args:
      manifolds: the m manifolds.
      view: see `Scheme`.
      layers: see `Scheme`.
      **sizes: see `Scheme`.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> rules = [("kernel", fg.PO([fg.Sphere(), fg.Stiefel()]))]
      >>> collection = fg.plan({"kernel": jnp.ones((3, 3, 4, 6))}, rules)["kernel"]
      >>> collection.num_groups, collection.member.sum(0).tolist()  # of each output's 4 slices, 2 are Stiefel
      (12, [2, 2, 2, 2, 2, 2])
    """

    def deal(self, inputs: int, outputs: int, bits: Bits) -> Dealt:
        """Column by column."""
        member, group = _dealt_by_row(bits, outputs, inputs, len(self.manifolds))
        return member.T, group.T

    def dealt_at_once(self, inputs: int, outputs: int) -> int:
        """A column."""
        return inputs


class PIO(Scheme):
    """POMs for input and output channels.

    Half of the input channels (⌊C/2⌋, drawn at random) are grouped by output: the half-column of each output channel is
    one group, and these D groups are dealt evenly over the m manifolds. The other inputs are dealt as `PI` does.
    D·[C ≥ 2] + m·⌈C/2⌉ groups, less empty parts; with one input channel it is `PI`.

    Args:
      manifolds: the m manifolds.
      view: see `Scheme`.
      layers: see `Scheme`.
      **sizes: see `Scheme`.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import fgsgd_jax as fg
      >>> rules = [("kernel", fg.PIO([fg.Sphere(), fg.Stiefel()]))]
      >>> collection = fg.plan({"kernel": jnp.ones((3, 3, 4, 6))}, rules)["kernel"]
      >>> np.bincount(collection.group.ravel()).tolist()  # 6 half-columns, then 2 parts of each of 2 rows
      [2, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    """

    def deal(self, inputs: int, outputs: int, bits: Bits) -> Dealt:
        """Half by column, half by row."""
        parts = len(self.manifolds)
        by_output = np.argsort(bits.keys(inputs), kind="stable")[: inputs // 2]
        by_input = np.setdiff1d(np.arange(inputs), by_output)
        member = np.empty((inputs, outputs), int)
        group = np.empty((inputs, outputs), int)
        member[by_output] = members(bits, 1, outputs, parts)
        group[by_output] = np.arange(outputs)
        # The half-columns' remainder went to the first parts; the rows' begins after it.
        rest = _dealt_by_row(bits, len(by_input), outputs, parts, first=outputs % parts)
        member[by_input] = rest[0]
        group[by_input] = rest[1] + (outputs if len(by_output) else 0)
        return member, group

    def dealt_at_once(self, inputs: int, outputs: int) -> int:
        """A row, or a row of half-columns."""
        return outputs


class Custom(Scheme):
    """Member and group arrays of your own, both inputs × outputs.

    `member[c, d]` is the index of the manifold of matrix (c, d), `group[c, d]` the number of its group; the members of
    a group share one manifold. For a stack, arrays of one layer hold for every layer; arrays [*layers, inputs, outputs]
    hold one grid a layer, each with its own group numbers.

    Args:
      manifolds: those that `member` indexes, from 0.
      member: integers, inputs × outputs.
      group: integers, inputs × outputs; gaps in the numbers are closed.
      view: see `Scheme`.
      layers: see `Scheme`.
      **sizes: see `Scheme`.

    Raises:
      ValueError: in `fg.plan`, for arrays that do not fit the grid, or a group on two manifolds.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> member = [[0, 0, 1], [0, 0, 1]]  # the third output channel is Stiefel
      >>> rules = [("kernel", fg.Custom([fg.Sphere(), fg.Stiefel()], member, group=member))]
      >>> fg.plan({"kernel": jnp.ones((3, 3, 2, 3))}, rules)["kernel"].num_groups
      2
    """

    def __init__(
        self,
        manifolds: Sequence[Manifold],
        member: Any,
        group: Any,
        view: str | None = None,
        *,
        layers: int = 0,
        **sizes: int,
    ):
        super().__init__(manifolds, view, layers=layers, **sizes)
        self.member, self.group = np.asarray(member), np.asarray(group)

    def deal(self, inputs: int, outputs: int, bits: Bits) -> Dealt:
        """The given arrays, checked."""
        return self.deal_layers((), inputs, outputs, lambda index: bits)

    def deal_layers(self, layers, inputs, outputs, bits) -> Dealt:
        """The given arrays of every layer, checked."""
        del bits
        grid = (*layers, inputs, outputs)
        for name, array in (("member", self.member), ("group", self.group)):
            if array.shape not in (grid, grid[-2:]) or array.dtype.kind not in "iu":
                raise ValueError(
                    f"Custom: {name} is {array.dtype} of shape {array.shape}, the grid takes integers of shape "
                    + (f"{grid} (layers, inputs, outputs) or " if layers else "")
                    + f"{(inputs, outputs)} (inputs, outputs)"
                )
        by_layer = (np.broadcast_to(array, grid).reshape(-1, *grid[-2:]) for array in (self.member, self.group))
        return _stacked([self._checked(*dealt) for dealt in zip(*by_layer, strict=True)], layers)

    def _checked(self, member: np.ndarray, group: np.ndarray) -> Dealt:
        if member.min() < 0 or member.max() >= len(self.manifolds):
            raise ValueError(
                f"Custom: member has values from {member.min()} to {member.max()}; the indices of the "
                f"manifolds are 0 … {len(self.manifolds) - 1}"
            )
        if group.min() < 0:
            raise ValueError(f"Custom: group has the number {group.min()}; number the groups from 0")
        numbers = numbered(group)
        of_group = np.zeros(numbers.max() + 1, int)
        of_group[numbers] = member
        if (mixed := of_group[numbers] != member).any():
            raise ValueError(
                f"Custom: group {group[mixed][0]} has members on two manifolds; a POM lies on one: split the group"
            )
        return member.astype(int), numbers


def _stacked(dealt: list[tuple[np.ndarray, np.ndarray]], layers: tuple[int, ...]) -> Dealt:
    """What was dealt for every layer of a stack, with the numbers of the groups running on."""
    members, groups = (np.stack([np.asarray(array) for array in arrays]) for arrays in zip(*dealt, strict=True))
    counts = groups.max(axis=(1, 2)) + 1
    groups = groups + (np.cumsum(counts) - counts)[:, None, None]
    return members.reshape(*layers, *members.shape[1:]), groups.reshape(*layers, *groups.shape[1:])


def _dealt_by_row(bits: Bits, rows: int, cols: int, parts: int, first: int = 0) -> Dealt:
    member = members(bits, rows, cols, parts, first)
    return member, numbered(np.arange(rows)[:, None] * parts + member)
