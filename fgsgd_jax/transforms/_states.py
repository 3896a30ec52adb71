"""The states of the links, and reading radii and figures out of them, wherever they are.

What a state holds for each parameter has the tree of the parameters. What it holds for each matrix stands apart, in one
array for each bucket of parameters of one shape. Figures are one array over the constrained parameters. `paths` names
them: the keys of one dictionary for each bucket, without leaves.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..groups import Stacks, is_scale

ByPath = dict[str, Any]
Paths = tuple[dict[str, tuple[()]], ...]


class Moments(NamedTuple):
    """Count, mean and centred second moment of what entered each matrix of a bucket."""

    seen: Float[Array, "paths *layers inputs outputs"]
    mean: Float[Array, "paths *layers inputs outputs"]
    m2: Float[Array, "paths *layers inputs outputs"]


class LambdaState(NamedTuple):
    """What λ needs between its changes: γ and moments by bucket, counts of applied updates, and `unfed` figures."""

    gamma: Stacks
    moments: tuple[Moments, ...]
    since_change: Int[Array, ""]
    total: Int[Array, ""]
    unfed: Int[Array, "paths"]


class Refused(NamedTuple):
    """How often each leaf's gradient was refused: constrained ones as figures, others by path."""

    constrained: Int[Array, "paths"]
    free: ByPath


class ProjectState(NamedTuple):
    """Of `project`: the kind of manifold of every matrix, and how often each leaf was refused."""

    paths: Paths
    kinds: Stacks
    refused: Refused


class NormalizeState(NamedTuple):
    """Of `normalize_by_zeta`: the groups, and of the last step the share of groups with ζ > 1 and the largest R."""

    paths: Paths
    groups: Stacks
    zeta_share: Float[Array, "paths"]
    grad_norm: Float[Array, "paths"]


class RetractState(NamedTuple):
    """Of `retract`: the kinds, and the largest ‖v‖/s of the last step."""

    paths: Paths
    kinds: Stacks
    step_ratio: Float[Array, "paths"]


class SteepestState(NamedTuple):
    """Of `steepest`: the kind of manifold of every matrix."""

    paths: Paths
    kinds: Stacks


class RescaleState(NamedTuple):
    """Of `rescale`: the kinds, ℜ (the radius of every matrix), and what λ needs."""

    paths: Paths
    kinds: Stacks
    radii: Stacks
    lambdas: LambdaState | None


class FgsgdState(NamedTuple):
    """Of `fgsgd`: all of the above, momentum in the tree of the parameters, and the state of the learning rate."""

    momentum: Any
    rate: Any
    paths: Paths
    kinds: Stacks
    groups: Stacks
    radii: Stacks
    lambdas: LambdaState | None
    zeta_share: Float[Array, "paths"]
    grad_norm: Float[Array, "paths"]
    step_ratio: Float[Array, "paths"]
    refused: Refused


class OnManifoldsState(NamedTuple):
    """Of `on_manifolds`: the kinds, ℜ, what λ needs, the inner optimizer's state, the last step's largest ‖v‖/s, and
    how often each leaf was refused.
    """

    paths: Paths
    kinds: Stacks
    radii: Stacks
    lambdas: LambdaState | None
    inner: Any
    step_ratio: Float[Array, "paths"]
    refused: Refused


class StepMetrics(NamedTuple):
    """Figures of one parameter's last step: scalars, NaN where no link measured them."""

    zeta_share: Float[Array, ""] | float = float("nan")
    grad_norm: Float[Array, ""] | float = float("nan")
    step_ratio: Float[Array, ""] | float = float("nan")
    unfed: Int[Array, ""] | float = float("nan")
    degenerate: Int[Array, ""] | float = float("nan")


_STATES = (ProjectState, NormalizeState, RetractState, RescaleState, FgsgdState, OnManifoldsState)


def radii(state: Any) -> dict[str, Float[Array | np.ndarray, "*layers inputs outputs"]]:
    """ℜ of every matrix, by path of the parameter: the radii that the state of `rescale`, `fgsgd` or a wrapper holds.

    Args:
      state: the state of a chain that has `rescale` in it, of `fgsgd`, or of any wrapper of those.

    Returns:
      Arrays over the grid of each parameter with a collection (that of a Euclidean matrix has no meaning).

    Raises:
      ValueError: for a state of something else.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"dense": 2 * jnp.eye(3)}
      >>> plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel(radius=2.0), view="i o -> 1 1 i o"))])
      >>> fg.radii(fg.fgsgd(0.1, plan).init(params))["dense"].tolist()
      [[2.0]]
    """
    holding = [found for found in _find(state) if isinstance(found, (RescaleState, FgsgdState, OnManifoldsState))]
    if not holding:
        raise ValueError(
            "this state holds no radii: it is of no chain with fg.rescale(plan), nor of fg.fgsgd or fg.on_manifolds"
        )
    # The outermost first: an optimizer inside `on_manifolds` may hold radii of the same weights.
    return {
        path: radius
        for found in reversed(holding)
        for paths, stacked in zip(found.paths, found.radii, strict=True)
        for path, radius in zip(sorted(paths), stacked, strict=True)
    }


def refused(state: Any) -> dict[str, Int[Array | np.ndarray | np.generic, ""]]:
    """How many steps since `init` have refused the gradient of each leaf.

    A gradient without a finite squared norm is taken as zero in that step, as `project` says. All other leaves move,
    and so does a leaf with momentum; `optax.apply_if_finite` around the optimizer leaves out the whole step instead.

    Args:
      state: the state of a chain that has `project` in it, of `fgsgd`, or of any wrapper of those.

    Returns:
      Counts by path, of all leaves of the plan, constrained or not.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"bias": jnp.zeros(2), "scale": jnp.ones(2)}
      >>> tx = fg.fgsgd(0.1, fg.plan(params, [("*", None)]))
      >>> grads = {"bias": jnp.array([jnp.nan, 1]), "scale": jnp.ones(2)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> bool(jnp.all(updates["bias"] == 0)), int(fg.refused(state)["bias"]), int(fg.refused(state)["scale"])
      (True, 1, 0)
    """
    counts: dict[str, Any] = {}
    for found in _find(state):
        if isinstance(found, (ProjectState, FgsgdState, OnManifoldsState)):
            own = dict(zip(_names(found), found.refused.constrained, strict=True)) | found.refused.free
            for path, count in own.items():
                counts[path] = counts[path] + count if path in counts else count
    if not counts:
        raise ValueError(
            "this state counts nothing: it is of no chain with fg.project, nor of fg.fgsgd, fg.on_manifolds"
        )
    return counts


def metrics(state: Any) -> dict[str, StepMetrics]:
    """Figures of the last step, by path of the parameter.

    Args:
      state: the state of a chain of the links, of `fgsgd`, or of any wrapper of those.

    Returns:
      For each parameter with a collection: the share of its groups with ζ > 1, the largest norm R of a group's
      projected gradient, and the largest ‖v‖_F/s of a constrained matrix. `unfed` is the number of matrices that kept
      their scale at the last change of λ because no features, or constant ones, reached them. `degenerate` is the
      number of matrices that never move because they have no radius: weights that were zero when `init` ran with
      `initial_radii="fitted"` inside jit, where nothing can be refused.

    Raises:
      ValueError: for a state of something else.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.fgsgd(0.1, plan)
      >>> _, state = tx.update({"w": jnp.array([[0.0], [2.0]])}, tx.init(params), params)
      >>> found = fg.metrics(state)["w"]
      >>> [round(float(x), 6) for x in (found.zeta_share, found.grad_norm, found.step_ratio)]
      [1.0, 2.0, 0.025]
    """
    states = list(_find(state))
    if not states:
        raise ValueError(
            "this state holds no figures: it is of no chain of fg's links, nor of fg.fgsgd or fg.on_manifolds"
        )
    figures: dict[str, dict[str, Any]] = {}
    for found in states:
        of_state = [
            (name, getattr(source, name))
            for source in (found, getattr(found, "lambdas", None))
            for name in StepMetrics._fields
            if hasattr(source, name)
        ]
        if hasattr(found, "radii"):
            stuck = [
                jnp.sum(~is_scale(radius, radius.dtype), axis=range(1, radius.ndim), dtype=jnp.int32)
                # An `nnx.Optimizer` keeps each array in a variable, which does not compare.
                for radius in map(jnp.asarray, found.radii)
            ]
            of_state.append(("degenerate", itertools.chain(*stuck)))
        for name, values in of_state:
            for path, value in zip(_names(found), values, strict=True):
                figures.setdefault(path, {})[name] = value
    return {path: StepMetrics(**values) for path, values in figures.items()}


def _names(state: Any) -> list[str]:
    """The constrained parameters of a link's state, in the order of its figures."""
    return [path for of_bucket in state.paths for path in sorted(of_bucket)]


def _find(state: Any) -> Iterator[Any]:
    """All states of links in a tree, in its order; those inside `on_manifolds` after its own."""
    for leaf in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _STATES)):
        if isinstance(leaf, _STATES):
            yield leaf
            if isinstance(leaf, OnManifoldsState):
                yield from _find(leaf.inner)
