"""Seeds of one comparison: side by side in one program (vmap), or one after the other in the same small program.

One training step of several seeds on digits, for the Euclidean baseline and PIO. What is faster is how `fgsgd compare`
should train; prints a line for each and writes JSON.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from timing import machine, medians, ratio, side_by_side

from fgsgd_jax.experiments import TrainConfig, Trainer, load


def measure(scheme: str, seeds: int, repeats: int) -> dict:
    config = TrainConfig(data="digits", model="resnet8", scheme=scheme, limit_train=1000, augment="none")
    trainer = Trainer(config, load("digits", limit_train=config.limit_train))
    states = [trainer.start(seed) for seed in range(seeds)]
    orders = [trainer.order(state) for state in states]
    together, order = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jnp.stack(orders)
    data = trainer.train_data
    one = jax.jit(trainer._one_step).lower(states[0], orders[0], data).compile()
    every = jax.jit(jax.vmap(trainer._one_step, in_axes=(0, 0, None))).lower(together, order, data).compile()
    programs = {
        "one after the other": lambda: [one(*pair, data) for pair in zip(states, orders, strict=True)],
        "side by side": lambda: every(together, order, data),
    }
    seconds = side_by_side(programs, repeats)
    return {
        "scheme": scheme,
        "seeds": seeds,
        "seconds": seconds,
        "medians": medians(seconds),
        "side by side over one after the other": ratio(seconds, "side by side", "one after the other"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/seeds.json"))
    options = parser.parse_args()
    rows = []
    for scheme in ("euc", "pio:sp+ob+st"):
        for seeds in options.seeds:
            rows.append(measure(scheme, seeds, options.repeats))
            found = rows[-1]
            print(
                f"{scheme}, {seeds} seeds: side by side takes "
                f"{found['side by side over one after the other']:.2f} times as long",
                flush=True,
            )
    options.json.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
