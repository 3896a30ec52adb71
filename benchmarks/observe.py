"""What observing the features costs: training steps of a ResNet-20 with λ off and on, and of plain SGD, in turns.

Prints a table and writes JSON. Ratios are medians of the ratios within a turn, so that what else the machine does
falls on both sides.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np

from fgsgd_jax.experiments._config import TrainConfig
from fgsgd_jax.experiments._data import ImageSet, Split
from fgsgd_jax.experiments._trainer import Trainer

ARMS = {
    "sgd": {"scheme": "euc"},
    "fgsgd": {"scheme": "pio:sp+ob+st"},
    "fgsgd with lambda": {"scheme": "pio:sp+ob+st", "lambda_": "epoch"},
}


def images(count):
    """Noise in the shape of CIFAR-10: what a step costs does not depend on what is seen."""
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), (np.arange(count) % 10).astype(np.int32))
    return ImageSet("noise", split, split, tuple(map(str, range(10))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="of each arm in a turn")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/observe.json"))
    options = parser.parse_args()

    batch = 128
    data = images(batch * 1000)
    arms = {}
    for name, settings in ARMS.items():
        trainer = Trainer(TrainConfig(model=options.model, batch_size=batch, augment="none", **settings), data)
        state = trainer.start(0)
        order = trainer.order(state)
        # The first call compiles.
        arms[name] = [trainer, jax.block_until_ready(trainer.advance(state, order, 1)), order]
    seconds = {name: [] for name in arms}
    for _ in range(options.turns):
        for name, arm in arms.items():
            trainer, state, order = arm
            start = time.perf_counter()
            arm[1] = jax.block_until_ready(trainer.advance(state, order, options.steps))
            seconds[name].append((time.perf_counter() - start) / options.steps)

    def ratio(name, against):
        return float(np.median(np.array(seconds[name]) / np.array(seconds[against])))

    figures = {
        "model": options.model,
        "batch": batch,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "seconds per step": {name: float(np.median(times)) for name, times in seconds.items()},
        "fgsgd / sgd": ratio("fgsgd", "sgd"),
        "observing / not": ratio("fgsgd with lambda", "fgsgd"),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{options.model}, batch {batch}, on {figures['device']}: medians of {options.turns} turns")
    for name, value in figures["seconds per step"].items():
        print(f"  {name:18} {1000 * value:8.1f} ms a step")
    print(f"  FG-SGD over SGD    {figures['fgsgd / sgd']:8.3f}")
    print(f"  observing over not {figures['observing / not']:8.3f}")


if __name__ == "__main__":
    main()
