"""Seconds of `fg.norms` and `fg.certify` on the 3×3 kernels of a ResNet-110, every slice a group.

Prints a table and writes JSON. The first call compiles; the others are what a training loop pays.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import fgsgd_jax as fg


def resnet110(key):
    params, inputs = {}, 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(18):
            params[f"{stage}/{block}/0"] = jnp.zeros((3, 3, inputs, width))
            params[f"{stage}/{block}/1"] = jnp.zeros((3, 3, width, width))
            inputs = width
    plan = fg.plan(params, [("*", fg.Each(fg.Sphere()))])
    return fg.initialize(key, params, plan), plan


def seconds(function, repeats):
    """Of the first call, and the least of the others."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return {"first": times[0], "least": min(times[1:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/bounds.json"), help="where to write the figures")
    options = parser.parse_args()
    params, plan = resnet110(jax.random.key(0))
    figures = {
        "slices": sum(plan[path].num_groups for path in plan),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "norms": seconds(lambda: fg.norms(params, plan), options.repeats),
        "certify": seconds(lambda: fg.certify(params, plan).holds, options.repeats),
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{figures['slices']} slices on {figures['device']}, seconds")
    for name in ("norms", "certify"):
        print(f"  fg.{name:8} first {figures[name]['first']:.2f}, then {figures[name]['least']:.3f}")


if __name__ == "__main__":
    main()
