"""Images and labels as arrays in one `.npz` file, as NumPy writes them."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .._errors import UsageError
from ._images import ImageSet, Split
from ._subset import limit, split_off

# The names that Keras and MedMNIST give to training images and labels, and to those of the test.
NAMES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", None, None),
)


def load_arrays(
    path: Path, name: str, image_size: int | None, limit_train: int | None, limit_test: int | None
) -> ImageSet:
    """The set in a `.npz` file: images as bytes `[n, height, width]` or `[n, height, width, 1 or 3]`, a label each."""
    try:
        with zipfile.ZipFile(path) as packed:
            arrays = {member.removesuffix(".npy"): _array(packed, member) for member in packed.namelist()}
    # NumPy, zipfile and zlib each have their own for a damaged file.
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"data {name!r} cannot be read: {str(error).splitlines()[0]}") from error
    names = next((each for each in NAMES if each[0] in arrays and each[1] in arrays), None)
    if names is None:
        raise UsageError(
            f"data {name!r} holds {', '.join(arrays) or 'nothing'}; its arrays should be called x_train and y_train, "
            "and x_test and y_test if there is a test"
        )
    tested = names[2] in arrays and names[3] in arrays
    pairs = [names[:2], names[2:]] if tested else [names[:2]]
    images = [_images(arrays[str(one)], f"data {name!r}, {one}", image_size) for one, _ in pairs]
    labels = [
        _labels(arrays[str(one)], len(images[place]), f"data {name!r}, {one}") for place, (_, one) in enumerate(pairs)
    ]
    classes, train_labels = np.unique(labels[0], return_inverse=True)
    train, notes = Split(images[0], train_labels.astype(np.int32)), []
    if tested:
        if len(strange := np.setdiff1d(labels[1], classes)):
            raise UsageError(
                f"data {name!r}, {names[3]}: the label {strange[0]} is none of the {len(classes)} classes of {names[1]}"
            )
        test = Split(images[1], np.searchsorted(classes, labels[1]).astype(np.int32))
    else:
        train, test, note = split_off(train)
        notes.append(note)
    return ImageSet(
        name=path.name,
        train=limit(train, limit_train),
        test=limit(test, limit_test),
        classes=tuple(map(str, classes)),
        notes=tuple(notes),
    )


def _array(packed: zipfile.ZipFile, member: str) -> np.ndarray:
    with packed.open(member) as file:
        # By its default this refuses arrays of objects, which would run whatever is in them.
        return np.lib.format.read_array(file)


def _images(array: np.ndarray, what: str, size: int | None) -> np.ndarray:
    shape = "×".join(map(str, array.shape))
    if array.dtype != np.uint8:
        raise UsageError(
            f"{what} holds {array.dtype}; images are bytes from 0 to 255: "
            "from numbers between 0 and 1, (255 * x).round().astype('uint8') makes them"
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise UsageError(f"{what} is {shape}; images are n × height × width, or that × 1 or 3 channels")
    if size is None:
        return array
    fitted = [np.asarray(ImageOps.fit(Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each), (size, size)))
              for each in array]  # fmt: skip
    return np.stack(fitted).reshape(len(array), size, size, array.shape[-1]) if fitted else array


def _labels(array: np.ndarray, count: int, what: str) -> np.ndarray:
    # MedMNIST has them in a column.
    flat = array.reshape(len(array)) if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.ndim != 1 or flat.dtype.kind not in "iuUb":
        shape = "×".join(map(str, array.shape))
        raise UsageError(f"{what} is {shape} of {array.dtype}; labels are one whole number or word an image")
    if len(flat) != count:
        raise UsageError(f"{what} has {len(flat)} labels for {count} images")
    return flat
