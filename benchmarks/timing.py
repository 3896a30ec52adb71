"""How the benchmarks measure: programs side by side in one run, so that what else the machine does falls on all."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def side_by_side(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat of every program. They take turns; a first turn, in which caches fill, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over turns of the ratio within a turn."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "NPROC")},
        "jax": jax.__version__,
    }
