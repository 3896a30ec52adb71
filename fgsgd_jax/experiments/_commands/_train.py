import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from .._config import Config, TrainConfig
from .._errors import UsageError, resume_command, unknown
from .._options import options
from .._processes import is_first, joined
from .._run import LOG, run, stored_config
from .._tasks import CONFIGS
from .._text import TextConfig
from ._command import Command, given


@options
class Train(Command):
    """Train a network on images, or with --task text a GPT."""

    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=TrainConfig)
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where log, checkpoints and picture are kept; runs/DATA-MODEL-SCHEME-SEED where left out."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the last checkpoint of the run directory. Options left out are those that the run began with; with a
    constant --schedule, --epochs may be more."""
    checkpoint_every: Annotated[int | None, tyro.conf.arg(metavar="STEPS")] = None
    """Steps between checkpoints; an epoch where left out."""
    report_bounds: tyro.conf.FlagCreatePairsOff[bool] = False
    """Log certificates, the Lipschitz bound and the generalization bounds after every epoch."""

    @classmethod
    def of(cls, options: Sequence[str]) -> type[Command]:
        """That of the task, which a run to be resumed knows itself."""
        task, folder = given(options, "--task"), given(options, "--run-dir")
        if task is None and folder is not None and "--resume" in options and (Path(folder) / LOG).is_file():
            task = stored_config(Path(folder)).task
        if task is not None and task not in CONFIGS:
            raise unknown("task", task, CONFIGS)
        return TextTrain if task == "text" else cls

    def defaults(self) -> "Train | None":
        """What options left out stand for, where that depends on those given: a resumed run keeps its own."""
        if not self.resume:
            return None
        folder = self.folder()
        stored: Config = stored_config(folder)
        if not isinstance(stored, type(self.config)):
            raise UsageError(f"the run in {folder} is of --task {stored.task}; leave --task out")
        return type(self)(config=stored, run_dir=folder)

    def folder(self) -> Path:
        """Where the run is kept."""
        if self.run_dir is not None:
            return self.run_dir
        parts = (*self.config.names, f"seed{self.config.seed}")
        return Path("runs") / re.sub(r"[^\w.+-]+", "-", "-".join(parts))

    def _what_now(self, folder: Path) -> list[str]:
        """How to go on with the run, where it has begun."""
        if not (folder / LOG).is_file():
            return []
        every = [] if self.checkpoint_every is None else ["--checkpoint-every", str(self.checkpoint_every)]
        command = " ".join([resume_command(folder), *every, *["--report-bounds"] * self.report_bounds])
        return [f"`{command}` goes on from the last checkpoint"]

    def run(self, console: Console) -> None:
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise UsageError(f"--checkpoint-every {self.checkpoint_every}: give a whole number of 1 or more")
        with joined():
            console.quiet |= not is_first()
            folder = self.folder()
            try:
                result = run(
                    self.config,
                    folder,
                    resume=self.resume,
                    checkpoint_every=self.checkpoint_every,
                    report_bounds=self.report_bounds,
                    console=console,
                )
            except KeyboardInterrupt as interruption:
                raise KeyboardInterrupt(*self._what_now(folder)) from interruption
        if result.sample is not None:
            console.print(f"\n{result.sample}\n", highlight=False, markup=False)
        test = result.records[-1]["test"]
        figures = f"test error {test['error']:.2f} %, loss {test['loss']:.4f}"
        console.print(f"{figures}; picture: {result.picture}", highlight=False, soft_wrap=True)


@options
class TextTrain(Train):
    """Train a small GPT on text, and print a sample of what it writes."""

    config: Annotated[TextConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(  # pyright: ignore
        default_factory=TextConfig
    )
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the last checkpoint of the run directory. Options left out are those that the run began with; with a
    constant --schedule, --steps may be more."""
    checkpoint_every: Annotated[int | None, tyro.conf.arg(metavar="STEPS")] = None
    """Steps between checkpoints; --report-every where left out."""
    report_bounds: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False
