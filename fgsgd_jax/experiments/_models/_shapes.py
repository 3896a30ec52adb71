"""What the ResNets are, apart from the API that they are written in."""

from typing import NamedTuple


class CifarShape(NamedTuple):
    """He et al. (2016), section 4.2: 6n+2 layers for small images, n blocks in each of three stages.

    Every block is always there: the "constant depth" that the paper sets against stochastic depth.
    """

    blocks: int
    squeeze: bool = False
    widths: tuple[int, ...] = (16, 32, 64)


class ImageNetShape(NamedTuple):
    """He et al. (2016), table 1: a 7×7 stem of stride 2, a maximum pool and four stages of bottlenecks.

    The stride of a stage is on its first 3×3 convolution, as in torchvision, not on the 1×1 before it.
    """

    blocks: tuple[int, ...]
    squeeze: bool = False
    widths: tuple[int, ...] = (64, 128, 256, 512)
    expansion: int = 4


CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
IMAGENET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def cifar_shape(depth: int, squeeze: bool = False) -> CifarShape:
    """The shape of ResNet-`depth`; the depth is 6n+2."""
    return CifarShape((depth - 2) // 6, squeeze)


def stage_stride(stage: int, block: int) -> int:
    """Every stage but the first halves the image, in its first block."""
    return 2 if stage > 0 and block == 0 else 1
