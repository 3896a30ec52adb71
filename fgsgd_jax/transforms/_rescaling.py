"""The options of λ, which every optimizer takes as `rescaling`."""

import dataclasses
import warnings
from typing import Any, Literal

import numpy as np

InitialRadii = Literal["gamma", "fitted"]


@dataclasses.dataclass(frozen=True)
class Rescaling:
    """When and how the radii ℜ = γ/λ follow the features: the options of λ.

    λ is the standard deviation of the features that enter a matrix, over an epoch. It is 1 in the first epoch, and
    stays 1 if `every` and `warmup` are None or `update` is given no `feature_moments`. `feature_moments` (of
    `fg.nnx.moments` or `fg.linen.observe`) cover what was seen since the last applied update. A matrix whose channels
    had no features, or constant ones, keeps its scale and is counted in `fg.metrics`.

    Args:
      every: the number of applied updates in an epoch, after which ℜ changes. None: no change after the warm-up.
      floor: smallest λ used. 1 guarantees ℜ ≤ γ and with it the norm bounds of Proposition 1; None uses λ as measured.
      max_change: largest factor by which radii change at once, None for none. Without normalization layers, changing
        all radii together over-corrects. If the plan knows the order of the layers (it was given a trace), each λ is
        corrected by the changes of the layers above it, and the limit concerns the channels of a layer relative to
        each other; `"auto"` is then 1 + 4/(most layers between two normalizations), and no limit if that is one layer.
        Without an order it is 2.
      warmup: (updates, until): change every `updates` applied updates until `until` of them were applied. Together with
        `max_change` it lets the scales of a deep network without normalization settle early. There, leave `every` out,
        so that they stay: every later change alters the function that the network computes, and training suffers.

    Raises:
      ValueError: for invalid options.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 4 and eq. 2.

    Example:
      >>> import fgsgd_jax as fg
      >>> fg.Rescaling(every=500, floor=1.0)
      Rescaling(every=500, floor=1.0, max_change='auto', warmup=None)
    """

    every: int | None = None
    floor: float | None = None
    max_change: float | Literal["auto"] | None = "auto"
    warmup: tuple[int, int] | None = None

    def __post_init__(self):
        # `optax.inject_hyperparams` passes tracers, on which nothing static can be built.
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in given.items():
            parts = value if isinstance(value, tuple) else (value,)
            if not all(part is None or isinstance(part, (int, float, str)) for part in parts):
                raise ValueError(
                    f"Rescaling({name}={value!r}): give a Python number. Under optax.inject_hyperparams, name what is "
                    "static: optax.inject_hyperparams(fg.fgsgd, static_args=('rescaling',))"
                )
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise ValueError(
                f"Rescaling(every={self.every!r}): give the applied updates of an epoch, a whole number of 1 or more, "
                "or None for λ = 1"
            )
        if self.floor is not None and not self.floor > 0:
            raise ValueError(f"Rescaling(floor={self.floor!r}): give a positive number, or None for no floor")
        if self.max_change not in ("auto", None) and not self.max_change > 1:
            raise ValueError(
                f"Rescaling(max_change={self.max_change!r}): give a factor above 1, 'auto', or None for no limit"
            )
        if self.warmup is not None and not (np.shape(self.warmup) == (2,) and min(self.warmup) >= 1):
            raise ValueError(
                f"Rescaling(warmup={self.warmup!r}): give (applied updates per change, applied updates it lasts)"
            )

    @property
    def measures(self) -> bool:
        """Whether λ is ever measured."""
        return self.every is not None or self.warmup is not None


_OLD = {"every": "every", "lambda_floor": "floor", "max_change": "max_change", "warmup": "warmup"}


def options(
    link: str, rescaling: Rescaling | None, initial_radii: InitialRadii, old: dict[str, Any]
) -> tuple[Rescaling, InitialRadii]:
    """The options, checked, with the keywords of version 0.1 in `old` translated with a warning."""
    # `optax.inject_hyperparams` hands variable keywords on under their common name.
    old |= old.pop("old", {})
    if unknown := set(old) - {*_OLD, "radii"}:
        raise TypeError(f"{link} has no argument {sorted(unknown)[0]!r}")
    if "radii" in old:
        initial_radii = old.pop("radii")
        _warn(f"{link}(radii={initial_radii!r}) is now {link}(initial_radii={initial_radii!r})")
    if old:
        if rescaling is not None:
            raise TypeError(f"{link}: give {', '.join(old)} in rescaling=fg.Rescaling(...)")
        rescaling = Rescaling(**{_OLD[name]: value for name, value in old.items()})
        shown = ", ".join(f"{_OLD[name]}={value!r}" for name, value in old.items())
        _warn(f"{link}({', '.join(old)}) is now {link}(rescaling=fg.Rescaling({shown}))")
    if rescaling is not None and not isinstance(rescaling, Rescaling):
        raise TypeError(f"{link}: rescaling={rescaling!r}; write fg.Rescaling(every=steps_per_epoch)")
    if initial_radii not in ("gamma", "fitted"):
        raise ValueError(f"{link}: initial_radii={initial_radii!r}; write 'gamma' or 'fitted'")
    return rescaling or Rescaling(), initial_radii


def _warn(text: str) -> None:
    warnings.warn(f"{text}; the old form ends with version 0.3", DeprecationWarning, stacklevel=4)
