"""The radii ℜ = γ/λ: what they start from, and how λ changes them at the end of an epoch."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..features import FeatureMoments, is_moments, matrix_moments, merge_moments
from ..groups import Bucket, Plan, Stacked, automatic, by_path, gammas
from ..linalg import norm
from ..manifolds import Mixture

# Changing all radii at once from λ measured together over-corrects where no normalization separates the layers; with
# this limit plain ReLU chains settle (after 20 changes at 20 layers, 49 at 50).
_LIMIT = 2.0
# Where the order of the layers is known, what they change in common is corrected exactly, but the effect of a changed
# profile over the channels on the layers below is not known: it is limited so that it stays within a small factor over
# a run of layers without normalization, whatever its length. Measured on ReLU chains of 10, 20 and 50 layers.
_PROFILE_LIMIT = 4.0


class LambdaState(NamedTuple):
    """What λ needs between its changes: γ, the moments so far, and counts of applied updates."""

    gamma: tuple[Float[Array, "layers inputs outputs"], ...]
    moments: tuple[FeatureMoments, ...]
    since_change: Int[Array, ""]
    total: Int[Array, ""]
    unfed: Stacked


class ScaleState(NamedTuple):
    """ℜ of every matrix, and the state of λ (None while λ = 1)."""

    radii: Stacked
    lambdas: LambdaState | None


@dataclasses.dataclass(frozen=True)
class Scale:
    """The options of `rescale`, and the changes of ℜ that follow from them; see `rescale` for their meaning."""

    plan: Plan
    layout: tuple[Bucket, ...]
    every: int | None = None
    lambda_floor: float | None = None
    max_change: float | Literal["auto"] | None = "auto"
    warmup: tuple[int, int] | None = None
    radii: Literal["gamma", "fitted"] = "gamma"

    def __post_init__(self):
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise ValueError(f"every={self.every!r}: give the applied updates of an epoch, or None for λ = 1")
        if self.lambda_floor is not None and not self.lambda_floor > 0:
            raise ValueError(f"lambda_floor={self.lambda_floor!r}: give a positive number, or None for no floor")
        if self.max_change not in ("auto", None) and not self.max_change > 1:
            raise ValueError(f"max_change={self.max_change!r}: give a factor above 1, 'auto', or None for no limit")
        if self.warmup is not None and not (len(self.warmup) == 2 and min(self.warmup) >= 1):
            raise ValueError(f"warmup={self.warmup!r}: give (applied updates per change, applied updates it lasts)")
        if self.radii not in ("gamma", "fitted"):
            raise ValueError(f"radii={self.radii!r}: write 'gamma' or 'fitted'")

    @property
    def measures(self) -> bool:
        """Whether λ is ever measured."""
        return self.every is not None or self.warmup is not None

    def init(self, kinds: Stacked, leaves: dict[str, Any]) -> ScaleState:
        """The state at λ = 1."""
        paths = tuple(bucket.paths for bucket in self.layout)
        radii = tuple(
            automatic(functools.partial(_fitted, bucket), kind, leaves, like=jnp.zeros(()))
            if self.radii == "fitted"
            else jnp.asarray(gammas(self.plan, bucket, bucket.dtype(leaves)))
            for bucket, kind in zip(self.layout, kinds.values, strict=True)
        )
        if not self.measures:
            return ScaleState(Stacked(radii, paths), None)
        empty = tuple(_empty(radius.shape, radius.dtype) for radius in radii)
        unfed = Stacked(tuple(jnp.zeros(len(layers), jnp.int32) for layers in paths), paths)
        # No buffer twice: a donated one must not be handed in twice.
        gamma = tuple(jnp.copy(radius) for radius in radii)
        since_change, total = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return ScaleState(Stacked(radii, paths), LambdaState(gamma, empty, since_change, total, unfed))

    def advance(self, state: ScaleState, kinds: Stacked, feature_moments: Any) -> ScaleState:
        """The state after one more applied update; the radii change if it was the last of the epoch."""
        if state.lambdas is None:
            return state
        lambdas = state.lambdas
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
        never = jnp.zeros((), bool)
        due = never if self.every is None else lambdas.since_change >= self.every
        if self.warmup is None:
            return due
        updates, until = self.warmup
        return jnp.where(lambdas.total <= until, lambdas.since_change >= updates, due)

    def _accumulated(self, moments: tuple[FeatureMoments, ...], feature_moments: Any) -> tuple[FeatureMoments, ...]:
        given = by_path(feature_moments, is_leaf=is_moments)
        if not any(path in given for bucket in self.layout for path in bucket.paths):
            raise ValueError(
                f"feature_moments has no path of a constrained parameter: it has {list(given)[:8]}, the plan has "
                f"{[path for bucket in self.layout for path in bucket.paths][:8]}. Pass fg.nnx.moments(model) of an "
                "observed model, or the collection 'feature_moments' of fg.linen.observe(module).apply"
            )
        merged = []
        for bucket, before in zip(self.layout, moments, strict=True):
            parts = [self._of_layer(bucket, path, given.get(path), before.mean.dtype) for path in bucket.paths]
            batch = jax.tree.map(lambda *layers: jnp.stack(layers), *parts)
            after = merge_moments(before, batch)
            # One batch of features that are no numbers must not cost the epoch its λ.
            usable = jnp.isfinite(after.mean) & jnp.isfinite(after.m2)
            merged.append(jax.tree.map(functools.partial(jnp.where, usable), after, before))
        return tuple(merged)

    def _of_layer(self, bucket: Bucket, path: str, part: Any, dtype: jnp.dtype) -> FeatureMoments:
        if part is None:
            return _empty(bucket.view.grid[:2], dtype)
        if not is_moments(part):
            raise TypeError(f"feature_moments[{path!r}] is {type(part).__name__}; it must be a FeatureMoments")
        try:
            pooled = matrix_moments(part, bucket.view, bucket.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        # The moments of all layers of a bucket are stacked, whatever axes they came from.
        return FeatureMoments(pooled.count.astype(dtype), pooled.mean.astype(dtype), pooled.m2.astype(dtype))

    def _changed(self, state: ScaleState, kinds: Stacked) -> ScaleState:
        """New radii γ/λ from the moments, which start again from nothing."""
        assert state.lambdas is not None
        lambdas, limit = state.lambdas, self._limit
        layers = [
            _Layers.of(bucket, kind, gamma, radius, moments, limit if self._ordered else None)
            for bucket, kind, gamma, radius, moments in zip(
                self.layout, kinds.values, lambdas.gamma, state.radii.values, lambdas.moments, strict=True
            )
        ]
        if self._ordered:
            radii = [part.changed(common) for part, common in zip(layers, self._common_changes(layers), strict=True)]
        else:
            radii = [part.changed_alone(limit) for part in layers]
        if self.lambda_floor is not None:
            bounds = (gamma / self.lambda_floor for gamma in lambdas.gamma)
            radii = [jnp.minimum(radius, bound) for radius, bound in zip(radii, bounds, strict=True)]
        paths = state.radii.paths
        lambdas = lambdas._replace(
            moments=jax.tree.map(jnp.zeros_like, lambdas.moments),
            since_change=jnp.zeros_like(lambdas.since_change),
            unfed=Stacked(tuple(part.unfed for part in layers), paths),
        )
        radii = (jnp.where(part.usable, radius, part.radius) for part, radius in zip(layers, radii, strict=True))
        return ScaleState(Stacked(tuple(radii), paths), lambdas)

    @property
    def _ordered(self) -> bool:
        return bool(self.plan.order)

    @property
    def _limit(self) -> float | None:
        if self.max_change != "auto":
            return self.max_change
        if not self._ordered:
            return _LIMIT
        runs = " ".join("#" if path is None else "." for path in self.plan.order).replace(" ", "").split("#")
        longest = max(len(run) for run in runs)
        return 1 + _PROFILE_LIMIT / longest if longest > 1 else None

    def _common_changes(self, layers: Sequence["_Layers"]) -> list[Float[Array, "layers"]]:
        """The factor that all radii of a layer share, corrected for the changes of the layers above it.

        λ was measured under the old radii. Where no normalization separates the layers, the features of a layer grow
        with those of the layer above it, that is by the ratio of the root mean squares of ℜλ after and before it.
        """
        ones = [jnp.ones_like(part.common) for part in layers]
        order = self.plan.order
        indices = np.array([self._places[path] for path in order if path is not None])
        resets = np.array([n > 0 and order[n - 1] is None for n, path in enumerate(order) if path is not None])
        dtype = jnp.result_type(*(one.dtype for one in ones))
        fed, before, common, shaped, gamma, radius = (
            jnp.concatenate([getattr(part, name).astype(dtype) for part in layers])
            for name in ("fed", "before", "common", "shaped", "rms_gamma", "rms_radius")
        )
        highest = jnp.full_like(common, jnp.inf) if self.lambda_floor is None else gamma / self.lambda_floor / radius

        def through(upstream, layer):
            reset, fed, before, common, shaped, highest = layer
            upstream = jnp.where(reset, 1, upstream)
            common = jnp.where(fed, jnp.minimum(common / upstream, highest), common)
            return jnp.where(fed, shaped / before * common, 1) * upstream, common

        in_order = (values[indices] for values in (fed > 0, before, common, shaped, highest))
        _, changes = lax.scan(through, jnp.ones((), dtype), (jnp.asarray(resets), *in_order))
        ends = np.cumsum([len(one) for one in ones])
        parts = jnp.split(common.at[indices].set(changes), ends[:-1])
        return [part.astype(one.dtype) for part, one in zip(parts, ones, strict=True)]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """Position of each path in the concatenation of all buckets' layers."""
        return {path: place for place, path in enumerate(path for bucket in self.layout for path in bucket.paths)}


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
    def of(
        bucket: Bucket,
        kind: Array | None,
        gamma: Array,
        radius: Array,
        moments: FeatureMoments,
        limit: float | None,
    ) -> "_Layers":
        std = moments.std
        # Below round-off of the layer's largest λ a channel is dead: its scale stays instead of growing without bound.
        finite = jnp.isfinite(std)
        dead = jnp.finfo(std.dtype).eps ** 0.5 * jnp.max(jnp.where(finite, std, 0), axis=(1, 2), keepdims=True)
        fed = (moments.count > 0) & (std > dead) & finite
        constrained = Mixture(bucket.kinds, kind).constrained(jnp.ones_like(std)) > 0
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


def _fitted(bucket: Bucket, kind: Array | None, leaves: dict[str, Array]) -> Array:
    return Mixture(bucket.kinds, kind).radius_of(bucket.stack(leaves))


def _empty(shape: tuple[int, ...], dtype: jnp.dtype) -> FeatureMoments:
    # Three arrays: a donated buffer must not be handed in twice.
    return FeatureMoments(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
