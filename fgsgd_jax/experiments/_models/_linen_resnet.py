"""The same ResNet in linen, with the same parameter names: either API's parameters fit the other's network."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

import fgsgd_jax as fg

from ._initializers import BN_EPSILON, BN_MOMENTUM, conv_init
from ._nnx_resnet import pad_shortcut
from ._shapes import CifarShape, stage_stride

Images = Float[Array, "n _ _ _"]


def _conv(outputs: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(outputs, (3, 3), strides=stride, padding=1, use_bias=False, kernel_init=conv_init, name=name)


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=BN_MOMENTUM, epsilon=BN_EPSILON, name=name)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters (option A)."""

    outputs: int
    stride: int

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Images:
        y = nn.relu(_norm(train, "norm_0")(_conv(self.outputs, self.stride, "conv_0")(x)))
        y = _norm(train, "norm_1")(_conv(self.outputs, 1, "conv_1")(y))
        return nn.relu(y + pad_shortcut(x, self.outputs, self.stride))


class Stage(nn.Module):
    """Blocks one after the other, as `block_0`, `block_1` and so on."""

    number: int
    blocks: int
    width: int

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Images:
        for block in range(self.blocks):
            x = BasicBlock(self.width, stage_stride(self.number, block), name=f"block_{block}")(x, train)
        return x


class CifarResNet(nn.Module):
    """A ResNet of 6n+2 layers for small images."""

    shape: CifarShape
    num_classes: int

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Float[Array, "n classes"]:
        x = nn.relu(_norm(train, "stem_norm")(_conv(self.shape.widths[0], 1, "stem")(x)))
        for stage, width in enumerate(self.shape.widths):
            x = Stage(stage, self.shape.blocks, width, name=f"stage_{stage}")(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def functional(module: nn.Module, channels: int):
    """`init`, `apply` and `trace` of a Model from a linen module."""

    def init(key: jax.Array):
        # Parameters do not depend on the images' size: the smallest that passes both strides.
        variables = module.init(key, jnp.zeros((1, 8, 8, channels), jnp.float32), False)
        return variables["params"], variables["batch_stats"]

    def apply(params, stats, images, train, observe=False):
        variables = {"params": params, "batch_stats": stats}
        apply = fg.linen.observe(module).apply if observe else module.apply
        logits, new = apply(variables, images, train, mutable=["batch_stats"])
        return logits, new["batch_stats"], fg.linen.moments(new) if observe else {}

    def trace(size):
        return fg.linen.trace(module, jax.ShapeDtypeStruct((1, *size, channels), jnp.float32), train=False)

    return init, apply, trace
