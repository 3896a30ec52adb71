import math
from typing import Any

import optax

import fgsgd_jax as fg

from ._clip import clip_groups
from ._config import TrainConfig
from ._errors import UsageError
from ._schemes import WEIGHT_NORM, is_spatial_kernel, pooled, rules
from ._weight_norm import weight_normalized


def make_plan(config: TrainConfig, params: Any, seed: int, trace: fg.Trace) -> Any:
    """The plan that a config and a seed give for these parameters (or their shapes); `None` for the baselines."""
    chosen = rules(config.scheme, config.retraction)
    if chosen is None:
        return None
    try:
        gamma = trace if config.gamma == "literal" else config.gamma
        return fg.plan(params, chosen, seed=seed, gamma=gamma, degenerate="euclidean", trace=trace)
    except ValueError as error:
        raise UsageError(f"scheme {config.scheme!r} does not fit model {config.model!r}: {error}") from error


def make_optimizer(
    config: TrainConfig, rate: optax.Schedule, plan: fg.Plan | None, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """FG-SGD on the plan's manifolds, or for the baselines momentum SGD with L2 weight decay, as in torch."""
    tx = _baseline(config, rate) if plan is None else _constrained(config, rate, plan, steps_per_epoch)
    return tx if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), tx)


def _baseline(config: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    decay = optax.add_decayed_weights(config.weight_decay)
    # `None` would build another state than 0.0 does; a momentum of zero is a momentum.
    tx = optax.with_extra_args_support(optax.chain(decay, optax.sgd(rate, momentum=config.momentum)))
    return weight_normalized(tx, is_spatial_kernel) if config.scheme == WEIGHT_NORM else tx


def _constrained(
    config: TrainConfig, rate: optax.Schedule, plan: fg.Plan, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    # Features below 10⁻¹⁹ have no variance in float32: deep chains need a few changes to have all of them measured.
    quarter = max(1, steps_per_epoch // 4)
    rescaling = fg.Rescaling(
        every=steps_per_epoch if config.lambda_ == "epoch" else None,
        warmup=(quarter, steps_per_epoch) if config.lambda_ == "first" else None,
        floor=config.lambda_floor,
    )
    if (config.zeta, config.pooling) == ("on", "scheme"):
        return fg.fgsgd(
            rate,
            plan,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            rho=config.rho,
            curvature=config.curvature,
            rescaling=rescaling,
        )
    # The same step with line 6 of its own: between the projection of gradients and that of the momentum, or behind it.
    line_6, decay = _line_6(config, plan), optax.add_decayed_weights(config.weight_decay, mask=plan.mask)
    momentum = optax.trace(config.momentum)
    links = (decay, momentum, line_6) if config.zeta == "late" else (line_6, decay, momentum)
    return fg.on_manifolds(optax.chain(*links, optax.scale_by_learning_rate(rate)), plan, rescaling=rescaling)


def _line_6(config: TrainConfig, plan: fg.Plan) -> optax.GradientTransformation:
    if config.zeta == "off":
        return optax.identity()
    groups = pooled(plan, config.pooling)
    if config.zeta in ("on", "late"):
        return fg.normalize_by_zeta(groups, rho=config.rho, curvature=config.curvature)
    # Where ζ of flat space leaves 1: R (2ρ + R) = 1.
    return clip_groups(groups, 1 / (config.rho + math.sqrt(1 + config.rho**2)))
