"""Projection and retraction by shape, beside the floor and beside what one writes by hand.

For every batch of matrices: `fgsgd_jax`, the projection and default retraction of one manifold; `products`, the four
n·p² products that a Stiefel step consists of and nothing else; `copy`, one fused read, modification and write of the
same arrays; `qr`, the projection and `jnp.linalg.qr` with its signs fixed, as one writes it by hand. Prints a table and
writes JSON.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, ratio, side_by_side

import fgsgd_jax as fg

CASES = {
    "A: 64 × St(64, 16)": (fg.Stiefel(), (64, 64, 16)),
    "B: St(512, 128)": (fg.Stiefel(), (1, 512, 128)),
    "C: St(1024, 256)": (fg.Stiefel(), (1, 1024, 256)),
    "D: 4096 × St(9, 3)": (fg.Stiefel(), (4096, 9, 3)),
    "E: 4096 × St(3, 3)": (fg.Stiefel(), (4096, 3, 3)),
    "4096 spheres of 576": (fg.Sphere(), (4096, 576, 1)),
    "Oblique 576 × 512": (fg.Oblique(), (1, 576, 512)),
}
RATE = 0.01


def step(manifold, x, g):
    return manifold.retract(x, -RATE * manifold.project(x, g))


def by_hand(x, g):
    with jax.default_matmul_precision("highest"):
        a = jnp.swapaxes(x, -1, -2) @ g
        q, r = jnp.linalg.qr(x - RATE * (g - x @ ((a + jnp.swapaxes(a, -1, -2)) / 2)))
        return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def products(x, g):
    """As many products of the same sizes as a projection and one step of the iteration have."""
    with jax.default_matmul_precision("highest"):
        v = x @ (jnp.swapaxes(x, -1, -2) @ g)
        return v @ (jnp.swapaxes(v, -1, -2) @ v)


def copy(x, g):
    return x + RATE * g


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kernels.json"))
    options = parser.parse_args()
    found = {}
    print(
        f"{'ms, median':24}{'fgsgd_jax':>10}{'qr':>10}{'products':>10}{'copy':>10}   qr/ours  ours/products  ours/copy"
    )
    for name, (manifold, shape) in CASES.items():
        x = manifold.random_point(jax.random.key(0), shape, jnp.float32)
        g = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        functions = {"fgsgd_jax": lambda x, g, manifold=manifold: step(manifold, x, g), "copy": copy}
        if isinstance(manifold, fg.Stiefel):
            functions |= {"qr": by_hand, "products": products}
        compiled = {key: jax.jit(function).lower(x, g).compile() for key, function in functions.items()}
        seconds = side_by_side(
            {key: lambda program=program, x=x, g=g: program(x, g) for key, program in compiled.items()}, options.repeats
        )
        after = x
        for _ in range(1000):
            after = compiled["fgsgd_jax"](after, g)
        violation = float(jnp.max(manifold.violation(after)))
        ratios = {other: ratio(seconds, "fgsgd_jax", other) for other in functions if other != "fgsgd_jax"}
        found[name] = {"seconds": seconds, "ours over": ratios, "violation after 1000 steps": violation}
        times = medians(seconds)
        cells = "".join(
            f"{1e3 * times[key]:10.3f}" if key in times else f"{'—':>10}"
            for key in ("fgsgd_jax", "qr", "products", "copy")
        )
        shown = [
            f"{1 / ratios['qr']:.2f}" if "qr" in ratios else "—",
            *(f"{ratios[key]:.2f}" if key in ratios else "—" for key in ("products", "copy")),
        ]
        print(f"{name:24}{cells}{shown[0]:>10}{shown[1]:>15}{shown[2]:>11}   {violation:.0e}", flush=True)
    options.json.write_text(json.dumps(machine() | {"kernels": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
