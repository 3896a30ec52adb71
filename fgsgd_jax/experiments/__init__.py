"""The application: data, models, training loop, command line. An optional extra.

Nothing is imported before it is asked for, so that `fgsgd` can say what is missing where the extra is not installed.
"""

import importlib
from typing import Any

_HOMES = {
    "ImageSet": "_data",
    "MetricsLog": "_log",
    "Model": "_models",
    "Observer": "_fit",
    "Result": "_run",
    "Split": "_data",
    "TextConfig": "_text",
    "TrainConfig": "_config",
    "TrainState": "_state",
    "Trainer": "_trainer",
    "UsageError": "_errors",
    "build": "_models",
    "continued": "_text",
    "draw": "_picture",
    "fit": "_fit",
    "hold_out": "_data",
    "limit": "_data",
    "load": "_data",
    "load_text": "_text",
    "rules": "_schemes",
    "run": "_run",
    "schedule": "_schedules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
