from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ._paths import mapped


class Factors(NamedTuple):
    """A kernel as weight normalization has it: w = g·v/‖v‖ for every output channel."""

    g: Float[Array, "outputs"]
    v: Float[Array, "*inputs outputs"]


class WeightNormState(NamedTuple):
    """The factors of the normalized kernels, `None` for other parameters, and the optimizer's state."""

    factors: Any
    inner: Any


def weight_normalized(
    inner: optax.GradientTransformationExtraArgs, chosen: Callable[[str, Array], bool]
) -> optax.GradientTransformationExtraArgs:
    """Trains length and direction of every output channel of the chosen kernels instead of their entries.

    `inner` sees g and v in the place of w, their gradients by the chain rule; weight decay is of g and v. They begin
    with v = w, g = ‖v‖. They are state, so that the network stays as it is: its parameters are w.

    Args:
        inner: the optimizer of the factors and of all other parameters.
        chosen: whether the parameter of this path is normalized; its last axis is that of the output channels.

    References:
        Salimans & Kingma, Weight Normalization, 2016, eqs. 2 and 3; without their initialization from data.
    """

    def init(params: Any) -> WeightNormState:
        factors = mapped(lambda path, w: _factors(w) if chosen(path, w) else None, params)
        return WeightNormState(factors, inner.init(_with(factors, params)))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        trained = _with(state.factors, params)
        _, pulled_back = jax.vjp(_weights, trained)
        (gradients,) = pulled_back(updates)
        steps, inner_state = inner.update(gradients, state.inner, trained, **extra_args)
        after = optax.apply_updates(trained, steps)
        factors = jax.tree.map(lambda old, new: None if old is None else new, state.factors, after, is_leaf=_is_place)
        displacements = jax.tree.map(lambda new, w: new - w, _weights(after), params)
        return displacements, WeightNormState(factors, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(w: Array) -> Factors:
    return Factors(_lengths(w), w)


def _lengths(v: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(v), axis=tuple(range(v.ndim - 1))))


def _is_place(node: Any) -> bool:
    return node is None or isinstance(node, Factors)


def _with(factors: Any, params: Any) -> Any:
    """The parameters with factors where there are any."""
    return jax.tree.map(lambda factor, w: w if factor is None else factor, factors, params, is_leaf=_is_place)


def _weights(trained: Any) -> Any:
    def weight(node: Any) -> Array:
        if not isinstance(node, Factors):
            return node
        scale = node.g / _lengths(node.v)
        return jnp.expand_dims(scale, tuple(range(node.v.ndim - 1))) * node.v

    return jax.tree.map(weight, trained, is_leaf=lambda node: isinstance(node, Factors))
