import json
import math
import os
from pathlib import Path
from typing import Any

from ._errors import UsageError

Record = dict[str, Any]


class MetricsLog:
    """A run's figures as JSON lines: first what the run is, then one line an epoch.

    Every line is on the disk before the training goes on. A line that a crash cut short is dropped on resuming, and so
    is what lies after the checkpoint: the log ends up as if nothing had happened.
    """

    def __init__(self, path: Path):
        self.path = path

    def create(self, header: Record) -> None:
        """Write the first line; the file appears whole or not at all."""
        self._replace([header])

    def append(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[Record, list[Record]]:
        """The first line, and the epochs' lines."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [self._parse(number, line, last=number == len(lines)) for number, line in enumerate(lines, 1)]
        if not records or records[0] is None:
            raise UsageError(f"{self.path} has no first line; it is not the log of a run")
        return records[0], [record for record in records[1:] if record is not None]

    def truncate(self, step: int) -> list[Record]:
        """Forget what came after this step, and give what is left of the epochs."""
        header, records = self.read()
        kept = [record for record in records if record["step"] <= step]
        self._replace([header, *kept])
        return kept

    def _replace(self, records: list[Record]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, records))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _parse(self, number: int, line: str, last: bool) -> Record | None:
        try:
            record = json.loads(line)
        except ValueError as error:
            if last and number > 1:
                return None
            raise UsageError(f"{self.path}, line {number} is damaged: {error}") from error
        if not isinstance(record, dict) or (number > 1 and not isinstance(record.get("step"), int)):
            raise UsageError(f"{self.path}, line {number} is no line of a run's log")
        return record


def _line(record: Record) -> str:
    # JSON has no NaN: a figure that is not finite is null.
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
