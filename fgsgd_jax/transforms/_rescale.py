"""The rescaling of weights by ℜ = γ/λ."""

from typing import Any, Literal

import optax
from jaxtyping import Array

from ..groups import Plan, automatic, batches, buckets, from_paths, kinds_of
from ..manifolds import Mixture
from ._links import check_on_manifold, constrained, constrained_leaves, held, wider
from ._scale import Scale
from ._states import RescaleState


def rescale(
    plan: Plan,
    every: int | None = None,
    lambda_floor: float | None = None,
    max_change: float | Literal["auto"] | None = "auto",
    warmup: tuple[int, int] | None = None,
    radii: Literal["gamma", "fitted"] = "gamma",
) -> optax.GradientTransformationExtraArgs:
    """Sets the matrices that the displacements lead to to exactly their radius ℜ = γ/λ.

    It is the last link of every chain. The radii are its state: no radius is carried from step to step by weights,
    where round-off would walk it away.

    λ is the standard deviation of the features that enter a matrix, over an epoch. It is 1 in the first epoch, and for
    ever if `every` and `warmup` are None or `update` is given no `feature_moments`. `feature_moments` (of
    `fg.nnx.moments` or `fg.linen.observe`) cover what was seen since the last applied update. A matrix whose channels
    had no features, or constant ones, keeps its scale and is counted in `fg.metrics`.

    Updates are added to the weights. A matrix whose radius falls by a factor c keeps the round-off of what it was, c
    times as much of it relative to the new radius, until the next step brings it back.

    Args:
      plan: the plan of the parameters.
      every: applied updates in an epoch: after so many, ℜ changes. None: not after the warm-up.
      lambda_floor: smallest λ used. 1 guarantees ℜ ≤ γ and with it the norm bounds of Proposition 1; None uses λ as
        measured.
      max_change: largest factor by which radii change at once, None for none. Without normalization layers, changing
        all radii together over-corrects. If the plan knows the order of the layers (it was given a trace), each λ is
        corrected by the changes of the layers above it, and the limit concerns the channels of a layer relative to
        each other; `"auto"` is 1 + 4/(layers between normalizations) then, and 2 otherwise.
      warmup: (updates, until): change every `updates` applied updates until `until` of them were applied. With a
        limited change it lets the scales of a deep network without normalization settle early; with `every=None` they
        stay then, without which such a network hardly trains: each change is one of the function that it computes.
      radii: of the first epoch: `"gamma"`, or `"fitted"` for those of the parameters that `init` is given, as
        `fg.nearest(..., radii="fitted")` leaves them; they then take the place of γ.

    Returns:
      A transformation whose `update` needs `params`, takes `feature_moments`, and expects displacements, as `retract`
      makes them.

    Raises:
      ValueError: in `init` outside jit, if parameters are off their manifolds; for options that make no sense.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 4 and eq. 2.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.rescale(plan, every=1)
      >>> count, mean = jnp.full(2, 10.0), jnp.zeros(2)
      >>> moments = {"w": fg.FeatureMoments(count, mean, m2=2.25 * count)}  # λ = 1.5
      >>> still = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(still, tx.init(params), params, feature_moments=moments)
      >>> [round(x, 6) for x in (params["w"] + updates["w"]).ravel().tolist()]  # ℜ = 1/1.5
      [0.666667, 0.0]
      >>> round(float(fg.radii(state)["w"][0, 0]), 6)
      0.666667
    """
    layout = buckets(plan)
    joined = batches(plan, layout)
    scale = Scale(plan, layout, every, lambda_floor, max_change, warmup, radii)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.rescale")
        check_on_manifold(params, plan, "fg.rescale", radii)
        kinds = kinds_of(plan, layout)
        return RescaleState(kinds, *scale.init(kinds, leaves))

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.rescale")
        state, leaves = held(state, constrained_leaves(updates, plan, "updates", "fg.rescale"), plan)
        like = constrained(plan, points), state.scale
        displacements, rescaled = automatic(rescaled_points, points, leaves, state, feature_moments, like=like)
        return from_paths(leaves | displacements, updates), RescaleState(state.kinds, *rescaled)

    def rescaled_points(points: dict[str, Array], leaves: dict[str, Array], state: Any, feature_moments: Any) -> Any:
        rescaled, displacements = scale.advance(state.scale, state.kinds, feature_moments), {}
        for batch in joined:
            kind, radius = (batch.flat(batch.own(values)) for values in (state.kinds.values, rescaled.radii.values))
            x = batch.stack(points)
            y = Mixture(batch.kinds, kind, radius).rescale(x + batch.stack(leaves))
            displacements |= batch.unstack(y - x, wider(points, leaves))
        return displacements, rescaled

    return optax.GradientTransformationExtraArgs(init, update)
