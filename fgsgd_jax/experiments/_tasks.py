"""The tasks by name: their options and their comparisons."""

from typing import Any

from ._config import Config, TrainConfig
from ._errors import unknown
from ._image_kind import ImageKind
from ._kind import Kind
from ._text import TextConfig, TextKind

AnyConfig = TrainConfig | TextConfig
CONFIGS: dict[str, type[AnyConfig]] = {"images": TrainConfig, "text": TextConfig}
KINDS: dict[str, Kind] = {"images": ImageKind(), "text": TextKind()}


def config_from_dict(values: dict[str, Any]) -> AnyConfig:
    """The options that `to_dict` wrote, of whatever task; those of older versions are of images."""
    name = values.get("task", "images")
    if name not in CONFIGS:
        raise unknown("task", str(name), CONFIGS)
    return CONFIGS[name].from_dict(values)


def kind_of(config: Config) -> Kind:
    """What a comparison of these options is made of."""
    return KINDS[config.task]
