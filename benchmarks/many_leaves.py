"""What hundreds and thousands of leaves St(8, 8) cost before the first step, beside Optax's own optimizers.

Every figure is the first of its kind in a process of its own, where nothing is compiled yet: seconds of the processor,
which on a machine with other work say more than those of the clock, which stand beside them. Prints a table and writes
JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from timing import machine, versions

import fgsgd_jax as fg

OPTIMIZERS = {
    "fgsgd": lambda plan: fg.fgsgd(0.1, plan, momentum=0.9),
    "on_manifolds(adam)": lambda plan: fg.on_manifolds(optax.adam(1e-3), plan),
    "riemannian_adam": lambda plan: fg.riemannian_adam(1e-3, plan),
    "optax.sgd": lambda plan: optax.sgd(0.1, momentum=0.9),
    "optax.adam": lambda plan: optax.adam(1e-3),
    "optax.contrib.muon": lambda plan: optax.contrib.muon(0.1),
}

# Twenty leaves a second: 3,000 would take minutes.
MOST = {"optax.contrib.muon": 300}


def seconds(call: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """What a call returns, and its seconds."""
    cpu, clock = time.process_time(), time.perf_counter()
    result = jax.block_until_ready(call())
    return result, {"cpu": time.process_time() - cpu, "clock": time.perf_counter() - clock}


def measure(name: str, count: int) -> dict[str, dict[str, float]]:
    """The first plan, draw, projection and compiled update of so many leaves in this process."""
    params = {f"layer_{n}": jnp.eye(8, dtype=jnp.float32) for n in range(count)}
    found = {}
    plan, found["plan"] = seconds(lambda: fg.plan(params, [("*", fg.Each(fg.Stiefel()))]))
    params, found["initialize"] = seconds(lambda: fg.initialize(jax.random.key(0), params, plan))
    params, found["nearest"] = seconds(lambda: fg.nearest(params, plan))
    tx = OPTIMIZERS[name](plan)
    state, found["init"] = seconds(lambda: tx.init(params))
    lowered, found["trace"] = seconds(lambda: jax.jit(tx.update).lower(params, state, params))
    compiled, found["compile"] = seconds(lowered.compile)
    for what in ("first update", "update"):
        _, found[what] = seconds(lambda: compiled(params, state, params))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=(300, 3000))
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="OPTIMIZER")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/many_leaves.json"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.only[0], options.counts[0])))
        return
    rows = []
    for count in options.counts:
        for name in (name for name in options.only if count <= MOST.get(name, count)):
            command = [sys.executable, __file__, "--inside", "--counts", str(count), "--only", name]
            runs = []
            for _ in range(options.repeats):
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            rows.append({"leaves": count, "name": name, "runs": runs})
            least = {what: min(run[what]["cpu"] for run in runs) for what in runs[0]}
            print(f"{count} {name}: " + ", ".join(f"{what} {value:.2f} s" for what, value in least.items()), flush=True)
            figures = {"machine": machine(), "versions": versions("jax", "optax", "fgsgd-jax"), "rows": rows}
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
