"""Everything public compiled for accelerators that are not there: tests/test_compiled.py runs it.

    python tools/compiled.py tpu | cuda [PATTERN ...]

Prints one JSON object: by the name of each case the Pallas kernels and collectives in the compiled program, or the
error. The environment has to be `environment(platform)` from the start of the process.
"""

import fnmatch
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import accelerators
import jax
import jax.numpy as jnp
import numpy as np
import optax
from accelerators_hlo import cost
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

import fgsgd_jax as fg

environment = accelerators._environment
RETRACTIONS = ("polar", "qr", "cayley", "exp")
THREE = (fg.Sphere(), fg.Oblique(), fg.Stiefel())
SHAPES = {"conv": (3, 3, 16, 32), "dense": (48, 32), "bias": (32,)}
MATRIX = "i o -> 1 1 i o"
RULES = [("conv", fg.PIO((*THREE, fg.Euclidean()))), ("dense", fg.Whole(fg.Stiefel(), view=MATRIX)), ("*", None)]
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "fgsgd": lambda plan: fg.fgsgd(0.1, plan, momentum=0.9),
    "fgsgd, nesterov": lambda plan: fg.fgsgd(0.1, plan, momentum=0.9, nesterov=True),
    "fgsgd, without kernels": lambda plan: fg.fgsgd(0.1, plan, momentum=0.9, kernels="xla"),
    "adamw": lambda plan: fg.on_manifolds(optax.adamw(1e-2), plan),
    "riemannian_adam": lambda plan: fg.riemannian_adam(1e-2, plan),
    "spel": lambda plan: fg.spel(0.1, plan),
    "spel, coarse": lambda plan: fg.spel(0.1, plan, coarse=True),
    "manifold_muon": lambda plan: fg.manifold_muon(0.1, plan),
    "hyperball": lambda plan: fg.hyperball(optax.adam(0.1), plan),
    "chain": lambda plan: optax.chain(
        fg.project(plan),
        fg.normalize_by_zeta(plan),
        optax.trace(0.9),
        fg.project(plan),
        optax.scale_by_learning_rate(0.1),
        fg.retract(plan),
        fg.rescale(plan),
    ),
}
MEASURES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "initialize": fg.initialize,
    "nearest": lambda key, params, plan: fg.nearest(params, plan),
    "nearest, fitted": lambda key, params, plan: fg.nearest(params, plan, radii="fitted"),
    "violation": lambda key, params, plan: fg.violation(params, plan),
    "norms": lambda key, params, plan: fg.norms(params, plan),
}


def main(platform: str, *patterns: str) -> None:
    *_, (_, topology) = (each for each in accelerators.TARGETS.values() if each[0] == platform)
    devices = accelerators._devices(platform, topology)
    found = {}
    for name, case in cases(devices).items():
        if patterns and not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        try:
            function, *arguments = case()
            lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
            figures = cost(lowered.compile().as_text())
            found[name] = {
                "pallas": figures.pallas,
                "collectives": sorted(figures.collectives),
                "gathered": figures.gathered,
            }
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
    print(json.dumps(found))


def cases(devices: list) -> dict[str, Callable[[], tuple]]:
    """What is compiled, by name: functions that return a function and its arguments' shapes."""
    one = SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices[:4]), ("channels",))
    everywhere = NamedSharding(mesh, P())
    shared = {
        "conv": NamedSharding(mesh, P(None, None, None, "channels")),
        "dense": NamedSharding(mesh, P(None, "channels")),
        "bias": everywhere,
    }
    found = {f"update/{name}": functools.partial(updated, make, one) for name, make in OPTIMIZERS.items()}
    for name in RETRACTIONS:
        rules = [("dense", fg.Whole(fg.Stiefel(retraction=name), view=MATRIX)), ("conv", fg.PIO(retracting(name)))]
        rules.append(("*", None))
        found[f"update/{name}"] = functools.partial(updated, OPTIMIZERS["fgsgd"], one, rules=rules)

    def rescaled(plan: Any) -> Any:
        return fg.fgsgd(0.1, plan, momentum=0.9, rescaling=fg.Rescaling(every=2))

    found["update/rescaling"] = functools.partial(updated, rescaled, one, moments=True)

    def with_kernels(plan: Any) -> Any:
        return fg.fgsgd(0.1, plan, momentum=0.9, shardings=shared)

    found["shared/fgsgd"] = functools.partial(updated, with_kernels, shared)
    # Columns of one matrix meet in its products; slices of one kernel do not.
    found["shared/slices"] = functools.partial(updated, with_kernels, shared, rules=[RULES[0], ("*", None)])
    for name in ("adamw", "riemannian_adam", "spel", "manifold_muon"):
        found[f"shared/{name}"] = functools.partial(updated, OPTIMIZERS[name], shared)

    def out(plan: Any) -> Any:
        return fg.fgsgd(0.1, plan, momentum=0.9, share_out=mesh)

    heads = [("dense", fg.Whole(fg.Stiefel(), view="i (h d) -> 1 h i d", h=4)), ("conv", fg.PIO(THREE)), ("*", None)]
    found["share_out/fgsgd"] = functools.partial(updated, out, everywhere, rules=heads)
    found |= {f"weights/{name}": functools.partial(measured, measure, one) for name, measure in MEASURES.items()}
    for manifold in (*THREE, fg.Euclidean()):
        kind = type(manifold).__name__.lower()
        for name in ("exp", "log", "dist", "transport", "violation", "random_point"):
            found[f"maps/{kind}/{name}"] = functools.partial(mapped, manifold, name, one)
    return found


def retracting(retraction: str) -> tuple[fg.Manifold, ...]:
    return fg.Sphere(), fg.Stiefel(retraction=retraction)


def updated(make: Callable[[Any], Any], sharding: Any, rules: list = RULES, moments: bool = False) -> tuple:
    """A step of user's code, and the shapes that it is given; what mirrors a parameter lies where it does."""

    def placed(path: Any, leaf: Any) -> Any:
        names = [entry.key for entry in path if getattr(entry, "key", None) in SHAPES]
        mirrors = names and SHAPES[names[-1]] == leaf.shape
        own = sharding if not isinstance(sharding, dict) else sharding[names[-1]] if mirrors else sharding["bias"]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    bare = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    tx, params = make(fg.plan(bare, rules)), jax.tree_util.tree_map_with_path(placed, bare)
    state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, bare))
    extra = {}
    if moments:
        channels = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)
        extra = {"feature_moments": {"conv": fg.FeatureMoments(channels, channels, channels)}}

    def step(grads: Any, state: Any, params: Any, extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step, params, state, params, extra


def measured(measure: Callable[[Any, Any, Any], Any], sharding: Any) -> tuple:
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for path, shape in SHAPES.items()}
    plan = fg.plan(params, RULES)
    return (lambda key, params: measure(key, params, plan)), key_of(sharding), params


def mapped(manifold: fg.Manifold, name: str, sharding: Any) -> tuple:
    x = jax.ShapeDtypeStruct((8, 128, 3, 3), jnp.float32, sharding=sharding)
    function = getattr(manifold, name)
    match name:
        case "random_point":
            return (lambda key: function(key, x.shape)), key_of(sharding)
        case "transport":
            return function, x, x, x
        case "violation":
            return function, x
    return function, x, x


def key_of(sharding: Any) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)


if __name__ == "__main__":
    main(*sys.argv[1:])
