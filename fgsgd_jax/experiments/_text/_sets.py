"""Sets of texts that `datasets` reads."""

import datasets
import numpy as np

from .._data._hub import open_tables, train_and_test
from .._errors import UsageError, did_you_mean
from ._corpus import HELD_OUT, PLACES, STDLIB, Bytes, TextSet


def load_set(name: str, column: str | None) -> TextSet:
    """A set of texts, by local folder or hub name; the texts of a split are joined by empty lines."""
    with open_tables(name, "texts", STDLIB, PLACES, "Parquet files with a column of texts") as tables:
        train, test = train_and_test(name, tables)
        column = _column(name, train, column)
        text = _joined(train, column)
        title = name.rstrip("/").rpartition("/")[2]
        if test is None:
            cut = len(text) - len(text) // HELD_OUT
            return TextSet(title, (text[:cut],), (text[cut:],), ("held out: the last tenth of the set",))
        if column not in test.column_names:
            raise UsageError(f"data {name!r} has no column {column!r} in its split to test on")
        return TextSet(title, (text,), (_joined(test, column),))


def _column(name: str, table: datasets.Dataset, chosen: str | None) -> str:
    words = [
        column
        for column, kind in table.features.items()
        if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")
    ]
    listed = ", ".join(words) or "none"
    if chosen is not None:
        if chosen not in words:
            guess = did_you_mean(chosen, words)
            raise UsageError(f"data {name!r} has no column of texts {chosen!r}; {guess}--text-column: {listed}")
        return chosen
    if "text" in words:
        return "text"
    if len(words) != 1:
        raise UsageError(f"data {name!r} has no column `text`; choose by --text-column: {listed}")
    return words[0]


def _joined(table: datasets.Dataset, column: str) -> Bytes:
    return np.frombuffer("\n\n".join(text or "" for text in table[column][:]).encode(), np.uint8)
