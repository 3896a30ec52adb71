"""Several processes that train one network: how they meet, and who writes."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from ._errors import LostProcessError, UsageError

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# JAX's own 100 seconds are long to wait for a process that died between two steps.
HEARTBEAT_TIMEOUT = 30

_LOST = "another process of this training ended; start all again with --resume to go on from the last checkpoint"


@contextmanager
def joined() -> Iterator[None]:
    """Within it, the devices of all processes that the environment names are one machine's.

    `JAX_COORDINATOR_ADDRESS` is host:port of the first process, `JAX_NUM_PROCESSES` their number and `JAX_PROCESS_ID`
    that of this one, from 0; the latter two can be left out where JAX finds them itself (Slurm, Open MPI, Kubernetes).
    Without the address there is one process.

    Raises:
        UsageError: the variables make no sense, or the others did not come.
        LostProcessError: another process ended while this one trained.
    """
    if COORDINATOR not in os.environ:
        yield
        return
    _fork()
    try:
        jax.distributed.initialize(
            os.environ[COORDINATOR],
            _number(COUNT),
            _number(NUMBER),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"no processes to train with ({str(error).strip().splitlines()[0]}): set {COORDINATOR}=HOST:PORT, "
            f"{COUNT} and, from 0, {NUMBER} for every one"
        ) from error
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise LostProcessError(f"{_LOST} ({str(error).strip().splitlines()[0]})") from error
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process writes: the log, the pictures and to the terminal."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Wait for the others to come here too."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _fork() -> None:
    """Go on in a child, and outlive it: JAX aborts the process that it runs in when it learns of another's end."""
    ours, parents = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parents)
        threading.Thread(target=_end_with, args=(ours,), daemon=True).start()
        return
    os.close(ours)
    # A terminal interrupts both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        raise LostProcessError(_LOST)
    sys.exit(code if code >= 0 else 128 - code)


def _end_with(pipe: int) -> None:
    """Wait for the parent's end, which closes its end of the pipe, and end too."""
    os.read(pipe, 1)
    os._exit(1)


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise UsageError(f"{name}={value!r}: give a whole number")
    return None if value is None else int(value)
