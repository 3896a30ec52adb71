"""The whole update of a residual network's convolutions: FG-SGD under PIO(Sp+Ob+St) beside Optax's own optimizers.

All convolutions of ResNet-20, 56 and 110, momentum 0.9, the update alone. Prints a table and writes JSON.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import machine, medians, ratio, side_by_side

import fgsgd_jax as fg


def kernels(depth: int) -> dict[str, tuple[int, ...]]:
    shapes, inputs = {"stem": (3, 3, 3, 16)}, 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            shapes[f"{stage}/{block}/0"] = (3, 3, inputs, width)
            shapes[f"{stage}/{block}/1"] = (3, 3, width, width)
            inputs = width
    return shapes


def measure(depth: int, repeats: int) -> dict:
    params = {path: jnp.zeros(shape) for path, shape in kernels(depth).items()}
    rng = np.random.default_rng(0)
    grads = {path: jnp.asarray(0.01 * rng.standard_normal(x.shape), jnp.float32) for path, x in params.items()}
    plan = fg.plan(params, [("*", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()]))])
    start = time.perf_counter()
    params = jax.block_until_ready(fg.initialize(jax.random.key(0), params, plan))
    found: dict = {
        "slices": sum(x.shape[2] * x.shape[3] for x in params.values()),
        "initialize": time.perf_counter() - start,
    }
    optimizers = {
        "fgsgd": fg.fgsgd(0.1, plan, momentum=0.9),
        "sgd": optax.sgd(0.1, momentum=0.9),
        "adamw": optax.adamw(1e-3),
    }
    programs = {}
    for name, tx in optimizers.items():
        state = tx.init(params)
        start = time.perf_counter()
        lowered = jax.jit(tx.update).lower(grads, state, params)
        compiled = lowered.compile()
        found[name] = {
            "compile": time.perf_counter() - start,
            "program": len(lowered.as_text()),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }
        programs[name] = lambda compiled=compiled, state=state: compiled(grads, state, params)
    seconds = side_by_side(programs, repeats)
    for name, times in medians(seconds).items():
        found[name] |= {"seconds": seconds[name], "median": times, "over sgd": ratio(seconds, name, "sgd")}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=(20, 56, 110))
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/update.json"))
    options = parser.parse_args()
    found = {}
    for depth in options.depths:
        found[f"ResNet-{depth}"] = measured = measure(depth, options.repeats)
        print(f"ResNet-{depth}, {measured['slices']} slices; initialize {measured['initialize']:.1f} s")
        for name in ("fgsgd", "sgd", "adamw"):
            row = measured[name]
            print(
                f"  {name:8}{1e3 * row['median']:8.2f} ms {row['over sgd']:6.2f} × sgd, "
                f"compile {row['compile']:.1f} s, temporary {row['temporary'] / 2**20:.1f} MiB",
                flush=True,
            )
    options.json.write_text(json.dumps(machine() | {"updates": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
