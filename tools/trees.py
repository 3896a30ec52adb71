"""Which trees, wrappers, ways out of the process and modes of JAX an optimizer goes through.

tests/test_trees.py runs every case; `python tools/trees.py` writes docs/trees.md.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import json
import pathlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn, nnx, serialization, struct
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import fgsgd_jax as fg
from fgsgd_jax.groups import by_path

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "trees.md"
WORKS = "works"

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "fgsgd": lambda plan: fg.fgsgd(optax.linear_schedule(0.1, 0.05, 10), plan, 0.9, rescaling=fg.Rescaling(every=2)),
    "on_manifolds(adam)": lambda plan: fg.on_manifolds(optax.adam(0.05), plan, rescaling=fg.Rescaling(every=2)),
    "riemannian_adam": lambda plan: fg.riemannian_adam(0.05, plan),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`run` passes, or raises what `refused` matches; `remedy` is what the page says beside it."""

    run: Callable[..., Any]
    refused: str | None = None
    remedy: str = ""


# --- the problem


def kernel(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), "float32")


def rules_of(params: Any) -> list[Any]:
    """Matrices and stacks of them are orthogonal, kernels mixed, all else is free."""
    return [
        *([(lambda path, leaf: leaf.ndim == 2, fg.Whole(fg.Stiefel()))] if _has(params, 2) else []),
        *(
            [(lambda path, leaf: leaf.ndim == 3, fg.Each(fg.Sphere(), view="neurons", layers=1))]
            if _has(params, 3)
            else []
        ),
        *([(lambda path, leaf: leaf.ndim == 4, fg.PIO([fg.Sphere(), fg.Stiefel()]))] if _has(params, 4) else []),
        ("*", None),
    ]


def _has(params: Any, ndim: int) -> bool:
    return any(leaf.ndim == ndim for leaf in jax.tree.leaves(params))


def gradients(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sin(3 * x) + jnp.asarray(0.1, x.dtype), params)


def stepper(tx: Any, jit: Callable[..., Any] = jax.jit) -> Callable[[Any, Any], Any]:
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    return jit(step)


def check(params: Any, plan: fg.Plan, state: Any, before: Any) -> None:
    """That the weights moved, are on their manifolds at the radii of the state, and that all of it can be read."""
    assert jax.tree.structure(params) == jax.tree.structure(before)
    for path, leaf in by_path(params).items():
        assert leaf.dtype == by_path(before)[path].dtype, path
        assert not np.array_equal(leaf, by_path(before)[path]), f"{path} did not move"
    radii = fg.radii(state)
    assert set(radii) == set(fg.metrics(state)) == set(plan.collections)
    assert set(fg.refused(state)) == set(plan)
    assert all(float(found) <= 1e-6 for found in fg.violation(params, plan, radii).values())
    fg.nearest(params, plan, radii)


def trains(params: Any, make: Callable[[Any], Any] = OPTIMIZERS["fgsgd"], **options: Any) -> None:
    """Two steps of a tree from its plan on."""
    plan = fg.plan(params, rules_of(params))
    before = fg.initialize(jax.random.key(0), params, plan)
    tx = make(plan)
    step = stepper(tx, **options)
    after, state = before, tx.init(before)
    for _ in range(2):
        after, state = step(after, state)
    check(after, plan, state, before)


@functools.cache
def trained(optimizer: str) -> tuple[Any, fg.Plan, Any, Callable[[Any, Any], Any], tuple[Any, Any]]:
    """An optimizer's rules, plan, transformation and step; and parameters and state after two steps, λ included."""
    params = {"conv/kernel": kernel(3, 3, 2, 4), "block": {"kernel": kernel(2, 4, 3), "bias": kernel(3)[...]}}
    rules = [
        ("conv/kernel", fg.PIO([fg.Sphere(), fg.Stiefel(), fg.Euclidean()])),
        ("block/kernel", fg.Each(fg.Sphere(), view="neurons", layers=1)),
        ("*", None),
    ]
    plan = fg.plan(params, rules)
    tx = OPTIMIZERS[optimizer](plan)
    step = stepper(tx)
    start = fg.initialize(jax.random.key(0), params, plan)
    return rules, plan, tx, step, step(*step(start, tx.init(start)))


# --- trees

Pair = collections.namedtuple("Pair", ["kernel", "value"])


@struct.dataclass
class Attention:
    query: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    value: Any
    name: str = dataclasses.field(default="", metadata={"static": True})


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.first(x)))


def nnx_stack(rngs: nnx.Rngs) -> Any:
    def layer(rngs: nnx.Rngs) -> Any:
        return nnx.Linear(4, 3, rngs=rngs)

    return nnx.split_rngs(splits=2)(nnx.vmap(layer, in_axes=0, out_axes=0))(rngs)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.tanh(nn.Dense(4)(x)), None


def linen_scan() -> Any:
    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return scanned().init(jax.random.key(0), jnp.ones((2, 4)), None)["params"]


def partitioned() -> Any:
    layer = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x")))
    return {"l": nn.unbox(layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"])}


def equinox(filtered: bool = True) -> Any:
    import equinox as eqx

    model = eqx.nn.MLP(3, 3, 4, 1, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_inexact_array) if filtered else model


def haiku_like() -> Any:
    return {"mlp/~/linear": {"w": kernel(4, 3), "b": kernel(3)}}


def tied() -> None:
    """One array at two paths is two parameters, drawn apart and trained apart."""
    shared = kernel(4, 3)
    params = {"embed": shared, "head": shared}
    plan = fg.plan(params, rules_of(params))
    drawn = fg.initialize(jax.random.key(0), params, plan)
    assert not np.allclose(drawn["embed"], drawn["head"])
    trains(params)


TREES: dict[str, Case] = {
    "dict": Case(lambda: trains({"a": {"kernel": kernel(4, 3), "bias": kernel(3)}})),
    "dict with integer keys": Case(lambda: trains({1: kernel(4, 3), 0: {10: kernel(3)}})),
    "names with slashes (Haiku)": Case(lambda: trains(haiku_like())),
    "OrderedDict": Case(lambda: trains(collections.OrderedDict(b=kernel(4, 3), a=kernel(3)))),
    "list and tuple": Case(lambda: trains([kernel(4, 3), (kernel(3), kernel(3, 3, 2, 4))])),
    "namedtuple": Case(lambda: trains(Pair(kernel(4, 3), {"value": kernel(3)}))),
    "dataclass": Case(lambda: trains({"x": Plain(kernel(4, 3))})),
    "flax.struct": Case(lambda: trains({"attn": Attention(kernel(4, 3), kernel(3, 4))})),
    "FrozenDict": Case(lambda: trains(FrozenDict({"a": {"kernel": kernel(4, 3)}}))),
    "None among the leaves": Case(lambda: trains({"a": None, "b": kernel(4, 3)})),
    "a single array": Case(lambda: trains(kernel(4, 3))),
    "equinox, filtered": Case(lambda: trains(equinox())),
    "NNX state": Case(lambda: trains(nnx.state(Net(nnx.Rngs(0)), nnx.Param))),
    "NNX state, pure": Case(lambda: trains(nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(0)), nnx.Param)))),
    "NNX layers stacked by vmap": Case(lambda: trains(nnx.state(nnx_stack(nnx.Rngs(0)), nnx.Param))),
    "linen parameters": Case(lambda: trains(nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 4)))["params"])),
    "linen layers stacked by nn.scan": Case(lambda: trains(linen_scan())),
    "linen, partitioned and unboxed": Case(lambda: trains(partitioned())),
    "bfloat16 and float64 leaves": Case(
        lambda: trains({"a": kernel(4, 3), "b": kernel(3, 3, 2, 4), "c": kernel(3).astype("bfloat16")})
    ),
    "a parameter without entries": Case(lambda: fg.plan({"a": kernel(0, 3), "b": kernel(4, 3)}, [("*", None)])),
    "one array at two paths": Case(tied, remedy="two parameters, drawn and trained apart: share weights in the model"),
    "equinox, unfiltered": Case(
        lambda: trains_unfiltered(equinox(filtered=False)),
        refused="eqx.filter",
        remedy="`eqx.filter(model, eqx.is_inexact_array)`",
    ),
    "Python numbers": Case(
        lambda: fg.plan({"scale": 1.0}, [("*", None)]), refused="jnp.asarray", remedy="`jnp.asarray` of it"
    ),
    "complex weights": Case(
        lambda: fg.plan({"a": kernel(4, 3).astype("complex64")}, [("*", fg.Whole(fg.Stiefel()))]),
        refused="give it the scheme None",
        remedy="the scheme `None`",
    ),
    "two leaves of one path": Case(
        lambda: fg.plan({"enc/w": kernel(3), "enc": {"w": kernel(4)}}, [("*", None)]),
        refused="two leaves have the path 'enc/w'",
        remedy="rename one of them",
    ),
    "shapes alone": Case(
        lambda: fg.initialize(jax.random.key(0), {"a": jax.ShapeDtypeStruct((4, 3), "float32")}, [("*", None)]),
        refused="jax.eval_shape",
        remedy="`fg.plan` and `tx.init` take them; `fg.initialize` inside `jax.eval_shape`",
    ),
    "a stack without `layers=`": Case(
        lambda: fg.plan({"a": kernel(12, 8, 2, 4)}, [("*", fg.Each(fg.Stiefel()))]),
        refused="layers=1",
        remedy="`layers=1`; a window of up to 11×11 is taken for a kernel, and `print(plan)` notes it",
    ),
}


def trains_unfiltered(model: Any) -> None:
    fg.fgsgd(0.1, [("*", None)]).init(model)


# --- wrappers, and what reads through them


def two_parts() -> None:
    """Two optimizers, each with the plan of its part: readers find the parts of both."""
    params = {"a": {"kernel": kernel(4, 3), "bias": kernel(3)}, "b": {"kernel": kernel(3, 3, 2, 4)}}
    plan = fg.plan(params, rules_of(params))
    params = fg.initialize(jax.random.key(0), params, plan)
    labels = {"a": {"kernel": "a", "bias": "a"}, "b": {"kernel": "b"}}
    for make in ("fgsgd", "on_manifolds(adam)"):
        parts = {name: OPTIMIZERS[make](fg.plan({name: params[name]}, rules_of({name: params[name]}))) for name in "ab"}
        tx = optax.partition(parts, labels)
        trains_from(params, plan, tx)
    trains_from(params, plan, optax.apply_if_finite(optax.MultiSteps(tx, 1).gradient_transformation(), 3))


def trains_from(params: Any, plan: fg.Plan, tx: Any) -> None:
    step = stepper(optax.with_extra_args_support(tx))
    after, state = params, tx.init(params)
    for _ in range(2):
        after, state = step(after, state)
    check(after, plan, state, params)


def wrapped(wrap: Callable[[Any, fg.Plan], Any]) -> Callable[[str], None]:
    def run(optimizer: str) -> None:
        _, plan, _, _, (params, _) = trained(optimizer)
        params = fg.nearest(params, plan)
        trains_from(params, plan, wrap(OPTIMIZERS[optimizer], plan))

    return run


def injected(make: Any, plan: fg.Plan) -> Any:
    return optax.inject_hyperparams(lambda learning_rate: optax.chain(make(plan), optax.scale(learning_rate)))(1.0)


WRAPPERS: dict[str, Case] = {
    "chain": Case(wrapped(lambda make, plan: optax.chain(optax.clip(1.0), make(plan)))),
    "named_chain": Case(wrapped(lambda make, plan: optax.named_chain(("clip", optax.clip(1.0)), ("fg", make(plan))))),
    "masked": Case(wrapped(lambda make, plan: optax.masked(make(plan), jax.tree.map(lambda _: True, plan.mask())))),
    "MultiSteps": Case(wrapped(lambda make, plan: optax.MultiSteps(make(plan), 1).gradient_transformation())),
    "inject_hyperparams": Case(wrapped(injected)),
    "apply_if_finite": Case(wrapped(lambda make, plan: optax.apply_if_finite(make(plan), 3))),
    "several levels": Case(
        wrapped(
            lambda make, plan: optax.apply_if_finite(
                optax.chain(optax.clip(1.0), optax.MultiSteps(make(plan), 1).gradient_transformation()), 3
            )
        )
    ),
}
PARTITION = {
    "partition, a plan for each part": Case(two_parts),
    "partition, one plan for all parts": Case(
        lambda: one_plan_for_parts(),
        refused="a plan of its own, or put the whole plan outside",
        remedy="a plan for each part, or `fg.on_manifolds(optax.partition(...), plan)`",
    ),
}


def one_plan_for_parts() -> None:
    params = {"a": kernel(4, 3), "b": kernel(3, 3, 2, 4)}
    plan = fg.plan(params, rules_of(params))
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = optax.partition({"a": fg.fgsgd(0.1, plan), "b": fg.fgsgd(0.1, plan)}, {"a": "a", "b": "b"})
    tx.init(params)


# --- ways out of the process


def goes_on(optimizer: str, again: Callable[[Any], Any]) -> None:
    """The state and the parameters come back bit for bit, and so does the step from them."""
    _, _, _, step, before = trained(optimizer)
    found = again(before)
    same(found, before)
    same(step(*found), step(*before))
    same(fg.radii(found[1]), fg.radii(before[1]))


def same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (np.asarray(a).dtype, np.shape(a)) == (np.asarray(b).dtype, np.shape(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def cloudpickled(value: Any) -> Any:
    import cloudpickle

    return pickle.loads(cloudpickle.dumps(value))


def msgpack(value: Any) -> Any:
    return serialization.from_bytes(zeros_like(value), serialization.to_bytes(value))


def orbax(value: Any) -> Any:
    import orbax.checkpoint as ocp

    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder + "/value", value)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder + "/value", zeros_like(value))


def train_state(optimizer: str) -> None:
    """A TrainState by Flax's msgpack, as `flax.training.checkpoints` writes it."""
    _, _, tx, _, (params, opt_state) = trained(optimizer)
    state = TrainState(step=3, apply_fn=None, params=params, tx=tx, opt_state=opt_state)
    target = TrainState.create(apply_fn=None, params=zeros_like(params), tx=_without_look(tx, params))
    found = serialization.from_bytes(target, serialization.to_bytes(state))
    assert found.step == 3
    same((found.params, found.opt_state), (params, opt_state))


def _without_look(tx: Any, params: Any) -> Any:
    """`tx` whose `init` takes any parameters, as a target for what is read."""
    return optax.GradientTransformationExtraArgs(lambda _: zeros_like(tx.init(shapes_of(params))), tx.update)


def shapes_of(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def spawned(optimizer: str) -> None:
    """Rules, plan, parameters and state in a process of its own, which makes the same step, bit for bit."""
    rules, plan, _, step, before = trained(optimizer)
    program = (
        "import pickle, sys, jax\n"
        "for name, value in pickle.load(sys.stdin.buffer): jax.config.update(name, value)\n"
        "import trees\n"
        "optimizer, rules, plan, before = pickle.load(sys.stdin.buffer)\n"
        "import fgsgd_jax as fg\n"
        "assert fg.plan(before[0], rules) == plan\n"
        "found = trees.stepper(trees.OPTIMIZERS[optimizer](plan))(*before)\n"
        "sys.stdout.buffer.write(pickle.dumps(jax.device_get(found)))"
    )
    settings = [(name, getattr(jax.config, name)) for name in ("jax_enable_x64", "jax_numpy_dtype_promotion")]
    given = pickle.dumps(settings) + pickle.dumps((optimizer, rules, plan, before))
    folder = str(pathlib.Path(__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{program}"]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    same(pickle.loads(done.stdout), jax.device_get(step(*before)))


SERIALIZERS: dict[str, Case] = {
    "pickle": Case(lambda optimizer: goes_on(optimizer, lambda value: pickle.loads(pickle.dumps(value)))),
    "cloudpickle": Case(lambda optimizer: goes_on(optimizer, cloudpickled)),
    "copy.copy": Case(lambda optimizer: goes_on(optimizer, copy.copy)),
    "copy.deepcopy": Case(lambda optimizer: goes_on(optimizer, copy.deepcopy)),
    "flax.serialization (msgpack)": Case(lambda optimizer: goes_on(optimizer, msgpack)),
    "TrainState by msgpack": Case(train_state),
    "orbax": Case(lambda optimizer: goes_on(optimizer, orbax)),
    "a spawned process": Case(spawned),
}


# --- modes


def in_mode(mode: Callable[[], Any], **options: Any) -> Callable[[], None]:
    def run() -> None:
        with mode():
            trains({"k": kernel(4, 3), "b": kernel(3)}, **options)

    return run


def uncompiled() -> None:
    with jax.disable_jit():
        params = {"k": kernel(4, 3), "b": kernel(3)}
        plan = fg.plan(params, [("k", fg.Each(fg.Sphere(), view="neurons")), ("*", None)])
        before = fg.initialize(jax.random.key(0), params, plan)
        tx = fg.fgsgd(0.1, plan)
        after, state = stepper(tx, lambda f: f)(before, tx.init(before))
        check(after, plan, state, before)


def over_models() -> None:
    """Three models with states of their own by vmap, as one by one."""
    params = {"k": kernel(4, 3), "b": kernel(3)}
    plan = fg.plan(params, rules_of(params))
    models = jax.vmap(lambda key: fg.initialize(key, params, plan))(jax.random.split(jax.random.key(0), 3))
    tx = OPTIMIZERS["fgsgd"](plan)
    step = stepper(tx)
    found, _ = jax.jit(jax.vmap(step))(models, jax.vmap(tx.init)(models))
    for index in range(3):
        one = jax.tree.map(lambda x, n=index: x[n], models)
        expected, _ = step(one, tx.init(one))
        jax.tree.map(lambda a, b, n=index: np.testing.assert_allclose(a[n], b, atol=1e-6), found, expected)


def over_steps() -> None:
    """Steps in one `lax.scan`, as one by one."""
    _, plan, _, step, before = trained("fgsgd")
    found, _ = jax.jit(lambda carry: jax.lax.scan(lambda carry, _: (step(*carry), None), carry, length=3))(before)
    expected = step(*step(*step(*before)))
    check(found[0], plan, found[1], before[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[0], expected[0])


def donated() -> None:
    """Parameters, those they were made from, and the state, all donated: no buffer is among them twice."""
    params = {"k": kernel(4, 3), "b": kernel(3)}
    plan = fg.plan(params, rules_of(params))
    drawn = fg.initialize(jax.random.key(0), params, plan)
    near = fg.nearest(drawn, plan)
    tx = OPTIMIZERS["fgsgd"](plan)

    def step(*trees: Any) -> Any:
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), trees)

    jax.jit(step, donate_argnums=(0, 1, 2, 3))(params, drawn, near, tx.init(near))
    with np.testing.assert_raises(RuntimeError):
        np.asarray(drawn["b"])  # gone, so it was handed in


def through_gradients() -> None:
    """The derivative of a step, as meta-learning takes it, against differences."""
    params = {"k": kernel(4, 3)}
    plan = fg.plan(params, rules_of(params))
    params = fg.initialize(jax.random.key(0), params, plan)

    def reached(rate: Any) -> Any:
        tx = fg.fgsgd(rate, plan)
        updates, _ = tx.update(gradients(params), tx.init(params), params)
        return jnp.sum(jnp.sin(params["k"] + updates["k"]))

    slope = (reached(jnp.float32(0.11)) - reached(jnp.float32(0.09))) / 0.02
    np.testing.assert_allclose(jax.jit(jax.grad(reached))(jnp.float32(0.1)), slope, rtol=1e-2)


def by_shapes() -> None:
    """`init` and `update` of shapes alone: a state to restore to."""
    _, plan, _, _, (params, _) = trained("fgsgd")
    params = fg.nearest(params, plan)
    shapes = shapes_of(params)
    for make in OPTIMIZERS.values():
        tx = make(plan)
        state = tx.init(params)
        for found in (tx.init(shapes), jax.eval_shape(tx.init, shapes)):
            assert jax.tree.structure(found) == jax.tree.structure(state)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)


MODES: dict[str, Case] = {
    "jax.debug_nans": Case(in_mode(lambda: jax.debug_nans(True))),
    "jax.debug_infs": Case(in_mode(lambda: jax.debug_infs(True))),
    "jax.checking_leaks": Case(in_mode(jax.checking_leaks)),
    "jax.disable_jit": Case(uncompiled),
    "strict dtype promotion": Case(in_mode(lambda: jax.numpy_dtype_promotion("strict"))),
    'jax_numpy_rank_promotion="raise"': Case(in_mode(lambda: jax.numpy_rank_promotion("raise"))),
    "jax.enable_x64": Case(in_mode(lambda: jax.enable_x64(True))),
    "without x64": Case(in_mode(lambda: jax.enable_x64(False))),
    'jax.transfer_guard("disallow")': Case(lambda: guarded()),
    "vmap over models": Case(over_models),
    "scan over steps": Case(over_steps),
    "donation": Case(donated),
    "gradients through a step": Case(through_gradients),
    "shapes alone, jax.eval_shape": Case(by_shapes),
}


def guarded() -> None:
    """No transfer in a compiled step, once its arguments lie on the device."""
    _, _, _, step, before = trained("fgsgd")
    step(*before)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(*before))


# --- the page

HEAD = """# Trees and tools

`python tools/trees.py` writes this page, and the tests compare it. Every table names the test in `tests/test_trees.py`
that runs its rows, each under the row's own name.
*Works* means: the plan finds every leaf, two steps move all
weights and keep them on their manifolds, and `fg.radii`, `fg.metrics`, `fg.refused` and `fg.nearest` read the state.
*Refused* is an error that names the path, what was found, and what to write. Which optimizers of Optax work, and in
which of its wrappers, is in [what runs on manifolds](compatibility.md).

"""
SECTIONS = {
    "Trees": (TREES, "test_a_tree"),
    "Wrappers": (WRAPPERS, "test_a_wrapper"),
    "Parts with plans of their own": (PARTITION, "test_parts"),
    "Ways out of the process": (SERIALIZERS, "test_a_way_out"),
    "Modes of JAX": (MODES, "test_a_mode"),
}
BELOW = {
    "Wrappers": "Around `fgsgd`, `on_manifolds(adam)` and `riemannian_adam`.",
    "Ways out of the process": "Parameters and state of `fgsgd` with momentum, λ and a schedule, of "
    "`on_manifolds(adam)` and of `riemannian_adam` come back bit for bit, and so does the next step. Rules and plans "
    "come back as they were by the same ways and by JSON (`tests/test_outside.py`). A state on a mesh is restored by "
    "orbax to the places of `tx.init(params)` (`tests/test_sharding.py`).",
}


def document() -> str:
    parts = [HEAD]
    for title, (cases, test) in SECTIONS.items():
        parts.append(f"## {title}\n\n" + (BELOW[title] + "\n\n" if title in BELOW else ""))
        parts.append(f"| `{test}` | found | |\n| --- | --- | --- |\n")
        for name, case in cases.items():
            found = WORKS if case.refused is None else "refused"
            parts.append(f"| {name} | {found} | {case.remedy} |\n")
        parts.append("\n")
    return "".join(parts) + many_leaves()


MANY_LEAVES = """## Many leaves

What leaves St(8, 8) cost before the first step: seconds of the processor on {cores}, the least of {runs} runs in
processes of their own ([figures](../benchmarks/results/many_leaves.json), by
[`benchmarks/many_leaves.py`](../benchmarks/many_leaves.py)). The first `fg.initialize` takes {initialize} s for
{counts} leaves, the first `fg.nearest` {nearest} s: leaves of one shape share their programs.

The number of different kernels in the update of `fgsgd` does not grow with the leaves. What grows is what XLA spends on
every argument and result of a program, as Optax's own optimizers show; `on_manifolds` and `riemannian_adam` pay for
Adam's state as well. With thousands of leaves of a shape, stack the layers in the model and write `layers=1`.

| compile an update, s | {columns} |
| --- |{rule}
"""


def many_leaves() -> str:
    """The section with the figures of benchmarks/many_leaves.py."""
    found = json.loads((DOCUMENT.parent.parent / "benchmarks/results/many_leaves.json").read_text())
    rows, counts = found["rows"], sorted({row["leaves"] for row in found["rows"]})

    def least(what: str, count: int, name: str) -> str:
        runs = [run for row in rows if (row["leaves"], row["name"]) == (count, name) for run in row["runs"]]
        return f"{min(run[what]['cpu'] for run in runs):.1f}" if runs else "—"

    text = MANY_LEAVES.format(
        cores="one core" if found["machine"]["cores used"] == 1 else f"{found['machine']['cores used']} cores",
        runs=len(rows[0]["runs"]),
        counts=" and ".join(f"{count:,}" for count in counts),
        columns=" | ".join(f"{count:,} leaves" for count in counts),
        rule=" ---: |" * len(counts),
        **{what: " and ".join(least(what, n, "fgsgd") for n in counts) for what in ("initialize", "nearest")},
    )
    for name in dict.fromkeys(row["name"] for row in rows):
        text += f"| `{name}` | {' | '.join(least('compile', count, name) for count in counts)} |\n"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document())
