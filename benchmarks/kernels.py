"""Projection and retraction by shape, beside other libraries and beside the floor.

The steps are of length 0.1 in the spectral norm (of one column for spheres), the largest that a group takes at a
learning rate of 0.1 after normalization by ζ. `copy` is one fused read, modification and write of the same arrays;
`products` are the four n·p² products of a Stiefel step alone.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from peers import Step, steps, violation
from record import Record
from timing import compared, medians, side_by_side

import fgsgd_jax as fg

CASES = {
    "64 × St(64, 16)": (fg.Stiefel(), (64, 64, 16)),
    "St(512, 128)": (fg.Stiefel(), (1, 512, 128)),
    "St(1024, 256)": (fg.Stiefel(), (1, 1024, 256)),
    "4,096 × St(9, 3)": (fg.Stiefel(), (4096, 9, 3)),
    "4,096 × St(3, 3)": (fg.Stiefel(), (4096, 3, 3)),
    "190,976 × St(3, 3)": (fg.Stiefel(), (190_976, 3, 3)),
    "4,096 × Sp(576)": (fg.Sphere(), (4096, 576, 1)),
    "Ob(576, 512)": (fg.Oblique(), (1, 576, 512)),
}
# The slices of a ResNet-110, which quick runs leave to the others.
LONG = ("190,976 × St(3, 3)",)
LENGTH = 0.1
# Quick runs leave the slower peers to the others.
BRIEF = ("fgsgd_jax", "copy", "products", "jnp.linalg.qr", "normalized by hand", "geoopt", "riemannax")
# Every violation is after steps in so many directions.
DIRECTIONS = 4


def measure(record: Record, cases=None) -> None:
    """A row for every step of every case: times, ratios to ours, and the violation after many steps."""
    cases = CASES if cases is None else cases
    repeats, seconds, count, patience = (9, 0.4, 50, 0.1) if record.quick else (51, 3.0, 1000, 0.6)
    if cases is CASES:
        why = "a quick run" if record.quick else "4,096 of them show it"
        record.left_out("all" if record.quick else LONG[0], "Muon's iteration, geojax, pymanopt", why)
    for case, (manifold, shape) in cases.items():
        if record.quick and case in LONG:
            record.left_out(case, "all", "a quick run")
        elif record.has_time(case) and record.has_memory(case, 40.0 * np.prod(shape)):
            with record.case(case):
                _measure(record, case, manifold, shape, repeats, seconds, count, patience)


def _measure(record, case, manifold, shape, repeats, seconds, count, patience):
    x, gs = _arguments(manifold, shape)
    made: dict[str, Step] = {}
    for name, make in steps(manifold, shape):
        if (record.quick or case in LONG) and name not in BRIEF:
            continue
        try:
            made[name] = make()
            jax.block_until_ready(made[name].run(made[name].give(x), made[name].give(gs[0])))
        except Exception as error:
            record.left_out(case, name, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}")
    given = {name: (step.give(x), step.give(gs[0])) for name, step in made.items()}
    programs = {name: lambda step=step, own=given[name]: step.run(*own) for name, step in made.items()}
    again: dict[str, list[float]] = {}
    found = side_by_side(programs, repeats, seconds, again)
    times = medians(found)
    for name, step in made.items():
        figures = compared(found, name, "ours", "fgsgd_jax")
        if name in again and "fgsgd_jax" in again:
            figures["repeated"] = compared(again, name, "ours", "fgsgd_jax")
        if not step.floor:
            most = (8 * patience if name == "fgsgd_jax" else patience) / times[name]
            figures |= _after(manifold, step, x, gs, int(max(3, min(count, most))))
        record.row(case, name, step.packages, **figures)


def _arguments(manifold, shape):
    """A point, and gradients whose tangent parts are of the length of a step."""
    rng = np.random.default_rng(0)
    # As one program each: operation by operation takes seconds to compile.
    x = np.asarray(jax.jit(lambda key: manifold.random_point(key, shape, jnp.float32))(jax.random.key(0)))
    project, gs = jax.jit(manifold.project), []
    for _ in range(DIRECTIONS):
        g = rng.standard_normal(shape, np.float32)
        v = np.asarray(project(x, g))
        if isinstance(manifold, fg.Oblique):
            length = np.linalg.norm(v, axis=-2, keepdims=True)
        elif isinstance(manifold, fg.Stiefel):
            length = np.linalg.norm(v, 2, axis=(-2, -1), keepdims=True)
        else:
            length = np.linalg.norm(v, axis=(-2, -1), keepdims=True)
        gs.append(LENGTH * g / length)
    return x, gs


def _after(manifold, step, x, gs, count):
    """How far from the manifold so many steps lead."""
    at, gs = step.give(x), [step.give(g) for g in gs]
    start = time.perf_counter()
    for index in range(count):
        # Waited for: steps in a queue each take new memory.
        at = jax.block_until_ready(step.run(at, gs[index % len(gs)]))
    at = step.take(at)
    return {"violation": violation(manifold, at), "steps": count, "seconds of steps": time.perf_counter() - start}
