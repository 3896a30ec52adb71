"""Which optimizers and wrappers of Optax run on manifolds: what is tried, and the table of what was found.

`python tests/compat.py` runs every optimizer alone and every wrapper with one of four, and writes
docs/compatibility.md; `--product` (`make compat`) runs every optimizer in every wrapper, in both dtypes. test_compat.py
has the same functions for cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import fgsgd_jax as fg

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "compatibility.md"
STEPS, LIMIT = 50, 1e-6

SCHEMES = {
    "Sphere": fg.Each(fg.Sphere()),
    "Oblique": fg.Each(fg.Oblique()),
    "Stiefel": fg.Each(fg.Stiefel()),
    "PIO mix": fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]),
}
DTYPES = ("float32", "bfloat16")

# --- what is tried

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    **{
        name: getattr(optax, name)
        for name in (
            *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad"),
            *("fromage", "lamb", "lars", "lbfgs", "lion", "nadam", "nadamw", "novograd", "optimistic_adam_v2"),
            *("optimistic_gradient_descent", "polyak_sgd", "radam", "rmsprop", "rprop", "sgd", "sign_sgd"),
            *("signum", "sm3", "yogi"),
        )
    },
    # Those that a rate alone does not make.
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=0),
    "optimistic_adam": lambda rate: optax.optimistic_adam(rate, optimism=rate),
    **{
        f"contrib.{name}": getattr(contrib, name)
        for name in (
            *("acprop", "ademamix", "adopt", "cocob", "dadapt_adamw", "dog", "dowg", "galore", "madgrad", "momo"),
            *("momo_adam", "muon", "prodigy", "schedule_free_adamw", "schedule_free_sgd", "simplified_ademamix"),
            "sophia",
        )
    },
    "contrib.dpsgd": lambda rate: contrib.dpsgd(rate, 1.0, 0.1, 0),
}
RATES = {"contrib.dog": 1.0, "contrib.dowg": 1.0, "contrib.cocob": 1.0, "contrib.prodigy": 1.0, "lars": 1.0}
FOUR = ("sgd", "adam", "rmsprop", "lion")

# What the functions below are handed: the optimizer's factory of a rate, and what puts it on the manifolds.
Factory = Callable[[Any], optax.GradientTransformation]
Wrap = Callable[[Factory, "Problem"], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """`around` has fg.on_manifolds innermost, `inside` outermost; `remedy` is what the document says."""

    around: Wrap | None = None
    inside: Wrap | None = None
    remedy: str = ""
    put: Callable[[Any], Any] = lambda params: params
    get: Callable[[Any], Any] = lambda params: params


def both(wrap: Callable[[optax.GradientTransformation, Problem], optax.GradientTransformation], **options) -> Wrapper:
    """A wrapper of one transformation, in both places."""
    return Wrapper(
        around=lambda make, problem: wrap(problem.on(make(RATE)), problem),
        inside=lambda make, problem: problem.on(wrap(make(RATE), problem)),
        **options,
    )


RATE = 0.02
INSIDE = "put it inside"
WRAPPERS: dict[str, Wrapper] = {
    "chain": both(lambda tx, _: optax.chain(optax.identity(), tx)),
    "named_chain": both(lambda tx, _: optax.named_chain(("only", tx))),
    "partition, multi_transform": Wrapper(
        around=lambda make, p: optax.partition(
            {"manifold": p.on(make(RATE)), "euclidean": make(RATE)}, p.plan.labels()
        ),
        inside=lambda make, p: p.on(
            optax.partition({"manifold": make(RATE), "euclidean": make(RATE)}, p.plan.labels())
        ),
    ),
    "masked": Wrapper(
        around=lambda make, p: optax.chain(
            optax.masked(p.on(make(RATE)), p.constrained()), optax.masked(make(RATE), p.plan.mask())
        ),
        inside=lambda make, p: p.on(
            optax.chain(optax.masked(make(RATE), p.constrained()), optax.masked(make(RATE), p.plan.mask()))
        ),
    ),
    "MultiSteps": both(lambda tx, _: optax.MultiSteps(tx, 4).gradient_transformation()),
    "inject_hyperparams": Wrapper(
        around=lambda make, p: optax.inject_hyperparams(lambda learning_rate: p.on(make(learning_rate)))(RATE),
        inside=lambda make, p: p.on(optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(RATE)),
    ),
    "apply_if_finite": both(lambda tx, _: optax.apply_if_finite(tx, 5)),
    "conditionally_mask": both(lambda tx, _: optax.conditionally_mask(tx, lambda step: step % 2 == 0)),
    "conditionally_transform": both(
        lambda tx, _: optax.conditionally_transform(tx, lambda step: step % 2 == 0),
        remedy=f"{INSIDE}, or take conditionally_mask: where it does not transform, gradients pass as they are",
    ),
    "flatten": both(lambda tx, _: optax.flatten(tx), remedy=f"{INSIDE}: around it weights have no shapes and names"),
    "freeze": both(lambda tx, p: optax.chain(tx, optax.freeze(p.first()))),
    "selective_transform": both(
        lambda tx, p: optax.selective_transform(tx, freeze_mask=p.first()),
        remedy=f"{INSIDE}, or take freeze: around it frozen weights are hidden from the plan",
    ),
    "schedule_free": both(
        lambda tx, _: contrib.schedule_free(tx, RATE),
        remedy=f"{INSIDE}: around it weights are averages; schedule_free_eval_params go through fg.nearest",
    ),
    "mechanize": both(lambda tx, _: contrib.mechanize(tx), remedy=f"{INSIDE}: around it displacements are scaled"),
    "lookahead": Wrapper(
        around=lambda make, p: optax.lookahead(p.on(make(RATE)), 5, 0.5),
        inside=lambda make, p: p.on(optax.lookahead(make(RATE), 5, 0.5)),
        remedy="keep the slow weights in the training loop and bring their average back with fg.nearest",
        put=optax.LookaheadParams.init_synced,
        get=lambda params: params.fast if isinstance(params, optax.LookaheadParams) else params,
    ),
    "sam": Wrapper(
        around=lambda make, p: contrib.sam(p.on(make(RATE)), p.on(optax.sgd(0.05))),
        inside=lambda make, p: p.on(contrib.sam(make(RATE), optax.sgd(0.05))),
        remedy="around it with fg.on_manifolds for both of its optimizers; it takes no value=",
    ),
    "ema (of updates)": both(
        lambda tx, _: optax.chain(tx, optax.ema(0.9)),
        remedy=f"{INSIDE}; averages of weights (optax.ema on them) go through fg.nearest",
    ),
    "apply_every": both(
        lambda tx, _: optax.chain(tx, optax.apply_every(3)),
        remedy=f"{INSIDE}, or take MultiSteps: displacements do not add up",
    ),
    "gradient clipping": both(lambda tx, _: optax.chain(optax.clip_by_global_norm(1.0), tx)),
    "reduce_on_plateau": both(
        lambda tx, _: optax.chain(tx, contrib.reduce_on_plateau(0.5, patience=1, atol=1e3)),
        remedy=f"{INSIDE}: behind it displacements are scaled",
    ),
    "split_real_and_imaginary": both(lambda tx, _: contrib.split_real_and_imaginary(tx)),
}
# Some take no extra arguments, whatever their type says.
NO_EXTRA = ("sam",)

# --- what is found

FEASIBLE, REFUSED, LEAVES = "yes", "refused", "leaves the manifolds"


class Problem:
    """A quadratic over one kernel for each scheme and a bias."""

    def __init__(self, schemes: tuple[str, ...] = tuple(SCHEMES)):
        shapes = {**dict.fromkeys(schemes, (3, 3, 2, 4)), "bias": (4,)}
        params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
        keys = jax.random.split(jax.random.key(0), len(shapes))
        self.goal = {path: jax.random.normal(key, x.shape) for key, (path, x) in zip(keys, params.items(), strict=True)}
        self.plan = fg.plan(params, [*((name, SCHEMES[name]) for name in schemes), ("*", None)])
        self.params = fg.initialize(jax.random.key(1), params, self.plan)
        self.schemes = schemes

    def on(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return fg.on_manifolds(tx, self.plan)

    def constrained(self) -> Any:
        return jax.tree.map(lambda free: not free, self.plan.mask())

    def first(self) -> Any:
        return {path: path == self.schemes[0] for path in self.params}

    def loss(self, params: Any, dtype: str = "float32") -> Any:
        # The weights that the model sees are rounded to `dtype`; those that the optimizer has are the master copy.
        squares = [jnp.square(x.astype(dtype) - self.goal[path].astype(dtype)) for path, x in params.items()]
        return sum(jnp.sum(square.astype(jnp.float32)) for square in squares) / 2


@functools.cache
def problem(schemes: tuple[str, ...] = tuple(SCHEMES)) -> Problem:
    return Problem(schemes)


def outcome(
    make: Callable[[Problem], optax.GradientTransformation],
    p: Problem,
    dtype: str = "float32",
    put: Callable[[Any], Any] = lambda params: params,
    get: Callable[[Any], Any] = lambda params: params,
    options: tuple[str, ...] = ("value", "grad", "value_fn"),
    examples: tuple[int, ...] = (),
) -> dict[str, str]:
    """For each scheme whether its kernel is feasible after 50 steps, refused, or off its manifold."""

    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(p.loss)(get(params), dtype)
        known = {"value": value, "grad": grads, "value_fn": p.loss, "obj_fn": p.loss}
        grads = jax.tree.map(lambda g: jnp.broadcast_to(g, (*examples, *g.shape)), grads)
        updates, state = tx.update(grads, state, params, **{name: known[name] for name in options})
        return optax.apply_updates(params, updates), state

    refusals = (ValueError, TypeError)
    try:
        tx = optax.with_extra_args_support(make(p))
        start = put(p.params)
        init = state = tx.init(start)
        params, compiled = start, jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
        for _ in range(STEPS):
            params, state = compiled(params, state)
        params = get(params)
        assert any(jnp.any(params[path] != p.params[path]) for path in params), "nothing moved"
        found = {path: float(value) for path, value in fg.violation(params, p.plan).items()}
        if max(found.values()) > LIMIT:
            # Outside jit the weights can be looked at, and what takes them off the manifolds is refused.
            params, state = start, init
            for _ in range(UNCOMPILED):
                params, state = step(params, state)
    except refusals as error:
        if "fg.on_manifolds" not in str(error):
            raise
        return dict.fromkeys(p.schemes, REFUSED)
    return {name: FEASIBLE if found[name] <= LIMIT else LEAVES for name in p.schemes}


# Lookahead and reduce_on_plateau need a few steps to show what they do.
UNCOMPILED = 8


def of_optimizer(name: str, dtype: str = "float32", schemes: tuple[str, ...] = tuple(SCHEMES)) -> dict[str, str]:
    """`outcome` of an optimizer inside fg.on_manifolds."""
    p, make = problem(schemes), OPTIMIZERS[name]
    # One gradient for every example, as it asks for.
    options = {"examples": (3,)} if name == "contrib.dpsgd" else {}
    if name == "contrib.sophia":
        options["options"] = ("obj_fn",)
    return outcome(lambda p: p.on(make(RATES.get(name, RATE))), p, dtype, **options)


def of_wrapper(name: str, place: str, optimizer: str, dtype: str = "float32") -> dict[str, str]:
    """`outcome` of a wrapper around fg.on_manifolds, or inside it around the optimizer."""
    wrapper, make = WRAPPERS[name], OPTIMIZERS[optimizer]
    wrap = wrapper.around if place == AROUND else wrapper.inside
    return outcome(
        lambda p: wrap(make, p),
        problem(),
        dtype,
        *((wrapper.put, wrapper.get) if place == AROUND else ()),
        options=()
        if name in NO_EXTRA
        else ("value", "grad", "value_fn")
        if optimizer != "contrib.sophia"
        else ("obj_fn",),
    )


AROUND, WITHIN = "around", "inside"


def together(found: list[str]) -> str:
    """One word for several cells that should agree; all of them where they do not."""
    return ", ".join(sorted(set(found)))


# --- the table

HEAD = """# What runs on manifolds

Generated by `tests/compat.py` (`make compat`), and checked by the tests: not written by hand. *yes* is feasible to 1e-6
after 50 steps of float32 weights, which the model sees as they are or rounded to bfloat16.
*refused* is an error that names the remedy; where it takes a look at the weights, it is one of steps that are not
compiled, and inside jit `fg.violation` tells. Inside
means `fg.on_manifolds(wrapper(optimizer), plan)`. *leaves the manifolds* is no error, anywhere: see the remedy.

"""
REMEDIES = {
    "contrib.dpsgd": "it takes gradients by example: optax.chain(contrib.differentially_private_aggregate(...), "
    "fg.on_manifolds(optax.sgd(...), plan))"
}


def read() -> dict[str, dict[str, str]]:
    """The published tables: rows by name, cells by column."""
    rows, columns = {}, []
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
            if cells[0] in ("optimizer", "wrapper"):
                columns = cells
            elif not cells[0].startswith("-"):
                rows[cells[0]] = dict(zip(columns, cells, strict=True))
    return rows


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write(product: bool) -> None:
    optimizers = []
    for name in sorted(OPTIMIZERS):
        found = [of_optimizer(name, dtype) for dtype in (DTYPES if product else DTYPES[:1])]
        cells = [together([by_scheme[scheme] for by_scheme in found]) for scheme in SCHEMES]
        optimizers.append([name, *cells, REMEDIES.get(name, "")])
        print(*optimizers[-1], flush=True)
    wrappers, usual = [], [name for name in sorted(OPTIMIZERS) if name not in REMEDIES]
    for number, (name, wrapper) in enumerate(WRAPPERS.items()):
        cells = []
        for place in (AROUND, WITHIN):
            runs = list(itertools.product(usual, DTYPES)) if product else [(FOUR[number % 4], DTYPES[number // 4 % 2])]
            found = []
            for run in runs:
                try:
                    found.extend(of_wrapper(name, place, *run).values())
                except Exception as error:
                    # Optax does not put every optimizer in every wrapper, with or without manifolds.
                    if run[0] in FOUR:
                        raise
                    print("Optax itself refuses", run[0], "in", name, error, flush=True)
            cells.append(together(found))
        wrappers.append([name, *cells, wrapper.remedy])
        print(*wrappers[-1], flush=True)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(
        HEAD
        + "## Optimizers: `fg.on_manifolds(optimizer, plan)`\n\n"
        + table(["optimizer", *SCHEMES, "remedy"], optimizers)
        + "\n## Wrappers: around `fg.on_manifolds(optimizer, plan)`, or inside it\n\n"
        + table(["wrapper", AROUND, WITHIN, "remedy"], wrappers)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--product", action="store_true")
    write(parser.parse_args().product)
