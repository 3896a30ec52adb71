from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

Params = dict[str, Any]
Stats = dict[str, Any]


class Model(NamedTuple):
    """A network as two pure functions, whichever Flax API it is written in.

    `params` and `stats` (batch normalization's running statistics) are plain nested dictionaries of arrays.
    """

    name: str
    init: Callable[[jax.Array], tuple[Params, Stats]]
    """`init(key) -> (params, stats)`"""
    apply: Callable[[Params, Stats, Float[Array, "n height width channels"], bool], tuple[Array, Stats]]
    """`apply(params, stats, images, train) -> (logits, new stats)`; `train` is static"""
