"""Classes of command-line options, with a help that is wrapped and not broken."""

import dataclasses
from types import MappingProxyType
from typing import TypeVar, dataclass_transform

from docstring_parser import parse_from_object

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def options(kind: type[T]) -> type[T]:
    """Make a frozen dataclass of command-line options, each with the docstring below it as its help.

    tyro reads these docstrings too, but keeps the break before an indented line.
    """
    kind = dataclasses.dataclass(frozen=True)(kind)
    helps = {each.arg_name: each.description or "" for each in parse_from_object(kind).params}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if field.name in helps:
            field.metadata = MappingProxyType({"help": " ".join(helps[field.name].split())})
    return kind
