"""Texts as bytes, with whole files held out to test on."""

import dataclasses
import fnmatch
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .._errors import UsageError

Bytes = UInt8[np.ndarray, " _"]

STDLIB = "stdlib"
# Installed packages are not the standard library, its tests are not on every machine, and the encodings are tables.
NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__")
SUFFIXES = ("", ".txt", ".text", ".md", ".rst", ".tex", ".py", ".csv", ".json", ".html")

# One file of so many is held out.
HELD_OUT = 10
PLACES = "`stdlib`, a text file, a folder of text files, or a set on the Hugging Face hub (owner/set)"


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Texts to train and to test on, file by file."""

    name: str
    train: tuple[Bytes, ...]
    test: tuple[Bytes, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """What there is: a line each."""
        (train, test), files = map(_bytes_in, (self.train, self.test)), [len(self.train), len(self.test)]
        return [
            f"{self.name}: {train:,} bytes of text to train on ({_counted(files[0])}), {test:,} to test on "
            f"({_counted(files[1])})",
            *self.notes,
        ]

    def fingerprint(self) -> dict[str, object]:
        """What a run writes down about its data, so that it is never resumed on other data unnoticed."""
        return {"train": _describe(self.train), "test": _describe(self.test)}


def load_text(
    name: str = STDLIB,
    *,
    held_out: str = "",
    text_column: str | None = None,
    limit_train: int | None = None,
    validation: float = 0.0,
) -> TextSet:
    """Load texts into memory, as bytes.

    Args:
        name: `stdlib`, a file, a folder, or a name on the Hugging Face hub.
        held_out: shell patterns of the files to test on, separated by commas; empty for a choice by names.
        text_column: the column of texts in a set.
        limit_train: keep the first so many bytes to train on.
        validation: test on this share of the training text instead.

    Raises:
        UsageError: the texts cannot be found or read.
    """
    path = Path(name).expanduser()
    if name == STDLIB:
        data = _of_files(name, _stdlib(), held_out)
    elif path.is_file() or (path.is_dir() and not any(path.rglob("*.parquet"))):
        data = _of_files(name, _files(name, path), held_out)
    else:
        if held_out:
            raise UsageError(f"--held-out {held_out}: a set has no files; its own split is tested on")
        from ._sets import load_set

        data = load_set(name, text_column)
    if limit_train is not None:
        data = dataclasses.replace(data, train=_first(data.train, limit_train))
    return hold_out_text(data, validation) if validation else data


def hold_out_text(data: TextSet, share: float) -> TextSet:
    """The same set with the last share of every training file in place of the test: for choosing hyperparameters."""
    cut = [len(text) - round(share * len(text)) for text in data.train]
    note = "tested on the last part of every training file, held out; the test text is left alone"
    return dataclasses.replace(
        data,
        train=tuple(text[:place] for text, place in zip(data.train, cut, strict=True)),
        test=tuple(text[place:] for text, place in zip(data.train, cut, strict=True)),
        notes=(*data.notes, note),
    )


def _of_files(name: str, files: Mapping[str, Path], held_out: str) -> TextSet:
    texts = {relative: _read(name, path) for relative, path in files.items()}
    title = Path(name).expanduser().name
    patterns = [pattern.strip() for pattern in held_out.split(",") if pattern.strip()]
    if patterns:
        tested = {each for pattern in patterns for each in _matching(name, pattern, texts)}
        note = f"held out: {', '.join(sorted(tested))}" if len(tested) <= 3 else f"held out: {_counted(len(tested))}"
    elif len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - len(text) // HELD_OUT
        return TextSet(title, (text[:cut],), (text[cut:],), ("held out: the last tenth of the file",))
    else:
        tested = {each for each in texts if zlib.crc32(each.encode()) % HELD_OUT == 0}
        # Of few files there may be none: then the one that is nearest to it.
        tested = tested or {min(texts, key=lambda each: zlib.crc32(each.encode()))}
        note = f"held out by a hash of their names: {', '.join(sorted(tested)[:3])}{', …' if len(tested) > 3 else ''}"
    if len(tested) == len(texts):
        raise UsageError(f"--held-out {held_out}: that is every file of {name!r}; leave one or more to train on")
    train, test = ([text for each, text in texts.items() if (each in tested) == side] for side in (False, True))
    return TextSet(title, tuple(train), tuple(test), (note,))


def _matching(name: str, pattern: str, texts: Mapping[str, Bytes]) -> list[str]:
    found = [each for each in texts if fnmatch.fnmatch(each, pattern) or fnmatch.fnmatch(Path(each).name, pattern)]
    if not found:
        there_are = ", ".join(list(texts)[:8]) + (", …" if len(texts) > 8 else "")
        raise UsageError(f"--held-out: no file of {name!r} is called {pattern!r}; there are {there_are}")
    return found


def _stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*.py"))
        if not set(path.relative_to(root).parts[:-1]) & set(NOT_STDLIB)
    }
    if not found:
        raise UsageError(f"this Python has no source of its standard library in {root}; give --data a folder of texts")
    return found


def _files(name: str, path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    found = {
        each.relative_to(path).as_posix(): each
        for each in sorted(path.rglob("*"))
        if each.is_file() and each.suffix.lower() in SUFFIXES and not each.name.startswith(".")
    }
    if not found:
        suffixes = ", ".join(suffix for suffix in SUFFIXES if suffix)
        raise UsageError(f"data folder {name!r} holds no text file ({suffixes}); give {PLACES}")
    return found


def _read(name: str, path: Path) -> Bytes:
    try:
        text = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise UsageError(f"data {name!r}: {path} cannot be read: {error.strerror or error}") from error
    if (text == 0).any():
        raise UsageError(f"data {name!r}: {path} is no text: it holds zero bytes; remove it, or save it as UTF-8")
    return text


def _first(texts: Sequence[Bytes], count: int) -> tuple[Bytes, ...]:
    kept: list[Bytes] = []
    for text in texts:
        kept.append(text[: max(0, count - sum(map(len, kept)))])
    return tuple(text for text in kept if len(text))


def _bytes_in(texts: Sequence[Bytes]) -> int:
    return sum(map(len, texts))


def _counted(files: int) -> str:
    return f"{files:,} file" + "s" * (files != 1)


def _describe(texts: Sequence[Bytes]) -> dict[str, object]:
    checksum = 0
    for text in texts:
        checksum = zlib.crc32(np.ascontiguousarray(text).data, checksum)
    # The shape as that of images, so that both are told apart in the same words.
    return {"shape": [_bytes_in(texts)], "crc32": checksum}
