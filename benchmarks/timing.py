"""How the benchmarks measure: programs side by side in one run, so that what else the machine does falls on all."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# Longer programs find nothing in the caches that they left there.
_SHORT = 0.2


def side_by_side(
    programs: Mapping[str, Callable[[], Any]],
    repeats: int,
    at_most: float = float("inf"),
    again: dict[str, list[float]] | None = None,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every repeat of every program. They take turns; a first turn, in which caches fill, does not count.

    After `at_most` seconds no further turn begins, but every program has been measured once. What a program finds in
    the caches is what the others left, as an update finds what a training step left. If `again` is given, each runs
    once more at once, with caches of its own, and these seconds go there. Before every program is a pause, in seconds:
    XLA frees the memory of a large program after its results are there, at the cost of what runs next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    begun, short = time.perf_counter(), set()
    for turn in range(repeats + 1):
        if turn > 1 and time.perf_counter() - begun > at_most:
            break
        for name, program in programs.items():
            time.sleep(pause)
            seconds[name].append(_seconds(program))
            if again is not None and name in short:
                again.setdefault(name, []).append(_seconds(program))
        if turn == 0:
            short = {name for name, each in seconds.items() if each[0] < _SHORT}
            # Not before: programs may compile in the first turn.
            seconds, begun = {name: [] for name in programs}, time.perf_counter()
    return seconds


def _seconds(program: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - start


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over turns of the ratio within a turn."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def compared(seconds: Mapping[str, list[float]], name: str, word: str, to: str) -> dict[str, Any]:
    """The figures of a row: the median, its ratio to another program's, called `over WORD`, and all seconds."""
    return {
        "median": statistics.median(seconds[name]),
        f"over {word}": ratio(seconds, name, to),
        "seconds": seconds[name],
    }


def pin(cores: int | None) -> None:
    """Let this process run on so many of its cores only. To be called before JAX starts its threads."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def cores() -> int:
    """On how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores used": cores(),
        "threads": {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "NPROC")},
        "jax": jax.__version__,
    }


def _processor() -> str:
    """What Linux calls it; elsewhere the architecture is all there is."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
