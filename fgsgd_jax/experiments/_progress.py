import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ._state import Figures, Glance
from ._trainer import Trainer
from ._words import WORDS, Words, words_of

SECONDS_BETWEEN_GLANCES = 0.25


class ProgressDisplay:
    """A live bar in a terminal, and a line for the epochs in any case.

    The bar shows figures of the refresh before: they have been computed by then, so that nobody waits for them.
    """

    def __init__(self, console: Console, trainer: Trainer, line_every: int = 1):
        """Prepare the display.

        Args:
            console: where to.
            trainer: whose training is shown.
            line_every: print every so manieth epoch, and the last.
        """
        self._console, self._trainer, self._line_every = console, trainer, line_every
        self._words = words_of(trainer.config)
        self._epochs = trainer.epochs_at(trainer.total_steps)
        self._total = trainer.total_steps if self._words.lap == "step" else self._epochs
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(self._describe(0), total=trainer.total_steps, figures="compiling …")
        self._pending: Glance | None = None
        self._shown = 0.0

    def __enter__(self) -> "ProgressDisplay":
        constrained = self._trainer.plan_of(self._trainer.config.seed) is not None
        # On text only FG-SGD has line 6.
        normalizes = getattr(self._trainer.config, "optimizer", "fgsgd") == "fgsgd"
        for line in legend(constrained, self._words, normalizes):
            self._console.print(line, highlight=False, soft_wrap=True)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, glance: Callable[[], Glance]) -> None:
        """Show how things stood at the refresh before, if it is time to show anything."""
        now = time.monotonic()
        if self._bar.disable or now - self._shown < SECONDS_BETWEEN_GLANCES:
            return
        pending, self._pending = self._pending, glance()
        if pending is not None:
            self._show(int(pending.step), self._trainer.figures(pending))
        self._shown = now

    def epoch(self, record: dict[str, Any]) -> None:
        """Print an epoch's line."""
        number = record["epoch"]
        if number % self._line_every == 0 or number == self._epochs:
            self._console.print(epoch_line(record, self._total, self._words), highlight=False, soft_wrap=True)

    def _show(self, step: int, figures: Figures) -> None:
        text = f"loss {figures.loss:.3f} acc {100 - figures.error:.1f}%" + _constraints(figures._asdict())
        self._bar.update(self._task, completed=step, figures=text, description=self._describe(step))

    def _describe(self, step: int) -> str:
        lap = step if self._words.lap == "step" else min(step // self._trainer.steps_per_epoch + 1, self._epochs)
        return f"{self._words.lap} {_counted(lap, self._total)}"


def legend(constrained: bool, words: Words = WORDS["images"], normalizes: bool = True) -> list[str]:
    """What the epochs' lines say, in lines of at most 80 characters."""
    step = "|v|/s: longest step by radius"
    return (
        list(words.legend)
        + [
            "viol: largest distance from a manifold, as a share of its radius",
            f"ζ>1: share of the groups whose step ζ shortened; {step}" if normalizes else step,
        ]
        * constrained
    )


def epoch_line(record: dict[str, Any], total: int, words: Words = WORDS["images"]) -> str:
    """An epoch, of so many or of so many steps, in one line of at most 80 characters; loss and error are train/test."""
    train, test = record["train"], record["test"]
    return (
        f"{words.lap} {_counted(record[words.lap], total)}  loss {train['loss']:.3f}/{test['loss']:.3f}  "
        f"error {train['error']:.2f}/{test['error']:.2f}%"
        f"{_constraints(record)}"
    )


def _constraints(figures: Mapping[str, Any]) -> str:
    if figures.get("violation") is None:
        return ""
    violation, share, ratio = (figures[name] for name in ("violation", "zeta_share", "step_ratio"))
    # An optimizer without line 6 has no ζ.
    shortened = "" if share is None or math.isnan(share) else f" ζ>1 {100 * share:.0f}%"
    return f" viol {violation:.0e}{shortened} |v|/s {ratio:.2g}"


def _counted(number: int, total: int) -> str:
    return f"{number:{len(str(total))}}/{total}"
