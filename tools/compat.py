"""Which optimizers and wrappers of Optax run on manifolds: what is tried, and the table of what was found.

`python tools/compat.py` (`make compat`) runs every optimizer alone and in every wrapper, in both dtypes, and writes
docs/compatibility.md. What was found is kept in benchmarks/results/compat.json as it goes; interrupted, it goes on from
there. tests/test_compat.py runs a part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import fgsgd_jax as fg

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "compatibility.md"
FOUND = pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "compat.json"
STEPS, LIMIT = 50, 1e-6

SCHEMES = {
    "Sphere": fg.Each(fg.Sphere()),
    "Oblique": fg.Each(fg.Oblique()),
    "Stiefel": fg.Each(fg.Stiefel()),
    "PIO mix": fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]),
}
DTYPES = ("float32", "bfloat16")

# --- what is tried

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
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
    # Those that find their rate begin with one that can be seen in 50 steps.
    "contrib.dadapt_adamw": lambda rate: contrib.dadapt_adamw(rate, estim_lr0=1e-2),
    "contrib.dog": lambda rate: contrib.dog(rate, init_step=("heuristic", 1e-2)),
    "contrib.prodigy": lambda rate: contrib.prodigy(rate, estim_lr0=1e-2),
    **{
        f"contrib.{name}": getattr(contrib, name)
        for name in (
            *("acprop", "ademamix", "adopt", "cocob", "dowg", "galore", "madgrad", "momo"),
            *("momo_adam", "muon", "schedule_free_adamw", "schedule_free_sgd", "simplified_ademamix"),
            "sophia",
        )
    },
    "contrib.dpsgd": lambda rate: contrib.dpsgd(rate, 1.0, 0.1, 0),
    # Ours are on manifolds by themselves: a rate gives a function of the plan.
    "fg.spel": lambda rate: lambda plan: fg.spel(rate, plan),
    "fg.manifold_muon": lambda rate: lambda plan: fg.manifold_muon(rate, plan),
    "fg.hyperball": lambda rate: lambda plan: fg.hyperball(optax.adam(rate), plan, rate),
}
RATE = 0.02
# Where that would hardly move the weights in 50 steps.
RATES = {
    **dict.fromkeys(("adadelta", "contrib.cocob", "contrib.dadapt_adamw", "contrib.dog", "contrib.dowg"), 1.0),
    "contrib.prodigy": 1.0,
    "lars": 30.0,
}
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


INSIDE = "put it inside"
WRAPPERS: dict[str, Wrapper] = {
    "chain": both(lambda tx, _: optax.chain(optax.identity(), tx)),
    "named_chain": both(lambda tx, _: optax.named_chain(("only", tx))),
    "partition, multi_transform": Wrapper(
        around=lambda make, p: optax.partition(
            {"manifold": p.on(make(RATE)), "euclidean": p.off(make(RATE))}, p.plan.labels()
        ),
        inside=lambda make, p: p.on(
            optax.partition({"manifold": make(RATE), "euclidean": make(RATE)}, p.plan.labels())
        ),
    ),
    "masked": Wrapper(
        around=lambda make, p: optax.chain(
            optax.masked(p.on(make(RATE)), p.constrained()), optax.masked(p.off(make(RATE)), p.plan.mask())
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

    def __init__(self, schemes: tuple[str, ...] = tuple(SCHEMES), constraining: bool = True):
        shapes = {**dict.fromkeys(schemes, (3, 3, 2, 4)), "bias": (4,)}
        params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
        keys = jax.random.split(jax.random.key(0), len(shapes))
        self.goal = {path: jax.random.normal(key, x.shape) for key, (path, x) in zip(keys, params.items(), strict=True)}
        self.plan = fg.plan(params, [*((name, SCHEMES[name]) for name in schemes), ("*", None)])
        self.params = fg.initialize(jax.random.key(1), params, self.plan)
        self.schemes, self.constraining = schemes, constraining

    def on(self, tx: Any) -> optax.GradientTransformation:
        if not self.constraining:
            return self.off(tx)
        return tx(self.plan) if _takes_plan(tx) else fg.on_manifolds(tx, self.plan)

    def off(self, tx: Any) -> optax.GradientTransformation:
        """The optimizer without manifolds; of ours there is none, and SGD has its place."""
        return optax.sgd(RATE) if _takes_plan(tx) else tx

    def constrained(self) -> Any:
        return jax.tree.map(lambda free: not free, self.plan.mask())

    def first(self) -> Any:
        return {path: path == self.schemes[0] for path in self.params}

    def loss(self, params: Any, dtype: Any = 0) -> Any:
        """The loss with weights as the model sees them, rounded to DTYPES[dtype]; the optimizer has the master copy."""

        def rounded(dtype: str) -> Any:
            squares = [jnp.square(x.astype(dtype) - self.goal[path].astype(dtype)) for path, x in params.items()]
            return sum(jnp.sum(square.astype(jnp.float32)) for square in squares) / 2

        # Both, so that one program serves both.
        return jax.lax.select_n(jnp.asarray(dtype), *(rounded(name) for name in DTYPES))


def _takes_plan(tx: Any) -> bool:
    return not isinstance(tx, optax.GradientTransformation)


@functools.cache
def problem(schemes: tuple[str, ...] = tuple(SCHEMES), constraining: bool = True) -> Problem:
    return Problem(schemes, constraining)


def outcomes(
    make: Callable[[Problem], optax.GradientTransformation],
    p: Problem,
    dtypes: tuple[str, ...],
    put: Callable[[Any], Any] = lambda params: params,
    get: Callable[[Any], Any] = lambda params: params,
    options: tuple[str, ...] = ("value", "grad", "value_fn"),
    examples: tuple[int, ...] = (),
) -> dict[str, dict[str, str]]:
    """By dtype, for each scheme whether its kernel is feasible after 50 steps, refused, or off its manifold."""

    def step(params: Any, state: Any, dtype: Any) -> Any:
        loss = functools.partial(p.loss, dtype=dtype)
        value, grads = jax.value_and_grad(loss)(get(params))
        known = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
        grads = jax.tree.map(lambda g: jnp.broadcast_to(g, (*examples, *g.shape)), grads)
        updates, state = tx.update(grads, state, params, **{name: known[name] for name in options})
        return optax.apply_updates(params, updates), state

    def outcome(dtype: int) -> dict[str, str]:
        params, state = start, init
        for _ in range(STEPS):
            params, state = compiled(params, state, dtype)
        reached = get(params)
        assert any(jnp.any(reached[path] != p.params[path]) for path in reached), "nothing moved"
        found = {path: float(value) for path, value in fg.violation(reached, p.plan).items()}
        if max(found.values()) > LIMIT:
            # Outside jit the weights can be looked at, and what took them off the manifolds is refused.
            for _ in range(UNCOMPILED):
                params, state = step(params, state, dtype)
        return {name: FEASIBLE if found[name] <= LIMIT else LEAVES for name in p.schemes}

    def build() -> tuple[Any, Any, Any]:
        tx, start = optax.with_extra_args_support(make(p)), put(p.params)
        return tx, start, tx.init(start)

    refused = dict.fromkeys(p.schemes, REFUSED)
    built = unless_refused(build)
    if built is None:
        return dict.fromkeys(dtypes, refused)
    tx, start, init = built
    compiled = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
    return {dtype: unless_refused(outcome, DTYPES.index(dtype)) or refused for dtype in dtypes}


def unless_refused(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call; None where the library refuses it, with a remedy."""
    try:
        return call(*args)
    except (ValueError, TypeError) as error:
        if "fg.on_manifolds" not in str(error):
            raise
        return None


# Some call what is inside them not in every step.
UNCOMPILED = 4


def at_own_rate(optimizer: str) -> Factory:
    """The factory of an optimizer whose rate is that of RATES where it is given RATE."""
    return lambda rate: OPTIMIZERS[optimizer](rate * (RATES.get(optimizer, RATE) / RATE))


def of_optimizer(
    name: str, dtypes: tuple[str, ...] = DTYPES, schemes: tuple[str, ...] = tuple(SCHEMES)
) -> dict[str, dict[str, str]]:
    """`outcomes` of an optimizer inside fg.on_manifolds."""
    p = problem(schemes)
    # One gradient for every example, as it asks for.
    options = {"examples": (3,)} if name == "contrib.dpsgd" else {}
    if name == "contrib.sophia":
        options["options"] = ("obj_fn",)
    return outcomes(lambda p: p.on(at_own_rate(name)(RATE)), p, dtypes, **options)


def of_wrapper(
    name: str,
    place: str,
    optimizer: str,
    dtypes: tuple[str, ...] = DTYPES,
    constraining: bool = True,
    schemes: tuple[str, ...] = tuple(SCHEMES),
) -> dict[str, dict[str, str]]:
    """`outcomes` of a wrapper around fg.on_manifolds, or inside it around the optimizer."""
    wrapper, make = WRAPPERS[name], at_own_rate(optimizer)
    wrap = wrapper.around if place == AROUND else wrapper.inside
    return outcomes(
        lambda p: wrap(make, p),
        problem(schemes, constraining),
        dtypes,
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

`make compat` writes this page from `benchmarks/results/compat.json`, and the tests compare the two.

- *yes*: after 50 steps, float32 weights are within 1e-6 of their manifolds. The loss is computed from these weights,
  and in a second run from the same weights rounded to bfloat16.
- *refused*: an error names the remedy. Where the error depends on the weights, it is raised by steps outside jit, for
  weights off by more than 1e-5; inside jit, `fg.violation` shows them.
- *around* is `wrapper(fg.on_manifolds(optimizer, plan))`, *inside* is `fg.on_manifolds(wrapper(optimizer), plan)`.
  `fg.spel`, `fg.manifold_muon` and `fg.hyperball` take the plan themselves, so nothing can go inside them.

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


NO_WRAPPER = "none"


def runs() -> list[tuple[str, str]]:
    """Wrapper with its place, and optimizer; those of four first."""
    names = sorted(OPTIMIZERS, key=lambda name: (name not in FOUR, name))
    usual = [name for name in names if name not in REMEDIES]
    alone = [(NO_WRAPPER, name) for name in names]
    pairs = [(place, name, other) for other in usual for name in WRAPPERS for place in (AROUND, WITHIN)]
    return alone + [
        (f"{place} {name}", other) for place, name, other in pairs if place == AROUND or not other.startswith("fg.")
    ]


def run(wrapper: str, optimizer: str) -> dict[str, dict[str, str]] | str:
    """What is found; or why Optax itself, without manifolds, does not put this optimizer into this wrapper."""
    if wrapper == NO_WRAPPER:
        return of_optimizer(optimizer)
    place, name = wrapper.split(" ", 1)
    try:
        return of_wrapper(name, place, optimizer)
    except Exception as error:
        try:
            of_wrapper(name, place, optimizer, constraining=False)
        except type(error) as theirs:
            return f"{type(theirs).__name__}: {str(theirs).splitlines()[0][:100]}"
        raise


def find(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What is found by every run that `path` does not have, and what it has."""
    known = json.loads(path.read_text()) if path.exists() else {}
    versions = {"jax": jax.__version__, "optax": optax.__version__}
    if known.setdefault("versions", versions) != versions:
        raise SystemExit(f"{path} was found with {known['versions']}, these are {versions}: delete it to start again")
    for number, (wrapper, optimizer) in enumerate(runs(), start=1):
        row = known.setdefault(wrapper, {})
        if optimizer not in row:
            row[optimizer] = run(wrapper, optimizer)
            print(f"{number} of {len(runs())}: {optimizer}, {wrapper}: {row[optimizer]}", flush=True)
            if number % 100 == 0:
                # Thousands of programs would fill the memory.
                jax.clear_caches()
            path.with_suffix(".new").write_text(json.dumps(known, indent=1) + "\n")
            os.replace(path.with_suffix(".new"), path)
    return known


def document(known: dict[str, dict[str, Any]]) -> str:
    """The page, of what was found so far."""
    done = [(wrapper, other, known[wrapper][other]) for wrapper, other in runs() if other in known.get(wrapper, {})]
    optimizers = []
    for name in sorted(OPTIMIZERS):
        cells = [together([by_scheme[scheme] for by_scheme in known[NO_WRAPPER][name].values()]) for scheme in SCHEMES]
        optimizers.append([name, *cells, REMEDIES.get(name, "")])
    wrappers = []
    for name, wrapper in WRAPPERS.items():
        cells = []
        for place in (AROUND, WITHIN):
            row = [found for key, _, found in done if key == f"{place} {name}" and not isinstance(found, str)]
            every = [cell for by_dtype in row for by_scheme in by_dtype.values() for cell in by_scheme.values()]
            cells.append(together(every))
        wrappers.append([name, *cells, wrapper.remedy])
    impossible: dict[tuple[str, str], list[str]] = {}
    for wrapper, other, found in done:
        if isinstance(found, str):
            name = wrapper.split(" ", 1)[1]
            others = impossible.setdefault((name, found), [])
            others += [] if other in others else [other]
    return (
        HEAD
        + f"{len(done)} of {len(runs())} runs of every optimizer in every wrapper were made, with "
        + ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        + ".\n\n## Optimizers: `fg.on_manifolds(optimizer, plan)`\n\n"
        + table(["optimizer", *SCHEMES, "remedy"], optimizers)
        + "\n## Wrappers: around `fg.on_manifolds(optimizer, plan)`, or inside it\n\n"
        + table(["wrapper", AROUND, WITHIN, "remedy"], wrappers)
        + ("\n## What Optax itself does not run, with or without manifolds\n\n" if impossible else "")
        + "".join(
            f"- `{name}` with {', '.join(f'`{other}`' for other in others)}: `{said}`\n"
            for (name, said), others in impossible.items()
        )
    )


if __name__ == "__main__":
    DOCUMENT.write_text(document(find(FOUND)))
