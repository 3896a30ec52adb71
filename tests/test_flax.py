"""Flax without glue: nnx.Optimizer in graph and in tree mode. Linen's TrainState is in test_transforms.py."""

import jax
import jax.numpy as jnp
import pytest

import fgsgd_jax as fg


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_nnx_optimizer_in_either_mode(graph, users_settings):
    pytest.importorskip("flax", minversion="0.12.8", reason="the optimizer has no tree mode")
    from flax import nnx

    model = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    plan = fg.plan(params, [("kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])), ("*", None)])
    nnx.update(model, fg.initialize(jax.random.key(0), params, plan))
    before = model.kernel[...]
    optimizer = nnx.Optimizer(model, fg.fgsgd(0.1, plan, momentum=0.9), wrt=nnx.Param, graph=graph)
    x = jnp.ones((2, 5, 5, 3))

    @nnx.jit(graph=graph)
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2), graph=graph)(model)
        optimizer.update(model, grads)
        return fg.metrics(optimizer.opt_state)

    for _ in range(5):
        figures = step(model, optimizer)
    assert float(fg.violation(nnx.state(model, nnx.Param), plan)["kernel"]) <= 1e-6
    assert float(jnp.max(jnp.abs(model.kernel[...] - before))) > 1e-3
    assert set(fg.radii(optimizer.opt_state)) == {"kernel"}
    # The state's variables read alike inside the step and outside.
    (now,) = fg.metrics(optimizer.opt_state).values()
    assert float(figures["kernel"].step_ratio) == float(now.step_ratio) > 0
    assert int(figures["kernel"].degenerate) == int(now.degenerate) == 0
    assert int(fg.refused(optimizer.opt_state)["kernel"]) == 0
