"""One training in a folder of its own: log, checkpoints, picture. `train` and `demo` are made of it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import fgsgd_jax as fg

from . import _processes as processes
from ._checkpoints import Checkpoints
from ._config import Data, TrainConfig
from ._data import data_difference
from ._errors import UsageError, resume_command
from ._fit import Report, fit
from ._log import MetricsLog, Record
from ._measures import Measurer
from ._picture import draw, draw_scales
from ._progress import ProgressDisplay
from ._schedules import CONSTANT
from ._state import Glance, TrainState
from ._tasks import AnyConfig, config_from_dict
from ._text import TextConfig
from ._trainer import Trainer
from ._versions import versions
from ._words import words_of

LOG, CHECKPOINTS, PICTURE, SCALES, SAMPLE = "metrics.jsonl", "checkpoints", "picture.png", "scales.png", "sample.txt"


class Result(NamedTuple):
    """A finished run."""

    folder: Path
    records: list[Record]
    state: TrainState
    sample: str | None = None
    """what a model of text wrote, with its prompt"""

    @property
    def picture(self) -> Path:
        return self.folder / PICTURE


def run(
    config: AnyConfig,
    folder: Path,
    *,
    trainer: Trainer | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    console: Console | None = None,
    line_every: int = 1,
    report_bounds: bool = False,
) -> Result:
    """Train to the end in a folder of its own.

    Args:
        config: the training's options.
        folder: where the log, the checkpoints and the picture go.
        trainer: of these options, to train again without compiling again; made where left out.
        resume: go on from the folder's last checkpoint. `config` may have more epochs, or steps of text, than the run
            had, where its rates do not depend on their number: it then ends as a run of so many.
        checkpoint_every: steps between checkpoints; an epoch where left out.
        console: where to show progress.
        line_every: print every so manieth epoch.
        report_bounds: log what `Measures.record` has of every epoch, as `bounds`.

    Returns:
        The log's lines and the last state.

    Raises:
        UsageError: the options are wrong; the folder holds another run, or none to resume; the training diverged.
    """
    config = config.check()
    console = console or Console()
    # First what is cheap to find wrong.
    if resume:
        refuse_other_options(folder, config)
    else:
        refuse_taken(folder)
        # Before any of the processes makes it a folder that is taken.
        processes.meet("new run")
    trainer = trainer or Trainer(config, config.load())
    if difference := config.difference(dataclasses.replace(trainer.config, seed=config.seed)):
        raise ValueError(f"the trainer has other options than the run: {difference}")
    log = MetricsLog(folder / LOG, writes=processes.is_first())
    if resume:
        _take_up(log, config, trainer.data)
    plan, state = trainer.plan_of(config.seed), trainer.start(config.seed)
    if not resume:
        header = {"config": config.to_dict(), "data": trainer.data.fingerprint(), "versions": versions()}
        _create(log, header)

    for line in config.about(trainer.data):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    report = _with_bounds(trainer, Measurer(trainer, state.params)) if report_bounds else trainer.report

    records: list[Record] = []
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    try:
        if resume:
            state = _restored(checkpoints, config, plan, state)
            records = _records_until(int(state.step), log, trainer)
            console.print(
                f"resuming the run in {folder} after step {int(state.step)} of {trainer.total_steps}",
                highlight=False,
                soft_wrap=True,
            )
        with ProgressDisplay(console, trainer, line_every) as display:
            observer = _Keeper(log, records, checkpoints, _about(config, plan), display, words_of(config).lap)
            state = fit(trainer, state, observer, checkpoint_every, report)
    finally:
        checkpoints.close()
    sample = trainer.task.sample(trainer.devices.own(state.params))
    if processes.is_first():
        draw({", ".join(config.names[1:]): records}, folder / PICTURE, words_of(config))
        if isinstance(config, TrainConfig) and config.lambda_ != "off":
            draw_scales(records, folder / SCALES)
        if sample is not None:
            (folder / SAMPLE).write_text(sample, encoding="utf-8")
    return Result(folder, records, state, sample)


def _with_bounds(trainer: Trainer, measurer: Measurer) -> Report:
    def report(state: TrainState, plan: fg.Plan | None) -> Record:
        return trainer.report(state, plan) | {"bounds": measurer(state, plan).record()}

    return report


def refuse_taken(folder: Path) -> None:
    """Never write over anything: a folder for a new run is empty, or not there yet."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"run directory {folder} is a file; give another --run-dir")
    # A run that was killed while it created its log left no more than the log's unfinished copy.
    if folder.exists() and any(entry.suffix != ".tmp" for entry in folder.iterdir()):
        raise UsageError(
            f"run directory {folder} already holds something: go on with that run by --resume "
            f"(`{resume_command(folder)}`), or give another --run-dir"
        )


def stored_config(folder: Path) -> AnyConfig:
    """The options of the run in this folder."""
    path = folder / LOG
    if not path.is_file():
        raise UsageError(f"run directory {folder} holds no run to resume; leave out --resume, or give its --run-dir")
    header, _ = MetricsLog(path).read()
    if not isinstance(header.get("config"), dict):
        raise UsageError(f"{path} does not begin with the options of a run")
    return config_from_dict(header["config"])


def refuse_other_options(folder: Path, config: AnyConfig) -> None:
    """A run goes on with the options that it began with, or for longer where that changes none of its steps."""
    before = stored_config(folder)
    if difference := config.of_length(before.length).difference(before):
        raise UsageError(f"the run in {folder} had other options: {difference}; give another --run-dir for a new run")
    unit = config.LENGTH
    if config.length < before.length:
        raise UsageError(
            f"--{unit} {config.length}: the run in {folder} is one of {before.length} {unit}; a run can be "
            "extended, not shortened: leave the option out, or give another --run-dir for a new run"
        )
    schedule = getattr(before, "schedule", None)
    if config.length > before.length and schedule != CONSTANT:
        raise UsageError(
            f"--{unit} {config.length}: the run in {folder} has --schedule {schedule}, drawn over "
            f"{before.length} {unit}, so a longer run has other rates from its first step; start it in another "
            f"--run-dir, and with --schedule {CONSTANT} if you may want to extend it"
        )
    if config.length > before.length and isinstance(before, TextConfig) and before.steps % before.report_every:
        raise UsageError(
            f"--steps {config.length}: the last line of the run in {folder} is of fewer steps than --report-every "
            f"{before.report_every}, and would be of more; start a longer run in another --run-dir"
        )


class _Keeper:
    """The observer that writes everything down."""

    def __init__(
        self,
        log: MetricsLog,
        records: list[Record],
        checkpoints: Checkpoints,
        about: dict[str, Any],
        display: ProgressDisplay,
        lap: str,
    ):
        self._lap = lap
        self._log, self._records, self._checkpoints = log, records, checkpoints
        self._about, self._display = about, display

    def progress(self, glance: Callable[[], Glance]) -> None:
        self._display.update(glance)

    def epoch(self, record: Record) -> None:
        self._log.append(record)
        self._records.append(record)
        self._display.epoch(record)
        if not math.isfinite(record["train"]["loss"]):
            raise UsageError(
                f"the loss is no longer a number in {self._lap} {record[self._lap]}: the training diverged; use a "
                "smaller --lr"
            )

    def checkpoint(self, step: int, state: TrainState) -> None:
        self._checkpoints.save(step, state, self._about)


def _take_up(log: MetricsLog, config: AnyConfig, data: Data) -> None:
    """Refuse other data, and write down how long the run is now to be."""
    header, records = log.read()
    if difference := data_difference(data.fingerprint(), header.get("data") or {}):
        raise UsageError(
            f"data {data.name!r} is not what it was when the run in {log.path.parent} began ({difference}); give that "
            "data, or another --run-dir"
        )
    if header["config"].get(config.LENGTH) != config.length:
        log.rewrite(header | {"config": config.to_dict()}, records)


def _records_until(step: int, log: MetricsLog, trainer: Trainer) -> list[Record]:
    records = log.truncate(step)
    # Every line is on the disk before the checkpoint that follows it.
    if len(records) != trainer.epochs_at(step):
        raise UsageError(
            f"{log.path} has {len(records)} epochs and the checkpoint {trainer.epochs_at(step)}: lines are "
            "missing or damaged; put them back, or give another --run-dir"
        )
    return records


def _create(log: MetricsLog, header: Record) -> None:
    folder = log.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.create(header)
    except OSError as error:
        raise UsageError(f"run directory {folder} cannot be written: {error.strerror or error}") from error


def _about(config: AnyConfig, plan: fg.Plan | None) -> dict[str, Any]:
    return {"config": config.to_dict(), "plan": None if plan is None else plan.to_json()}


def _restored(checkpoints: Checkpoints, config: AnyConfig, plan: fg.Plan | None, start: TrainState) -> TrainState:
    """The newest saved state; the first one where the run did not come to its first checkpoint."""
    step = checkpoints.latest()
    if step is None:
        return start
    about = checkpoints.about(step)
    saved = config_from_dict(about["config"])
    # Those of a run that was made longer since are shorter.
    if difference := config.difference(saved.of_length(config.length)):
        raise UsageError(f"checkpoint {step} belongs to a run of other options: {difference}")
    if difference := _plan_difference(plan, about["plan"]):
        raise UsageError(f"checkpoint {step} belongs to another plan: {difference}; it cannot be resumed with this one")
    return checkpoints.restore(step, start)


def _plan_difference(plan: fg.Plan | None, saved: str | None) -> str | None:
    if plan is None or saved is None:
        return None if plan is None and saved is None else "one of them constrains nothing"
    return plan.difference(fg.Plan.from_json(saved))
