import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .._errors import UsageError

GREY = ("1", "L")
# What Pillow converts to 8-bit RGB without loss; 16-bit and floating images have no agreed range.
COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr", "LA", "PA", "HSV", "LAB", "RGBX", "RGBa")


def decode(
    encoded: Iterable[dict | None], rows: Sequence[int] | np.ndarray, where: str, size: int | None
) -> tuple[np.ndarray, int]:
    """Decode images to one array of unsigned bytes, `[n, height, width, 1 or 3]`, and count the grey ones.

    Args:
        encoded: for every image its `bytes`, or its `path` where there are none.
        rows: every image's place in its split, for messages.
        where: the set and the split, for messages.
        size: cut every image to the middle square and scale it to this height and width.

    Returns:
        The images, grey if all are grey, RGB otherwise; and how many of them are grey.
    """
    images = [_open(item, f"{where}: image {row}", size) for row, item in zip(rows, encoded, strict=True)]
    grey = sum(image.mode in GREY for image in images)
    mode = "L" if grey == len(images) else "RGB"
    arrays = []
    for row, image in zip(rows, images, strict=True):
        if image.size != images[0].size:
            first, here = ("×".join(map(str, each.size[::-1])) for each in (images[0], image))
            raise UsageError(
                f"{where}: images of mixed sizes (image {rows[0]} is {first}, image {row} is {here}); "
                f"--image-size {min(images[0].size)} brings them to one size"
            )
        arrays.append(np.asarray(image.convert(mode), np.uint8))
    if not arrays:
        return np.zeros((0, 0, 0, 1), np.uint8), 0
    stacked = np.stack(arrays)
    return (stacked[..., None] if mode == "L" else stacked), grey


def _open(item: dict | None, what: str, size: int | None) -> Image.Image:
    if item is None or (item["bytes"] is None and item["path"] is None):
        raise UsageError(f"{what} is empty; remove that row")
    named = f" ({item['path']})" if item["bytes"] is None else ""
    try:
        # In memory: of a damaged file Pillow leaves the handle open.
        image = Image.open(io.BytesIO(Path(item["path"]).read_bytes() if item["bytes"] is None else item["bytes"]))
        image.load()
    # A damaged file makes Pillow's decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error.
    except Exception as error:
        raise UsageError(f"{what}{named} cannot be read ({error}); replace or remove it") from error
    if image.mode not in GREY + COLOUR:
        raise UsageError(f"{what}{named} has pixels of mode {image.mode}; convert it to 8-bit grey or RGB")
    return image if size is None else ImageOps.fit(image, (size, size))
