import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ._config import Config, TrainConfig, fits
from ._errors import UsageError, did_you_mean
from ._tasks import kind_of


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
    changed = _changes(row, changes, base)
    return "~".join([kind_of(base).name(row, name), *(f"{option}={_written(value)}" for option, value in changed)])


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
    kind = kind_of(base)
    changed = {kind.options[option]: value for option, value in _changes(row, changes, base)}
    return dataclasses.replace(base, **kind.fields(row, name), **changed).check()


def row_rates(lrs: Sequence[float], row: str, base: Config) -> tuple[float, ...]:
    """The rates that a row is tuned on: the grid, or on text its multiples of the rate that suits the optimizer."""
    return kind_of(base).rates(lrs, row.split("~")[0])


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


def _changes(row: str, changes: Iterable[str], base: Config) -> list[tuple[str, float | str]]:
    """What a row changes, by the short names of the options."""
    found: dict[str, float | str] = {}
    hints, options = get_type_hints(type(base)), kind_of(base).options
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
