"""The radii ℜ = γ/λ: what they start from, and how λ changes them at the end of an epoch."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..features import FeatureMoments, is_moments, matrix_moments, merge_moments
from ..groups import Bucket, Plan, Stacks, automatic, by_path, gammas, with_radius
from ..linalg import norm
from ..manifolds import Mixture
from ._algorithm import mixtures, radii_of, to_buckets
from ._rescaling import InitialRadii, Rescaling
from ._states import LambdaState, Moments

# Changing all radii at once from λ measured together over-corrects where no normalization separates the layers; with
# this limit plain ReLU chains settle (after 20 changes at 20 layers, 49 at 50).
_LIMIT = 2.0
# Where the order of the layers is known, what they change in common is corrected exactly, but the effect of a changed
# profile over the channels on the layers below is not known: it is limited so that it stays within a small factor over
# a run of layers without normalization, whatever its length. Measured on ReLU chains of 10, 20 and 50 layers.
_PROFILE_LIMIT = 4.0


class ScaleState(NamedTuple):
    """ℜ of every matrix, and the state of λ (None while λ = 1)."""

    radii: Stacks
    lambdas: LambdaState | None


@dataclasses.dataclass(frozen=True)
class Scale:
    """The changes of ℜ of a plan's weights that follow from the options."""

    plan: Plan
    rescaling: Rescaling
    initial_radii: InitialRadii

    def init(self, kinds: Stacks, leaves: dict[str, Any]) -> ScaleState:
        """The state at λ = 1; of a tree of placeholders, its structure."""
        radii = gammas(self.plan, leaves)
        if self.initial_radii == "fitted" and leaves:
            if shapes := [path for path in self.plan.collections if isinstance(leaves[path], jax.ShapeDtypeStruct)]:
                raise TypeError(
                    f"{shapes[0]}: initial_radii='fitted' reads the weights, this is {leaves[shapes[0]]}; trace the "
                    "call, jax.eval_shape(tx.init, params), to find shapes alone"
                )
            own = {path: leaves[path] for path in self.plan.collections}

            def fitted(kinds: Stacks, own: dict[str, Any]) -> Stacks:
                return radii_of(self.plan, kinds, *to_buckets(self.plan, own))

            radii = tuple(map(with_radius, automatic(fitted, kinds, own, like=radii)))
        if not self.rescaling.measures:
            return ScaleState(radii, None)
        # No buffer twice: a donated one must not be handed in twice.
        gamma = jax.tree.map(jnp.copy, radii)
        empty = tuple(_empty(radius.shape, radius.dtype) for radius in gamma)
        unfed = jnp.zeros(len(self.plan.collections), jnp.int32)
        since_change, total = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return ScaleState(radii, LambdaState(gamma, empty, since_change, total, unfed))

    def advance(self, state: ScaleState, kinds: Stacks, feature_moments: Any) -> ScaleState:
        """The state with λ after one more applied update; the radii change if it was the last of the epoch."""
        return automatic(self._advanced, state, kinds, feature_moments, like=state)

    def _advanced(self, state: ScaleState, kinds: Stacks, feature_moments: Any) -> ScaleState:
        lambdas = state.lambdas
        assert lambdas is not None
        if feature_moments is not None:
            lambdas = lambdas._replace(moments=self._accumulated(lambdas.moments, feature_moments))
        lambdas = lambdas._replace(since_change=lambdas.since_change + 1, total=lambdas.total + 1)
        return lax.cond(
            self._due(lambdas),
            lambda state: self._changed(state, kinds),
            lambda state: state,
            ScaleState(state.radii, lambdas),
        )

    def _due(self, lambdas: LambdaState) -> Bool[Array, ""]:
        every, warmup = self.rescaling.every, self.rescaling.warmup
        due = jnp.zeros((), bool) if every is None else lambdas.since_change >= every
        if warmup is None:
            return due
        updates, until = warmup
        return jnp.where(lambdas.total <= until, lambdas.since_change >= updates, due)

    def _accumulated(self, moments: tuple[Moments, ...], feature_moments: Any) -> tuple[Moments, ...]:
        given = by_path(feature_moments, is_leaf=is_moments)
        if not any(path in given for path in self.plan.collections):
            raise ValueError(
                f"feature_moments has no path of a constrained parameter: it has {list(given)[:8]}, the plan has "
                f"{list(self.plan.collections)[:8]}. Pass fg.nnx.moments(model) of an "
                "observed model, or the collection 'feature_moments' of fg.linen.observe(module).apply"
            )
        merged = []
        for bucket, before in zip(self.plan.buckets, moments, strict=True):
            parts = [self._of_parameter(bucket, path, given.get(path), before.mean.dtype) for path in bucket.paths]
            count, mean, m2 = map(jnp.stack, zip(*parts, strict=True))
            both = merge_moments(FeatureMoments(*before), FeatureMoments(count, mean, m2))
            after = Moments(both.count, both.mean, both.m2)
            # One batch of features that are no numbers must not cost the epoch its λ.
            usable = jnp.isfinite(after.mean) & jnp.isfinite(after.m2)
            merged.append(jax.tree.map(functools.partial(jnp.where, usable), after, before))
        return tuple(merged)

    def _of_parameter(self, bucket: Bucket, path: str, part: Any, dtype: jnp.dtype) -> Moments:
        if part is None:
            return _empty(bucket.grid, dtype)
        if not is_moments(part):
            raise TypeError(f"feature_moments[{path!r}] is {type(part).__name__}; it must be a FeatureMoments")
        try:
            pooled = matrix_moments(part, bucket.view, bucket.shape, len(bucket.layers))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return Moments(*(x.astype(dtype) for x in (pooled.count, pooled.mean, pooled.m2)))

    def _changed(self, state: ScaleState, kinds: Stacks) -> ScaleState:
        """New radii γ/λ from the moments, which start again from nothing."""
        assert state.lambdas is not None
        lambdas, limit = state.lambdas, self._limit

        def flat(stacked: Array) -> Array:
            """Values of the matrices of all layers of all parameters."""
            return stacked.reshape(-1, *stacked.shape[-2:])

        # Of each bucket: of a bucket of one manifold the kinds have no leaves.
        kinds, gamma, before, moments = jax.tree.map(flat, (kinds, lambdas.gamma, state.radii, lambdas.moments))
        own = mixtures(self.plan, kinds), gamma, before, moments
        layers = [_Layers.of(*parts, limit if self.plan.order else None) for parts in zip(*own, strict=True)]
        if self.plan.order:
            radii = [part.changed(common) for part, common in zip(layers, self._common_changes(layers), strict=True)]
        else:
            radii = [part.changed_alone(limit) for part in layers]
        if (floor := self.rescaling.floor) is not None:
            radii = [jnp.minimum(radius, most / floor) for radius, most in zip(radii, gamma, strict=True)]
        unfed = [
            jnp.sum(part.unfed.reshape(len(bucket.paths), -1), axis=1, dtype=jnp.int32)
            for bucket, part in zip(self.plan.buckets, layers, strict=True)
        ]
        lambdas = lambdas._replace(
            moments=jax.tree.map(jnp.zeros_like, lambdas.moments),
            since_change=jnp.zeros_like(lambdas.since_change),
            unfed=jnp.concatenate(unfed),
        )
        changed = (
            jnp.where(part.usable, radius, part.radius).reshape(stacked.shape)
            for stacked, part, radius in zip(state.radii, layers, radii, strict=True)
        )
        return ScaleState(tuple(changed), lambdas)

    @property
    def _limit(self) -> float | None:
        if self.rescaling.max_change != "auto":
            return self.rescaling.max_change
        if not self.plan.order:
            return _LIMIT
        runs = "".join("#" if path is None else "." for path in self.plan.order).split("#")
        longest = max(len(run) for run in runs)
        return 1 + _PROFILE_LIMIT / longest if longest > 1 else None

    def _common_changes(self, layers: Sequence["_Layers"]) -> list[Float[Array, "layers"]]:
        """The factor that all radii of a layer share, corrected for the changes of the layers above it.

        λ was measured under the old radii. Where no normalization separates the layers, the features of a layer grow
        with those of the layer above it, that is by the ratio of the root mean squares of ℜλ after and before it.
        """
        order = self.plan.order
        # The layers that a parameter stacks follow each other.
        met = [(path, n > 0 and order[n - 1] is None) for n, path in enumerate(order) if path is not None]
        indices = np.array([place for path, _ in met for place in self._places[path]])
        resets = np.array([reset and first == 0 for path, reset in met for first in range(len(self._places[path]))])
        dtype = jnp.result_type(*(part.common for part in layers))
        fed, before, common, shaped, gamma, radius = (
            jnp.concatenate([getattr(part, name).astype(dtype) for part in layers])
            for name in ("fed", "before", "common", "shaped", "rms_gamma", "rms_radius")
        )
        floor = self.rescaling.floor
        highest = jnp.full_like(common, jnp.inf) if floor is None else gamma / floor / radius

        def through(upstream, layer):
            reset, fed, before, common, shaped, highest = layer
            upstream = jnp.where(reset, 1, upstream)
            common = jnp.where(fed, jnp.minimum(common / upstream, highest), common)
            return jnp.where(fed, shaped / before * common, 1) * upstream, common

        in_order = (values[indices] for values in (fed > 0, before, common, shaped, highest))
        _, found = lax.scan(through, jnp.ones((), dtype), (jnp.asarray(resets), *in_order))
        ends = np.cumsum([len(part.common) for part in layers])
        changes = jnp.split(common.at[indices].set(found), ends[:-1])
        return [change.astype(part.common.dtype) for change, part in zip(changes, layers, strict=True)]

    @functools.cached_property
    def _places(self) -> dict[str, range]:
        """Positions of each parameter's layers in the concatenation of all buckets'."""
        places, start = {}, 0
        for bucket in self.plan.buckets:
            for path in bucket.paths:
                places[path] = range(start, start + math.prod(bucket.layers))
                start = places[path].stop
        return places


@dataclasses.dataclass(frozen=True)
class _Layers:
    """One bucket at a change of its radii from ℜ to ℜ · common · profile, which without limits is γ/λ.

    `common` is the factor of a layer that takes the root mean square of ℜλ (`before`) to that of γ; the profile is what
    remains for each matrix. `shaped` is the root mean square of ℜλ · profile, with the profile as it is limited.
    """

    radius: Float[Array, "layers inputs outputs"]
    profile: Float[Array, "layers inputs outputs"]
    usable: Bool[Array, "layers inputs outputs"]
    fed: Bool[Array, "layers"]
    before: Float[Array, "layers"]
    common: Float[Array, "layers"]
    shaped: Float[Array, "layers"]
    rms_gamma: Float[Array, "layers"]
    rms_radius: Float[Array, "layers"]
    unfed: Int[Array, "layers"]

    @staticmethod
    def of(mixture: Mixture, gamma: Array, radius: Array, moments: Moments, limit: float | None) -> "_Layers":
        """The layers at the radii ℜ with the moments of their features."""
        std = FeatureMoments(*moments).std
        # Below round-off of the layer's largest λ a channel is dead: its scale stays instead of growing without bound.
        finite = jnp.isfinite(std)
        dead = jnp.finfo(std.dtype).eps ** 0.5 * jnp.max(jnp.where(finite, std, 0), axis=(1, 2), keepdims=True)
        fed = (moments.seen > 0) & (std > dead) & finite
        constrained = mixture.constrained(jnp.ones_like(std)) > 0
        usable = constrained & fed
        std = jnp.where(usable, std, 1)

        def rms(values):
            # Where no matrix is usable nothing changes, whatever the means are.
            count = jnp.sum(usable, axis=(1, 2), dtype=values.dtype)
            length = norm(jnp.where(usable, values, 0), axis=(1, 2))
            return jnp.where(count > 0, length / jnp.sqrt(jnp.maximum(count, 1)), 1)

        before, rms_gamma = rms(radius * std), rms(gamma)
        common = rms_gamma / before
        profile = gamma / (radius * std) / common[:, None, None]
        if limit is not None:
            profile = jnp.clip(profile, 1 / limit, limit)
        return _Layers(
            radius=radius,
            profile=profile,
            usable=usable,
            fed=jnp.any(usable, axis=(1, 2)),
            before=before,
            common=common,
            shaped=rms(radius * std * profile),
            rms_gamma=rms_gamma,
            rms_radius=rms(radius),
            unfed=jnp.sum(constrained & ~fed, axis=(1, 2), dtype=jnp.int32),
        )

    def changed(self, common: Float[Array, "layers"]) -> Float[Array, "layers inputs outputs"]:
        """The radii after a change by `common` and the profile."""
        return self.radius * common[:, None, None] * self.profile

    def changed_alone(self, limit: float | None) -> Float[Array, "layers inputs outputs"]:
        """The radii after a change of each by `limit` at most, whatever happens in other layers."""
        radii = self.changed(self.common)
        return radii if limit is None else jnp.clip(radii, self.radius / limit, self.radius * limit)


def _empty(shape: tuple[int, ...], dtype: jnp.dtype) -> Moments:
    # Three arrays: a donated buffer must not be handed in twice.
    return Moments(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
