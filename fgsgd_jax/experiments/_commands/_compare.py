import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro
from rich.console import Console

from .._compare import RESULTS, Comparison, compare, read_results
from .._comparison_report import draw, report
from .._config import TrainConfig, option
from .._errors import UsageError, unknown
from .._image_kind import ImageKind
from .._options import options
from .._rows import check_rows, row_name
from .._tasks import CONFIGS
from .._text import TextConfig, TextKind
from .._text._config import Optimizer, Scheme, Start
from ._command import Command, given

REPORT, PICTURE = "report.md", "comparison.png"
UNSHARED = ("task", "optimizer", "scheme", "lr", "seed", "validation", "tangent", "start")


T = TypeVar("T")

# An option of a single training, for which a comparison has others. With its own type: of `Any`, tyro would take 0 and
# 0.0 for one option.
_Given = Annotated[T, tyro.conf.Suppress, tyro.conf.Fixed]


@options
class SharedConfig(TrainConfig):
    """What all trainings of a comparison have in common."""

    scheme: _Given[str] = "euc"
    lr: _Given[float] = 0.1
    seed: _Given[int] = 0
    validation: _Given[float] = 0.0


@options
class Compare(Command):
    """Compare schemes (with --task text: optimizers), each at its best learning rate."""

    instead: ClassVar[dict[str, str]] = {
        "--scheme": "--rows",
        "--lr": "--lrs",
        "--seed": "--seeds",
        "--validation": "--held-out",
    }

    SHARE: ClassVar[str] = "--held-out"

    config: Annotated[SharedConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=SharedConfig)
    rows: str = ",".join(ImageKind.rows)
    """The rows, separated by commas: schemes, by any name that `fgsgd train --scheme` takes. ~option=value after a name
    changes an option of that row: euc~wd=0.005."""
    lrs: str = "0.03,0.1,0.3"
    """The grid of learning rates, separated by commas; a single one is not tuned."""
    seeds: int = 5
    """Trainings of every row."""
    tuning_seeds: int = 2
    """Trainings of every row and rate of the grid."""
    held_out: float = 0.2
    """The share of the training images on which rates are compared."""
    widen: int = 0
    """How many rates more a row may try beyond an end of the grid, as long as the best lies there."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where results, report and picture are kept; runs/compare-DATA-MODEL where left out. An interrupted comparison
    goes on where it was, by the same command; rows and seeds may be added."""

    @classmethod
    def of(cls, options: Sequence[str]) -> type[Command]:
        task = given(options, "--task")
        if task is not None and task not in CONFIGS:
            raise unknown("task", task, CONFIGS)
        return TextCompare if task == "text" else cls

    def run(self, console: Console) -> None:
        config: Any = CONFIGS[self.config.task](**self.config.to_dict()).check()
        share = self._share()
        rows = tuple(row_name(name.strip(), config) for name in self.rows.split(",") if name.strip())
        if not rows:
            raise UsageError("--rows: name one row or more")
        check_rows(rows, config)
        if self.seeds < 1 or self.tuning_seeds < 1:
            raise UsageError("--seeds and --tuning-seeds: give a whole number of 1 or more")
        if self.widen < 0:
            raise UsageError("--widen: give a whole number of 0 or more")
        if not 0 < share < 1:
            raise UsageError(f"{self.SHARE}: give a share between 0 and 1")
        config = dataclasses.replace(config, validation=0.0)
        folder = self.run_dir or Path("runs") / "-".join(["compare", *config.names[:2]])
        comparison = Comparison(config, rows, self._rates(), self.seeds, self.tuning_seeds, share, self.widen)
        try:
            compare(comparison, folder, lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
        except KeyboardInterrupt as interruption:
            raise KeyboardInterrupt("the same command goes on where it was") from interruption
        found = read_results(folder / RESULTS)
        draw(found, folder / PICTURE)
        text = report(found, self._command(comparison, folder), PICTURE)
        (folder / REPORT).write_text(text, encoding="utf-8")
        console.print(text, highlight=False, soft_wrap=True, markup=False)
        console.print(f"report: {folder / REPORT}, picture: {folder / PICTURE}", highlight=False, soft_wrap=True)

    def _share(self) -> float:
        """The share of the training data on which rates are compared."""
        return self.held_out

    def _rates(self) -> tuple[float, ...]:
        try:
            rates = tuple(float(rate) for rate in self.lrs.split(","))
        except ValueError as error:
            raise UsageError(f"--lrs {self.lrs}: give numbers separated by commas") from error
        if not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
            raise UsageError(f"--lrs {self.lrs}: give different numbers above 0")
        return rates

    def _command(self, comparison: Comparison, folder: Path) -> str:
        """What to type, in the same place, for the same."""
        words = ["fgsgd", "compare"]
        if comparison.base.task != TrainConfig.task:
            words += ["--task", comparison.base.task]
        for field in dataclasses.fields(comparison.base):
            value = getattr(comparison.base, field.name)
            if field.name not in UNSHARED and value != field.default:
                words += [option(field.name), str(value)]
        words += ["--rows", ",".join(comparison.rows), "--lrs", self.lrs, "--seeds", str(self.seeds)]
        words += ["--tuning-seeds", str(self.tuning_seeds), self.SHARE, str(comparison.held_out)]
        words += ["--widen", str(self.widen)] * (self.widen > 0)
        words += ["--run-dir", str(folder)]
        return shlex.join(words)


@options
class SharedTextConfig(TextConfig):
    """What all trainings of a comparison on text have in common."""

    optimizer: _Given[Optimizer] = "adamw"
    scheme: _Given[Scheme] = "auto"
    lr: _Given[float | None] = None
    tangent: _Given[Literal["on", "off"]] = "on"
    start: _Given[Start] = "uniform"
    seed: _Given[int] = 0
    validation: float = 0.1
    """The share of the training text on which rates are compared: the last part of every file."""


@options
class TextCompare(Compare):
    """Compare optimizers and manifolds of a GPT, each at its best learning rate."""

    instead: ClassVar[dict[str, str]] = {
        "--scheme": "--rows",
        "--lr": "--lrs",
        "--seed": "--seeds",
        "--optimizer": "--rows",
        "--tangent": "--rows, as in spel~tangent=off",
        "--start": "--rows, as in spel~start=nearest",
    }

    SHARE: ClassVar[str] = "--validation"

    config: Annotated[SharedTextConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(  # pyright: ignore
        default_factory=SharedTextConfig
    )
    rows: str = ",".join(TextKind.rows)
    """The rows, separated by commas: optimizers as `fgsgd train --task text` takes them, after which :scheme chooses
    other manifolds than the optimizer's own, and ~option=value changes an option: spel:heads~tangent=off."""
    lrs: str = "0.3,1,3"
    """The grid of learning rates, separated by commas, as multiples of each optimizer's own rate (0.05; 0.01 for adamw
    and on-manifolds; 3 for fgsgd); a single one is not tuned."""
    seeds: int = 3
    """Trainings of every row."""
    tuning_seeds: int = 1
    """Trainings of every row and rate of the grid."""
    held_out: _Given[float] = 0.1

    def _share(self) -> float:
        return self.config.validation
