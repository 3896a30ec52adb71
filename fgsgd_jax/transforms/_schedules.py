"""Learning rates that the convergence theorem asks for."""

import jax.numpy as jnp
import optax


def robbins_monro(r0: float, power: float = 0.75, period: float = 1.0) -> optax.Schedule:
    """The learning rates r_t = r0 (1 + t/period)^-power, whose sum diverges and whose sum of squares converges: eq. 4.

    Args:
      r0: learning rate of the first step.
      power: in (½, 1]: at ½ and below, the sum of squares diverges; above 1, the sum converges.
      period: steps until the rate has fallen by the factor 2^power.

    Returns:
      A schedule for any Optax optimizer.

    Raises:
      ValueError: a power outside (½, 1], or a rate or period that is not positive.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, eq. 4; Robbins & Monro 1951.

    Example:
      >>> import fgsgd_jax as fg
      >>> float(fg.robbins_monro(1.0, power=1.0)(3))
      0.25
    """
    if not 0.5 < power <= 1:
        raise ValueError(f"power={power}: eq. 4 holds for powers above 0.5 and up to 1")
    if r0 <= 0 or period <= 0:
        raise ValueError(f"r0={r0}, period={period}: both must be positive")
    return lambda step: r0 * (1.0 + jnp.asarray(step, jnp.float32) / period) ** -power
