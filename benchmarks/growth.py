"""How run time, compile time and program size grow: with the layers, with the slices, with the size of one matrix."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import steps
from record import Record
from timing import medians, ratio, side_by_side
from updates import MOMENTUM, RATE, SLICES, example

import fgsgd_jax as fg

LAYERS = (10, 50, 200)
SLICE_COUNTS = (10**3, 10**4, 10**5, 10**6, 10**7)
SIZES = tuple(2**power for power in range(3, 13))
QUICK = ((), (), (32, 128, 512))


def measure(record: Record, layers=None, slice_counts=None, sizes=None) -> None:
    """A row for every number of layers, number of slices and size."""
    usual = QUICK if record.quick else (LAYERS, SLICE_COUNTS, SIZES)
    if record.quick:
        record.left_out("growth", "all", "a quick run: only matrices up to 512×512")
    repeats, seconds = (7, 1.0) if record.quick else (21, 3.0)
    for count in usual[0] if layers is None else layers:
        shapes = {f"layer_{n:03}": (3, 3, 16, 16) for n in range(count)}
        if record.has_time(f"{count} layers"):
            with record.case(f"{count} layers"):
                _update(record, f"{count} layers", "layers", count, shapes, repeats, seconds)
    for size in usual[2] if sizes is None else sizes:
        case = f"St({size}, {size})"
        if record.has_time(case) and record.has_memory(case, 12 * 4.0 * size**2):
            with record.case(case):
                _matrix(record, case, size, repeats, seconds)
    for count in usual[1] if slice_counts is None else slice_counts:
        side = round(count**0.5)
        case = f"{side**2} slices"
        # Twenty arrays: weights, gradients, state, update, and what is computed in between.
        if record.has_time(case) and record.has_memory(case, 20 * 36.0 * count):
            with record.case(case):
                _update(record, case, "slices", side**2, {"layer": (3, 3, side, side)}, repeats, seconds)


def _update(record, case, axis, count, shapes, repeats, seconds):
    """FG-SGD under PIO on so many layers of 16×16 slices, or one layer of so many slices, beside `optax.sgd`."""
    params, grads, plan = example(shapes, SLICES)
    programs, figures = {}, {}
    for name, tx in {
        "fgsgd": fg.fgsgd(RATE, plan, momentum=MOMENTUM),
        "optax.sgd": optax.sgd(RATE, momentum=MOMENTUM),
    }.items():
        state = tx.init(params)
        start = time.perf_counter()
        lowered = jax.jit(tx.update).lower(grads, state, params)
        compiled = lowered.compile()
        figures[name] = {"compile": time.perf_counter() - start, "program": len(lowered.as_text())}
        programs[name] = lambda compiled=compiled, state=state: compiled(grads, state, params)
    found = side_by_side(programs, repeats, seconds)
    for name, median in medians(found).items():
        over = ratio(found, name, "optax.sgd")
        record.row(
            case,
            name,
            axis=axis,
            count=count,
            median=median,
            **{"over sgd": over},
            **figures[name],
            seconds=found[name],
        )


def _matrix(record, case, size, repeats, seconds):
    """One square matrix; the spectral norm of a Gaussian's skew part is about √(2n)."""
    stiefel, shape = fg.Stiefel(), (1, size, size)
    x = stiefel.random_point(jax.random.key(0), shape, jnp.float32)
    g = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32) * 0.1 / (2 * size) ** 0.5)
    wanted = ("fgsgd_jax", "products", "jnp.linalg.qr") if size <= 1024 else ("fgsgd_jax", "products")
    if size == 2048:
        record.left_out("St(2048, 2048) and larger", "jnp.linalg.qr", "would take minutes")
    programs = {}
    for name, make in steps(stiefel, shape):
        if name in wanted:
            step = make()
            programs[name] = lambda step=step: step.run(x, g)
    found = side_by_side(programs, repeats, seconds)
    for name, median in medians(found).items():
        over = ratio(found, name, "products")
        record.row(case, name, axis="size", count=size, median=median, **{"over products": over}, seconds=found[name])
