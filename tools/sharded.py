"""Trainings on eight fake devices beside the same on one: run by tests/test_sharding.py, in a process of its own.

Prints one JSON object: by the name of each case what was found. Cases are `axis type/layout/optimizer`.
"""

import contextlib
import fnmatch
import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chains import chained
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import fgsgd_jax as fg
from fgsgd_jax.kernels import _pallas_tpu, _pallas_triton
from fgsgd_jax.kernels._descend import PALLAS, PallasForm

STEPS = 4
SHAPES = {
    "conv": (3, 3, 8, 16),
    "conv2": (3, 3, 16, 16),
    "dense": (16, 8),
    "qr": (16, 8),
    "cayley": (8, 8),
    "bias": (8,),
}
MATRIX = "i o -> 1 1 i o"
RULES = [
    ("conv*", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()])),
    ("dense", fg.Whole(fg.Stiefel(), view=MATRIX)),
    ("qr", fg.Whole(fg.Stiefel(retraction="qr"), view=MATRIX)),
    ("cayley", fg.Whole(fg.Stiefel(retraction="cayley"), view=MATRIX)),
    ("*", None),
]
OPTIMIZERS = {
    "fgsgd": lambda plan: fg.fgsgd(0.1, plan, momentum=0.9, rescaling=fg.Rescaling(every=2)),
    "chain": lambda plan: chained(plan, 0.1, 0.9, rescaling=fg.Rescaling(every=2)),
    "adam": lambda plan: fg.on_manifolds(optax.adam(0.02), plan),
    "spel": lambda plan: fg.spel(0.1, plan),
    "riemannian_adam": lambda plan: fg.riemannian_adam(0.02, plan),
}

SHARED_OUT = {
    "fgsgd": lambda plan, mesh: fg.fgsgd(0.5, plan, momentum=0.9, share_out=mesh),
    "chain": lambda plan, mesh: optax.chain(
        fg.project(plan), optax.sgd(0.5), fg.retract(plan, share_out=mesh), fg.rescale(plan)
    ),
    "adam": lambda plan, mesh: fg.on_manifolds(optax.adam(0.1), plan, share_out=mesh),
}


def on_inputs(name):
    return {path: P(*([None] * (len(shape) - 2)), name, None) for path, shape in SHAPES.items() if len(shape) > 1}


def on_outputs(name):
    return {path: P(*([None] * (len(shape) - 1)), name) for path, shape in SHAPES.items()}


LAYOUTS = {
    "data": {},
    "outputs": on_outputs("model"),
    "inputs": on_inputs("model"),
    "fully": {path: P(*(None, None, "data", "model")[4 - len(shape) :]) for path, shape in SHAPES.items()},
}


def tensors(number):
    rng = np.random.default_rng(number)
    return {path: np.asarray(rng.standard_normal(shape), np.float32) for path, shape in SHAPES.items()}


def moments():
    """What entered `conv`: λ from ½ to 2 over its channels."""
    std = np.linspace(0.5, 2, 8, dtype=np.float32)
    return {"conv": fg.FeatureMoments(np.full(8, 100, np.float32), np.zeros(8, np.float32), 100 * std**2)}


def stepper(tx, goal):
    def step(params, state):
        grads = jax.tree.map(jnp.subtract, params, goal)
        updates, state = tx.update(grads, state, params, feature_moments=jax.tree.map(jnp.asarray, moments()))
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def train(make, params, goal):
    plan = fg.plan(params, RULES)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = optax.with_extra_args_support(make(plan))
    state, step = tx.init(params), stepper(tx, goal)
    seen = []
    for _ in range(STEPS):
        params, state = step(params, state)
        seen.append([leaf.sharding for leaf in jax.tree.leaves((params, state))])
    return plan, params, state, seen


def gap(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def mesh_of(kind, count=8):
    shape = (2, count // 2)
    return jax.make_mesh(
        shape, ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2, devices=jax.devices()[:count]
    )


def placed(tree, mesh, layout):
    return {path: jax.device_put(x, NamedSharding(mesh, layout.get(path, P()))) for path, x in tree.items()}


def case(kind, layout, optimizer):
    make = OPTIMIZERS[optimizer]
    _, expected, expected_state, _ = train(make, *map(on_one_device, (tensors(0), tensors(1))))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        start, goal = placed(tensors(0), mesh, LAYOUTS[layout]), placed(tensors(1), mesh, LAYOUTS[layout])
        plan, params, state, seen = train(make, start, goal)
        leaves = jax.tree.leaves((params, state))
        return {
            "gap": gap(params, expected),
            "radii": gap(fg.radii(state), fg.radii(expected_state)),
            "violation": max(float(v) for v in fg.violation(params, plan, fg.radii(state)).values()),
            "near": gap(fg.nearest(params, plan, fg.radii(state)), params),
            "stable": all(
                all(a.is_equivalent_to(b, leaf.ndim) for a, b, leaf in zip(first, seen[-1], leaves, strict=True))
                for first in seen
            ),
            "placed": all(
                params[path].sharding.is_equivalent_to(start[path].sharding, x.ndim) for path, x in start.items()
            ),
            "moved": gap(params, fg.initialize(jax.random.key(0), start, plan)),
        }


def kernels(form, kind, layout):
    """The kernels of a platform, interpreted, on the part of each device; what is exchanged, and the same on one."""
    paths, mesh = ("conv", "conv2"), mesh_of(kind)
    start, goal = ({path: tensors(number)[path] for path in paths} for number in (0, 1))
    rules = [("*", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]))]
    plan, found = fg.plan(start, rules), []
    shardings = {path: NamedSharding(mesh, LAYOUTS[layout].get(path, P())) for path in paths}
    for places in (None, shardings):
        with jax.set_mesh(mesh) if places and kind == "Explicit" else contextlib.nullcontext():
            if places:
                PALLAS["cpu"] = PallasForm({"tpu": _pallas_tpu, "cuda": _pallas_triton}[form], interpret=True)
            params, end = ((jax.device_put(tree, places) if places else on_one_device(tree)) for tree in (start, goal))
            params = fg.initialize(jax.random.key(0), params, plan)
            stated = None if kind == "Explicit" else places
            only = "pallas" if places else "auto"
            rescaling = fg.Rescaling(every=2)
            tx = fg.fgsgd(0.1, plan, momentum=0.9, rescaling=rescaling, kernels=only, shardings=stated)
            state, step = tx.init(params), stepper(tx, end)
            text = step.lower(params, state).compile().as_text()
            for _ in range(STEPS):
                params, state = step(params, state)
            found.append((params, fg.radii(state), list(fg.metrics(state).values())))
    return {
        "gap": max(gap(mine, theirs) for mine, theirs in zip(*found, strict=True)),
        "exchanged": exchanged(text),
        "placed": all(found[1][0][path].sharding.is_equivalent_to(shardings[path], 4) for path in paths),
    }


def on_one_device(tree):
    return {path: jnp.asarray(x) for path, x in tree.items()}


def exchanged(text):
    """The gathers and exchanges of more than figures in a compiled program, as lines of HLO."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= \(?\w+\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)", line)
        if match and np.prod([int(n) for n in match[1].split(",") if n], dtype=int) >= 9 * 8:
            found.append(line.strip()[:200])
    return found


def rules_for(paths):
    rules = [("tall", fg.Whole(fg.Stiefel(), view=MATRIX)), *RULES]
    return [rule for rule in rules if any(fnmatch.fnmatch(path, rule[0]) for path in paths)][:-1]


def lowered(optimizer, plan, params):
    tx = OPTIMIZERS[optimizer](plan)
    return jax.jit(tx.update).lower(params, tx.init(params), params)


def compiled(optimizer, plan, params):
    """The text of the compiled update, without what says from where it was called."""
    text = lowered(optimizer, plan, params).compile().as_text()
    # The tables of files and lines come first; what refers to them stands in braces.
    return re.sub(r", metadata=\{[^}]*\}", "", re.sub(r"(?m)^\d+ [{\"].*\n", "", text))


def gathers(kind, optimizer, *paths):
    """What is exchanged in the update of these weights."""
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        known = tensors(0) | {"tall": np.zeros((256, 8), np.float32)}
        layout = LAYOUTS["outputs"] | {"tall": P("model", None)}
        params = placed({path: known[path] for path in paths}, mesh, layout)
        plan = fg.plan(params, rules_for(paths))
        params = fg.initialize(jax.random.key(0), params, plan)
        return exchanged(compiled(optimizer, plan, params))


def early(kind, optimizer, *paths):
    """The same with plans made before the weights lay anywhere, and whether their programs are that of a later one."""
    mesh = mesh_of(kind)
    shapes = {path: jax.ShapeDtypeStruct(SHAPES[path], jnp.float32) for path in paths}
    plans = {"shapes": fg.plan(shapes, rules_for(paths))}
    plans["JSON"] = fg.Plan.from_json(plans["shapes"].to_json())
    plans["rules"] = rules_for(paths)
    known = tensors(0)
    with jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext():
        params = placed({path: known[path] for path in paths}, mesh, LAYOUTS["outputs"])
        later = fg.plan(params, rules_for(paths))
        params = fg.initialize(jax.random.key(0), params, later)
        expected = lowered(optimizer, later, params)
        return {
            "exchanged": exchanged(expected.compile().as_text()),
            "same": {
                name: lowered(optimizer, plan, params).as_text() == expected.as_text() for name, plan in plans.items()
            },
            "devices": sorted(
                {len(x.sharding.device_set) for x in jax.tree.leaves(OPTIMIZERS[optimizer](later).init(params))}
            ),
        }


def shared_out(kind, optimizer):
    """Eleven matrices that every device holds: their retraction on all devices against that on each."""
    mesh, make = mesh_of(kind), SHARED_OUT[optimizer]
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        params = {str(n): np.asarray(rng.standard_normal((16, 8)), np.float32) for n in range(11)}
        params = placed(params, mesh, {})
        plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel(), view=MATRIX))])
        start = fg.initialize(jax.random.key(0), params, plan)
        found = []
        for mesh_or_none in (None, mesh):
            tx = make(plan, mesh_or_none)
            state = tx.init(start)
            step = jax.jit(tx.update).lower(params, state, start).compile()
            now = start
            for _ in range(STEPS):
                updates, state = step(params, state, now)
                now = optax.apply_updates(now, updates)
            found.append((now, step.cost_analysis()["flops"]))
        (each, all_of_it), (together, part) = found
        return {
            "gap": gap(each, together),
            "moved": gap(together, start),
            "violation": max(float(v) for v in fg.violation(together, plan).values()),
            "placed": all(x.sharding.is_fully_replicated for x in together.values()),
            "flops": part / all_of_it,
        }


def checkpoint():
    """State and plan saved on eight devices, read on four and on one; then a step there, as here."""
    import orbax.checkpoint as ocp

    make, found = OPTIMIZERS["fgsgd"], {}
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        mesh = mesh_of("Auto")
        start, goal = (placed(tensors(number), mesh, LAYOUTS["fully"]) for number in (0, 1))
        plan, params, state, _ = train(make, start, goal)
        leaves, structure = jax.tree.flatten((params, state))
        checkpointer.save(folder + "/state", dict(enumerate_named(leaves)))
        checkpointer.wait_until_finished()
        text = plan.to_json()
        after, _ = stepper(make(plan), goal)(params, state)
        for count in (4, 1):
            again = fg.Plan.from_json(text)
            mesh = mesh_of("Auto", count) if count > 1 else None
            fresh = on_one_device(tensors(0)) if mesh is None else placed(tensors(0), mesh, LAYOUTS["fully"])
            here = fg.plan(fresh, RULES)
            fresh = fg.initialize(jax.random.key(3), fresh, here)
            goal = on_one_device(tensors(1)) if mesh is None else placed(tensors(1), mesh, LAYOUTS["fully"])
            like = fresh, make(here).init(fresh)
            template = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(enumerate_named(jax.tree.leaves(like))))
            saved = checkpointer.restore(folder + "/state", template)
            restored = jax.tree.unflatten(structure, list(saved.values()))
            there, _ = stepper(make(here), goal)(*restored)
            found[str(count)] = {
                "difference": here.difference(again),
                "other": fg.plan(fresh, RULES, seed=1).difference(again),
                "exact": gap(restored, (params, state)),
                "gap": gap(there, after),
                "devices": len(restored[0]["conv"].sharding.device_set),
            }
    return found


def enumerate_named(leaves):
    return ((f"{number:03}", leaf) for number, leaf in enumerate(leaves))


def main(names):
    found = {}
    for name in names:
        first, *rest = name.split("/")
        if first == "checkpoint":
            found[name] = checkpoint()
        elif first == "gathers":
            found[name] = gathers(*rest)
        elif first == "early":
            found[name] = early(*rest)
        elif first == "kernels":
            found[name] = kernels(*rest)
        elif first == "shared out":
            found[name] = shared_out(*rest)
        else:
            found[name] = case(first, *rest)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
