"""What every link does first: find the plan, and the constrained weights in the trees that it is given."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ..groups import Plan, Rules, Stacks, array_leaves, as_plan, by_path, check_scales, from_paths, violation
from ..linalg import compute_dtype
from ._rescaling import InitialRadii
from ._scale import ScaleState
from ._states import ByPath

PlanOrRules = Plan | Rules

# A forgotten `initialize` violates by about 1, half a displacement by its square, rounding to bfloat16 by a few of its
# eps, float32 by 1e-6; but a radius that falls by a factor leaves that many times the rounding, for one step.
_OFF_MANIFOLD, _OFF_AT_NEW_RADII = 1e-5, 1e-3


class Call(NamedTuple):
    """One call of a link: the plan, and by path the leaves of the parameters and of the updates.

    `free` are the updates of the leaves without a collection, `tree` is that of the updates.
    """

    plan: Plan
    points: ByPath
    leaves: ByPath
    free: ByPath
    tree: Any

    def answer(self, changed: ByPath) -> Any:
        """The tree of the updates with the changed leaves."""
        return from_paths(self.leaves | changed, self.tree)


class Start(NamedTuple):
    """What `init` is given: the plan and the leaves by path; none of a tree of placeholders."""

    plan: Plan
    leaves: ByPath

    def beside(self, state: Any) -> Any:
        """The state with what lies on one device put on all those that the parameters are shared out over.

        So a checkpoint that is restored to the places of this state can be stepped from: what is read back is committed
        to its place, and a program takes no arrays that are committed to different devices.
        """
        shardings = [getattr(leaf, "sharding", None) for leaf in self.leaves.values() if not isinstance(leaf, Tracer)]
        meshes = [own.mesh for own in shardings if isinstance(own, NamedSharding) and own.mesh.size > 1]
        if not meshes:
            return state
        everywhere = NamedSharding(meshes[0], PartitionSpec())

        def put(leaf: Any) -> Any:
            single = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and len(leaf.sharding.device_set) == 1
            return jax.device_put(leaf, everywhere) if single else leaf

        return jax.tree.map(put, state)


def started(link: str, plan: PlanOrRules, params: Any) -> Start:
    """The plan and leaves of `init`.

    `optax.tree_utils.tree_map_params` asks for the structure of a state with a placeholder for the parameters, which
    has no leaves.
    """
    if params is not None and not jax.tree.leaves(params):
        if isinstance(plan, Plan):
            return Start(plan, {})
        raise ValueError(
            f"{link} was given rules, and asked for the structure of its state without parameters, as "
            "optax.tree_utils.tree_map_params does; give it the plan, fg.plan(params, rules)"
        )
    if params is None:
        raise ValueError(f"{link} needs the parameters: call tx.init(params)")
    own = as_plan(plan, params)
    return Start(own, _leaves(params, own, "parameters", link))


def called(
    link: str,
    plan: PlanOrRules,
    updates: Any,
    params: Any,
    needs_params: bool = True,
    scale: ScaleState | None = None,
) -> Call:
    """The plan and leaves of `update`. Outside jit weights that have left the manifolds of `scale` are an error."""
    if needs_params and params is None:
        raise ValueError(f"{link} needs the parameters: call tx.update(grads, state, params)")
    own = plan if isinstance(plan, Plan) else as_plan(plan, updates if params is None else params)
    points = _leaves(params, own, "parameters", link) if needs_params else {}
    leaves = _leaves(updates, own, "updates", link)
    for path in [path for path in leaves if path in points]:
        # An update wider than its weight would widen the state, and then the weight.
        update, dtype = leaves[path], points[path].dtype
        if jnp.issubdtype(dtype, jnp.floating) and update.dtype.itemsize > max(4, dtype.itemsize):
            leaves[path] = update.astype(compute_dtype(dtype))
    free = {path: leaf for path, leaf in leaves.items() if path not in own.collections}
    call = Call(own, points, leaves, free, updates)
    if scale is not None and not any(isinstance(radius, Tracer) for radius in scale.radii):
        _check_still_on_manifold(link, call, params, scale)
    return call


def _leaves(tree: Any, plan: Plan, role: str, link: str) -> ByPath:
    """The leaves by path, if the weights of the plan's collections are among them, in their shapes."""
    leaves = array_leaves(tree, role)
    for path in plan.collections:
        if path not in leaves and path in by_path(tree, is_leaf=lambda node: node is None):
            raise ValueError(
                f"{link}: the {role} have None at {path!r}, which the plan constrains; hand in zeros where there is no "
                "gradient: jax.tree.map(lambda g, p: jnp.zeros_like(p) if g is None else g, grads, params, "
                "is_leaf=lambda g: g is None), or leave the parameter free by a rule "
                f"({path!r}, None) before the others"
            )
        if path not in leaves:
            raise ValueError(
                f"{link}: the {role} lack the leaf {path!r}, which the plan constrains; a wrapper that flattens, "
                "renames or hides weights goes inside, as in fg.on_manifolds(optax.flatten(optimizer), plan). Under "
                "optax.partition give each part a plan of its own, or put the whole plan outside, as in "
                f"fg.on_manifolds(optax.partition(...), plan). The paths are {list(leaves)[:8]}"
            )
        if leaves[path].shape != plan.entries[path].shape:
            raise ValueError(
                f"{link}: {path} has shape {leaves[path].shape} in the {role}, {plan.entries[path].shape} in the plan: "
                + (
                    "gradients by example are aggregated before, as in optax.chain(optax.contrib."
                    f"differentially_private_aggregate(...), {link}(...))"
                    if leaves[path].shape[1:] == plan.entries[path].shape
                    else "make the plan from these parameters"
                )
            )
    # NumPy's numbers as JAX's; not the float0 of a gradient by integers.
    numbers = [path for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)]
    return leaves | {
        path: jnp.asarray(leaves[path]) for path in numbers if jnp.issubdtype(leaves[path].dtype, jnp.floating)
    }


def check_on_manifold(link: str, start: Start, params: Any, initial_radii: InitialRadii) -> None:
    """Raises if concrete parameters are off their manifolds; under jit nothing can be said."""
    radii = None if initial_radii == "gamma" else "fitted"
    if radii and start.leaves:
        check_scales(start.plan, start.leaves)
    for path, found in _violations(start.plan, start.leaves, params, radii, _OFF_MANIFOLD).items():
        collection = start.plan.collections[path]
        raise ValueError(
            f"{link}: {path} is off its manifolds ({', '.join(type(kind).__name__ for kind in collection.kinds)}; "
            f"γ = {np.min(collection.gamma):.3g}) by {found:.2g}. Start from "
            "fg.initialize(key, params, plan), or keep these weights with fg.nearest(params, plan); to keep their "
            f"scales too, write fg.nearest(params, plan, radii='fitted') and {link}(..., initial_radii='fitted')"
        )


def _check_still_on_manifold(link: str, call: Call, params: Any, scale: ScaleState) -> None:
    """Raises if concrete parameters have left their manifolds during the training."""
    limit = _OFF_MANIFOLD if scale.lambdas is None else _OFF_AT_NEW_RADII
    for path, found in _violations(call.plan, call.points, params, scale.radii, limit).items():
        raise ValueError(
            f"{link}: {path} has left its manifolds by {found:.2g} since the last step: something around {link} "
            "changes its displacements, or the weights (optax.ema, apply_every, lookahead, reduce_on_plateau, "
            "conditionally_transform, contrib.mechanize, contrib.schedule_free, averages). Put that inside, as in "
            "fg.on_manifolds(optax.chain(optimizer, optax.ema(0.9)), plan), or bring the weights back with "
            "fg.nearest(params, plan, fg.radii(opt_state))"
        )


def _violations(
    plan: Plan, leaves: ByPath, params: Any, radii: Stacks | Literal["fitted"] | None, limit: float
) -> dict[str, float]:
    """Of the parameters that are further off than `limit` and rounding; of none where they cannot be looked at."""
    if any(path not in leaves or isinstance(leaves[path], (Tracer, jax.ShapeDtypeStruct)) for path in plan):
        return {}
    # Inside `lax.cond`, as of optax.conditionally_transform, even what is made of known numbers would be traced.
    with jax.ensure_compile_time_eval():
        own: Any = radii
        if isinstance(radii, tuple):
            pairs = zip(plan.buckets, radii, strict=True)
            own = {path: radius for bucket, stack in pairs for path, radius in zip(bucket.paths, stack, strict=True)}
        return {
            path: float(found)
            for path, found in violation(params, plan, own).items()
            if not float(found) <= max(limit, 16 * float(jnp.finfo(leaves[path].dtype).eps))
        }
