"""What every form of a step is given: the matrices of several layers, all of one size and on the same manifolds."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..manifolds import Manifold, Stiefel


class Layer(NamedTuple):
    """The matrices of one layer, in one dtype of at least 32 bits.

    `x` are points, `w` gradients or directions, `kind` and `radius` as in `Mixture`; `new_radius` is that of the point
    to reach (None: the same).
    """

    x: Float[Array, "*b n p"]
    w: Float[Array, "*b n p"]
    kind: Int[Array, "*b"] | None
    radius: Float[Array, "*b"]
    new_radius: Float[Array, "*b"] | None = None


# Of every layer an array like its `w`, and a figure for each of its matrices.
Results = tuple[list[Float[Array, "*b n p"]], list[Float[Array, "*b"]]]


def by_polar(manifold: Manifold) -> bool:
    """Whether this is the Stiefel manifold itself, no subclass, with the polar retraction."""
    return type(manifold) is Stiefel and manifold.retraction == "polar"


def is_wide(x: Array) -> bool:
    """Whether matrices have more columns than rows."""
    return x.shape[-2] < x.shape[-1]


def unpacked(pairs: Sequence[tuple[Array, Array]]) -> Results:
    """A pair for each layer as a pair of lists."""
    return [array for array, _ in pairs], [figure for _, figure in pairs]


def joined(layers: Sequence[Layer], concatenate: Callable[[list[Array]], Array] = jnp.concatenate) -> Layer:
    """All layers as one, along one batch axis."""
    batches = [layer.x.shape[:-2] for layer in layers]

    def join(*parts: Array) -> Array:
        pairs = zip(parts, batches, strict=True)
        return concatenate([part.reshape(-1, *part.shape[len(batch) :]) for part, batch in pairs])

    return jax.tree.map(join, *layers)


def split(values: Float[Array, "count *rest"], layers: Sequence[Layer]) -> list[Float[Array, "..."]]:
    """The layers' parts of what runs along the batch axis of `joined`."""
    parts, start = [], 0
    for layer in layers:
        batch = layer.x.shape[:-2]
        end = start + math.prod(batch)
        parts.append(lax.slice_in_dim(values, start, end).reshape(*batch, *values.shape[1:]))
        start = end
    return parts
