"""Adapter for Flax NNX: feature moments of an unchanged model, and the trace of its layers.

```
model = fg.nnx.observe(model)                      # once: the layers now record what enters them

@nnx.jit
def train_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, feature_moments=fg.nnx.moments(model))
    fg.nnx.clear(model)                            # moments cover what was seen since the last applied update
```
"""

import functools
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from .features import FeatureMoments, batch_moments, einsum_axes, merge_moments, output_positions
from .groups import Trace
from .linalg import compute_dtype

_LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
_NORMALIZATIONS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


class Moments(nnx.Variable):
    """Count, mean and centred second moment of a layer's input, on an axis of length 3 before its channels."""


def observe(model: nnx.Module) -> nnx.Module:
    """Makes the layers of a model record the moments of their inputs, per input channel, whenever they are called.

    Convolutions, `Linear`, `LinearGeneral` (so attention's projections) and `Einsum` layers become instances of
    subclasses of their classes, with one `Moments` variable each. It holds count, mean and second moment of all calls
    since the last `clear`, also under `nnx.jit`, `nnx.scan`, `nnx.vmap` and `nnx.remat`. Between `model.eval()` and
    `model.train()` nothing is recorded. No activation is kept.

    Args:
      model: changed in place.

    Returns:
      The same model.

    Raises:
      ValueError: if the model has none of these layers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fgsgd_jax as fg
      >>> model = fg.nnx.observe(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu))
      >>> _ = model(jnp.array([[1.0, 1.0], [3.0, 1.0]], jnp.float32))
      >>> fg.nnx.moments(model)["layers/0/kernel"].std.tolist()  # λ of the two channels
      [1.0, 0.0]
    """
    found = False
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, _LAYERS):
            found = True
            if not _observes(layer):
                shape = _recorded_shape(layer)
                owner = cast(Any, layer)
                owner.feature_moments = Moments(jnp.zeros(shape, compute_dtype(layer.kernel[...].dtype)))
                owner.use_running_average = False
                layer.__class__ = _observing(type(layer))
    if not found:
        raise ValueError(f"{type(model).__name__} has no {', '.join(layer.__name__ for layer in _LAYERS)} to observe")
    return model


def unobserve(model: nnx.Module) -> nnx.Module:
    """Undoes `observe`: the layers get their classes back, the moments are dropped. Changes the model in place.

    Example:
      >>> from flax import nnx
      >>> import fgsgd_jax as fg
      >>> layer = fg.nnx.observe(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> type(layer).__name__, type(fg.nnx.unobserve(layer)).__name__
      ('ObservedLinear', 'Linear')
    """
    for _, layer in nnx.iter_modules(model):
        if layer_class := _observes(layer):
            layer.__class__ = layer_class
            del layer.feature_moments, layer.use_running_average
    return model


def moments(model: nnx.Module) -> dict[str, FeatureMoments]:
    """What the layers of an observed model recorded of their inputs, by the path of each kernel.

    Args:
      model: after `observe`.

    Returns:
      Moments per input channel, since the last `clear`; what `update` takes as `feature_moments`.

    Raises:
      ValueError: no layer is observed.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fgsgd_jax as fg
      >>> layer = fg.nnx.observe(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> _ = layer(jnp.zeros((5, 2), jnp.float32))
      >>> fg.nnx.moments(layer)["kernel"].count.tolist()
      [5.0, 5.0]
    """
    result = {}
    for prefix, layer in _observed(model):
        recorded = layer.feature_moments[...]
        stack = _stacked_axes(layer)
        channel_axes = _axes(layer, ndim=None)[1]
        axes = (*range(stack), *(axis if axis < 0 else axis + stack for axis in channel_axes))
        count, mean, m2 = jnp.moveaxis(recorded, stack, 0)
        result["/".join([*prefix, "kernel"])] = FeatureMoments(count, mean, m2, axes)
    return result


def clear(model: nnx.Module) -> None:
    """Forgets what an observed model has recorded.

    Raises:
      ValueError: no layer is observed.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fgsgd_jax as fg
      >>> layer = fg.nnx.observe(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> _ = layer(jnp.zeros((5, 2), jnp.float32))
      >>> fg.nnx.clear(layer)
      >>> fg.nnx.moments(layer)["kernel"].count.tolist()
      [0.0, 0.0]
    """
    for _, layer in _observed(model):
        layer.feature_moments[...] = jnp.zeros_like(layer.feature_moments[...])


def trace(model: nnx.Module, *args: Any, **kwargs: Any) -> Trace:
    """The calls of a model's layers on inputs like these, for `fg.plan(..., gamma=trace)`. Nothing is computed.

    Args:
      model: any model; it is not changed.
      *args: the call's arguments, arrays or `jax.ShapeDtypeStruct`s; one example is enough.
      **kwargs: the call's keyword arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fgsgd_jax as fg
      >>> conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> fg.nnx.trace(conv, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)).positions
      {'kernel': 16}
    """
    calls: list[tuple[str | None, int]] = []
    graphdef, state = nnx.split(model)

    def run(state, args):
        copy = nnx.merge(graphdef, state)
        for prefix, layer in nnx.iter_modules(copy):
            if isinstance(layer, _LAYERS + _NORMALIZATIONS):
                # A static attribute: it survives where a transform inside the model rebuilds the layer.
                cast(Any, layer).fgsgd_path = "/".join([*map(str, prefix), "kernel"])
                layer.__class__ = _traced(type(layer))
        _recordings.append(calls)
        try:
            return copy(*args, **kwargs)
        finally:
            _recordings.pop()

    jax.eval_shape(run, state, args)
    return Trace(tuple(calls))


# A layer changes its class to a subclass with another `__call__`: it stays what its users take it for. (A mixin
# would give the subclass another memory layout, which Python does not let an instance change to.)


@functools.cache
def _observing(layer_class: type) -> type:
    """Subclass of a layer that records the input of every call."""

    def call(self: Any, inputs, *args, **kwargs):
        # `model.eval()` sets this flag, as it does in batch normalization.
        if not self.use_running_average:
            channel_axes, axes = _axes(self, inputs.ndim)
            count, mean, m2 = self.feature_moments[...]
            recorded = FeatureMoments(count, mean, m2, axes)
            merged = merge_moments(recorded, batch_moments(inputs, channel_axes, axes))
            dtype = self.feature_moments[...].dtype
            self.feature_moments[...] = jnp.stack([merged.count, merged.mean, merged.m2]).astype(dtype)
        return layer_class.__call__(self, inputs, *args, **kwargs)

    return type(f"Observed{layer_class.__name__}", (layer_class,), {"__call__": call, "_fgsgd_observes": layer_class})


def _observes(layer: Any) -> type | None:
    """The class of which an observed layer was; None of any other."""
    return getattr(type(layer), "_fgsgd_observes", None)


# What `trace` is recording, innermost last.
_recordings: list[list[tuple[str | None, int]]] = []


@functools.cache
def _traced(layer_class: type) -> type:
    """Subclass of a layer that notes its calls for `trace`."""

    def call(self: Any, inputs, *args, **kwargs):
        outputs = layer_class.__call__(self, inputs, *args, **kwargs)
        if isinstance(self, _NORMALIZATIONS):
            _recordings[-1].append((None, 0))
        else:
            features = len(self.out_features) if isinstance(self, nnx.LinearGeneral) else 1
            spatial = len(self.kernel_size) if isinstance(self, (nnx.Conv, nnx.ConvTranspose)) else None
            _recordings[-1].append((cast(Any, self).fgsgd_path, output_positions(outputs.shape, features, spatial)))
        return outputs

    return type(f"Traced{layer_class.__name__}", (layer_class,), {"__call__": call})


def _observed(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    found = False
    for prefix, layer in nnx.iter_modules(model):
        if _observes(layer):
            found = True
            yield tuple(map(str, prefix)), layer
    if not found:
        raise ValueError("no layer of this model is observed: call fg.nnx.observe(model) first")


def _axes(layer: Any, ndim: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The channel axes of a layer's input with `ndim` axes, and those of its kernel that they meet."""
    if isinstance(layer, nnx.LinearGeneral):
        batch = tuple(layer.batch_axis)
        return (*batch, *layer.axis), tuple(range(len(batch) + len(layer.axis)))
    if isinstance(layer, nnx.Einsum):
        return einsum_axes(layer.einsum_str, ndim or len(layer.einsum_str))
    if isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel:
        return (-1,), (-1,)
    return (-1,), (-2,)


def _stacked_axes(layer: Any) -> int:
    """How many axes of the kernel are layers that were made together under `nnx.vmap`."""
    if isinstance(layer, (nnx.Conv, nnx.ConvTranspose)):
        own = len(layer.kernel_size) + 2
    elif isinstance(layer, nnx.LinearGeneral):
        own = len(layer.batch_axis) + len(layer.axis) + len(layer.out_features)
    elif isinstance(layer, nnx.Einsum):
        own = len(layer.einsum_str.split("->")[0].split(",")[1].replace("...", ""))
    else:
        own = 2
    return layer.kernel[...].ndim - own


def _recorded_shape(layer: Any) -> tuple[int, ...]:
    stack, shape = _stacked_axes(layer), layer.kernel[...].shape
    channels = tuple(shape[stack:][axis] for axis in _axes(layer, ndim=None)[1])
    if isinstance(layer, nnx.Conv):
        channels = (channels[0] * layer.feature_group_count,)
    return (*shape[:stack], 3, *channels)
