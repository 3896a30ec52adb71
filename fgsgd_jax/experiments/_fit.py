import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax

import fgsgd_jax as fg

from ._state import Glance, TrainState
from ._trainer import Trainer

Report = Callable[[TrainState, fg.Plan | None], dict[str, Any]]


@runtime_checkable
class Observer(Protocol):
    """What a training tells while it runs."""

    def progress(self, glance: Callable[[], Glance]) -> None:
        """After every call of the device, with what gives the state's figures. Must not wait for the device."""

    def epoch(self, record: dict[str, Any]) -> None:
        """After every epoch, with its line for the log."""

    def checkpoint(self, step: int, state: TrainState) -> None:
        """Where the state is to be saved."""


def fit(
    trainer: Trainer,
    state: TrainState,
    observer: Observer,
    checkpoint_every: int | None = None,
    report: Report | None = None,
) -> TrainState:
    """Train to the last epoch, from wherever the state stands.

    Args:
        trainer: what to train.
        state: from `trainer.start`, or a saved one. Its buffers are given away.
        observer: is told of progress, epochs and checkpoints.
        checkpoint_every: steps between checkpoints; an epoch where left out. The last step is one in any case.
        report: what makes an epoch's line for the log; `trainer.report` where left out.

    Returns:
        The state after the last step.
    """
    every = checkpoint_every or trainer.steps_per_epoch
    step, plan = int(state.step), trainer.plan_of(int(state.seed))
    mark = trainer.mark(state)
    while step < trainer.total_steps:
        began, first = time.perf_counter(), step
        end = min((step // trainer.steps_per_epoch + 1) * trainer.steps_per_epoch, trainer.total_steps)
        order = trainer.order(state)
        while step < end:
            next_checkpoint = (step // every + 1) * every
            count = min(end, next_checkpoint, step + trainer.steps_per_call) - step
            state = trainer.advance(state, order, count)
            step += count
            # One call ahead of the device keeps it busy; any further, and progress would tell of the future.
            mark.block_until_ready()
            mark = trainer.mark(state)
            observer.progress(partial(trainer.glance, state, plan))
            if step % every == 0 and step < end:
                observer.checkpoint(step, state)
        jax.block_until_ready(state)
        trained = time.perf_counter()
        record = (report or trainer.report)(state, plan)
        tested = time.perf_counter()
        timing = {
            "train": trained - began,
            "test": tested - trained,
            "step": (trained - began) / (end - first),
        }
        # The log's line comes first, so that no checkpoint is ahead of the log.
        observer.epoch(record | {"seconds": timing})
        if step % every == 0 or step == trainer.total_steps:
            observer.checkpoint(step, state)
    return state
