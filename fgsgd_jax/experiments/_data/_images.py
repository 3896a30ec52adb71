import dataclasses
import zlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32, UInt8

from .._errors import UsageError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels, in memory."""

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        """The images at these places, in this order."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A classification set: what is trained on, what is tested on, the classes' names, and what a user should know."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.train.images.shape[-1]

    def summary(self) -> list[str]:
        """What there is, and what was done to it to be trained on: a line each."""
        height, width = self.train.images.shape[1:3]
        return [
            f"{self.name}: {len(self.train):,} training and {len(self.test):,} test images, {height}×{width} "
            f"{'grey' if self.channels == 1 else 'colour'}, {len(self.classes)} classes",
            *self.notes,
        ]

    def fingerprint(self) -> dict[str, object]:
        """What a run writes down about its data, so that it is never resumed on other data unnoticed."""
        return {
            "train": _describe(self.train),
            "test": _describe(self.test),
            "classes": list(self.classes),
        }


def data_difference(mine: Mapping[str, object], others: Mapping[str, object]) -> str | None:
    """The first thing in which two fingerprints differ, in words; `None` where they are of the same content."""
    what = "images" if "classes" in mine else "text"
    for name, words in (("classes", "classes"), ("train", f"training {what}"), ("test", f"test {what}")):
        one, other = mine.get(name), others.get(name)
        if one != other:
            return f"{words}: {_in_words(one)}, was {_in_words(other)}"
    return None


def _in_words(part: object) -> str:
    if isinstance(part, dict):
        shape = "×".join(map(str, part.get("shape", ())))
        return f"{shape} with checksum {part.get('crc32', 0):08x}"
    if isinstance(part, list):
        shown = ", ".join(map(str, part[:4]))
        return f"{len(part)} ({shown}{', …' if len(part) > 4 else ''})"
    return str(part)


def check(data: ImageSet) -> ImageSet:
    """Refuse a set that cannot be trained on, however it was loaded."""
    for name, split in (("training", data.train), ("test", data.test)):
        if len(split) == 0:
            raise UsageError(f"data {data.name!r} has no {name} images; give more images")
    if data.train.images.shape[1:] != data.test.images.shape[1:]:
        raise UsageError(
            f"data {data.name!r} has training images of height × width × channels {data.train.images.shape[1:]} "
            f"and test images of {data.test.images.shape[1:]}; --image-size N brings them to one size"
        )
    if len(np.unique(data.train.labels)) < 2:
        raise UsageError(f"data {data.name!r} has training images of one class only; a classifier needs two or more")
    return data


def _describe(split: Split) -> dict[str, object]:
    checksum = 0
    for array in (split.images, split.labels):
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return {"shape": list(split.images.shape), "crc32": checksum}
