"""The workloads of `make accelerators` on the device that there is: seconds of a step, and how feasible it stays.

What the compiler says of each program is noted beside them. The programs of a workload take turns, so that what else
the machine does falls on all of them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerators import FGSGD, RESULTS, SGD, Program, Rows, Workload, _versions, compiled, program, workloads
from timing import machine, medians, side_by_side

import fgsgd_jax as fg

# Steps that are started before one is awaited, as in training.
STEPS, TURNS, SECONDS = 10, 10, 20.0
# A CPU has kernels of its own, which `make bench` measures: here it shows that the command works.
ON_CPU = ("ResNet-20, PIO ·",)


def run(options: argparse.Namespace) -> None:
    """Runs and prints them, and writes a JSON with the device's name."""
    devices, own = jax.devices(), machine()
    platform = "cuda" if own["platform"] == "gpu" else own["platform"]
    path = options.results or RESULTS.with_stem(f"accelerators_{own['device'].replace(' ', '_').lower()}")
    words = options.only or (ON_CPU if platform == "cpu" else [""])
    rows = Rows(path, [])
    for case, workload in workloads().items():
        names = ["initialize"] if workload.initialize else [n for n in workload.optimizers if n in options.optimizers]
        names = [name for name in names if any(word in f"{case} · {name}" for word in words)]
        for row in _measured(platform, devices, workload, names, options.dump and options.dump / case):
            rows.add({"target": own["device"], "case": case} | row | {"machine": own, "versions": _versions()})
    print(table(rows.rows))


def _measured(
    platform: str, devices: list, workload: Workload, names: list[str], dump: Path | None
) -> list[dict[str, Any]]:
    if workload.mesh and len(devices) < 4:
        return [{"name": name, "left out": f"it needs four devices, here are {len(devices)}"} for name in names]
    rows, runs = {name: {"name": name} for name in names}, {}
    for name in names:
        try:
            made = program(devices, workload, name)
            code, figures = compiled(platform, workload, made, dump and dump / f"{name}.txt")
            rows[name] |= figures
            runs[name] = _Run(code, made)
            runs[name]()
        except Exception as error:
            rows[name]["left out"] = f"{type(error).__name__}: {str(error)[:300]}"
            runs.pop(name, None)
    seconds = side_by_side(runs, TURNS, SECONDS * len(runs))
    for name, median in medians(seconds).items():
        rows[name] |= {"step": median / runs[name].steps, "steps": [each / runs[name].steps for each in seconds[name]]}
        if name == FGSGD:
            # At the backend's own precision of products, after all these steps.
            rows[name]["violation"] = runs[name].violation()
    return list(rows.values())


class _Run:
    """A compiled program with its arrays: each call takes `steps` more steps."""

    def __init__(self, code: Callable[..., Any], made: Program):
        self._code, self._plan, self.steps = code, made.plan, STEPS
        if made.init is None:
            self.steps, (_, shapes) = 1, made.arguments
            self._own = (jax.random.key(0), jax.tree.map(_zeros, shapes))
            return
        grads, state, params = made.arguments
        start = fg.initialize(jax.random.key(0), jax.tree.map(_zeros, params), made.plan)
        rng = np.random.default_rng(0)
        self._grads = {
            path: jax.device_put(0.01 * rng.standard_normal(g.shape, np.float32), g.sharding)
            for path, g in grads.items()
        }
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), made.init(start), state)
        self._own = (state, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, params))

    def __call__(self) -> Any:
        if self._plan is None:
            return self._code(*self._own)
        state, params = self._own
        for _ in range(self.steps):
            params, state = self._code(self._grads, state, params)
        self._own = (state, params)
        return self._own

    def violation(self) -> float:
        """The largest of all weights."""
        found = fg.violation(self._own[1], self._plan)
        return max(float(jnp.max(each)) for each in jax.tree.leaves(found))


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each program."""
    header = ["on this device", "by", "a step, ms", "× sgd", "lower and compile, s", "violation"]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    sgd = {row["case"]: row["step"] for row in rows if row["name"] == SGD and "step" in row}
    for row in rows:
        line = [row["case"], row["name"]]
        if "left out" in row:
            lines.append([*line, row["left out"], "", "", ""])
            continue
        over = f"{row['step'] / sgd[row['case']]:.3g}" if row["case"] in sgd else "—"
        violation = f"{row['violation']:.1e}" if "violation" in row else "—"
        lines.append([*line, f"{1e3 * row['step']:.3g}", over, f"{row['seconds']:.2g}", violation])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
