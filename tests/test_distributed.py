"""`fgsgd train` in two processes of four fake devices each: they do what one does, and what is left if one is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
import orbax.checkpoint as ocp

pytestmark = pytest.mark.slow

TINY = ["--limit-train", "64", "--limit-test", "32", "--batch-size", "32", "--lr", "0.03"]
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
SECONDS = 400


def start(folder, *arguments, **environment):
    """One process of the training command; what it prints goes to a file."""
    command = [sys.executable, "-m", "fgsgd_jax.experiments", "train", "--run-dir", str(folder / "run")]
    with (folder / f"out{environment.get('JAX_PROCESS_ID', '')}").open("w") as out:
        return subprocess.Popen(
            [*command, *TINY, *arguments], env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT, text=True
        )


def start_two(folder, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = DEVICES | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(folder, *arguments, **shared, JAX_PROCESS_ID=number) for number in ("0", "1")]


def said(folder, number=""):
    return (folder / f"out{number}").read_text()


def finish(folder, processes, numbers):
    for process, number in zip(processes, numbers, strict=True):
        assert process.wait(SECONDS) == 0, said(folder, number)


def state(folder):
    """The last checkpoint's arrays, whatever devices they were on."""
    steps = (folder / "run" / "checkpoints").absolute()
    last = steps / str(max(int(entry.name) for entry in steps.iterdir())) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(last).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(last, ocp.args.PyTreeRestore(restore_args=as_numpy))


def records(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]


def test_two_processes_train_as_one_does(tmp_path):
    arguments = ("--epochs", "2", "--model", "resnet8", "--scheme", "po:sp+st", "--lambda", "epoch")
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir(), together.mkdir()
    finish(alone, [start(alone, *arguments)], [""])
    finish(together, start_two(together, *arguments), "01")

    # What is left is the order in which a batch is summed up.
    expected, found = state(alone), state(together)
    assert expected.keys() == found.keys()
    for name in expected:
        largest = np.max(np.abs(expected[name]), initial=0)
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5 * largest, err_msg=name)
    for one, two in zip(records(alone), records(together), strict=True):
        np.testing.assert_allclose(two["train"]["loss"], one["train"]["loss"], rtol=1e-4)
        assert two["violation"] < 1e-6
    assert (together / "run" / "picture.png").is_file()
    # One process shows progress and writes.
    assert "epoch 2/2" in said(together, 0)
    assert "epoch" not in said(together, 1)


@pytest.mark.parametrize("lost", [1, 0])
def test_the_loss_of_a_process_ends_the_other_and_the_run_resumes(lost, tmp_path):
    arguments = ("--epochs", "60", "--model", "plain8", "--scheme", "euc")
    processes = start_two(tmp_path, *arguments)
    deadline = time.monotonic() + SECONDS
    while "epoch  3/60" not in said(tmp_path, 0):
        assert time.monotonic() < deadline, said(tmp_path, 0)
        time.sleep(0.05)
    processes[lost].send_signal(signal.SIGKILL)
    processes[lost].wait()
    code, message = processes[1 - lost].wait(60), said(tmp_path, 1 - lost)
    assert code == 3
    assert message.splitlines()[-1].startswith("fgsgd: another process of this training ended; start all again with")
    assert "Traceback" not in message

    finish(tmp_path, start_two(tmp_path, *arguments, "--resume"), "01")
    resumed = re.search(r"resuming the run in \S+ after step (\d+) of 120", said(tmp_path, 0))
    assert resumed is not None
    assert int(resumed[1]) >= 4  # the checkpoint after the second epoch
    assert [record["epoch"] for record in records(tmp_path)] == list(range(1, 61))


def test_an_environment_that_makes_no_sense_is_one_line(tmp_path):
    process = start(tmp_path, JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="two", JAX_PROCESS_ID="0")
    assert process.wait(120) == 2
    assert said(tmp_path, 0) == "fgsgd: JAX_NUM_PROCESSES='two': give a whole number\n"
