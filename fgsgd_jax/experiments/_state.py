from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int32, UInt32


class Zeta(NamedTuple):
    """What the normalization by ζ did to one parameter since the epoch began."""

    share: Float[Array, ""]
    """The share of groups with ζ > 1, summed over the steps."""
    grad_norm: Float[Array, ""]
    """The largest R of eq. 6."""
    step_ratio: Float[Array, ""]
    """The largest ‖v‖/s: a step's length over its manifold's radius."""


class Totals(NamedTuple):
    """Sums over the epoch so far; in the state, so that a resumed epoch reports what an undisturbed one does."""

    predictions: Int32[Array, ""]
    """images, or bytes of text"""
    wrong: Int32[Array, ""]
    loss: Float[Array, ""]
    zeta: dict[str, Zeta]


class TrainState(NamedTuple):
    """All that the next step depends on; saving it and nothing else resumes bit for bit."""

    step: Int32[Array, ""]
    seed: UInt32[Array, ""]
    lr: Float[Array, ""]
    """The learning rate at the first step: data, so that a search over rates compiles once."""
    params: dict[str, Any]
    stats: dict[str, Any]
    opt_state: Any
    totals: Totals


class Glance(NamedTuple):
    """What is reported of a state: small, on the device until somebody reads it."""

    step: Int32[Array, ""]
    totals: Totals
    violation: dict[str, Array]
    """By parameter."""


class Figures(NamedTuple):
    """An epoch so far in a few numbers; those of the constraints are `None` for the baseline."""

    loss: float
    error: float
    """In percent."""
    violation: float | None = None
    zeta_share: float | None = None
    grad_norm: float | None = None
    step_ratio: float | None = None
