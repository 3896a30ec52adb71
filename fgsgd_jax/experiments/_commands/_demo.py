import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from .._config import TrainConfig
from .._data import ImageSet
from .._demo_picture import draw_demo
from .._errors import UsageError
from .._log import Record, finite
from .._options import options
from .._paired import paired_difference
from .._trainer import Trainer
from .._versions import versions
from ._command import Command

RESULTS, PICTURE = "results.json", "picture.png"

# The setting of docs/findings.md, "Fewer images", of 250: every row with its better weight decay, and the rate that its
# search chose.
SETTING = {"data": "digits", "limit_train": 250, "model": "resnet8", "augment": "none"}
ROWS = {
    "free weights": {"scheme": "euc", "weight_decay": 0.0005, "lr": 0.3},
    "FG-SGD, PIO": {"scheme": "pio3", "weight_decay": 0.005, "lr": 1.0},
}
# Their difference there.
WITH_20_SEEDS = "-0.92, -1.24 to -0.59"
# Points of the curves.
POINTS = 20
# The layer whose slices are drawn.
LAYER = "stage_0/block_0/conv_0/kernel"

LIMITS = """\
Where it does not help: a network that does not fit its images yet learns more slowly on manifolds (5,000 images of
CIFAR-10 with augmentation, 12 epochs: 1.5 points worse). With 1,000 digits and the weight decay tuned, 0.13 points are
left. Mixing manifolds adds nothing to slicing: spheres for every slice do as well there. Here the search chose the rate
1 for PIO, with very long steps: part of the gain may be the rate. See docs/findings.md."""


@options
class Demo(Command):
    """Train free weights and FG-SGD on 250 digits: a table, and a picture."""

    seeds: int = 16
    """Trainings of each of the two."""
    epochs: int = 280
    """How often every image is seen: one step each."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where results and picture are kept; the first free of runs/demo, runs/demo-2, … where left out."""

    def run(self, console: Console) -> None:
        if self.seeds < 2:
            raise UsageError(f"--seeds {self.seeds}: give 2 or more, since the difference has an interval")
        folder = self.run_dir or _free_folder()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} already holds something; give another --run-dir")
        configs = {name: TrainConfig(epochs=self.epochs, **SETTING, **row).check() for name, row in ROWS.items()}
        # They are of one set of data.
        shared = next(iter(configs.values()))
        data = shared.load()
        for line in shared.about(data):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(
            f"{2 * self.seeds} trainings of {self.epochs} steps, the same seeds for both: two minutes on two cores",
            highlight=False,
        )
        trainings, weights = self._trained(configs, data, console)
        found = {
            "setting": {name: config.to_dict() for name, config in configs.items()},
            "data": data.fingerprint(),
            "versions": versions(),
            "trainings": trainings,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).write_text(json.dumps(finite(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draw_demo(trainings, weights, LIMITS, folder / PICTURE)
        console.print(_table(trainings))
        console.print(_verdict(trainings), highlight=False, soft_wrap=True)
        console.print(LIMITS.replace("\n", " "), highlight=False)
        console.print(f"picture: {folder / PICTURE}", highlight=False, soft_wrap=True)

    def _trained(
        self, configs: dict[str, TrainConfig], data: ImageSet, console: Console
    ) -> tuple[dict[str, list[Record]], dict[str, Any]]:
        """The trainings of each row, seed by seed, and the slices of the first one on manifolds."""
        trainers = {name: Trainer(config, data) for name, config in configs.items()}
        trainings: dict[str, list[Record]] = {name: [] for name in trainers}
        weights: dict[str, Any] = {}
        for seed in range(self.seeds):
            for name, trainer in trainers.items():
                record, state = _train(trainer, seed)
                trainings[name].append(record)
                plan = trainer.plan_of(seed)
                if plan is not None and not weights:
                    *above, last = LAYER.split("/")
                    kernel = state.params
                    for key in above:
                        kernel = kernel[key]
                    collection = plan.collections[LAYER]
                    weights = {
                        "layer": LAYER,
                        "kernel": np.asarray(kernel[last]),
                        "member": np.asarray(collection.member),
                        "names": [type(manifold).__name__ for manifold in collection.manifolds],
                    }
            errors = ", ".join(f"{each[-1]['test_error'][-1]:.2f} % {name}" for name, each in trainings.items())
            console.print(f"seed {seed}: {errors}", highlight=False, soft_wrap=True)
        return trainings, weights


def _train(trainer: Trainer, seed: int) -> tuple[Record, Any]:
    """One training: its errors and losses at some of its epochs, and the last state."""
    state, plan = trainer.start(seed), trainer.plan_of(seed)
    epochs = trainer.epochs_at(trainer.total_steps)
    # More of them at the beginning, where the most happens.
    points = sorted(
        {min(each, epochs) for each in (1, 3, 7)} | {-(-epochs * place // POINTS) for place in range(1, POINTS + 1)}
    )
    curves: dict[str, list[float]] = {"train_error": [], "train_loss": [], "test_error": [], "test_loss": []}
    violation = None
    for epoch in range(1, epochs + 1):
        state = trainer.advance(state, trainer.order(state), trainer.steps_per_epoch)
        if epoch in points:
            figures = trainer.figures(trainer.glance(state, plan))
            loss, error = trainer.evaluate(state)
            for name, value in zip(curves, (figures.error, figures.loss, error, loss), strict=True):
                curves[name].append(value)
            violation = figures.violation
    return {"seed": seed, "epochs": points, "violation": violation} | curves, state


def _free_folder() -> Path:
    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    return next(folder for name in names if not (folder := Path("runs") / name).exists())


def _last(records: list[Record], name: str) -> np.ndarray:
    return np.array([record[name][-1] for record in records], float)


def _verdict(trainings: dict[str, list[Record]]) -> str:
    free, constrained = (_last(records, "test_error") for records in trainings.values())
    found = paired_difference(constrained, free)
    return (
        f"Difference in test error: {found.mean:+.2f} points, 95 % interval {found.lower:+.2f} to {found.upper:+.2f}; "
        f"{np.sum(constrained < free)} of {len(free)} seeds are better on manifolds, {np.sum(constrained > free)} "
        f"worse (sign-flip test: p = {found.p:.3f}). With 20 seeds it was {WITH_20_SEEDS} (docs/findings.md)."
    )


def _table(trainings: dict[str, list[Record]]) -> Table:
    table = Table()
    table.add_column("")
    for heading in ("test error, %", "test loss", "training, %", "violation"):
        table.add_column(heading, justify="right")
    for name, records in trainings.items():
        worst = [record["violation"] for record in records if record["violation"] is not None]
        cells = [
            f"{_last(records, key).mean():.{digits}f} ± {_last(records, key).std(ddof=1):.{digits}f}"
            for key, digits in (("test_error", 2), ("test_loss", 3), ("train_error", 2))
        ]
        table.add_row(name, *cells, f"{max(worst):.1e}" if worst else "—")
    return table
