from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from ._data import ImageSet, Split
from ._devices import Devices


class DeviceSplit(NamedTuple):
    """A split on the device, with the statistics of the training images that normalize it."""

    images: UInt8[Array, "n height width channels"]
    labels: Int32[Array, " n"]
    mean: Float[Array, "1 1 1 channels"]
    std: Float[Array, "1 1 1 channels"]


def to_devices(data: ImageSet, devices: Devices) -> tuple[DeviceSplit, DeviceSplit]:
    """Both splits on every device, with the mean and deviation of each channel over the training images."""
    mean = data.train.images.mean((0, 1, 2), dtype=np.float64)
    std = data.train.images.std((0, 1, 2), dtype=np.float64)
    # A channel that is the same everywhere says nothing, at whatever scale.
    std = np.where(std > 0, std, 1.0)

    def put(split: Split) -> DeviceSplit:
        statistics = (jnp.asarray(each, jnp.float32)[None, None, None] for each in (mean, std))
        return devices.whole(DeviceSplit(jnp.asarray(split.images), jnp.asarray(split.labels), *statistics))

    return put(data.train), put(data.test)


def normalize(
    images: UInt8[Array, "n height width channels"], data: DeviceSplit
) -> Float[Array, "n height width channels"]:
    """Images as the network takes them: mean 0 and deviation 1 by channel, over the training images."""
    return (images.astype(jnp.float32) - data.mean) / data.std
