"""What leaves the process and comes back: rules that state no radius, and plans."""

import copy
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fgsgd_jax as fg
from fgsgd_jax.manifolds import UNSTATED


def cloudpickled(value):
    return pickle.loads(pytest.importorskip("cloudpickle").dumps(value))


WAYS = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "pickle, protocol 0": lambda value: pickle.loads(pickle.dumps(value, 0)),
    "cloudpickle": cloudpickled,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
MANIFOLDS = [fg.Euclidean(), fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Stiefel(retraction="qr")]
PARAMS = {"conv": {"kernel": jnp.zeros((3, 3, 4, 6))}, "stack": jnp.zeros((3, 8, 6)), "free": jnp.zeros(6)}
RULES = [
    ("kernel", fg.PIO([fg.Sphere(), fg.Oblique(radius=0.3), fg.Stiefel(), fg.Euclidean()])),
    ("stack", fg.Each(fg.Stiefel(), view="neurons", layers=1)),
    ("*", None),
]


@pytest.mark.parametrize("way", [*WAYS.values(), lambda value: jax.tree.map(lambda x: x, value)], ids=[*WAYS, "tree"])
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=str)
def test_a_radius_that_nobody_gave_stays_so(manifold, way):
    found = way(manifold)
    assert found == manifold
    assert found.radius is UNSTATED
    assert way(type(manifold)(radius=1.0)).radius is not UNSTATED


def test_a_radius_that_nobody_gave_is_the_number_1_and_one_leaf():
    manifold = fg.Sphere()
    assert manifold.radius == 1.0
    assert repr(manifold) == "Sphere(radius=1.0)"
    assert hash(manifold) == hash(fg.Sphere(radius=1.0))
    assert jax.tree.leaves(manifold) == [1.0]
    # Inside transformations it is a number that takes the dtype of what it meets.
    doubled = jax.jit(lambda manifold, x: manifold.radius * x)(manifold, jnp.ones(2, jnp.bfloat16))
    assert doubled.dtype == jnp.bfloat16
    assert jax.vmap(lambda manifold: manifold.radius, axis_size=2, in_axes=None)(manifold).shape == (2,)
    assert jax.grad(lambda manifold: 3 * manifold.radius)(manifold).radius == 3


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_rules_make_the_same_plan_again(way):
    found = fg.plan(PARAMS, way(RULES))
    assert found.difference(fg.plan(PARAMS, RULES)) is None
    np.testing.assert_allclose(np.min(found["conv/kernel"].gamma), 90**-0.5)


@pytest.mark.parametrize("way", [*WAYS.values(), lambda p: fg.Plan.from_json(p.to_json())], ids=[*WAYS, "JSON"])
def test_plans_come_back_as_they_were(way):
    plan = fg.plan(PARAMS, RULES, seed=3, trace=fg.Trace((("conv/kernel", 4),)))
    found = way(plan)
    assert found == plan
    assert str(found) == str(plan)
    assert found.mask(PARAMS) == plan.mask(PARAMS) == {"conv": {"kernel": False}, "stack": False, "free": True}


def test_plans_of_nnx_models_come_back_with_their_trees():
    state = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu), nnx.Param)
    plan = fg.plan(state, [("kernel", fg.Whole(fg.Stiefel())), ("*", None)])
    for way in WAYS.values():
        assert jax.tree.leaves(way(plan).mask()) == jax.tree.leaves(plan.mask()) == [True, False]


def test_rules_and_plans_mean_the_same_in_a_spawned_process(tmp_path):
    (tmp_path / "rules").write_bytes(pickle.dumps((RULES, fg.plan(PARAMS, RULES))))
    program = (
        "import json, pickle, sys, numpy as np, jax, fgsgd_jax as fg\n"
        "rules, plan = pickle.load(open(sys.argv[1], 'rb'))\n"
        "params = {path: np.zeros(entry.shape, 'float32') for path, entry in plan.entries.items()}\n"
        "made = fg.plan({'conv': {'kernel': params.pop('conv/kernel')}, **params}, rules)\n"
        "print(json.dumps([made == plan, made.to_json()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "rules"], capture_output=True, text=True, check=True
    )
    same, text = json.loads(done.stdout)
    assert same
    assert fg.Plan.from_json(text) == fg.plan(PARAMS, RULES)
