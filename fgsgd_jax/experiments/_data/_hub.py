import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np

from .._errors import UsageError
from ._decode import decode
from ._images import ImageSet, Split
from ._subset import balanced_order

TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
# What is held out of a set that comes without a split to test on.
TEST_SHARE = 0.2
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def load_hub(
    name: str,
    image_column: str | None,
    label_column: str | None,
    image_size: int | None,
    limit_train: int | None,
    limit_test: int | None,
) -> ImageSet:
    """Any image classification set that `datasets.load_dataset` reads, by local folder or hub name.

    Only the images that the limits keep are decoded.
    """
    tables = _tables(name)
    any_table = next(iter(tables.values()))
    image_column = _image_column(name, any_table, image_column)
    label_column = _label_column(name, any_table, label_column)

    train_table, test_table = _train_and_test(name, tables)
    train_labels, classes = _train_labels(name, train_table, label_column)
    if test_table is None:
        order = balanced_order(train_labels, seed=0)
        held = round(TEST_SHARE * len(order))
        train_rows, test_rows = order[held:], order[:held]
        test_table, test_labels = train_table, train_labels
    else:
        test_labels = _encode(name, test_table, label_column, classes)
        train_rows, test_rows = np.arange(len(train_labels)), np.arange(len(test_labels))

    def split(which: str, table: datasets.Dataset, labels, rows, limit: int | None) -> Split:
        if limit is not None and limit < len(rows):
            rows = rows[balanced_order(labels[rows], seed=0)[:limit]]
        encoded = table.cast_column(image_column, datasets.Image(decode=False)).select(rows)
        cells = (dict(row)[image_column] for row in encoded)
        images = decode(cells, rows, f"data {name!r}, split {which}", image_size)
        return Split(images, labels[rows])

    train = split("train", train_table, train_labels, train_rows, limit_train)
    test = split("test", test_table, test_labels, test_rows, limit_test)
    train, test = _same_channels(train, test)
    return ImageSet(name=Path(name).name, train=train, test=test, classes=classes)


def _tables(name: str) -> dict[str, datasets.Dataset]:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"data {name!r} is a file; give the folder that holds it")
    if not folder.is_dir() and not HUB_NAME.fullmatch(name):
        raise UsageError(f"data folder {name!r} does not exist; give `digits`, a folder or a hub name (owner/set)")
    path, config = (str(folder), None) if folder.is_dir() else (name.partition(":")[0], name.partition(":")[2] or None)
    try:
        with _quiet_bars():
            tables = datasets.load_dataset(path, config)
    # `datasets` lets through whatever its readers, its network client and its cache raise.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if folder.is_dir():
            raise UsageError(
                f"data folder {name!r} cannot be read as a set of images ({reason}); it should hold Parquet files "
                "with an image and a label column, or one folder of images per class"
            ) from error
        raise UsageError(
            f"data {name!r} is no folder here and could not be loaded from the Hugging Face hub ({reason}); "
            "give `digits`, a folder or a hub name (owner/set or owner/set:config)"
        ) from error
    if not isinstance(tables, datasets.DatasetDict) or not tables:
        raise UsageError(f"data {name!r} holds no table of images")
    return {str(split): table for split, table in tables.items()}


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """No progress bars of `datasets` in a log file; they stay in a terminal, where a download may take long."""
    quiet = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _image_column(name: str, table: datasets.Dataset, chosen: str | None) -> str:
    images = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if chosen is not None:
        if chosen not in images:
            raise UsageError(f"data {name!r} has no image column {chosen!r}; --image-column: {_listed(images)}")
        return chosen
    if not images:
        raise UsageError(f"data {name!r} has no column of images; its columns are {_listed(table.column_names)}")
    if len(images) > 1:
        raise UsageError(f"data {name!r} has several columns of images; choose by --image-column: {_listed(images)}")
    return images[0]


def _label_column(name: str, table: datasets.Dataset, chosen: str | None) -> str:
    columns = table.column_names
    if chosen is not None:
        if chosen not in columns:
            raise UsageError(f"data {name!r} has no column {chosen!r}; --label-column: {_listed(columns)}")
        return chosen
    typed = [column for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    # By type where that decides, by name where it does not (several labels, or labels as plain numbers or words).
    named = [column for column in LABEL_NAMES if column in (typed or columns)]
    if not typed and not named:
        raise UsageError(
            f"data {name!r} has no label column; its columns are {_listed(columns)}: name one by --label-column, "
            "or sort the images into one folder per class"
        )
    if len(typed) > 1 and "label" not in typed:
        raise UsageError(f"data {name!r} has several label columns; choose by --label-column: {_listed(typed)}")
    return named[0]


def _train_and_test(name: str, tables: dict[str, datasets.Dataset]) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    test = next((split for split in TEST_SPLITS if split in tables), None)
    train = "train" if "train" in tables else None
    if train is None and len(tables) == 1:
        train, test = next(iter(tables)), None
    if train is None:
        raise UsageError(f"data {name!r} has no split `train`; its splits are {_listed(list(tables))}")
    return tables[train], None if test is None else tables[test]


def _train_labels(name: str, table: datasets.Dataset, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    kind = table.features[column]
    if isinstance(kind, datasets.ClassLabel):
        classes = tuple(kind.names)
    else:
        values = table[column][:]
        if strange := [value for value in values if not isinstance(value, int | str)]:
            raise UsageError(
                f"data {name!r}: column {column!r} does not hold one class per image, but such things as "
                f"{strange[0]!r}; name another by --label-column"
            )
        classes = tuple(str(value) for value in sorted(set(values), key=lambda value: (isinstance(value, str), value)))
    return _encode(name, table, column, classes), classes


def _encode(name: str, table: datasets.Dataset, column: str, classes: tuple[str, ...]) -> np.ndarray:
    values = table[column][:]
    if isinstance(table.features[column], datasets.ClassLabel):
        labels = np.array([-1 if value is None else value for value in values], np.int64)
    else:
        place = {label: number for number, label in enumerate(classes)}
        labels = np.array([place.get(str(value), -1) for value in values], np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(bad):
        raise UsageError(
            f"data {name!r}: image {bad[0]} has the label {values[int(bad[0])]!r}, which is none of the "
            f"{len(classes)} classes of the training images; remove such images, or name another --label-column"
        )
    return labels.astype(np.int32)


def _same_channels(train: Split, test: Split) -> tuple[Split, Split]:
    """Grey images beside a colour split become colour images, as they do within one split."""
    channels = max(train.images.shape[-1], test.images.shape[-1])

    def widen(split: Split) -> Split:
        shape = (*split.images.shape[:-1], channels)
        return Split(np.ascontiguousarray(np.broadcast_to(split.images, shape)), split.labels)

    return widen(train), widen(test)


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
