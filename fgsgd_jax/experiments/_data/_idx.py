"""Files of the format of MNIST, which no library among the dependencies reads: what to type to make them one `.npz`."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from .._errors import UsageError

BYTES = 8  # the code of unsigned bytes


class Header(NamedTuple):
    """What an IDX file says of itself at its beginning."""

    kind: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return 4 * (1 + len(self.shape))


def refuse_idx(path: Path, name: str) -> None:
    """Refuse an IDX file, or a folder of them, with the lines that convert what is there.

    Raises:
        UsageError: it is one.
    """
    folder = path.parent if path.is_file() else path
    if path.is_file() and header(path) is None:
        return
    found = {file: of_file for file in sorted(folder.iterdir()) if (of_file := header(file)) is not None}
    if not found:
        return
    target = folder / "images.npz"
    message = (
        f"data {name!r} holds files in IDX, the format of MNIST; these lines make them one file for --data {target}"
    )
    raise UsageError(message, _program(found, target))


def header(path: Path) -> Header | None:
    """The header of a file that is IDX, packed or not; `None` of any other."""
    # By its name first: of a folder of a million images none is opened.
    if not ("idx" in path.name or "ubyte" in path.name) or not path.is_file():
        return None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or not 1 <= start[3] <= 4:
                return None
            return Header(start[2], struct.unpack(f">{start[3]}I", file.read(4 * start[3])))
    except (OSError, EOFError, struct.error, zlib.error):
        return None


def _program(found: dict[Path, Header], target: Path) -> str:
    """Three lines of NumPy that read these files and write one that `--data` takes."""
    arrays = []
    for split, words in (("train", ("train",)), ("test", ("t10k", "test"))):
        for letter, axes in (("x", 3), ("y", 1)):
            for file, of_file in found.items():
                rank = len(of_file.shape)
                if any(word in file.name for word in words) and (rank >= axes if letter == "x" else rank == axes):
                    arrays.append(f"    {letter}_{split}={_reading(file, of_file)},")
                    break
    if len(arrays) not in (2, 4):
        listed = ", ".join(f"{file.name} {'×'.join(map(str, of_file.shape))}" for file, of_file in found.items())
        raise UsageError(
            f"{target.parent} holds files in IDX, the format of MNIST ({listed}), of which it is not plain which are "
            "images and which labels; write them with numpy.savez as x_train, y_train, x_test and y_test into one .npz"
        )
    if strange := [file for file, of_file in found.items() if of_file.kind != BYTES]:
        raise UsageError(f"{strange[0]} is an IDX file of other numbers than bytes; images are bytes from 0 to 255")
    return "\n".join(["import gzip, numpy as np", f"np.savez({str(target)!r},", *arrays, ")"])


def _reading(file: Path, of_file: Header) -> str:
    name, rest = repr(str(file)), f"np.uint8, offset={of_file.size}).reshape{of_file.shape}"
    return f"np.frombuffer(gzip.open({name}).read(), {rest}" if file.suffix == ".gz" else f"np.fromfile({name}, {rest}"
