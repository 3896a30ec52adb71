from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array

import fgsgd_jax as fg

Params = dict[str, Any]
Stats = dict[str, Any]


class Apply(Protocol):
    """The forward pass of a network, on images or tokens; `train` and `observe` are static."""

    def __call__(
        self, params: Params, stats: Stats, inputs: Array, train: bool, observe: bool, /
    ) -> tuple[Array, Stats, dict[str, fg.FeatureMoments]]:
        """The logits, the new statistics, and the moments of what entered each kernel (none if not to be observed)."""
        ...


class Model(NamedTuple):
    """A network as two pure functions, whichever Flax API it is written in.

    `params` and `stats` (batch normalization's running statistics) are plain nested dictionaries of arrays.
    """

    name: str
    init: Callable[[jax.Array], tuple[Params, Stats]]
    """`init(key) -> (params, stats)`"""
    apply: Apply
    trace: Callable[[tuple[int, int]], fg.Trace] | None = None
    """`trace((height, width))`: the calls of its layers on images of this size; `None` of a network for other data"""
