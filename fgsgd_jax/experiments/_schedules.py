from typing import Literal

import jax.numpy as jnp
import optax

import fgsgd_jax as fg

ScheduleName = Literal["cosine", "step", "eq4", "constant"]

# The one whose rates do not depend on how long the training is.
CONSTANT = "constant"

# r0 (1 + t/period)^-power is a tenth of r0 at t = T when the period is T/20: (1 + 20)^-¾ = 0.10. Eq. 4 holds for any
# period; one of a single step would leave hardly any rate for most of the training.
EQ4_POWER = 0.75
EQ4_PERIODS = 20


def schedule(name: ScheduleName, lr: float, steps: int) -> optax.Schedule:
    """The learning rate over a training of so many steps.

    Args:
        name: `cosine` (to zero), `step` (a tenth at half of the steps and again at three quarters), `eq4` (to a tenth,
            as the paper's convergence theorem wants it, by `fg.robbins_monro`) or `constant`.
        lr: the rate at the first step.
        steps: the length of the training.
    """
    match name:
        case "cosine":
            decay = optax.cosine_decay_schedule(lr, steps)
            # Optax compares the count with a float, which strict promotion of types refuses for an integer.
            return lambda count: decay(jnp.asarray(count, jnp.float32))
        case "step":
            return optax.piecewise_constant_schedule(lr, {steps // 2: 0.1, steps * 3 // 4: 0.1})
        case "eq4":
            return fg.robbins_monro(lr, EQ4_POWER, period=steps / EQ4_PERIODS)
        case "constant":
            return optax.constant_schedule(lr)


def warmed_up(rate: optax.Schedule, steps: int) -> optax.Schedule:
    """A schedule that rises from zero to itself over the first so many steps."""
    if not steps:
        return rate
    return lambda count: jnp.minimum((jnp.asarray(count, jnp.float32) + 1) / steps, 1) * rate(count)
