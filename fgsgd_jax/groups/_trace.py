"""What a trace of the model's forward pass tells a plan."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Trace:
    """The calls of a model's layers, in their order, found without computing anything.

    `calls` has a pair for every call of a layer with a kernel, its path and the number of its output positions
    (H_out·W_out of a convolution), and (None, 0) for every call of a normalization layer, after which earlier scales no
    longer matter. Made by `fg.nnx.trace` and `fg.linen.trace`.

    Example:
      >>> import fgsgd_jax as fg
      >>> trace = fg.Trace((("conv_0/kernel", 64), (None, 0), ("conv_1/kernel", 16)))
      >>> trace.positions
      {'conv_0/kernel': 64, 'conv_1/kernel': 16}
    """

    calls: tuple[tuple[str | None, int], ...]

    @property
    def positions(self) -> dict[str, int]:
        """Output positions by path; of a layer called several times, the most."""
        found: dict[str, int] = {}
        for path, positions in self.calls:
            if path is not None:
                found[path] = max(positions, found.get(path, 0))
        return found

    def order(self, paths: Iterable[str]) -> tuple[str | None, ...]:
        """Those of `paths` that are called, in order of their first call, and None at normalizations between them."""
        paths, seen, order = set(paths), set(), []
        for path, _ in self.calls:
            if path is None and order and order[-1] is not None:
                order.append(None)
            elif path in paths and path not in seen:
                order.append(path)
                seen.add(path)
        return tuple(order)
