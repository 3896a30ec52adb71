"""Adapter for Flax linen: feature moments of an unchanged module, and the trace of its layers.

```
model = fg.linen.observe(module)                   # has the module's init and apply

@jax.jit
def train_step(params, opt_state, batch):
    (loss, observed), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)   # loss_fn calls model.apply
    updates, opt_state = tx.update(grads, opt_state, params, feature_moments=observed["feature_moments"])
    return optax.apply_updates(params, updates), opt_state
```
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from .features import FeatureMoments, batch_moments, einsum_axes, is_moments, merge_moments, output_positions
from .groups import Trace, by_path

_LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
_NORMALIZATIONS = (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
_COLLECTION = "feature_moments"


@dataclasses.dataclass(frozen=True)
class Observed:
    """A module whose `apply` also returns the moments of what entered its kernels; made by `observe`."""

    module: nn.Module

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """`module.init`, without moments."""
        return self.module.init(*args, **kwargs)

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = (), **kwargs: Any) -> tuple[Any, Any]:
        """`module.apply` with the collection `"feature_moments"` among the mutable ones.

        Args:
          variables: of the module. Moments in them under `"feature_moments"` are added to.
          *args: of the module.
          mutable: names of further mutable collections.
          **kwargs: of the module.

        Returns:
          The module's output, and the mutable collections: under `"feature_moments"` a tree of `FeatureMoments` at the
          paths of the kernels, which `update` of a transformation takes.
        """
        names = [mutable] if isinstance(mutable, str) else [] if mutable is False else list(mutable)
        with nn.intercept_methods(_record):
            return self.module.apply(variables, *args, mutable=[*names, _COLLECTION], **kwargs)


def observe(module: nn.Module) -> Observed:
    """Gives a module an `apply` that records the moments of its layers' inputs, per input channel.

    Convolutions, `Dense`, `DenseGeneral` (so attention's projections) and `Einsum` layers are observed, by intercepting
    their calls; no code changes. Modules that are called several times accumulate. `nn.scan` and `nn.vmap` carry out
    only what they are told to: name the moments there, `variable_axes={"params": 0, "feature_moments": 0}`. Layers
    inside them are passed over without that, with a warning.

    Args:
      module: any linen module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import fgsgd_jax as fg
      >>> model, x = fg.linen.observe(nn.Dense(3)), jnp.array([[1.0, 1.0], [3.0, 1.0]], jnp.float32)
      >>> _, observed = model.apply(model.init(jax.random.key(0), x), x)
      >>> observed["feature_moments"]["kernel"].std.tolist()  # λ of the two channels
      [1.0, 0.0]
    """
    return Observed(module)


def moments(collections: Mapping[str, Any]) -> dict[str, FeatureMoments]:
    """The moments in the collections that `Observed.apply` returned, by the path of each kernel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import fgsgd_jax as fg
      >>> model, x = fg.linen.observe(nn.Sequential([nn.Dense(3), nn.relu])), jnp.zeros((5, 2), jnp.float32)
      >>> _, observed = model.apply(model.init(jax.random.key(0), x), x)
      >>> fg.linen.moments(observed)["layers_0/kernel"].count.tolist()
      [5.0, 5.0]
    """
    return by_path(collections[_COLLECTION], is_leaf=is_moments)


def trace(module: nn.Module, *args: Any, rngs: Any = None, **kwargs: Any) -> Trace:
    """The calls of a module's layers on inputs like these, for `fg.plan(..., gamma=trace)`. Nothing is computed.

    Args:
      module: any linen module.
      *args: the call's arguments, arrays or `jax.ShapeDtypeStruct`s; one example is enough.
      rngs: as for `module.init`; by default a key for `"params"`.
      **kwargs: the call's keyword arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import fgsgd_jax as fg
      >>> conv = nn.Conv(4, (3, 3), strides=2)
      >>> fg.linen.trace(conv, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)).positions
      {'kernel': 16}
    """
    calls: list[tuple[str | None, int]] = []

    def note(next_call, args, kwargs, context):
        outputs = next_call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, _NORMALIZATIONS):
            calls.append((None, 0))
        elif context.method_name == "__call__" and isinstance(layer, _LAYERS):
            features = len(_tuple(layer.features)) if isinstance(layer, nn.DenseGeneral) else 1
            spatial = len(_tuple(layer.kernel_size)) if isinstance(layer, (nn.Conv, nn.ConvTranspose)) else None
            positions = output_positions(outputs.shape, features, spatial)
            calls.append(("/".join([*layer.path, "kernel"]), positions))
        return outputs

    def run(args):
        with nn.intercept_methods(note):
            return module.init(jax.random.key(0) if rngs is None else rngs, *args, **kwargs)

    jax.eval_shape(run, args)
    return Trace(tuple(calls))


def _record(next_call, args, kwargs, context):
    layer = context.module
    if context.method_name != "__call__" or not isinstance(layer, _LAYERS):
        return next_call(*args, **kwargs)
    if not layer.is_mutable_collection(_COLLECTION):
        path = "/".join([*layer.path, "kernel"])
        warnings.warn(
            f"fg.linen.observe: {path} is called inside nn.scan or nn.vmap, which do not carry its moments out, so its "
            'λ stays 1; write variable_axes={"params": 0, "feature_moments": 0} there',
            stacklevel=2,
        )
    else:
        inputs = args[0] if args else next(iter(kwargs.values()))
        subscripts = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
        channel_axes, axes = _axes(layer, inputs.ndim, subscripts)
        recorded = batch_moments(inputs, channel_axes, axes)
        if layer.has_variable(_COLLECTION, "kernel"):
            recorded = merge_moments(layer.get_variable(_COLLECTION, "kernel"), recorded)
        layer.put_variable(_COLLECTION, "kernel", recorded)
    return next_call(*args, **kwargs)


def _axes(layer: nn.Module, ndim: int, subscripts: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The channel axes of a layer's input with `ndim` axes, and those of its kernel that they meet."""
    if isinstance(layer, nn.DenseGeneral):
        channel_axes = (*_tuple(layer.batch_dims), *_tuple(layer.axis))
        return channel_axes, tuple(range(len(channel_axes)))
    if isinstance(layer, nn.Einsum):
        return einsum_axes(layer.einsum_str or subscripts or "", ndim)
    if isinstance(layer, nn.ConvTranspose) and layer.transpose_kernel:
        return (-1,), (-1,)
    return (-1,), (-2,)


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
