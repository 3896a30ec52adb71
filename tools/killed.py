"""Trainings that are killed at random moments or run out of disk: run by test_hard_restarts.py, in its own process.

`killed.py kill COUNT SEED` or `killed.py full FOLDER`; prints one JSON object. A training is a process forked from one
that has imported everything, with a compilation cache on the disk: a restart takes seconds.
"""

import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

EVERY = 3
STEPS_PER_EPOCH, EPOCHS = 4, 12
# Seconds from the first step of a process to its end, at most: a few checkpoints. The start takes two to six.
PATIENCE = 1.2
PAGE = 4096
PRELOADED = [
    "fgsgd_jax.experiments._run",
    "fgsgd_jax.experiments._models._nnx_resnet",
    "sklearn.datasets",
    "matplotlib.pyplot",
    "orbax.checkpoint",
]


def tiny(num_classes, channels):
    """Three convolutions, so narrow that a step takes milliseconds."""
    from fgsgd_jax.experiments._models import _nnx_resnet
    from fgsgd_jax.experiments._models._shapes import CifarShape

    shape = CifarShape(blocks=1, widths=(4,))
    return _nnx_resnet.functional(lambda rngs: _nnx_resnet.PlainNet(shape, num_classes, channels, rngs), channels)


def train(folder, cache, said, resume):
    """One process of a training; says what it does through a pipe."""
    import jax
    import numpy as np
    from rich.console import Console

    from fgsgd_jax.experiments import TrainConfig, Trainer, UsageError, _run
    from fgsgd_jax.experiments._models import REGISTRY

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    REGISTRY["tiny"] = tiny
    fit, advance = _run.fit, Trainer.advance

    def beginning(trainer, state, *arguments, **options):
        said.send(("begin", int(state.step)))
        return fit(trainer, state, *arguments, **options)

    def advancing(self, state, *arguments):
        state = advance(self, state, *arguments)
        said.send(("step", int(state.step)))
        return state

    _run.fit, Trainer.advance = beginning, advancing
    config = TrainConfig(
        model="tiny", epochs=EPOCHS, batch_size=16, limit_train=16 * STEPS_PER_EPOCH, limit_test=16, lr=0.05
    )
    try:
        result = _run.run(
            config, Path(folder), resume=resume, checkpoint_every=EVERY, console=Console(file=io.StringIO())
        )
    except UsageError as error:
        said.send(("refused", str(error)))
        return
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(result.state):
        digest.update(np.asarray(leaf).tobytes())
    said.send(("end", digest.hexdigest()))


class Training:
    """A process that trains, and what it has said so far."""

    def __init__(self, context, folder, cache):
        self._said, theirs = context.Pipe(duplex=False)
        resume = (Path(folder) / "metrics.jsonl").exists()
        self.process = context.Process(target=train, args=(str(folder), str(cache), theirs, resume))
        self.process.start()
        theirs.close()
        self.heard = {}

    def listen(self, seconds=None, until=()):
        """Hear what is said for so long, or until something is."""
        end = None if seconds is None else time.monotonic() + seconds
        while not any(word in self.heard for word in until):
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                if not self._said.poll(left):
                    return
                word, value = self._said.recv()
            except (EOFError, OSError):
                self.process.join()
                return
            self.heard[word] = value

    def kill(self):
        self.process.kill()
        self.process.join()
        self.listen()


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def saved(folder):
    """Steps of the checkpoints that bear their final names."""
    found = folder / "checkpoints"
    return sorted(int(entry.name) for entry in found.iterdir() if entry.name.isdigit()) if found.is_dir() else []


def kill_often(context, root, count, seed):
    draw = random.Random(seed)
    whole = Training(context, root / "whole", root / "cache")
    whole.listen()
    expected, log = whole.heard["end"], log_of(root / "whole")

    figures = {"kills": 0, "runs": 0, "before the first step": 0, "steps lost": 0, "most steps lost": 0}
    folder = None
    while figures["kills"] < count:
        if folder is None:
            folder = root / f"run {figures['runs']}"
            figures["runs"] += 1
            reached = 0
        training = Training(context, folder, root / "cache")
        if draw.random() < 0.2:
            training.listen(draw.uniform(0, 5), until=["end", "refused"])  # while it starts
        else:
            training.listen(until=["step", "end", "refused"])
            training.listen(draw.uniform(0, PATIENCE), until=["end", "refused"])
        if "end" not in training.heard:
            training.kill()
        heard = training.heard
        assert "refused" not in heard, heard["refused"]
        if "begin" in heard:
            lost = reached - heard["begin"]
            assert heard["begin"] % EVERY == 0 or heard["begin"] == STEPS_PER_EPOCH * EPOCHS
            assert 0 <= lost <= EVERY, f"{lost} steps lost"
            figures["steps lost"] += lost
            figures["most steps lost"] = max(figures["most steps lost"], lost)
        reached = max(reached, heard.get("step", 0))
        if "end" in heard:
            training.process.join()
            assert heard["end"] == expected, "other weights"
            assert log_of(folder) == log, "another log"
            folder = None
        else:
            assert training.process.exitcode == -signal.SIGKILL, training.process.exitcode
            figures["kills"] += 1
            figures["before the first step"] += "begin" not in heard
    # The last one too comes to its end.
    if folder is not None:
        training = Training(context, folder, root / "cache")
        training.listen()
        assert training.heard["end"] == expected, "other weights"
        assert log_of(folder) == log, "another log"
    return figures


def fill(context, root, folder):
    """Trains into a folder on a disk that is too small, makes room, and goes on."""
    whole = Training(context, root / "whole", root / "cache")
    whole.listen()
    # Room for the two checkpoints that are kept and a quarter of the next, by pages as a disk gives them.
    sizes = [file.stat().st_size for file in (root / "whole" / "checkpoints").rglob("*") if file.is_file()]
    room = int(1.125 * sum(-(-size // PAGE) * PAGE for size in sizes))
    disk, ballast = os.statvfs(folder.parent), folder.parent / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - room)
    training = Training(context, folder, root / "cache")
    training.listen()
    heard = training.heard
    found = {"said": heard.get("refused"), "exit": training.process.exitcode, "reached": heard.get("step")}
    found["saved"] = saved(folder)
    ballast.unlink()
    training = Training(context, folder, root / "cache")
    training.listen()
    return found | {
        "resumed": training.heard.get("begin"),
        "same weights": training.heard.get("end") == whole.heard["end"],
        "same log": log_of(folder) == log_of(root / "whole"),
    }


def main():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as root:
        if sys.argv[1] == "kill":
            figures = kill_often(context, Path(root), int(sys.argv[2]), int(sys.argv[3]))
        else:
            figures = fill(context, Path(root), Path(sys.argv[2]))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
