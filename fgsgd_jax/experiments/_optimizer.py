from typing import Any

import optax

import fgsgd_jax as fg

from ._config import TrainConfig
from ._errors import UsageError
from ._schemes import rules


def make_plan(config: TrainConfig, params: Any, seed: int, trace: fg.Trace) -> Any:
    """The plan that a config and a seed give for these parameters (or their shapes); `None` for the baseline."""
    chosen = rules(config.scheme, config.retraction)
    if chosen is None:
        return None
    try:
        gamma = trace if config.gamma == "literal" else config.gamma
        return fg.plan(params, chosen, seed=seed, gamma=gamma, degenerate="euclidean", trace=trace)
    except ValueError as error:
        raise UsageError(f"scheme {config.scheme!r} does not fit model {config.model!r}: {error}") from error


def make_optimizer(
    config: TrainConfig, rate: optax.Schedule, plan: Any, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """FG-SGD on the plan's manifolds, or for the baseline momentum SGD with L2 weight decay, as in torch."""
    if plan is None:
        decay = optax.add_decayed_weights(config.weight_decay)
        # `None` would build another state than 0.0 does; a momentum of zero is a momentum.
        return optax.with_extra_args_support(optax.chain(decay, optax.sgd(rate, momentum=config.momentum)))
    return fg.fgsgd(
        rate,
        plan,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        rho=config.rho,
        curvature=config.curvature,
        every=steps_per_epoch if config.lambda_ == "epoch" else None,
        lambda_floor=config.lambda_floor,
    )
