"""Seconds of `fg.norms` and `fg.certify` on the 3×3 kernels of a ResNet-110, every slice a group.

Prints a table and writes JSON. The first call compiles; the others are what a training loop pays.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from timing import machine, medians, side_by_side

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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/bounds_speed.json"))
    options = parser.parse_args()
    params, plan = resnet110(jax.random.key(0))
    programs = {"norms": lambda: fg.norms(params, plan), "certify": lambda: fg.certify(params, plan).holds}
    first = {}
    for name, program in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(program())
        first[name] = time.perf_counter() - start
    seconds = side_by_side(programs, options.repeats)
    slices = sum(plan[path].num_groups for path in plan)
    figures = machine() | {"slices": slices, "first": first, "seconds": seconds}
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{slices} slices on {figures['device']}, seconds")
    for name, median in medians(seconds).items():
        print(f"  fg.{name:8} first {first[name]:.2f}, then {median:.3f}")


if __name__ == "__main__":
    main()
