"""Moments of the features that enter each matrix of a view."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..groups import View
from ._moments import FeatureMoments, merge_over


def matrix_moments(moments: FeatureMoments, view: View, shape: tuple[int, ...], layer_axes: int = 0) -> FeatureMoments:
    """Moments per matrix [*layers, inputs, outputs], pooled over the channels of a matrix.

    Args:
      moments: of the features that enter a weight of `shape`.
      view: the weight's grid of matrices.
      shape: of the weight.
      layer_axes: how many leading axes of the weight, and of the moments, stack layers.

    Raises:
      ValueError: if the channels are not those of the weight.
    """
    if layer_axes:
        if moments.mean.shape[:layer_axes] != shape[:layer_axes]:
            raise ValueError(
                f"feature moments of shape {moments.mean.shape} are not stacked over layers as the weight of shape "
                f"{shape} is"
            )
        if len(moments.axes) == moments.mean.ndim:  # they name the axis of the stack as well
            own_axes = tuple(axis if axis < 0 else axis - 1 for axis in moments.axes[1:])
            moments = dataclasses.replace(moments, axes=own_axes)
        return jax.vmap(lambda own: matrix_moments(own, view, shape[1:], layer_axes - 1))(moments)
    entries = jax.tree.map(lambda x: _against_weight(x, moments.axes, shape), moments)
    pooled = merge_over(jax.tree.map(view.split_broadcast, entries), axis=(-2, -1))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, view.grid[:2]), pooled)


def _against_weight(x: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """`x` over the weight's `axes`, reshaped to broadcast against the weight."""
    if x.ndim != len(axes):
        raise ValueError(f"feature moments of shape {x.shape} do not have the {len(axes)} axes {axes} of the weight")
    positions = [axis % len(shape) for axis in axes]
    lengths = tuple(shape[position] for position in positions)
    if lengths == x.shape:
        order = sorted(range(x.ndim), key=positions.__getitem__)
        broadcast = [shape[axis] if axis in positions else 1 for axis in range(len(shape))]
        return x.transpose(order).reshape(broadcast)
    # A grouped convolution: output d is fed by the channels of its own group.
    channels, outputs = shape[-2:]
    groups = x.shape[-1] // channels if x.ndim == 1 and axes == (-2,) else 0
    if groups * channels != x.size or outputs % max(groups, 1) or groups == 0:
        raise ValueError(f"feature moments of shape {x.shape} do not fit the axes {axes} of a weight of shape {shape}")
    by_output = jnp.repeat(x.reshape(groups, channels).T, outputs // groups, axis=1)
    return by_output.reshape((1,) * (len(shape) - 2) + (channels, outputs))
