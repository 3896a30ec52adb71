"""The rows of one part of `bench.py`: printed and written as they come, so that what is cut off later loses none."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from timing import cores, machine, versions


class Record:
    """One part's rows, each with the machine and the versions that it holds for, and what was left out and why.

    `quick` is the reader's wish to be done soon; `at_most` the seconds after which a part begins no further case.
    """

    def __init__(self, path: Path, quick: bool = False, at_most: float = float("inf")):
        self.path, self.quick = path, quick
        self.rows: list[dict[str, Any]] = []
        self.missing: list[dict[str, str]] = []
        self._begun, self._at_most = time.perf_counter(), at_most
        self._machine = machine()

    def row(self, case: str, name: str, packages: tuple[str, ...] = (), **figures: Any) -> None:
        used = {"device": self._machine["device"], "cores used": cores()}
        used |= {"versions": versions("jax", "jaxlib", "optax", "fgsgd-jax", *packages)}
        self.rows.append({"case": case, "name": name} | figures | used)
        shown = {key: _short(value) for key, value in figures.items() if not isinstance(value, (list, dict))}
        print(f"  {case}: {name}: {', '.join(' '.join(pair) for pair in shown.items())}", flush=True)
        self.write()

    def left_out(self, case: str, name: str, why: str) -> None:
        self.missing.append({"case": case, "name": name, "why": why})
        print(f"  {case}: {name} left out: {why}", flush=True)
        self.write()

    @contextmanager
    def case(self, case: str, name: str = "all") -> Iterator[None]:
        """A case whose failure, be it of memory, is a row left out and not the end of the part."""
        try:
            yield
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            self.left_out(case, name, f"{type(error).__name__}: {first[:200]}")

    def has_time(self, case: str) -> bool:
        """Whether the part's time is not spent yet; says so if it is."""
        spent = time.perf_counter() - self._begun
        if spent > self._at_most:
            self.left_out(case, "all", f"the part's {self._at_most:.0f} s are spent")
        return spent <= self._at_most

    def has_memory(self, case: str, needed: float) -> bool:
        """Whether the device has so many bytes to spare; says so if not."""
        spare = available()
        if needed > spare:
            self.left_out(case, "all", f"takes {needed / 2**30:.1f} GiB, there are {spare / 2**30:.1f}")
        return needed <= spare

    def write(self) -> None:
        """One row a line, so that two runs can be compared by eye."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"machine": self._machine, "quick": self.quick}, ensure_ascii=False)[1:-1]
        lists = []
        for name, rows in (("rows", self.rows), ("left out", self.missing)):
            lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            lists.append(f'"{name}": [\n{lines}\n]')
        partial = self.path.with_suffix(".partial")
        partial.write_text("{" + ",\n".join([head, *lists]) + "}\n", encoding="utf-8")
        partial.replace(self.path)


def available() -> float:
    """Bytes that the device has to spare; unlimited where it does not say."""
    if figures := jax.devices()[0].memory_stats():
        return figures.get("bytes_limit", float("inf")) - figures.get("bytes_in_use", 0)
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else float("inf")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
