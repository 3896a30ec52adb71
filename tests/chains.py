"""Algorithm 1 as the chain of its links, which `fg.fgsgd` is held against."""

from __future__ import annotations

import optax

import fgsgd_jax as fg


def chained(plan, rate, momentum=None, nesterov=False, rescaling=None, **zeta):
    """The links in the paper's order; `zeta` is what `fg.normalize_by_zeta` takes."""
    trace = [] if momentum is None else [optax.trace(momentum, nesterov), fg.project(plan)]
    return optax.chain(
        fg.project(plan),
        fg.normalize_by_zeta(plan, **zeta),
        *trace,
        optax.scale_by_learning_rate(rate),
        fg.retract(plan),
        fg.rescale(plan, rescaling),
    )
