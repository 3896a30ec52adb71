"""What is killed or runs out of disk loses the steps since its last checkpoint, no more; and no file runs code."""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")

import fgsgd_jax as fg
from fgsgd_jax.experiments import MetricsLog, TrainConfig, UsageError
from fgsgd_jax.experiments._checkpoints import Checkpoints
from fgsgd_jax.experiments._state import Totals, TrainState

KILLED = Path(__file__).parent.parent / "tools" / "killed.py"


def trained(*command):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_fifty_kills_lose_nothing_that_was_saved(record_property):
    """Each assertion is in tools/killed.py: what a process resumes from, weights bit for bit, the log line by line."""
    figures = trained(sys.executable, str(KILLED), "kill", "50", "0")
    assert figures["kills"] == 50
    assert figures["most steps lost"] <= 3
    # Most struck while it trained or saved, not while it started.
    assert figures["before the first step"] <= 25
    record_property("kills survived", figures["kills"])
    record_property("steps repeated", figures["steps lost"])


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_the_new_checkpoint_only(tmp_path):
    unshare = shutil.which("unshare")
    mount = "mount -t tmpfs -o size=64m tmpfs"
    if (
        not unshare
        or subprocess.run([unshare, "-rm", "sh", "-c", f"{mount} {tmp_path}"], capture_output=True).returncode
    ):
        pytest.skip("no file system of a size can be mounted here")
    script = f'{mount} "$1" && exec "$2" "$3" full "$1/run"'
    found = trained(unshare, "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, str(KILLED))
    assert "No space left on device" in found["said"]
    assert "make room and go on by --resume: `fgsgd train --run-dir " in found["said"]
    assert found["exit"] == 0
    assert found["saved"]
    assert found["resumed"] == found["saved"][-1] < found["reached"]
    assert found["same weights"]
    assert found["same log"]


@pytest.fixture
def state():
    params = {"kernel": jnp.ones((3, 2), jnp.float32)}
    totals = Totals(jnp.int32(1), jnp.int32(2), jnp.float32(3), {})
    known = {
        "step": jnp.int32(3),
        "seed": jnp.uint32(0),
        "params": params,
        "stats": {},
        "opt_state": (),
        "totals": totals,
    }
    return TrainState(**dict.fromkeys(TrainState._fields, jnp.float32(0)) | known)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(state, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {"config": 1})
    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(UsageError, match=r"checkpoint .*6 cannot be written .*No space left.*--resume"):
            checkpoints.save(6, state, {"config": 1})
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.latest() == 3
    assert again.about(3) == {"config": 1}
    np.testing.assert_array_equal(again.restore(3, state).params["kernel"], state.params["kernel"])
    again.close()


def test_the_loss_of_another_process_while_saving_is_no_full_disk(state, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection closed by peer")

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager.save", lost)
        with pytest.raises(UsageError, match="cannot be written"):
            checkpoints.save(3, state, {})
        patched.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
            checkpoints.save(3, state, {})
    checkpoints.close()


def test_a_line_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.create({"config": {}})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"metrics\.jsonl cannot be written: No space left.*--resume"):
        log.append({"step": 1})
    with pytest.raises(OSError, match="No space left"):
        log.create({"config": {}})  # a new run, of which there is nothing to resume


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


# Of what orbax had begun to read when it met the damage.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_that_is_read_runs_code(state, tmp_path):
    """A payload in the place of every file of a checkpoint, in a log and in a plan."""
    trace = tmp_path / "trace"
    payload = pickle.dumps(Planted(trace))
    # The payload works.
    pickle.loads(payload).close()
    assert trace.exists()
    trace.unlink()

    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, {"config": TrainConfig().to_dict(), "plan": None})
    checkpoints.close()
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 3
    array = io.BytesIO()
    np.save(array, np.array([Planted(trace)], object), allow_pickle=True)
    for file in files:
        whole = file.read_bytes()
        for planted in (payload, array.getvalue(), json.dumps({"py/reduce": ["open", str(trace)]}).encode()):
            file.write_bytes(planted)
            try:
                checkpoints = Checkpoints(folder)
                checkpoints.about(3)
                checkpoints.restore(3, state)
            except UsageError:
                pass
            finally:
                checkpoints.close()
        file.write_bytes(whole)
        assert not trace.exists(), file

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes(payload)
    with pytest.raises(UsageError):
        log.read()
    with pytest.raises(ValueError):
        fg.Plan.from_json(payload.decode("latin-1"))
    plan = fg.plan({"k": jnp.zeros((3, 3, 2, 2))}, [("*", fg.Each(fg.Stiefel()))])
    for wild in ("__import__('os').system", "os.system", "Manifold", "builtins.open"):
        with pytest.raises(ValueError):
            fg.Plan.from_json(plan.to_json().replace("Stiefel", wild))
    assert not trace.exists()


def test_no_module_of_the_library_unpickles():
    """What could: pickle and its kin, NumPy's and pandas' readers of objects, eval, exec."""
    import re

    unsafe = re.compile(
        r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve|allow_pickle)\b|(?<![.\w])(eval|exec)\(|np\.load\b"
    )
    package = Path(fg.__file__).parent
    found = {file.name for file in package.rglob("*.py") if unsafe.search(file.read_text(encoding="utf-8"))}
    assert found == set()
