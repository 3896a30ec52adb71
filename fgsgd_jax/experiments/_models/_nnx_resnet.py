"""ResNets in NNX. Submodules are plain attributes, so that parameters are called `stage_0/block_1/conv_0/kernel`."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import fgsgd_jax as fg

from ._initializers import BN_EPSILON, BN_MOMENTUM, SE_REDUCTION, conv_init
from ._shapes import CifarShape, ImageNetShape, stage_stride

Images = Float[Array, "n _ _ _"]

_norm = partial(nnx.BatchNorm, momentum=BN_MOMENTUM, epsilon=BN_EPSILON)


def _conv(inputs: int, outputs: int, window: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    # Explicit padding: "SAME" pads a strided convolution on one side only, unlike the networks of the papers.
    return nnx.Conv(
        inputs,
        outputs,
        (window, window),
        strides=stride,
        padding=window // 2,
        use_bias=False,
        kernel_init=conv_init,
        rngs=rngs,
    )


class SqueezeExcite(nnx.Module):
    """Scale every channel by a gate computed from all channels' means (Hu et al., 2018), reduction 16."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        hidden = max(1, channels // SE_REDUCTION)
        self.reduce = nnx.Linear(channels, hidden, rngs=rngs)
        self.expand = nnx.Linear(hidden, channels, rngs=rngs)

    def __call__(self, x: Images) -> Images:
        gate = self.expand(nnx.relu(self.reduce(x.mean((1, 2)))))
        return x * nnx.sigmoid(gate)[:, None, None, :]


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions beside a shortcut without parameters (option A of He et al.)."""

    def __init__(self, inputs: int, outputs: int, stride: int, squeeze: bool, rngs: nnx.Rngs):
        self.stride = stride
        self.conv_0 = _conv(inputs, outputs, 3, stride, rngs)
        self.norm_0 = _norm(outputs, rngs=rngs)
        self.conv_1 = _conv(outputs, outputs, 3, 1, rngs)
        self.norm_1 = _norm(outputs, rngs=rngs)
        self.squeeze = SqueezeExcite(outputs, rngs) if squeeze else None

    def __call__(self, x: Images) -> Images:
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        if self.squeeze is not None:
            y = self.squeeze(y)
        return nnx.relu(y + pad_shortcut(x, y.shape[-1], self.stride))


class Bottleneck(nnx.Module):
    """1×1, 3×3, 1×1 convolutions beside a shortcut, projected where the shape changes (option B)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, squeeze: bool, rngs: nnx.Rngs):
        self.conv_0 = _conv(inputs, width, 1, 1, rngs)
        self.norm_0 = _norm(width, rngs=rngs)
        self.conv_1 = _conv(width, width, 3, stride, rngs)
        self.norm_1 = _norm(width, rngs=rngs)
        self.conv_2 = _conv(width, outputs, 1, 1, rngs)
        self.norm_2 = _norm(outputs, rngs=rngs)
        self.squeeze = SqueezeExcite(outputs, rngs) if squeeze else None
        projected = inputs != outputs or stride != 1
        self.shortcut_conv = _conv(inputs, outputs, 1, stride, rngs) if projected else None
        self.shortcut_norm = _norm(outputs, rngs=rngs) if projected else None

    def __call__(self, x: Images) -> Images:
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        y = nnx.relu(self.norm_1(self.conv_1(y)))
        y = self.norm_2(self.conv_2(y))
        if self.squeeze is not None:
            y = self.squeeze(y)
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return nnx.relu(y + x)


class Stage(nnx.Module):
    """Blocks one after the other, as `block_0`, `block_1` and so on."""

    def __init__(self, blocks: list[nnx.Module]):
        self.blocks = len(blocks)
        for index, block in enumerate(blocks):
            setattr(self, f"block_{index}", block)

    def __call__(self, x: Images) -> Images:
        for index in range(self.blocks):
            x = getattr(self, f"block_{index}")(x)
        return x


class CifarResNet(nnx.Module):
    """A ResNet of 6n+2 layers for small images."""

    def __init__(self, shape: CifarShape, num_classes: int, channels: int, rngs: nnx.Rngs):
        self.stages = len(shape.widths)
        self.stem = _conv(channels, shape.widths[0], 3, 1, rngs)
        self.stem_norm = _norm(shape.widths[0], rngs=rngs)
        inputs = shape.widths[0]
        for stage, width in enumerate(shape.widths):
            blocks = []
            for block in range(shape.blocks):
                blocks.append(BasicBlock(inputs, width, stage_stride(stage, block), shape.squeeze, rngs))
                inputs = width
            setattr(self, f"stage_{stage}", Stage(blocks))
        self.head = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Float[Array, "n classes"]:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for stage in range(self.stages):
            x = getattr(self, f"stage_{stage}")(x)
        return self.head(x.mean((1, 2)))


class PlainNet(nnx.Module):
    """The 3×3 convolutions of a small ResNet one after the other: no shortcuts, no normalization."""

    def __init__(self, shape: CifarShape, num_classes: int, channels: int, rngs: nnx.Rngs):
        self.depth = 0
        inputs = channels
        for stage, width in enumerate(shape.widths):
            for block in range(2 * shape.blocks + (stage == 0)):
                # The first convolution of a stage shrinks the image, as in the ResNet; the stem comes before them all.
                stride = stage_stride(stage, block)
                setattr(self, f"conv_{self.depth:03d}", _conv(inputs, width, 3, stride, rngs))
                self.depth, inputs = self.depth + 1, width
        self.head = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Float[Array, "n classes"]:
        for index in range(self.depth):
            x = nnx.relu(getattr(self, f"conv_{index:03d}")(x))
        return self.head(x.mean((1, 2)))


class ImageNetResNet(nnx.Module):
    """A ResNet of bottlenecks for large images."""

    def __init__(self, shape: ImageNetShape, num_classes: int, channels: int, rngs: nnx.Rngs):
        self.stages = len(shape.widths)
        self.stem = _conv(channels, shape.widths[0], 7, 2, rngs)
        self.stem_norm = _norm(shape.widths[0], rngs=rngs)
        inputs = shape.widths[0]
        for stage, (width, count) in enumerate(zip(shape.widths, shape.blocks, strict=True)):
            outputs = width * shape.expansion
            blocks = []
            for block in range(count):
                stride = stage_stride(stage, block)
                blocks.append(Bottleneck(inputs, width, outputs, stride, shape.squeeze, rngs))
                inputs = outputs
            setattr(self, f"stage_{stage}", Stage(blocks))
        self.head = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Float[Array, "n classes"]:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        # After a ReLU, a margin of zeros never is the maximum.
        margin = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nnx.max_pool(margin, (3, 3), strides=(2, 2))
        for stage in range(self.stages):
            x = getattr(self, f"stage_{stage}")(x)
        return self.head(x.mean((1, 2)))


def pad_shortcut(x: Images, channels: int, stride: int) -> Images:
    """Option A: every `stride`-th pixel, and zeros for the channels that are new, half of them on either side."""
    new = channels - x.shape[-1]
    if stride != 1:
        x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))) if new else x


def functional(make, channels: int):
    """`init`, `apply` and `trace` of a Model from a function that builds an NNX module from its `Rngs`."""
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, _, _ = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key: jax.Array):
        _, params, stats = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(params, stats, images, train, observe=False):
        module = nnx.merge(graph, nnx.State(params), nnx.State(stats))
        if observe:
            fg.nnx.observe(module)
        module.set_attributes(use_running_average=not train, raise_if_not_found=False)
        logits = module(images)
        moments = fg.nnx.moments(module) if observe else {}
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)), moments

    def trace(size):
        return fg.nnx.trace(abstract, jax.ShapeDtypeStruct((1, *size, channels), jnp.float32))

    return init, apply, trace
