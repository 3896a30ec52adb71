"""Lines 5 to 7 of Algorithm 1 by the kernels of the platform that a program is compiled for, where it has any."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from .. import kernels
from ..groups import Bucket, Plan, buckets
from ..linalg import largest
from ..manifolds import compute_dtype
from . import _algorithm as algorithm
from ._algorithm import Descent, Step

Kernels = Literal["auto", "xla", "pallas"]
Lines = Callable[[Plan, Step], Descent]


def check_kernels(choice: str) -> None:
    """Raises for a choice that there is not."""
    if choice not in get_args(Kernels):
        raise ValueError(f"kernels={choice!r}: write one of {', '.join(map(repr, get_args(Kernels)))}")


def at_once(lines: Lines, plan: Plan, step: Step, choice: Kernels, nesterov: bool) -> Descent:
    """What `lines` result in, by kernels for all that the platform has kernels for, or only if it has (`"pallas"`)."""

    def by_lines(step: Step) -> Descent:
        return jax.tree.map(lambda found, wanted: found.astype(wanted.dtype), lines(plan, step), like)

    def refuse(step: Step) -> Descent:
        path = next(iter(plan.collections), "")
        raise ValueError(f"kernels='pallas': {path}: there are none for this platform; write kernels='auto'")

    def way(platform: str, is_whole: bool) -> Callable[[Step], Descent]:
        def by_kernels(step: Step) -> Descent:
            return _by_kernels(platform, lines, plan, step, choice == "pallas", nesterov, is_whole)

        return by_kernels

    like = _like(plan, step)
    if not plan.collections:
        return by_lines(step)
    served = any(
        _unserved(platform, bucket, step, nesterov) is None for platform in kernels.FORMS for bucket in buckets(plan)
    )
    if choice == "xla" or not (served or choice == "pallas"):
        return by_lines(step)
    step = step._replace(options=jax.tree.map(jnp.asarray, step.options))
    ways = {platform: functools.partial(way, platform) for platform in kernels.FORMS}
    return kernels.by_platform(refuse if choice == "pallas" else by_lines, ways, like, step)


def _like(plan: Plan, step: Step) -> Any:
    """The types of a descent."""
    points = {path: step.points[path] for path in plan.collections}
    moves = {path: jax.ShapeDtypeStruct(x.shape, compute_dtype(x.dtype)) for path, x in points.items()}
    figure = algorithm.no_figure(plan, points)
    momentum = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), step.momentum)
    refused = jax.ShapeDtypeStruct(figure.shape, bool)
    return Descent(moves, momentum, figure, figure, figure, refused)


def _by_kernels(
    platform: str, lines: Lines, plan: Plan, step: Step, only: bool, nesterov: bool, is_whole: bool
) -> Descent:
    """What the kernels of a platform serve by these, all else by `lines`."""
    layout = buckets(plan)
    reasons = [_unserved(platform, bucket, step, nesterov, is_whole) for bucket in layout]
    pairs = list(zip(layout, reasons, strict=True))
    if only:
        for bucket, reason in pairs:
            if reason:
                raise ValueError(f"kernels='pallas': {bucket.paths[0]}: {reason}; write kernels='auto'")
    rest = [bucket for bucket, reason in pairs if reason]
    parts = [(rest, lines(*_part(plan, step, rest)))] if rest else []
    for bucket, reason in pairs:
        if reason is None:
            parts.append(([bucket], _of_bucket(platform, *_part(plan, step, [bucket]), _layer(bucket, nesterov))))
    return _together(plan, step, parts)


def _unserved(platform: str, bucket: Bucket, step: Step, nesterov: bool, is_whole: bool = True) -> str | None:
    """Why a platform has no kernels for a bucket; None if it has."""
    if not is_whole:
        return "the program is for several devices"
    layer, (*grid, n, p) = _layer(bucket, nesterov), bucket.view.grid
    dtypes = {tree[path].dtype for path in bucket.paths for tree in (step.points, step.gradients)}
    return kernels.unserved(platform, layer, grid, n, p, *dtypes)


def _layer(bucket: Bucket, nesterov: bool) -> kernels.LayerType:
    return kernels.LayerType(bucket.kinds, bucket.grouping, bucket.members, nesterov)


def _part(plan: Plan, step: Step, own: Sequence[Bucket]) -> tuple[Plan, Step]:
    """The plan and the arrays of some buckets."""
    paths = [path for bucket in own for path in bucket.paths]
    pairs = zip(buckets(plan), range(len(plan)), strict=False)
    places = [place for bucket, place in pairs if bucket in own]

    def of(trees: Any) -> Any:
        if isinstance(trees, dict):
            return {path: trees[path] for path in trees if path in paths}
        return trees if trees is None else tuple(trees[place] for place in places)

    entries = {path: entry for path, entry in plan.entries.items() if path in paths}
    *arrays, options = step
    return Plan(entries, plan.seed), Step(*map(of, arrays), options)


def _of_bucket(platform: str, plan: Plan, step: Step, layer: kernels.LayerType) -> Descent:
    """One bucket's descent by kernels."""
    (bucket,) = buckets(plan)
    scalars = jnp.stack([jnp.asarray(number).astype(jnp.float32) for number in step.options])
    parameters = _planes(bucket, layer, step)
    if kernels.descends(platform, layer, parameters[0].x):
        found = [kernels.descend(platform, layer, scalars, each) for each in parameters]
        above, norm, refused, ratio = jnp.stack([each.figures for each in found], axis=1)
        share, refused = above / bucket.num_groups, refused > 0
    else:
        squares, refused = algorithm.refuse(plan, [kernels.measure(platform, layer, each) for each in parameters])
        zeta = algorithm.normalize(plan, step.groups, squares, step.options.rho, step.options.curvature)
        scales = kernels.unstack(zeta.inverse_zeta[0], restacked=True)
        pairs = zip(parameters, scales, strict=True)
        found = [kernels.move(platform, layer, scalars, each, scale) for each, scale in pairs]
        ratio = largest(jnp.stack([each.ratios for each in found]), 1)
        share, norm = zeta.zeta_share, zeta.grad_norm

    def by_path(tensors: Sequence[Any]) -> Any:
        pairs = zip(bucket.paths, tensors, strict=True)
        return {path: bucket.view.merge(kernels.matrices(tensor)) for path, tensor in pairs}

    momentum = None if step.momentum is None else by_path([each.momentum for each in found])
    return Descent(by_path([each.displacement for each in found]), momentum, share, norm, ratio, refused)


def _planes(bucket: Bucket, layer: kernels.LayerType, step: Step) -> list[kernels.Planes]:
    """What the kernels are given of each parameter of the only bucket."""

    def tensors(tree: Any) -> list[Any]:
        return [tree and kernels.planes(bucket.view.split(tree[path])) for path in bucket.paths]

    def values(stacks: Any, dtype: Any = None) -> list[Any]:
        if not stacks or isinstance(stacks[0], tuple):
            return [None] * len(bucket.paths)
        return kernels.unstack(stacks[0] if dtype is None else stacks[0].astype(dtype), restacked=True)

    columns = [tensors(step.points), tensors(step.gradients), tensors(step.momentum), values(step.kinds)]
    columns += [values(step.radii, jnp.float32), values(step.new_radii, jnp.float32)]
    columns.append(values(step.groups if layer.has_groups else None))
    return [kernels.Planes(*parts) for parts in zip(*columns, strict=True)]


def _together(plan: Plan, step: Step, parts: Sequence[tuple[Sequence[Bucket], Descent]]) -> Descent:
    """One descent of those of parts of the plan, the figures in the order of its buckets."""
    figures: dict[tuple[str, ...], list[Any]] = {}
    for own, (_, _, *columns) in parts:
        start = 0
        for bucket in own:
            end = start + len(bucket.paths)
            figures[bucket.paths] = [column[start:end] for column in columns]
            start = end
    in_order = zip(*(figures[bucket.paths] for bucket in buckets(plan)), strict=True)
    like = _like(plan, step)[2:]
    figures_ = [
        jnp.concatenate([part.astype(wanted.dtype) for part in column])
        for column, wanted in zip(in_order, like, strict=True)
    ]
    tensors = [{path: x for _, descent in parts for path, x in (descent[place] or {}).items()} for place in (0, 1)]
    return Descent(tensors[0], None if step.momentum is None else tensors[1], *figures_)
