"""The optimizers of a GPT."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool
from optax import contrib
from optax.contrib import MuonDimensionNumbers

import fgsgd_jax as fg

from .._paths import mapped
from ._config import TextConfig
from ._rules import is_block_matrix

# Of AdamW, everywhere: gradients of small batches of text are noisy, and few steps have no time for 0.999.
B1, B2 = 0.9, 0.95

Mask = Callable[[Any], Any]


def make_text_optimizer(
    config: TextConfig, rate: optax.Schedule, free_rate: optax.Schedule, plan: fg.Plan | None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config.

    AdamW moves what an optimizer of matrices leaves out (embedding, head, scales), at the rate of its own.

    Args:
        config: the options.
        rate: of the optimizer itself.
        free_rate: of AdamW for what it leaves out.
        plan: what the weights live on; `None` for free ones.
    """
    free = _adamw(config, free_rate)
    if config.optimizer == "adamw":
        tx = _adamw(config, rate)
    elif config.optimizer == "muon":
        tx = _muon(config, rate, free_rate, config.weight_decay)
    elif plan is None:
        raise ValueError(f"{config.optimizer} needs a plan")
    elif config.optimizer == "hyperball":
        tx = fg.hyperball(_adamw(config, free_rate, plan), plan, rate)
    elif config.optimizer == "muon-hyperball":
        tx = fg.hyperball(_muon(config, free_rate, free_rate, 0.0), plan, rate)
    elif config.optimizer == "on-manifolds":
        tx = fg.on_manifolds(_adamw(config, rate, plan), plan)
    elif config.optimizer == "fgsgd":
        # The chain of fg.fgsgd, whose free leaves get SGD: here they get AdamW as in all other rows.
        moved = optax.chain(optax.trace(config.momentum), optax.scale_by_learning_rate(rate))
        tx = fg.on_manifolds(
            optax.chain(
                fg.normalize_by_zeta(plan),
                optax.masked(moved, _in_plan(plan, True)),
                optax.masked(free, _in_plan(plan, False)),
            ),
            plan,
        )
    elif config.optimizer == "manifold-muon":
        tx = fg.manifold_muon(rate, plan, config.momentum, nesterov=True, free=free)
    elif config.tangent == "on":
        tx = fg.spel(rate, plan, config.momentum, nesterov=True, free=free)
    else:
        # The chain of fg.spel without the projection before the direction.
        tx = optax.chain(
            optax.masked(free, _in_plan(plan, False)),
            optax.masked(optax.trace(config.momentum, nesterov=True), _in_plan(plan, True)),
            fg.steepest(plan, tangent=False),
            optax.masked(optax.scale_by_learning_rate(rate), _in_plan(plan, True)),
            fg.retract(plan),
            fg.rescale(plan),
        )
    if config.start == "free" and plan is not None:
        tx = from_free_weights(tx, plan)
    return optax.with_extra_args_support(tx)


class FreeStart(NamedTuple):
    """The state of an optimizer whose first weights are free."""

    begun: Bool[Array, ""]
    inner: Any


def from_free_weights(tx: optax.GradientTransformation, plan: fg.Plan) -> optax.GradientTransformationExtraArgs:
    """`tx` for weights that begin off their manifolds: its first step leads from the nearest points, by the gradient
    that was taken off them.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> FreeStart:
        return FreeStart(jnp.zeros((), bool), tx.init(fg.nearest(params, plan)))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, FreeStart]:
        near = lax.cond(state.begun, lambda tree: tree, lambda tree: fg.nearest(tree, plan), params)
        moved, inner = tx.update(updates, state.inner, near, **extra_args)
        # Exactly zero from the second update on.
        gaps = jax.tree.map(jnp.subtract, near, params)
        return jax.tree.map(jnp.add, moved, gaps), FreeStart(jnp.ones((), bool), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _adamw(config: TextConfig, rate: optax.Schedule, plan: fg.Plan | None = None) -> optax.GradientTransformation:
    """AdamW, whose decay is of free matrices alone."""

    def decayed(tree: Any) -> Any:
        return mapped(lambda path, leaf: leaf.ndim > 1 and (plan is None or path not in plan.collections), tree)

    return optax.adamw(rate, b1=B1, b2=B2, weight_decay=config.weight_decay, mask=decayed)


def _muon(
    config: TextConfig, rate: optax.Schedule, free_rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, the heads of a projection as one (each by itself in `euc-heads`); Adam for
    the rest.
    """

    def dimensions(tree: Any) -> Any:
        def of_leaf(path: str, leaf: Any) -> MuonDimensionNumbers | None:
            if not is_block_matrix(path):
                return None
            if leaf.ndim == 2:
                return MuonDimensionNumbers()
            out = path.endswith("out/kernel")
            if config.scheme == "euc-heads":
                # What is neither input nor output is a batch of matrices.
                return MuonDimensionNumbers(1, 2) if out else MuonDimensionNumbers(0, 2)
            return MuonDimensionNumbers((0, 1), 2) if out else MuonDimensionNumbers(0, (1, 2))

        return mapped(of_leaf, tree)

    return contrib.muon(
        rate,
        beta=config.momentum,
        weight_decay=weight_decay,
        adam_b1=B1,
        adam_b2=B2,
        adam_learning_rate=free_rate,
        muon_weight_dimension_numbers=dimensions,
    )


def _in_plan(plan: fg.Plan, collected: bool) -> Mask:
    return lambda tree: mapped(lambda path, _: (path in plan.collections) == collected, tree)
