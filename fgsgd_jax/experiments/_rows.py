import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ._config import Config, TrainConfig, fits
from ._errors import UsageError, did_you_mean, unknown
from ._schemes import short_name
from ._text import SCHEMES, TextConfig
from ._text._config import RATE_OF, SCHEME_OF

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

# The rows of a comparison on text.
TEXT_ROWS = (
    "adamw",
    "muon",
    "hyperball",
    "muon-hyperball",
    "spel",
    "spel:heads",
    "manifold-muon",
    "on-manifolds",
    "on-manifolds:oblique",
    "on-manifolds:po-heads",
    "on-manifolds:pio-tiles",
    "fgsgd",
)
TEXT_OPTIONS = {
    "wd": "weight_decay",
    "momentum": "momentum",
    "free-lr": "free_lr",
    "warmup": "warmup",
    "schedule": "schedule",
    "retraction": "retraction",
    "tangent": "tangent",
    "start": "start",
}


def row_name(row: str, base: Config | None = None) -> str:
    """The one name of a row that can be written in several ways: `pio:sp+ob+st~weight-decay=5e-3` is `pio3~wd=0.005`.

    Args:
        row: a scheme as `fgsgd train --scheme` takes it, after which `~option=value` changes single options; on text
            an optimizer, after it `:` and a scheme if it is not the optimizer's own.
        base: the options that all rows share, of images where left out: the task is theirs.

    Raises:
        UsageError: there is no such scheme, optimizer, option or value.
    """
    base = TrainConfig() if base is None else base
    name, *changes = row.split("~")
    if isinstance(base, TextConfig):
        optimizer, scheme = _text_row(row, name)
        name = optimizer if scheme == SCHEME_OF[optimizer] else f"{optimizer}:{scheme}"
    else:
        name = short_name(name)
    changed = _changes(row, changes, type(base))
    return "~".join([name, *(f"{option}={_written(value)}" for option, value in changed)])


def row_config(row: str, base: Config) -> Any:
    """The options of a row.

    Args:
        row: a row with its changes, as `row_name` takes it: `euc~wd=0.005`, `pio3~zeta=off`; on text
            `spel~tangent=off`, `on-manifolds:oblique`.
        base: the options that all rows share.

    Raises:
        UsageError: there is no such scheme, optimizer, option or value.
    """
    name, *changes = row.split("~")
    options = _options(type(base))
    changed: dict[str, Any] = {options[name]: value for name, value in _changes(row, changes, type(base))}
    if isinstance(base, TextConfig):
        changed["optimizer"], changed["scheme"] = _text_row(row, name)
        changed["lr"] = None
    else:
        changed["scheme"] = name
    return dataclasses.replace(base, **changed).check()


def row_rates(lrs: Sequence[float], row: str, base: Config) -> tuple[float, ...]:
    """The rates that a row is tuned on: the grid, or on text its multiples of the rate that suits the optimizer."""
    if not isinstance(base, TextConfig):
        return tuple(lrs)
    optimizer, _ = _text_row(row, row.split("~")[0])
    return tuple(float(f"{lr * RATE_OF[optimizer]:.6g}") for lr in lrs)


def _text_row(row: str, name: str) -> tuple[Any, Any]:
    """The optimizer and the scheme of a row on text."""
    optimizer, colon, scheme = name.partition(":")
    if optimizer not in SCHEME_OF:
        raise unknown(f"optimizer in the row {row!r}:", optimizer, SCHEME_OF)
    if colon and scheme not in SCHEMES:
        raise unknown(f"scheme in the row {row!r}:", scheme, SCHEMES)
    return optimizer, scheme if colon else SCHEME_OF[optimizer]


def _options(kind: type[Config]) -> Mapping[str, str]:
    return TEXT_OPTIONS if kind is TextConfig else OPTIONS


def check_rows(rows: Iterable[str], base: Config) -> None:
    """Refuse rows that do not exist or come twice, under whatever names."""
    seen: dict[Config, str] = {}
    for row in rows:
        config = row_config(row, base)
        if config in seen:
            same = (
                f"row {row!r} is named twice" if seen[config] == row else f"rows {seen[config]!r} and {row!r} are one"
            )
            raise UsageError(f"{same}; name each once")
        seen[config] = row


def _changes(row: str, changes: Iterable[str], kind: type[Config]) -> list[tuple[str, float | str]]:
    """What a row changes, by the short names of the options."""
    found: dict[str, float | str] = {}
    hints, options = get_type_hints(kind), _options(kind)
    spelled = {field.strip("_").replace("_", "-"): short for short, field in options.items()}
    for change in changes:
        name, equals, value = change.partition("=")
        name = spelled.get(name, name)
        if name not in options or not equals:
            guess = "" if name in options else did_you_mean(name, [*options, *spelled])
            raise UsageError(f"row {row!r}: {guess}write ~option=value with an option of {', '.join(options)}")
        if name in found:
            raise UsageError(f"row {row!r} changes {name} twice")
        found[name] = _number(value)
        if not fits(found[name], hints[options[name]]):
            words = _words(hints[options[name]])
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
