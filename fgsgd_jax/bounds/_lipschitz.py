"""Lipschitz bound of a network from the norms of its layers."""

import math
from collections.abc import Mapping

from ._conv_norms import ConvNorms


class Chain:
    """Parts one after the other: the bound is the product of theirs.

    A part is the path of a layer's kernel, the Lipschitz constant of anything else (1 for ReLU and maximum pooling over
    windows that do not overlap, (H·W)^-½ for a global mean), or a `Chain` or `Sum`. An empty chain is the identity.

    Example:
      >>> import fgsgd_jax as fg
      >>> fg.bounds.Chain("conv_0/kernel", 1, "dense/kernel")
      Chain('conv_0/kernel', 1, 'dense/kernel')
    """

    def __init__(self, *parts: "str | int | float | Chain | Sum"):
        self.parts = parts

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.parts))})"


class Sum:
    """Branches on the same input, added: the bound is the sum of theirs. `Sum(1, branch)` is a residual block.

    Example:
      >>> import fgsgd_jax as fg
      >>> round(2.718281828 ** fg.log_lipschitz(fg.bounds.Sum(1, fg.bounds.Chain(2, 3)), {}), 6)  # x + g(f(x))
      7.0
    """

    def __init__(self, *branches: "str | int | float | Chain | Sum"):
        self.branches = branches

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.branches))})"


def log_lipschitz(network: "str | int | float | Chain | Sum", norms: Mapping[str, ConvNorms]) -> float:
    """Natural logarithm of an upper bound of a network's Lipschitz constant, in the Euclidean norm.

    Products run over the certified norms of the layers, in logarithms because those of deep networks overflow, and are
    rounded up. Activations, pooling and normalization enter as numbers of your own; for batch normalization in
    evaluation it is tighter to give its scale to `conv_norms`. Attention and squeeze-and-excitation, which multiply
    functions of the input, are not Lipschitz on the whole space.

    Args:
      network: how the layers are put together.
      norms: of the layers, from `conv_norms`.

    Returns:
      The logarithm; -inf if a layer is zero, inf if one is not finite.

    Raises:
      ValueError: for a path without norms, or a constant that is negative or no number.

    Example:
      >>> import math
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> norms = fg.conv_norms({"a": 2 * jnp.eye(3), "b": 3 * jnp.eye(3)}, {})
      >>> block = fg.bounds.Sum(1, fg.bounds.Chain("a", 1, "b"))  # x + b·relu(a·x)
      >>> round(math.exp(fg.log_lipschitz(block, norms)), 1)
      7.0
    """
    match network:
        case str():
            if network not in norms:
                raise ValueError(f"no norms of {network!r}: give conv_norms this layer too; here are {list(norms)[:8]}")
            return _log(float(norms[network].certified))
        case int() | float():
            if not network >= 0:
                raise ValueError(f"{network!r} is no Lipschitz constant: write a number ≥ 0, or the path of a layer")
            return _log(float(network))
        case Chain(parts=parts):
            logs = [log_lipschitz(part, norms) for part in parts]
            # Zero times infinity is of a layer whose norm is unknown.
            return math.inf if math.inf in logs else _up(math.fsum(logs)) if -math.inf not in logs else -math.inf
        case Sum(branches=branches):
            logs = [log_lipschitz(branch, norms) for branch in branches]
            largest = max(logs, default=-math.inf)
            if math.isinf(largest):
                return largest
            total = math.fsum(math.exp(log - largest) for log in logs)
            return _up(largest + _up(math.log(total) + 4 * math.ulp(1.0)))
    raise ValueError(f"{network!r} is no part of a network: write a layer's path, a number, Chain(...) or Sum(...)")


def _log(value: float) -> float:
    return _up(math.log(value)) if 0 < value < math.inf else -math.inf if value == 0 else math.inf


def _up(value: float) -> float:
    # Functions of the C library are within one unit in the last place, sums within half of one.
    return math.nextafter(math.nextafter(value, math.inf), math.inf)
