from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import fgsgd_jax as fg

from ._errors import UsageError, did_you_mean, unknown

Retraction = Literal["polar", "qr", "cayley", "exp"]
Pooling = Literal["scheme", "layer", "slice", "pi", "po", "pio"]
Rules = list[tuple[Any, Any]]

MANIFOLDS = ("sp", "ob", "st", "euc")
CONSTRAINED = ("sp", "ob", "st")
GROUPINGS = {"pi": "PI", "po": "PO", "pio": "PIO"}
WEIGHT_NORM = "wn"
BASELINES = ("euc", WEIGHT_NORM)

# Every name that is not a grouping over a list of manifolds.
NAMES = (*BASELINES, *CONSTRAINED, *(f"each-{manifold}" for manifold in CONSTRAINED), "poms-st")
# Groupings written shorter.
SHORT = {
    **{f"{grouping}3": f"{grouping}:sp+ob+st" for grouping in GROUPINGS},
    **{f"{grouping}4": f"{grouping}:sp+ob+st+euc" for grouping in GROUPINGS},
    "pio-sp-ob": "pio:sp+ob",
    "pio-sp-st": "pio:sp+st",
    "pio-ob-st": "pio:ob+st",
}


def full_name(name: str) -> str:
    """The one name of a scheme that has several: `pio3` is `pio:sp+ob+st`.

    Raises:
        UsageError: no scheme has this name.
    """
    name = SHORT.get(name, name)
    if name in NAMES:
        return name
    grouping, colon, members = name.partition(":")
    if not colon or grouping not in GROUPINGS:
        # A grouping of its own, misspelled, with its manifolds as they are.
        near = [f"{right}:{members}" for right in GROUPINGS] if colon else [*NAMES, *SHORT]
        raise UsageError(
            f"unknown scheme {name!r}: {did_you_mean(name, near)}there are {', '.join((*NAMES, *SHORT))}, and "
            f"{', '.join(f'{each}:' for each in GROUPINGS)} before any of {', '.join(MANIFOLDS)} joined by +"
        )
    manifolds = members.split("+")
    for manifold in manifolds:
        if manifold not in MANIFOLDS:
            raise unknown(f"manifold in the scheme {name!r}:", manifold, MANIFOLDS)
    if len(set(manifolds)) < len(manifolds):
        raise UsageError(f"scheme {name!r} names a manifold twice; name each of {', '.join(MANIFOLDS)} at most once")
    return name


def short_name(name: str) -> str:
    """The shortest name of a scheme: that of its row in a comparison."""
    full = full_name(name)
    return next((short for short, other in SHORT.items() if other == full), full)


def rules(name: str, retraction: Retraction = "polar") -> Rules | None:
    """A scheme's name, turned into the rules of a plan.

    Convolutions wider than 1×1 live under the scheme. Everything else (1×1 convolutions, Dense layers, biases, batch
    normalization) stays Euclidean: its slices are single numbers, which no manifold leaves room to move.

    Args:
        name: `euc` and `wn` (unconstrained: plain, and with weight normalization); `sp`, `ob`, `st` (a layer is one
            group on one manifold); `each-sp`, `each-ob`, `each-st` (every slice a group of its own); `poms-st`
            (grouped by PIO in three, all Stiefel); `pi:`, `po:` or `pio:` before any of `sp`, `ob`, `st`, `euc` joined
            by `+`, for some of which there are short names (`SHORT`): `pio3` is `pio:sp+ob+st`.
        retraction: how Stiefel points return to their manifold.

    Returns:
        The rules, or `None` for the baselines.

    Raises:
        UsageError: no scheme has this name.
    """
    name = full_name(name)
    if name in BASELINES:
        return None
    scheme = _scheme(name, retraction)
    return [(is_spatial_kernel, scheme), ("*", None)]


def pooled(plan: fg.Plan, pooling: Pooling) -> fg.Plan:
    """A plan of other groups for the same weights, to normalize by: its manifolds mean nothing.

    Args:
        plan: the plan of the weights.
        pooling: `scheme` (the plan's own groups), `layer`, `slice`, or `pi`, `po`, `pio`: as three manifolds would be
            grouped, so that `st` becomes `poms-st` by `pio`.
    """
    if pooling == "scheme":
        return plan
    anywhere = fg.Euclidean()
    match pooling:
        case "layer":
            scheme = fg.Whole(anywhere)
        case "slice":
            scheme = fg.Each(anywhere)
        case _:
            scheme = getattr(fg, GROUPINGS[pooling])([anywhere] * 3)
    shapes = {path: jax.ShapeDtypeStruct(plan.entries[path].shape, jnp.float32) for path in plan.collections}
    return fg.plan(shapes, [("*", scheme)], seed=plan.seed)


def _scheme(name: str, retraction: Retraction) -> Any:
    make = _manifold_maker(retraction)
    if name in CONSTRAINED:
        return fg.Whole(make(name))
    if name.startswith("each-"):
        return fg.Each(make(name.removeprefix("each-")))
    if name == "poms-st":
        return fg.PIO([make("st")] * 3)
    grouping, _, members = name.partition(":")
    return getattr(fg, GROUPINGS[grouping])([make(manifold) for manifold in members.split("+")])


def _manifold_maker(retraction: Retraction) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        match name:
            case "sp":
                return fg.Sphere()
            case "ob":
                return fg.Oblique()
            case "st":
                return fg.Stiefel(retraction=retraction)
            case _:
                return fg.Euclidean()

    return make


def is_spatial_kernel(path: str, leaf: Any) -> bool:
    return leaf.ndim == 4 and leaf.shape[0] * leaf.shape[1] > 1
