import dataclasses
import itertools
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .._config import TrainConfig
from .._picture import draw
from .._run import PICTURE, Result, load_for, run
from .._trainer import Trainer
from ._command import Command

SCHEMES = {"Euclidean SGD": "euc", "FG-SGD, PIO (Sp+Ob+St)": "pio:sp+ob+st"}
LINES = 5


@dataclasses.dataclass(frozen=True)
class Demo(Command):
    """Train the Euclidean baseline and FG-SGD on scikit-learn's digits, and compare them in a table and a picture."""

    epochs: int = 40
    seed: int = 0
    run_dir: Path | None = None
    """Where the two runs and the picture are kept; the first free of runs/demo, runs/demo-2, … where left out."""

    def run(self, console: Console) -> None:
        folder = self.run_dir or _free_folder()
        config = TrainConfig(data="digits", model="resnet8", epochs=self.epochs, batch_size=64, seed=self.seed).check()
        data = load_for(config)
        console.print(
            f"{config.model} on {len(data.train)} digits, tested on {len(data.test)}; loss and error: train/test",
            highlight=False,
        )
        results = {}
        for name, scheme in SCHEMES.items():
            console.print(f"[bold]{name}[/bold]")
            chosen = dataclasses.replace(config, scheme=scheme)
            results[name] = run(
                chosen,
                folder / scheme.partition(":")[0],
                trainer=Trainer(chosen, data),
                # Only at the end: the demonstration is shorter than the time between two checkpoints should be.
                checkpoint_every=10**9,
                console=console,
                line_every=max(1, self.epochs // LINES),
            )
        picture = folder / PICTURE
        draw({name: result.records for name, result in results.items()}, picture)
        console.print(_table(results))
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def _free_folder() -> Path:
    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    return next(folder for name in names if not (folder := Path("runs") / name).exists())


def _table(results: dict[str, Result]) -> Table:
    table = Table()
    table.add_column("")
    for heading in ("test error", "test loss", "largest violation", "seconds per step"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        last = result.records[-1]
        violation = f"{last['violation']:.1e}" if "violation" in last else "—"
        # The median leaves out the first epoch, in which everything is compiled.
        seconds = statistics.median(record["seconds"]["step"] for record in result.records)
        table.add_row(
            name, f"{last['test']['error']:.2f} %", f"{last['test']['loss']:.4f}", violation, f"{seconds:.4f}"
        )
    return table
