"""The form for every backend: the reference, run once for all layers of one shape.

Layers are stacked along a new axis, so that the program does not grow with their number, and sharded axes stay as they
are.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..manifolds import Manifold
from . import _reference
from ._layers import Layer, Results, unpacked


def tangent(manifolds: tuple[Manifold, ...], layers: Sequence[Layer]) -> Results:
    """See `_reference.tangent`."""
    return _by_shape(_reference.tangent_of(manifolds), layers)


def step(
    manifolds: tuple[Manifold, ...], layers: Sequence[Layer], factor: Float[Array, ""], is_tangent: bool
) -> Results:
    """See `_reference.step`."""
    return _by_shape(_reference.step_of(manifolds, factor, is_tangent), layers)


def _by_shape(of: Callable[[Layer], tuple[Array, Array]], layers: Sequence[Layer]) -> Results:
    places: dict[tuple, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer.x.shape, []).append(place)
    found: dict[int, tuple[Array, Array]] = {}
    for alike in places.values():
        if len(alike) == 1:
            found[alike[0]] = of(layers[alike[0]])
            continue
        results, figures = of(jax.tree.map(lambda *parts: jnp.stack(parts), *(layers[place] for place in alike)))
        found |= {place: (results[index], figures[index]) for index, place in enumerate(alike)}
    return unpacked([found[place] for place in range(len(layers))])
