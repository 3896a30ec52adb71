from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8

Augmentation = Literal["auto", "none", "crop", "crop-flip"]


def resolve(name: Augmentation, data: str) -> Augmentation:
    """What `auto` stands for: crops and flips, but no flips of the built-in digits, which would become other signs.

    Args:
        name: the option.
        data: the option `--data`. A folder that is called digits is `…/digits` and may hold anything.
    """
    if name != "auto":
        return name
    return "crop" if data == "digits" else "crop-flip"


def padding(size: int) -> int:
    """How far crops reach over the edge: an eighth of the image, so 4 pixels of 32 and 1 of 8."""
    return max(1, size // 8)


def augment(key: jax.Array, images: UInt8[Array, "n height width channels"], name: Augmentation) -> Array:
    """Every image shifted at random, black coming in at the edges, and flipped left to right half of the time."""
    if name == "none":
        return images
    crop_key, flip_key = jax.random.split(key)
    images = _crop(crop_key, images)
    return _flip(flip_key, images) if name == "crop-flip" else images


def _crop(key: jax.Array, images: Array) -> Array:
    count, height, width, channels = images.shape
    margins = padding(height), padding(width), 0
    padded = jnp.pad(images, ((0, 0), *((margin, margin) for margin in margins)))
    beyond = jnp.array([[2 * margin + 1 for margin in margins]], jnp.int32)
    corners = jax.random.randint(key, (count, 3), 0, beyond, jnp.int32)

    def one(image, corner):
        return lax.dynamic_slice(image, corner, (height, width, channels))

    return jax.vmap(one)(padded, corners)


def _flip(key: jax.Array, images: Array) -> Array:
    flipped = jax.random.bernoulli(key, shape=(images.shape[0],))
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
