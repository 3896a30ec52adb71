"""What observing the features costs: training steps of a ResNet-20 with λ off and on, and of plain SGD, in turns.

Prints a table and writes JSON.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
from pathlib import Path

import numpy as np
from timing import machine, medians, ratio, side_by_side

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


class Arm:
    """A training that goes on by a few steps at every call."""

    def __init__(self, config: TrainConfig, data: ImageSet, steps: int):
        self.trainer, self.steps = Trainer(config, data), steps
        self.state = self.trainer.start(0)
        self.order = self.trainer.order(self.state)

    def __call__(self):
        self.state = self.trainer.advance(self.state, self.order, self.steps)
        return self.state.step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="of each arm in a turn")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/observe.json"))
    options = parser.parse_args()

    batch = 128
    data = images(batch * 1000)
    arms = {
        name: Arm(TrainConfig(model=options.model, batch_size=batch, augment="none", **settings), data, options.steps)
        for name, settings in ARMS.items()
    }
    turns = side_by_side(arms, options.turns)
    seconds = {name: [time / options.steps for time in times] for name, times in turns.items()}
    figures = machine() | {
        "model": options.model,
        "batch": batch,
        "seconds per step": medians(seconds),
        "fgsgd / sgd": ratio(seconds, "fgsgd", "sgd"),
        "observing / not": ratio(seconds, "fgsgd with lambda", "fgsgd"),
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{options.model}, batch {batch}, on {figures['device']}: medians of {options.turns} turns")
    for name, value in figures["seconds per step"].items():
        print(f"  {name:18} {1000 * value:8.1f} ms a step")
    print(f"  FG-SGD over SGD    {figures['fgsgd / sgd']:8.3f}")
    print(f"  observing over not {figures['observing / not']:8.3f}")


if __name__ == "__main__":
    main()
