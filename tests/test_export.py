"""The whole update compiles for other platforms from this machine: nothing in it is of CPU alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import fgsgd_jax as fg

pytestmark = pytest.mark.usefixtures("users_settings")

MIX = fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()])


def matrix(retraction):
    return fg.Whole(fg.Stiefel(retraction=retraction), view="i o -> 1 1 i o")


# On CPU the second kernel is handled in a form of its own.
SHAPES = {"conv": (3, 3, 4, 6), "large": (3, 3, 32, 40), "bias": (8,)}
RULES = [("conv", MIX), ("large", fg.PO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])), ("*", None)]


def started(make, shapes, rules):
    """A jitted update, and the parameters and state that it starts from."""
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
    params = fg.initialize(jax.random.key(0), params, rules)
    tx = make(rules)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update), params, tx.init(params)


@pytest.mark.parametrize(
    "make",
    [
        lambda plan: fg.fgsgd(0.1, plan, momentum=0.9, rescaling=fg.Rescaling(every=2)),
        pytest.param(lambda plan: fg.on_manifolds(optax.adamw(1e-2), plan), marks=pytest.mark.slow),
        lambda plan: fg.riemannian_adam(1e-2, plan),
        lambda plan: fg.manifold_muon(1e-2, plan),
    ],
    ids=["fgsgd", "adamw", "riemannian_adam", "manifold_muon"],
)
def test_updates_for_accelerators_call_no_library_of_cpus(make):
    update, params, state = started(make, SHAPES, RULES)
    module = export.export(update, platforms=("tpu", "cuda"))(params, state, params).mlir_module()
    # Polar factors by products alone. Of the kernels, those for TPU are kept compatible between releases.
    assert "lapack" not in module
    assert set(re.findall(r"custom_call @([\w.$]+)", module)) <= {"tpu_custom_call"}


@pytest.mark.parametrize("retraction", ["qr", "cayley", "exp"])
def test_other_retractions_can_be_lowered_for_accelerators(retraction):
    update, params, state = started(lambda plan: fg.fgsgd(0.1, plan), {"w": (16, 8)}, [("w", matrix(retraction))])
    module = export.export(update, platforms=("tpu", "cuda"))(params, state, params).mlir_module()
    assert "lapack" not in module


@pytest.mark.parametrize("kernels", ["auto", "xla", "pallas"])
def test_updates_without_a_constrained_weight_are_those_of_sgd_on_every_platform(kernels):
    update, params, state = started(lambda plan: fg.fgsgd(0.1, plan, kernels=kernels), {"bias": (8,)}, [("*", None)])
    found, _ = update({"bias": jnp.ones(8)}, state, params)
    np.testing.assert_allclose(found["bias"], params["bias"] - 0.1, rtol=1e-6)
    export.export(update, platforms=("tpu", "cuda"))(params, state, params)


def test_an_exported_update_does_what_the_update_does():
    """On CPU, for which JAX has to be told that a layout constraint, no call to anything, may be exported."""
    update, params, state = started(lambda plan: fg.fgsgd(0.1, plan, momentum=0.9), SHAPES, RULES)
    grads = jax.tree.map(jnp.ones_like, params)
    allowed = export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    exported = export.export(update, platforms=("cpu",), disabled_checks=[allowed])(grads, state, params)
    found, after = exported.call(grads, state, params)
    expected, expected_state = update(grads, state, params)
    for path in SHAPES:
        assert np.max(np.abs(found[path] - params[path])) > 1e-3
        np.testing.assert_allclose(found[path], expected[path], atol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
