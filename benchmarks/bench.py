"""Speed, accuracy, growth and memory, beside other libraries and beside the machine's limits: all parts, or some.

Each part runs in a process of its own and writes its JSON row by row, so that what ends one part leaves the others
theirs. On a CPU, JAX and PyTorch get one core unless told otherwise. Results are written to
benchmarks/results/DEVICE, those of quick runs to benchmarks/results/DEVICE-quick; the tables in README.md,
docs/cost.md and benchmarks/README.md follow the JSON.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import tables

# Seconds after which a part begins no further case.
PARTS = {"kernels": 130, "updates": 300, "steps": 60, "growth": 70}
# The same of a quick run.
QUICK = {"kernels": 30, "updates": 20, "steps": 10, "growth": 10}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="of the parts")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, layers and repeats; under two minutes")
    parser.add_argument("--all", action="store_true", help="cases, whatever time they take; half an hour")
    parser.add_argument("--cores", type=int, help="of the CPU to use; on a CPU 1 where left out, else all")
    parser.add_argument("--results", type=Path, default=tables.RESULTS, help="the folder for the devices' folders")
    parser.add_argument("--tables", action="store_true", help="only bring the texts' tables up to date")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tables:
        return tables.write()
    if options.inside:
        return run(options.only[0], Path(options.inside), options)
    platform, device = _device()
    cores = options.cores or (1 if platform == "cpu" else None)
    folder = options.results / (device + ("-quick" if options.quick else ""))
    for part in options.only:
        print(f"{part}, on {device}", flush=True)
        command = [sys.executable, __file__, "--only", part, "--inside", str(folder)]
        command += [f"--{name}" for name in ("quick", "all") if getattr(options, name)]
        command += ["--cores", str(cores)] if cores else []
        start = time.perf_counter()
        if code := subprocess.run(command).returncode:
            print(f"{part} ended with {code}; the others go on", flush=True)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    show(folder)
    if options.results == tables.RESULTS:
        tables.write()


def run(part: str, folder: Path, options: argparse.Namespace) -> None:
    """One part, in this process."""
    from timing import pin

    pin(options.cores)
    from record import Record

    path = folder / f"{part}.json"
    seconds = float("inf") if options.all else (QUICK if options.quick else PARTS)[part]
    record = Record(path, options.quick, seconds)
    importlib.import_module(part).measure(record)


def _device() -> tuple[str, str]:
    """Platform and device, asked for in another process, so that this one does not hold what the parts need."""
    program = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    platform, kind = found.strip().splitlines()[-2:]
    return platform, re.sub(r"[^\w.]+", "-", kind.lower()).strip("-")


def show(folder: Path) -> None:
    """The tables as text, and the picture."""
    from pictures import draw
    from rich.console import Console
    from rich.markdown import Markdown

    results, console = tables.Results(folder), Console(width=None if sys.stdout.isatty() else 200)
    parts = [*results.parts, *(["ratios"] if results.rows("kernels") else [])]
    parts += ["memory"] if any("temporary" in row for row in results.rows("updates")) else []
    for part in ("kernels", "ratios", "updates", "memory", "steps", "growth"):
        if part in parts:
            console.print(Markdown(tables.TABLES[part](results)))
    if results.parts:
        draw(results, folder / "bench.png")
        print(f"JSON and picture are in {folder}")


if __name__ == "__main__":
    main()
