from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ._errors import UsageError
from ._state import TrainState

KEPT = 2


class Checkpoint(NamedTuple):
    """A saved state and what it belongs to."""

    state: TrainState
    about: dict[str, Any]


class Checkpoints:
    """The last two states of a run, saved by orbax.

    A checkpoint is written beside its final name and then renamed, so that whatever interrupts it leaves the older
    one whole. Saving is synchronous: the state's buffers are given away to the next step.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: TrainState, about: dict[str, Any]) -> None:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)),
            about=ocp.args.JsonSave(about),
        )
        self._manager.save(step, args=arguments, force=True)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says that it belongs to."""
        return self._restore(step, about=ocp.args.JsonRestore())["about"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at this step, in the structure and on the devices of `like`."""
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        saved = self._restore(step, state=ocp.args.StandardRestore(template))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in _named(like)])

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # A damaged checkpoint shows as any error of orbax, tensorstore or JSON.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"checkpoint {self.folder / str(step)} cannot be read ({reason}); remove that folder to resume from "
                "the one before it"
            ) from error


def _named(state: TrainState) -> dict[str, jax.Array]:
    """The state's leaves by path: a layout that does not depend on how optimizer states are nested or empty."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.asarray(leaf) for path, leaf in leaves}
