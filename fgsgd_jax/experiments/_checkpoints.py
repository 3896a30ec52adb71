import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ._errors import UsageError, resume_command
from ._paths import by_path
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
        # Every error is raised; what orbax's threads and tasks log besides are tracebacks.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: TrainState, about: dict[str, Any]) -> None:
        leaves = _named(state)
        sealed = {"about": about, "sha256": {"about": _digest(about), "state": _digest_of_state(leaves)}}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(sealed))
        try:
            self._manager.save(step, args=arguments, force=True)
        # A full disk shows as any error of orbax, tensorstore or the system.
        except Exception as error:
            # So does the loss of another process, of which there is more to say elsewhere.
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise
            raise UsageError(
                f"checkpoint {self.folder / str(step)} cannot be written ({_reason(error)}); the ones before it are "
                f"whole: make room and go on by --resume: `{resume_command(self.folder.parent)}`"
            ) from error

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says that it belongs to."""
        return self._sealed(step)["about"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at this step, in the structure and on the devices of `like`."""
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        saved = self._restore(step, state=ocp.args.StandardRestore(template))["state"]
        if self._sealed(step)["sha256"]["state"] != _digest_of_state(saved):
            raise self._unreadable(step, "its numbers are not those that were saved")
        return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in _named(like)])

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # A damaged checkpoint shows as any error of orbax, tensorstore or JSON.
        except Exception as error:
            raise self._unreadable(step, _reason(error)) from error

    def _sealed(self, step: int) -> dict[str, Any]:
        """What was saved beside the state, if it is whole."""
        sealed = self._restore(step, about=ocp.args.JsonRestore())["about"]
        try:
            whole = sealed["sha256"]["about"] == _digest(sealed["about"]) and isinstance(sealed["sha256"]["state"], str)
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise self._unreadable(step, "its description is not what was saved")
        return sealed

    def _unreadable(self, step: int, reason: str) -> UsageError:
        return UsageError(
            f"checkpoint {self.folder / str(step)} cannot be read ({reason}); remove that folder to resume from the "
            "one before it"
        )


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest_of_state(leaves: dict[str, jax.Array]) -> str:
    """Of every leaf's name, type and bytes: neither compression nor JSON notices every flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(leaves):
        leaf = np.asarray(leaves[name])
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _named(state: TrainState) -> dict[str, jax.Array]:
    """The state's leaves by path: a layout that does not depend on how optimizer states are nested or empty."""
    return {path: jnp.asarray(leaf) for path, leaf in by_path(state, ".").items()}
