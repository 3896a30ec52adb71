"""Classes of command-line options, with a help that is wrapped and not broken."""

import dataclasses
import inspect
from types import MappingProxyType
from typing import Annotated, ClassVar, TypeVar, dataclass_transform, get_origin

import tyro
from docstring_parser import parse_from_object

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def options(kind: type[T]) -> type[T]:
    """Make a frozen dataclass of command-line options, each with the docstring below it as its help.

    tyro reads these docstrings too, but keeps the break before an indented line.
    """
    hinted = tyro.conf.arg(help_behavior_hint=_default)
    kind.__annotations__ = {
        name: annotation if get_origin(annotation) is ClassVar else Annotated[annotation, hinted]
        for name, annotation in inspect.get_annotations(kind).items()
    }
    kind = dataclasses.dataclass(frozen=True)(kind)
    helps = {each.arg_name: each.description or "" for each in parse_from_object(kind).params}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if field.name in helps:
            field.metadata = MappingProxyType({"help": " ".join(helps[field.name].split())})
    return kind


def _default(value: str) -> str:
    """What an option left out is, below its help: of one that is then not set, the help itself says it."""
    return "" if value in ("", "''", "None", "False") else f"(default: {value})"
