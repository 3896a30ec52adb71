"""The tasks by name: their options."""

from typing import Any

from ._config import TrainConfig
from ._errors import unknown
from ._text import TextConfig

AnyConfig = TrainConfig | TextConfig
CONFIGS: dict[str, type[AnyConfig]] = {"images": TrainConfig, "text": TextConfig}


def config_from_dict(values: dict[str, Any]) -> AnyConfig:
    """The options that `to_dict` wrote, of whatever task; those of older versions are of images."""
    name = values.get("task", "images")
    if name not in CONFIGS:
        raise unknown("task", str(name), CONFIGS)
    return CONFIGS[name].from_dict(values)
