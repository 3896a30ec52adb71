"""Why the training step of a deep residual network is slow on CPU: its time by operation, from a trace of one step.

XLA fuses the sums along the shortcuts into every transposition that reads one, in the backward pass, so that within a
stage each block's fusion reads the branches of all before it. Prints, and writes to JSON, the time of these fusions,
the time of all operations, and how many fusions have how many operands in the compiled program.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import collections
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
from steps import Arm, images
from timing import machine, pin

from fgsgd_jax.experiments._config import TrainConfig

FUSION = "transpose_copy_fusion"


def measure(model: str, batch: int) -> dict:
    arm = Arm(TrainConfig(model=model, batch_size=batch, augment="none", scheme="euc"), images(32 * batch))
    arm.steps = 1
    jax.block_until_ready(arm())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(arm())
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    trainer = arm.trainer
    program = jax.jit(trainer._one_step).lower(arm.state, arm.order, trainer.train_data).compile().as_text()
    operands = collections.Counter(
        inputs.count("%") for inputs in re.findall(rf"%{FUSION}[\w.]* = [^\n]*? fusion\(([^)]*)\), kind", program)
    )
    # An operation's events carry its name in the program; others are Python's and the runtime's.
    times = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            times[re.sub(r"[.\d]+$", "", event["name"])] += event["dur"] / 1e3
    return {
        "model": model,
        "batch": batch,
        "milliseconds of these fusions": times[FUSION],
        "milliseconds of all operations": sum(times.values()),
        "fusions by number of operands": {str(count): operands[count] for count in sorted(operands)},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=("resnet20", "resnet110"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/step_trace.json"))
    options = parser.parse_args()
    pin(1)
    rows = [measure(model, options.batch) for model in options.models]
    for row in rows:
        print(json.dumps(row))
    options.json.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
