"""Lines 5 to 7 of Algorithm 1 by the kernels of the platform that a program is compiled for, where it has any."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from .. import kernels
from ..groups import Bucket, Plan, by_path
from ..linalg import largest
from . import _algorithm as algorithm
from ._algorithm import Descent, Step
from ._states import ByPath

Kernels = Literal["auto", "xla", "pallas"]
Lines = Callable[[Plan, Step], Descent]


def check_kernels(choice: str) -> None:
    """Raises for a choice that there is not."""
    if choice not in get_args(Kernels):
        raise ValueError(f"kernels={choice!r}: write one of {', '.join(map(repr, get_args(Kernels)))}")


def without_kernels(plan: Plan, step: Step) -> Descent:
    """The lines where `"pallas"` is the choice, and the platform has no kernels."""
    reason = "there are none for this platform, nor under jax.vmap, nor for derivatives"
    raise ValueError(_refusal(next(iter(plan.collections)), reason))


def stated_shardings(points: ByPath, stated: Any) -> dict[str, NamedSharding]:
    """How the parameters lie on a mesh as the user says, by path: one sharding for all, or a tree of them."""
    every = dict.fromkeys(points, stated) if isinstance(stated, Sharding) else by_path(stated)
    for path, sharding in every.items():
        if path not in points or not isinstance(sharding, Sharding):
            raise ValueError(
                f"fg.fgsgd: shardings has {sharding} at {path!r}; give a NamedSharding(mesh, spec) for all parameters, "
                "or a tree of them like the parameters"
            )
    # Others lie on one device, or as nobody can say.
    return {path: sharding for path, sharding in every.items() if isinstance(sharding, NamedSharding)}


class AtOnce(NamedTuple):
    """The lines of a plan by the kernels that a platform has for a program, and as they are where it has none.

    `choice` is that of the user: with `"pallas"` a leaf without kernels is an error. `like` are the types of the
    result; `shardings` are those that are known, of the leaves by path.
    """

    platform: str
    lines: Lines
    plan: Plan
    like: Descent
    choice: Kernels
    nesterov: bool
    shardings: dict[str, NamedSharding]
    program: kernels.Program

    def __call__(self, step: Step) -> Descent:
        reasons = {bucket: self.unserved(bucket, step) for bucket in self.plan.buckets}
        rest = [bucket for bucket, reason in reasons.items() if reason]
        if rest and self.choice == "pallas":
            raise ValueError(_refusal(rest[0].paths[0], str(reasons[rest[0]])))
        parts = [(rest, self.lines(*_part(self.plan, step, rest)))] if rest else []
        parts += [
            ([bucket], _of_bucket(self, *_part(self.plan, step, [bucket])))
            for bucket, reason in reasons.items()
            if not reason
        ]
        return _together(self.plan, self.like, parts)

    def unserved(self, bucket: Bucket, step: Step) -> str | None:
        """Why there are no kernels for a bucket; None if there are."""
        if self.program.is_shared and (reason := self.lost(bucket)):
            return reason
        *grid, n, p = bucket.view.grid
        dtypes = {tree[path].dtype for path in bucket.paths for tree in (step.points, step.gradients)}
        return kernels.unserved(self.platform, self.program, self.layer(bucket), grid, n, p, *dtypes)

    def layer(self, bucket: Bucket) -> kernels.LayerType:
        return kernels.LayerType(bucket.kinds, bucket.grouping, bucket.members, self.nesterov)

    def lost(self, bucket: Bucket) -> str | None:
        """Why kernels cannot take the part of each device; None if they can."""
        if any(path not in self.shardings for path in bucket.paths):
            return (
                "the program is for several devices, and nothing says how the weights lie on them: give the axes of "
                "the mesh the type Explicit, or pass shardings="
            )
        own = [self.shardings[path] for path in bucket.paths]
        if any(bucket.grid_spec(sharding.spec) is None for sharding in own):
            return "entries of one matrix, or parts of several axes of the grid, lie on different devices"
        if len({sharding.mesh for sharding in own}) > 1:
            return "parameters of one shape lie on different meshes"
        return None

    def place(self, bucket: Bucket) -> kernels.Place | None:
        """Where a bucket lies in a program for several devices."""
        if not self.program.is_shared:
            return None
        own = [self.shardings[path] for path in bucket.paths]
        # In the context of explicit axes a mesh of automatic ones was made.
        mesh = own[0].mesh if jax.sharding.get_abstract_mesh().empty else None
        return kernels.Place(mesh, [bucket.grid_spec(sharding.spec) for sharding in own])


def _refusal(path: str, reason: str) -> str:
    return f"kernels='pallas': {path}: {reason}; or write kernels='auto'"


def _part(plan: Plan, step: Step, own: Sequence[Bucket]) -> tuple[Plan, Step]:
    """The plan and the arrays of some buckets."""
    paths = {path for bucket in own for path in bucket.paths}
    places = [place for place, bucket in enumerate(plan.buckets) if bucket in own]

    def of(trees: Any) -> Any:
        if isinstance(trees, dict):
            return {path: trees[path] for path in trees if path in paths}
        return trees if trees is None else tuple(trees[place] for place in places)

    entries = {path: entry for path, entry in plan.entries.items() if path in paths}
    arrays = {name: of(trees) for name, trees in step._asdict().items() if name != "options"}
    return Plan(entries, plan.seed), step._replace(**arrays)


def _of_bucket(at_once: AtOnce, plan: Plan, step: Step) -> Descent:
    """One bucket's descent by kernels."""
    (bucket,) = plan.buckets
    platform, layer, place = at_once.platform, at_once.layer(bucket), at_once.place(bucket)
    scalars = jnp.stack([jnp.asarray(number).astype(jnp.float32) for number in step.options])
    parameters = _planes(at_once, bucket, step)
    if kernels.descends(platform, layer, parameters, place):
        found = kernels.descend(platform, layer, scalars, parameters, place)
        above, norm, refused, ratio = jnp.concatenate([each.figures for each in found]).reshape(-1, 4).T
        share, refused = above / bucket.num_groups, refused > 0
    else:
        norms = kernels.measure(platform, layer, parameters, place)
        squares, refused = algorithm.refuse([jnp.stack(norms)])
        zeta = algorithm.normalize(plan, step.groups, squares, step.options.rho, step.options.curvature)
        scales = kernels.unstack(zeta.inverse_zeta[0])
        found = kernels.move(platform, layer, scalars, parameters, scales, place)
        ratio = largest(jnp.stack([each.ratios for each in found]), 1)
        share, norm = zeta.zeta_share, zeta.grad_norm

    def tensors(name: str) -> Any:
        pairs = zip(bucket.paths, found, strict=True)
        return {path: bucket.view.merge(kernels.matrices(getattr(each, name))) for path, each in pairs}

    momentum = None if step.momentum is None else tensors("momentum")
    return Descent(tensors("displacement"), momentum, share, norm, ratio, refused)


def _planes(at_once: AtOnce, bucket: Bucket, step: Step) -> list[kernels.Planes]:
    """What the kernels are given of each parameter of the only bucket."""

    def tensors(tree: Any) -> list[Any]:
        split: Any = bucket.view.split
        return [tree and kernels.planes(split(tree[path])) for path in bucket.paths]

    def values(stacks: Any, dtype: Any = None) -> list[Any]:
        if not stacks or isinstance(stacks[0], tuple):
            return [None] * len(bucket.paths)
        stacked = stacks[0] if dtype is None else stacks[0].astype(dtype)
        return kernels.by_parameter(at_once.platform, at_once.program, stacked)

    columns = [tensors(step.points), tensors(step.gradients), tensors(step.momentum), values(step.kinds)]
    columns += [values(step.radii, jnp.float32), values(step.new_radii, jnp.float32)]
    columns.append(values(step.groups if at_once.layer(bucket).has_groups else None))
    return [kernels.Planes(*parts) for parts in zip(*columns, strict=True)]


def _together(plan: Plan, like: Descent, parts: Sequence[tuple[Sequence[Bucket], Descent]]) -> Descent:
    """One descent of those of parts of the plan, the figures in the order of its buckets."""
    by_bucket: dict[tuple[str, ...], list[Any]] = {}
    for own, (_, _, *columns) in parts:
        start = 0
        for bucket in own:
            end = start + len(bucket.paths)
            by_bucket[bucket.paths] = [column[start:end] for column in columns]
            start = end
    in_order = zip(*(by_bucket[bucket.paths] for bucket in plan.buckets), strict=True)
    figures = [
        jnp.concatenate([part.astype(wanted.dtype) for part in column])
        for column, wanted in zip(in_order, like[2:], strict=True)
    ]
    displacements, momentum = {}, {}
    for _, descent in parts:
        displacements |= descent.displacements
        momentum |= descent.momentum or {}
    tensors = displacements, None if like.momentum is None else momentum
    # As the lines give them.
    return Descent(*jax.tree.map(lambda found, wanted: found.astype(wanted.dtype), tensors, like[:2]), *figures)
