import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._errors import UsageError, resume_command

Record = dict[str, Any]


class MetricsLog:
    """A run's figures as JSON lines: first what the run is, then one line an epoch.

    Every line is on the disk before the training goes on. A line that a crash cut short is dropped on resuming, and so
    is what lies after the checkpoint: the log ends up as if nothing had happened. Of several processes one writes.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self._writes = path, writes

    def create(self, header: Record) -> None:
        """Write the first line; the file appears whole or not at all."""
        self._replace([header])

    def append(self, record: Record) -> None:
        if not self._writes:
            return
        with self._written(), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[Record, list[Record]]:
        """The first line, and the epochs' lines."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [self._parse(number, line, last=number == len(lines)) for number, line in enumerate(lines, 1)]
        if not records or records[0] is None:
            raise UsageError(f"{self.path} has no first line; it is not the log of a run")
        epochs = [record for record in records[1:] if record is not None]
        for number, record in enumerate(epochs, 2):
            # What a flipped bit made of a name would be missed only once the training is over.
            if _form(record) != _form(epochs[0]):
                raise UsageError(f"{self.path}, line {number} is damaged: it has other figures than line 2")
        return records[0], epochs

    def rewrite(self, header: Record, records: list[Record]) -> None:
        """Put another first line before the epochs."""
        with self._written():
            self._replace([header, *records])

    def truncate(self, step: int) -> list[Record]:
        """Forget what came after this step, and give what is left of the epochs."""
        header, records = self.read()
        kept = [record for record in records if record["step"] <= step]
        self.rewrite(header, kept)
        return kept

    def _replace(self, records: list[Record]) -> None:
        if not self._writes:
            return
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, records))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written: {error.strerror or error}; make room and go on by --resume: "
                f"`{resume_command(self.path.parent)}`"
            ) from error

    def _parse(self, number: int, line: str, last: bool) -> Record | None:
        try:
            record = json.loads(line)
        except ValueError as error:
            if last and number > 1:
                return None
            raise UsageError(f"{self.path}, line {number} is damaged: {error}") from error
        if not isinstance(record, dict) or (number > 1 and not _is_epoch(record)):
            raise UsageError(f"{self.path}, line {number} is no line of a run's log")
        return record


def _is_epoch(record: Record) -> bool:
    """Whether a line has what resuming and the picture need."""
    form = _form(record)
    losses = {"loss": "number", "error": "number"}
    return (
        all(isinstance(record.get(name), int) for name in ("epoch", "step"))
        and all(form.get(name) == losses for name in ("train", "test"))
        and isinstance(form.get("norms"), dict)
    )


def _form(value: Any) -> Any:
    """A line's names, with the kinds of its values in their places."""
    if isinstance(value, dict):
        return {key: _form(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_form(each) for each in value]
    # A figure that is not finite is null.
    return "number" if value is None or isinstance(value, (int, float)) else type(value).__name__


def _line(record: Record) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A record as JSON can have it: a figure that is not finite is null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
