"""Whole updates of whole networks: FG-SGD beside Optax's own optimizers and beside other libraries'.

What is timed is `tx.update` alone, compiled, on gradients at hand. The memory is that of a step of user's code, update
and `optax.apply_updates` in one program that may reuse the buffers of weights and state.
"""

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
from peers import on_torch, violation
from record import Record
from timing import compared, ratio, side_by_side

import fgsgd_jax as fg

Shapes = dict[str, tuple[int, ...]]

RATE, MOMENTUM = 0.1, 0.9
SLICES = [("*", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()]))]
FILTERS = [("*", fg.Whole(fg.Stiefel(), view="h w i o -> 1 1 (h w i) o"))]
# Attention's projections from the stream by heads, and back to it by heads; the other weights are plain.
HEADS = [
    ("*/qkv", fg.Whole(fg.Stiefel(), view="i (t h d) -> 1 (t h) i d", t=3, h=12)),
    ("*/proj", fg.Whole(fg.Stiefel(), view="(h d) o -> 1 h d o", h=12)),
    ("*", None),
]
MATRICES = [(f"*/{name}", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")) for name in ("qkv", "proj", "up", "down")]
MATRICES += [("*", None)]


@dataclass(frozen=True)
class Network:
    shapes: Shapes
    # The plan's rules, by the name of the row.
    rules: Mapping[str, list]
    # Whether other libraries' optimizers are measured too.
    others: bool = False
    # Whether the whole step is compiled too, to see its memory.
    memory: bool = True


def cifar_resnet(depth: int) -> Shapes:
    """The convolutions of He et al. (2016), section 4.2; shortcuts without weights."""
    shapes, inputs = {"stem": (3, 3, 3, 16)}, 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            shapes[f"{stage}/{block}/0"] = (3, 3, inputs, width)
            shapes[f"{stage}/{block}/1"] = (3, 3, width, width)
            inputs = width
    return shapes


def imagenet_resnet(blocks: tuple[int, ...]) -> Shapes:
    """The convolutions of He et al. (2016), table 1, with bottlenecks."""
    shapes, inputs = {"stem": (7, 7, 3, 64)}, 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
        for block in range(count):
            shapes[f"{stage}/{block}/0"] = (1, 1, inputs, width)
            shapes[f"{stage}/{block}/1"] = (3, 3, width, width)
            shapes[f"{stage}/{block}/2"] = (1, 1, width, 4 * width)
            if block == 0:
                shapes[f"{stage}/{block}/shortcut"] = (1, 1, inputs, 4 * width)
            inputs = 4 * width
    return shapes


def gpt2(layers: int, vocabulary: int = 50257, positions: int = 1024, width: int = 768) -> Shapes:
    """The weights of GPT-2 small; its biases and normalizations, 0.1 % of them, left out."""
    shapes = {"tokens": (vocabulary, width), "positions": (positions, width)}
    for layer in range(layers):
        sizes = {"qkv": 3 * width, "proj": width, "up": 4 * width}
        shapes |= {f"{layer}/{name}": (width, size) for name, size in sizes.items()}
        shapes[f"{layer}/down"] = (4 * width, width)
    return shapes


PIO, STIEFEL = "fgsgd, PIO(Sp+Ob+St)", "fgsgd, Stiefel by filters"
GPT = {"fgsgd, Stiefel by matrices": MATRICES, "fgsgd, Stiefel by heads": HEADS}
# The longest last, since no case begins when the time has run out.
NETWORKS = {
    "ResNet-110": Network(cifar_resnet(110), {PIO: SLICES}, others=True),
    "ResNet-50": Network(imagenet_resnet((3, 4, 6, 3)), {STIEFEL: FILTERS}),
    "ResNet-20": Network(cifar_resnet(20), {PIO: SLICES}, memory=False),
    "ResNet-56": Network(cifar_resnet(56), {PIO: SLICES}, memory=False),
    "GPT-2 small": Network(gpt2(12), GPT),
}
QUICK = {
    "ResNet-8": Network(cifar_resnet(8), {PIO: SLICES}, memory=False),
    "GPT-2 small, attention of one layer": Network(
        {path: shape for path, shape in gpt2(1).items() if path in ("0/qkv", "0/proj")},
        {name: [rule for rule in rules if rule[0] in ("*/qkv", "*/proj")] for name, rules in GPT.items()},
        memory=False,
    ),
    "ResNet-50, one block of width 256": Network(
        {path: shape for path, shape in imagenet_resnet((3, 4, 6, 3)).items() if path.startswith("2/1/")},
        {STIEFEL: FILTERS},
    ),
}


def measure(record: Record, networks=None) -> None:
    """A row for every optimizer of every network."""
    networks = networks or (QUICK if record.quick else NETWORKS)
    if networks is QUICK:
        for left in NETWORKS:
            record.left_out(left, "all", "a quick run: fewer layers of the same widths, if any")
        record.left_out("all", "geoopt, riemannax", "a quick run: imports take seconds, and the kernels have both")
    repeats, seconds, patience = (7, 1.5, 0.5) if record.quick else (31, 10.0, 3.0)
    for case, network in networks.items():
        weights = sum(4 * np.prod(shape) for shape in network.shapes.values())
        # The weights, gradients, four states, their updates, and room to work in.
        if record.has_time(case) and record.has_memory(case, 16.0 * weights):
            with record.case(case):
                _measure(record, case, network, repeats, seconds, patience)


def example(shapes: Shapes, rules) -> tuple[dict[str, jax.Array], dict[str, jax.Array], fg.Plan]:
    """Weights on their manifolds, gradients, and the plan.

    Where the plan has no groups to draw, layers of one shape begin alike: time does not depend on it.
    """
    zeros = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    rng = np.random.default_rng(0)
    grads = {path: jnp.asarray(0.01 * rng.standard_normal(x.shape, np.float32)) for path, x in zeros.items()}
    plan = fg.plan(zeros, rules)
    if any(np.unique(each.group).size > 1 and each.scheme != "Whole" for each in plan.collections.values()):
        return fg.initialize(jax.random.key(0), zeros, plan), grads, plan
    kinds: dict[Any, str] = {}
    alike = {path: kinds.setdefault((shape, path.split("/")[-1]), path) for path, shape in shapes.items()}
    first = {path: zeros[path] for path in kinds.values()}
    drawn = fg.initialize(jax.random.key(0), first, fg.plan(first, rules))
    return {path: jnp.array(drawn[one]) for path, one in alike.items()}, grads, plan


def _measure(record, case, network, repeats, seconds, patience):
    examples = {name: example(network.shapes, rules) for name, rules in network.rules.items()}
    params, grads, _ = next(iter(examples.values()))
    arguments = {
        name: (own, plan, fg.fgsgd(RATE, plan, momentum=MOMENTUM)) for name, (own, _, plan) in examples.items()
    }
    arguments |= {
        "optax.sgd": (params, None, optax.sgd(RATE, momentum=MOMENTUM)),
        "optax.adamw": (params, None, optax.adamw(1e-3)),
        "optax.contrib.muon": (params, None, optax.contrib.muon(1e-3, muon_weight_dimension_numbers=_as_matrices)),
    }
    programs, figures, compiled = {}, {}, {}
    for name, (own, _, tx) in arguments.items():
        state = tx.init(own)
        compiled[name], figures[name] = _compiled(tx, grads, state, own, network.memory)
        programs[name] = lambda program=compiled[name], state=state, own=own: program(grads, state, own)
    packages = dict.fromkeys(programs, ())
    if network.others:
        _, grads, plan = examples[PIO]
        others = {
            "geoopt.RiemannianSGD": (("geoopt", "torch"), lambda: _geoopt(params, grads, plan, False)),
            "geoopt.RiemannianSGD, layers joined": (("geoopt", "torch"), lambda: _geoopt(params, grads, plan, True)),
            "riemannax's adapter, layers joined": (("riemannax",), lambda: _riemannax(params, grads, plan)),
        }
        for name, (libraries, make) in others.items():
            # One that fails is left out, and takes no other row with it.
            with record.case(case, name):
                program = make()
                jax.block_until_ready(program())
                programs[name], figures[name], packages[name] = program, {}, libraries
    again: dict[str, list[float]] = {}
    found = side_by_side(programs, repeats, seconds, again)
    for name in programs:
        row = _compared(found, name)
        if name in again and "optax.sgd" in again:
            figures[name]["repeated"] = _compared(again, name)
        if name in examples:
            own, plan, tx = arguments[name]
            count = int(max(1, min(1000, patience / row["median"])))
            figures[name] |= _after(compiled[name], tx.init(own), own, grads, plan, count)
        record.row(case, name, packages[name], **row, **figures[name])


def _compared(seconds, name):
    """The times of an update, over `optax.sgd`'s, over Muon's, and what other libraries take over it."""
    row = compared(seconds, name, "sgd", "optax.sgd")
    if "optax.contrib.muon" in seconds:
        row["over muon"] = ratio(seconds, name, "optax.contrib.muon")
    for other in seconds:
        if other.startswith(("geoopt", "riemannax")) and name.startswith("fgsgd"):
            row[f"{other} over it"] = ratio(seconds, other, name)
    return row


def _compiled(tx, grads, state, params, whole):
    """The compiled update, and what compilation takes, and the memory of a `whole` step unless that is to be left."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    lowered = jax.jit(tx.update).lower(grads, state, params)
    compiled = lowered.compile()
    figures = {"compile": time.perf_counter() - start, "program": len(lowered.as_text())}
    figures |= {
        "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }
    memory = whole and jax.jit(step, donate_argnums=(1, 2)).lower(grads, state, params).compile().memory_analysis()
    if memory:
        figures |= {"temporary": memory.temp_size_in_bytes, "kept": memory.alias_size_in_bytes}
    return compiled, figures


def _as_matrices(params):
    """Muon on all weights but the embeddings, kernels as matrices with a column for each filter."""

    def of(path, x):
        if path in ("tokens", "positions"):
            return None
        return MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return {path: of(path, x) for path, x in params.items()}


def _after(update, state, params, grads, plan, count):
    """The violation after so many updates, at the radii that they are on."""
    apply = jax.jit(optax.apply_updates)
    directions = [grads, jax.tree.map(jnp.flip, grads)]
    for index in range(count):
        updates, state = update(directions[index % 2], state, params)
        params = apply(params, updates)
    radii, worst = fg.radii(state), 0.0
    for path, collection in plan.collections.items():
        grid = np.asarray(collection.view.split(params[path]), np.float64)
        grid = grid / np.broadcast_to(radii[path], grid.shape[:2])[..., None, None]
        for index, manifold in enumerate(collection.kinds):
            if not isinstance(manifold, fg.Euclidean) and (collection.kind == index).any():
                worst = max(worst, violation(manifold, grid[collection.kind == index]))
    return {"violation": worst, "steps": count}


def _slices(params, grads, plan, joined):
    """Points of radius 1 and their gradients, for each layer and manifold or, joined, for each manifold.

    Whether they are matrices of a Stiefel manifold comes first: the others are spheres' vectors along the last axis.
    """
    parts: dict[Any, list] = {}
    for path, collection in plan.collections.items():
        grids = [np.asarray(collection.view.split(tree[path])) for tree in (params, grads)]
        radius = np.broadcast_to(collection.gamma, collection.kind.shape)[..., None, None]
        for index, manifold in enumerate(collection.kinds):
            own = [grid[collection.kind == index].astype(np.float32) for grid in (grids[0] / radius, grids[1])]
            if not isinstance(manifold, fg.Stiefel):
                size = own[0].shape[-2] if isinstance(manifold, fg.Oblique) else own[0][0].size
                own = [np.swapaxes(each, -1, -2).reshape(-1, size) for each in own]
            key = type(manifold) if joined else (path, index)
            parts.setdefault((key, isinstance(manifold, fg.Stiefel)), []).append(own)
    for (_, stiefel), own in parts.items():
        yield stiefel, *(np.concatenate(each) for each in zip(*own, strict=True))


def _geoopt(params, grads, plan, joined):
    """Its momentum step on the same slices, in a tensor for each layer and manifold or in one for each manifold."""
    torch, device, wait = on_torch()
    import geoopt

    points = []
    for stiefel, x, g in _slices(params, grads, plan, joined):
        space = geoopt.EuclideanStiefel() if stiefel else geoopt.Sphere()
        points.append(geoopt.ManifoldParameter(torch.from_numpy(x).to(device), manifold=space))
        points[-1].grad = torch.from_numpy(g).to(device)
    optimizer = geoopt.optim.RiemannianSGD(points, lr=RATE, momentum=MOMENTUM)

    def step():
        optimizer.step()
        return wait(())

    return step


def _riemannax(params, grads, plan):
    """Its adapter for Optax behind momentum, on all slices of each manifold at once."""
    version = importlib.metadata.version("riemannax")
    try:
        from riemannax.api.optax_adapter import RiemannianOptaxAdapter
        from riemannax.manifolds import Sphere, Stiefel
    except ImportError as error:
        raise ImportError(f"{version} has no adapter for Optax, or none that runs ({error})") from error

    parts = []
    for stiefel, x, g in _slices(params, grads, plan, joined=True):
        space = Stiefel(*x.shape[1:]) if stiefel else Sphere(x.shape[1] - 1)
        tx = optax.chain(optax.trace(MOMENTUM), RiemannianOptaxAdapter(space, RATE))
        state = jax.vmap(tx.init)(jnp.asarray(x))
        program = jax.jit(jax.vmap(tx.update)).lower(g, state, x).compile()
        parts.append((program, (jnp.asarray(g), state, jnp.asarray(x))))
    return lambda: [program(*arguments) for program, arguments in parts]
