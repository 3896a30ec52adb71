"""The whole update compiles for other platforms from this machine: nothing in it is of CPU alone."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export

import fgsgd_jax as fg

pytestmark = pytest.mark.usefixtures("users_settings")

MIX = fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()])


def matrix(retraction):
    return fg.Whole(fg.Stiefel(retraction=retraction), view="i o -> 1 1 i o")


# The second kernel has enough slices to be handled in chunks on CPU.
SHAPES = {"conv": (3, 3, 4, 6), "large": (3, 3, 128, 160), "bias": (8,)}
RULES = [("conv", MIX), ("large", fg.PO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])), ("*", None)]


def exported(make, shapes, rules, **options):
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    plan = fg.plan(params, rules)
    tx = make(plan)
    state = jax.eval_shape(tx.init, params)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return export.export(jax.jit(update), **{"platforms": ("tpu", "cuda")} | options)(params, state, params)


@pytest.mark.parametrize(
    "make",
    [
        lambda plan: fg.fgsgd(0.1, plan, momentum=0.9, every=2),
        pytest.param(lambda plan: fg.on_manifolds(optax.adamw(1e-2), plan), marks=pytest.mark.slow),
        lambda plan: fg.riemannian_adam(1e-2, plan),
    ],
    ids=["fgsgd", "adamw", "riemannian_adam"],
)
def test_updates_for_accelerators(make):
    found = exported(make, SHAPES, RULES)
    assert set(found.platforms) == {"tpu", "cuda"}
    # By products alone, and in a loop over the steps that they need.
    assert "lapack" not in found.mlir_module()
    assert "stablehlo.while" in found.mlir_module()


@pytest.mark.parametrize("retraction", ["qr", "cayley", "exp"])
def test_other_retractions_for_accelerators(retraction):
    found = exported(lambda plan: fg.fgsgd(0.1, plan), {"w": (16, 8)}, [("w", matrix(retraction))])
    assert set(found.platforms) == {"tpu", "cuda"}


def test_updates_for_cpus():
    """For which JAX has to be told that a layout constraint, no call to anything, may be exported."""
    allowed = export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    found = exported(
        lambda plan: fg.fgsgd(0.1, plan, momentum=0.9), SHAPES, RULES, platforms=("cpu",), disabled_checks=[allowed]
    )
    assert found.platforms == ("cpu",)
