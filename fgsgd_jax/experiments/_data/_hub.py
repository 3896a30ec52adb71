import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
from datasets import config
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from .._errors import UsageError, did_you_mean
from ._decode import decode
from ._images import ImageSet, Split
from ._subset import balanced_order, split_rows

WORDS = {"train": "training", "test": "test"}
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
# Seconds that the hub has to say whether it knows a set.
HUB_PATIENCE = 5
PLACES = "`digits`, a folder, a .npz file or a hub name (owner/set or owner/set:config)"
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
    parts = "Parquet files with an image and a label column, or one folder of images per class"
    notes: list[str] = []
    with open_tables(name, "images", "digits", PLACES, parts) as tables:
        any_table = next(iter(tables.values()))
        image_column = _image_column(name, any_table, image_column)
        label_column = _label_column(name, any_table, label_column)

        train_table, test_table = train_and_test(name, tables)
        train_labels, classes = _train_labels(name, train_table, label_column)
        if test_table is None:
            train_rows, test_rows, note = split_rows(train_labels)
            notes.append(note)
            test_table, test_labels = train_table, train_labels
        else:
            test_labels = _encode(name, test_table, label_column, classes)
            train_rows, test_rows = np.arange(len(train_labels)), np.arange(len(test_labels))

        def split(which: str, table: datasets.Dataset, labels, rows, limit: int | None) -> Split:
            if limit is not None and limit < len(rows):
                rows = rows[balanced_order(labels[rows], seed=0)[:limit]]
            encoded = table.cast_column(image_column, datasets.Image(decode=False)).select(rows)
            cells = (dict(row)[image_column] for row in encoded)
            images, grey = decode(cells, rows, f"data {name!r}, split {which}", image_size)
            if 0 < grey < len(rows):
                found = f"{grey:,} of the {len(rows):,} {WORDS[which]} images"
                notes.append(f"{found} are grey among colour: all are taken as colour")
            return Split(images, labels[rows])

        train = split("train", train_table, train_labels, train_rows, limit_train)
        test = split("test", test_table, test_labels, test_rows, limit_test)
        if train.images.shape[-1] != test.images.shape[-1]:
            grey = "training" if train.images.shape[-1] == 1 else "test"
            notes.append(f"the {grey} images are grey, the others colour: all are taken as colour")
        train, test = _same_channels(train, test)
        return ImageSet(name=Path(name).name, train=train, test=test, classes=classes, notes=tuple(notes))


@contextmanager
def open_tables(name: str, kind: str, built_in: str, places: str, parts: str) -> Iterator[dict[str, datasets.Dataset]]:
    """The splits of a set, for as long as the context lasts.

    Args:
        name: a folder or a hub name.
        kind: images or texts, for messages.
        built_in: the name of the set that needs no file, for messages.
        places: what else can be given, for messages.
        parts: what a folder should hold, for messages.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"data {name!r} is a file, and none of arrays (.npz); give the folder that holds it")
    with ExitStack() as stack:
        if folder.is_dir():
            # `datasets` knows local files again by their paths and times, whatever has become of what is in them: here
            # they are read anew.
            parent = Path(config.HF_DATASETS_CACHE)
            parent.mkdir(parents=True, exist_ok=True)
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="fgsgd-", dir=parent))
            yield _read(name, folder, str(folder), None, cache, kind, parts)
            return
        path, _, part = name.partition(":")
        near = _near(folder, built_in)
        if not HUB_NAME.fullmatch(name):
            raise UsageError(f"data folder {name!r} does not exist{near}; give {places}")
        if reason := _ask_hub(name, path, near, places):
            stack.enter_context(_offline())
            try:
                tables = _read(name, folder, path, part or None, None, kind, parts)
            except UsageError as error:
                raise UsageError(
                    f"data {name!r}: there is no such folder or file here{near}, and the Hugging Face hub "
                    f"cannot be asked for a set of that name ({reason})"
                ) from error
        else:
            tables = _read(name, folder, path, part or None, None, kind, parts)
        yield tables


def _ask_hub(name: str, path: str, near: str, places: str) -> str | None:
    """Ask the hub once, without the retries of a download, whether it has a set: why there is no answer, if so."""
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=HUB_PATIENCE)
    except GatedRepoError as error:
        raise UsageError(
            f"data {name!r} is given by the Hugging Face hub to those alone who asked for it: log in by `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"data {name!r}: there is no such folder or file here{near}, nor such a set on the Hugging Face hub; give "
            f"{places}"
        ) from error
    # Whatever the network client raises: no network, no answer in time, a hub that is down.
    except Exception as error:
        return _reason(error)
    return None


def _near(path: Path, built_in: str) -> str:
    """A question whether the built-in set was meant, or what lies beside it."""
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    guess = did_you_mean(path.name, [*names, built_in] if parent == Path() else names).strip(" ?")
    return f" ({guess}?)" if guess else ""


@contextmanager
def _offline() -> Iterator[None]:
    """No look at the hub: what was loaded from it before is in the cache."""
    before = config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read(
    name: str, folder: Path, path: str, part: str | None, cache: str | None, kind: str, parts: str
) -> dict[str, datasets.Dataset]:
    try:
        with _quiet_bars():
            tables = datasets.load_dataset(path, part, cache_dir=cache)
    # `datasets` lets through whatever its readers, its network client and its cache raise.
    except Exception as error:
        if folder.is_dir():
            raise UsageError(
                f"data folder {name!r} cannot be read as a set of {kind} ({_reason(error)}); it should hold {parts}"
            ) from error
        raise UsageError(
            f"data {name!r} is no folder here and could not be loaded from the Hugging Face hub ({_reason(error)}); "
            "give `digits`, a folder or a hub name (owner/set or owner/set:config)"
        ) from error
    if not isinstance(tables, datasets.DatasetDict) or not tables:
        raise UsageError(f"data {name!r} holds no table of {kind}")
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
            candidates = _label_like(table)
            raise UsageError(
                f"data {name!r} has no column {chosen!r}; {did_you_mean(chosen, candidates)}--label-column: "
                f"{_listed(candidates)}"
            )
        return chosen
    typed = [column for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    # By type where that decides, by name where it does not (several labels, or labels as plain numbers or words).
    named = [column for column in LABEL_NAMES if column in (typed or columns)]
    if not typed and not named:
        raise UsageError(
            f"data {name!r} has no label column: {_suggested(_label_like(table))}, or sort the images into one folder "
            "per class"
        )
    if len(typed) > 1 and "label" not in typed:
        raise UsageError(f"data {name!r} has several label columns; choose by --label-column: {_listed(typed)}")
    return named[0]


def _label_like(table: datasets.Dataset) -> list[str]:
    """The columns that could hold one class an image: classes, words or whole numbers, of which some come twice."""
    found = []
    for column, kind in table.features.items():
        if isinstance(kind, datasets.ClassLabel) or (
            isinstance(kind, datasets.Value)
            and re.fullmatch(r"u?int\d+|bool|(large_)?string", kind.dtype)
            # File names and captions are words too, but each is of one image.
            and 2 <= len(set(table[column][:])) <= max(2, len(table) // 2)
        ):
            found.append(column)
    return found


def _suggested(columns: list[str]) -> str:
    if not columns:
        return "no other column has a class an image; add one of whole numbers or words"
    return f"name one by --label-column ({', '.join(columns)})"


def train_and_test(name: str, tables: dict[str, datasets.Dataset]) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The split to train on, and the one to test on if there is one."""
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
                f"{strange[0]!r}; {_suggested(_label_like(table))}"
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
