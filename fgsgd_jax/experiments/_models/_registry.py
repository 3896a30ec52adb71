from collections.abc import Callable
from functools import partial

from .._errors import unknown
from . import _linen_resnet, _nnx_resnet
from ._model import Model
from ._shapes import CIFAR_DEPTHS, IMAGENET_BLOCKS, ImageNetShape, cifar_shape

# `init`, `apply` and `trace` of a network for so many classes and image channels.
Maker = Callable[[int, int], tuple[Callable, Callable, Callable]]


def _cifar(depth: int, squeeze: bool, num_classes: int, channels: int):
    shape = cifar_shape(depth, squeeze)
    return _nnx_resnet.functional(lambda rngs: _nnx_resnet.CifarResNet(shape, num_classes, channels, rngs), channels)


def _plain(depth: int, num_classes: int, channels: int):
    shape = cifar_shape(depth)
    return _nnx_resnet.functional(lambda rngs: _nnx_resnet.PlainNet(shape, num_classes, channels, rngs), channels)


def _imagenet(depth: int, squeeze: bool, num_classes: int, channels: int):
    shape = ImageNetShape(IMAGENET_BLOCKS[depth], squeeze)
    return _nnx_resnet.functional(lambda rngs: _nnx_resnet.ImageNetResNet(shape, num_classes, channels, rngs), channels)


def _linen(depth: int, num_classes: int, channels: int):
    return _linen_resnet.functional(_linen_resnet.CifarResNet(cifar_shape(depth), num_classes), channels)


REGISTRY: dict[str, Maker] = {
    **{f"resnet{depth}": partial(_cifar, depth, False) for depth in CIFAR_DEPTHS},
    **{f"seresnet{depth}": partial(_cifar, depth, True) for depth in CIFAR_DEPTHS},
    **{f"resnet{depth}": partial(_imagenet, depth, False) for depth in IMAGENET_BLOCKS},
    **{f"seresnet{depth}": partial(_imagenet, depth, True) for depth in IMAGENET_BLOCKS},
    **{f"plain{depth}": partial(_plain, depth) for depth in (*CIFAR_DEPTHS, 50)},
    **{f"linen-resnet{depth}": partial(_linen, depth) for depth in CIFAR_DEPTHS},
}


def build(name: str, num_classes: int, channels: int) -> Model:
    """The network of this name.

    `resnet8` to `resnet110` are the small-image ResNets of 6n+2 layers, `resnet50` and `resnet101` have ImageNet's
    shape; `seresnet…` have squeeze-and-excitation gates; `plain8` to `plain110` are the small ones without shortcuts
    and without normalization; `linen-resnet8` to `linen-resnet110` are written in linen.

    Args:
        name: one of the above.
        num_classes: how many logits.
        channels: the images' channels, 1 or 3.

    Raises:
        UsageError: no network has this name.
    """
    if name not in REGISTRY:
        raise unknown("model", name, REGISTRY)
    return Model(name, *REGISTRY[name](num_classes, channels))
