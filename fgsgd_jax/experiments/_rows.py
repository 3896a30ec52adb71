import dataclasses
from collections.abc import Iterable
from typing import get_type_hints

from ._config import TrainConfig, fits
from ._errors import UsageError, unknown

# The rows of the paper's tables, and schemes' names written shorter.
ROWS = {
    "euc": "euc",
    "wn": "wn",
    "each-sp": "each-sp",
    "each-ob": "each-ob",
    "each-st": "each-st",
    "sp": "sp",
    "ob": "ob",
    "st": "st",
    "poms-st": "poms-st",
    "pi3": "pi:sp+ob+st",
    "po3": "po:sp+ob+st",
    "pio-sp-ob": "pio:sp+ob",
    "pio-sp-st": "pio:sp+st",
    "pio-ob-st": "pio:ob+st",
    "pio3": "pio:sp+ob+st",
    "pio4": "pio:sp+ob+st+euc",
}

# What a row may change: one option against the row's scheme.
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


def row_config(row: str, base: TrainConfig) -> TrainConfig:
    """The options of a row.

    Args:
        row: a name of `ROWS`, after which `~option=value` changes single options: `euc~wd=0.005`, `pio3~zeta=off`.
        base: the options that all rows share.

    Raises:
        UsageError: there is no such row, option or value.
    """
    name, *changes = row.split("~")
    if name not in ROWS:
        raise unknown("row", name, ROWS)
    changed, hints = {}, get_type_hints(TrainConfig)
    for change in changes:
        key, equals, value = change.partition("=")
        if key not in OPTIONS or not equals:
            raise UsageError(f"row {row!r}: write ~option=value with an option of {', '.join(OPTIONS)}")
        option = OPTIONS[key]
        changed[option] = _number(value)
        if not fits(changed[option], hints[option]):
            raise UsageError(f"row {row!r}: {key} cannot be {value!r}")
    return dataclasses.replace(base, scheme=ROWS[name], **changed).check()


def check_rows(rows: Iterable[str], base: TrainConfig) -> None:
    """Refuse rows that do not exist or come twice."""
    seen = set()
    for row in rows:
        row_config(row, base)
        if row in seen:
            raise UsageError(f"row {row!r} is named twice")
        seen.add(row)


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
