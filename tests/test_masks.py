"""Masks and labels of a plan, for Optax's wrappers, of every kind of parameters, called and uncalled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import fgsgd_jax as fg

RULES = [("kernel", fg.Whole(fg.Stiefel())), ("weight", fg.Whole(fg.Stiefel())), ("*", None)]
X = jnp.ones((2, 4), jnp.float32)


def dicts():
    return {"a": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "b": [{"weight": jnp.ones((3, 2))}]}


def linen():
    return nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)]).init(jax.random.key(0), X)["params"]


def partitioned():
    kernel = nn.with_partitioning(nn.initializers.ones, (None, "x"))
    return nn.Dense(3, kernel_init=kernel).init(jax.random.key(0), X)["params"]


class Net(nnx.Module):
    def __init__(self):
        self.first, self.second = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def state():
    return nnx.state(Net(), nnx.Param)


def equinox():
    eqx = pytest.importorskip("equinox")
    return eqx.filter(eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(0)), eqx.is_inexact_array)


class Callable_:
    """What equinox's modules are: parameters that can be called."""

    def __init__(self, kernel, bias):
        self.kernel, self.bias = kernel, bias

    def __call__(self, x):
        raise AssertionError("the parameters were called")


jax.tree_util.register_pytree_with_keys(
    Callable_,
    lambda x: (((jax.tree_util.GetAttrKey("kernel"), x.kernel), (jax.tree_util.GetAttrKey("bias"), x.bias)), None),
    lambda _, children: Callable_(*children),
)


def callables():
    return Callable_(jnp.ones((4, 3)), jnp.ones(3))


KINDS = [dicts, linen, partitioned, state, equinox, callables]


def rules_of(params):
    matched = [path for path in fg.groups.by_path(params) if path.endswith(("kernel", "weight"))]
    return [rule for rule in RULES if rule[0] == "*" or any(path.endswith(rule[0]) for path in matched)]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def params(request):
    return request.param()


def free(params):
    return [not path.endswith(("kernel", "weight")) for path in fg.groups.by_path(params)]


@pytest.mark.parametrize("called", [True, False], ids=["called", "uncalled"])
def test_weight_decay_by_mask(params, called, lenient_promotion):
    plan = fg.plan(params, rules_of(params))
    tx = optax.add_decayed_weights(0.5, mask=plan.mask() if called else plan.mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for update, leaf, decays in zip(jax.tree.leaves(updates), jax.tree.leaves(params), free(params), strict=True):
        np.testing.assert_allclose(update, 0.5 * leaf * decays)


@pytest.mark.parametrize("called", [True, False], ids=["called", "uncalled"])
def test_partition_by_labels(params, called, lenient_promotion):
    plan = fg.plan(params, rules_of(params))
    tx = optax.partition(
        {"manifold": optax.scale(0.0), "euclidean": optax.scale(2.0)}, plan.labels() if called else plan.labels
    )
    updates, _ = tx.update(params, tx.init(params), params)
    for update, leaf, decays in zip(jax.tree.leaves(updates), jax.tree.leaves(params), free(params), strict=True):
        np.testing.assert_allclose(update, 2 * leaf * decays)


def test_trees_are_those_of_the_parameters(params):
    plan = fg.plan(params, rules_of(params))
    assert jax.tree.leaves(plan.mask()) == jax.tree.leaves(plan.mask(params)) == free(params)
    assert jax.tree.structure(plan.mask()) == jax.tree.structure(plan.mask(params))
    assert jax.tree.leaves(plan.labels(params)) == ["euclidean" if x else "manifold" for x in free(params)]
    again = fg.Plan.from_json(plan.to_json())
    assert jax.tree.leaves(again.mask(params)) == free(params)
    for method in (again.mask, again.labels):
        with pytest.raises(ValueError, match=r"pass the parameters"):
            method()


def test_a_tree_of_another_plan_is_refused():
    plan = fg.plan({"a": jnp.ones((2, 2))}, [("*", None)])
    with pytest.raises(KeyError, match=r"'b'.*'a'"):
        plan.mask({"b": jnp.ones(2)})


def of_optimizer(make, called):
    """Two steps of an nnx.Optimizer, as its parameters by path."""
    model = Net()
    plan = fg.plan(nnx.state(model, nnx.Param), RULES[::2])
    optimizer = nnx.Optimizer(model, make(plan, called), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(jnp.square(model(X))))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
    return jax.tree.map(np.asarray, fg.groups.by_path(nnx.state(model, nnx.Param)))


@pytest.mark.usefixtures("users_settings")
@pytest.mark.parametrize(
    "make",
    [
        lambda plan, called: optax.adamw(0.1, weight_decay=0.5, mask=plan.mask() if called else plan.mask),
        lambda plan, called: optax.masked(optax.sgd(0.1), plan.mask() if called else plan.mask),
        lambda plan, called: optax.partition(
            {"manifold": optax.sgd(0.0), "euclidean": optax.adam(0.1)}, plan.labels() if called else plan.labels
        ),
    ],
    ids=["adamw", "masked", "partition"],
)
def test_inside_an_nnx_optimizer(make):
    called, uncalled = (of_optimizer(make, called) for called in (True, False))
    for path, leaf in called.items():
        np.testing.assert_array_equal(leaf, uncalled[path])
    assert not np.array_equal(called["first/bias"], nnx.state(Net(), nnx.Param)["first"]["bias"][...])


def test_adamw_needs_no_mask_for_constrained_weights(lenient_promotion):
    """Decay pulls along the radius, which the projection removes: the constrained weights are those without decay."""
    params = fg.initialize(jax.random.key(0), {"kernel": jnp.ones((6, 4), jnp.float32)}, RULES[:1])

    def trained(mask):
        tx = fg.on_manifolds(optax.adamw(0.01, weight_decay=0.5, mask=mask), RULES[:1])
        kernel, state = params, tx.init(params)
        for key in jax.random.split(jax.random.key(1), 5):
            updates, state = tx.update({"kernel": jax.random.normal(key, (6, 4), jnp.float32)}, state, kernel)
            kernel = optax.apply_updates(kernel, updates)
        return kernel["kernel"]

    unmasked, masked = trained(None), trained({"kernel": False})
    assert jnp.max(jnp.abs(masked - params["kernel"])) > 0.01
    np.testing.assert_allclose(unmasked, masked, atol=5e-7)
