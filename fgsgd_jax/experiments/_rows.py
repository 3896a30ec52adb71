import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ._config import TrainConfig, fits
from ._errors import UsageError, did_you_mean
from ._schemes import short_name

# The rows of the paper's tables: schemes by their shortest names.
ROWS = (
    "euc",
    "wn",
    "each-sp",
    "each-ob",
    "each-st",
    "sp",
    "ob",
    "st",
    "poms-st",
    "pi3",
    "po3",
    "pio-sp-ob",
    "pio-sp-st",
    "pio-ob-st",
    "pio3",
    "pio4",
)

# What a row may change: one option against the row's scheme, by its short name here and by that of `fgsgd train`.
OPTIONS = {
    "wd": "weight_decay",
    "momentum": "momentum",
    "gamma": "gamma",
    "lambda": "lambda_",
    "floor": "lambda_floor",
    "retraction": "retraction",
    "schedule": "schedule",
    "rho": "rho",
    "curvature": "curvature",
    "zeta": "zeta",
    "pooling": "pooling",
    "clip": "clip",
}
_SHORT = {field.strip("_").replace("_", "-"): short for short, field in OPTIONS.items()}


def row_name(row: str) -> str:
    """The one name of a row that can be written in several ways: `pio:sp+ob+st~weight-decay=5e-3` is `pio3~wd=0.005`.

    Args:
        row: a scheme as `fgsgd train --scheme` takes it, after which `~option=value` changes single options.

    Raises:
        UsageError: there is no such scheme, option or value.
    """
    scheme, *changes = row.split("~")
    return "~".join([short_name(scheme), *(f"{name}={_written(value)}" for name, value in _changes(row, changes))])


def row_config(row: str, base: TrainConfig) -> TrainConfig:
    """The options of a row.

    Args:
        row: a scheme with its changes, as `row_name` takes it: `euc~wd=0.005`, `pio3~zeta=off`.
        base: the options that all rows share.

    Raises:
        UsageError: there is no such scheme, option or value.
    """
    scheme, *changes = row.split("~")
    changed = {OPTIONS[name]: value for name, value in _changes(row, changes)}
    return dataclasses.replace(base, scheme=scheme, **changed).check()


def check_rows(rows: Iterable[str], base: TrainConfig) -> None:
    """Refuse rows that do not exist or come twice, under whatever names."""
    seen: dict[TrainConfig, str] = {}
    for row in rows:
        config = row_config(row, base)
        if config in seen:
            same = (
                f"row {row!r} is named twice" if seen[config] == row else f"rows {seen[config]!r} and {row!r} are one"
            )
            raise UsageError(f"{same}; name each once")
        seen[config] = row


def _changes(row: str, changes: Iterable[str]) -> list[tuple[str, float | str]]:
    """What a row changes, by the short names of the options."""
    found: dict[str, float | str] = {}
    hints = get_type_hints(TrainConfig)
    for change in changes:
        name, equals, value = change.partition("=")
        name = _SHORT.get(name, name)
        if name not in OPTIONS or not equals:
            guess = "" if name in OPTIONS else did_you_mean(name, [*OPTIONS, *_SHORT])
            raise UsageError(f"row {row!r}: {guess}write ~option=value with an option of {', '.join(OPTIONS)}")
        if name in found:
            raise UsageError(f"row {row!r} changes {name} twice")
        found[name] = _number(value)
        if not fits(found[name], hints[OPTIONS[name]]):
            words = _words(hints[OPTIONS[name]])
            there_are = f": {did_you_mean(value, words)}there are {', '.join(words)}" if words else ""
            raise UsageError(f"row {row!r}: {name} cannot be {value!r}{there_are}")
    return list(found.items())


def _words(hint: Any) -> list[str]:
    """The words that an option can be."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return list(choices)
    return [word for choice in choices for word in _words(choice)]


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _written(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"
