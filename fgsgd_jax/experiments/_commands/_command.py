from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from rich.console import Console


class Command(ABC):
    """A subcommand: a dataclass of its options, which the command line fills in, and what it does with them."""

    instead: ClassVar[dict[str, str]] = {}
    """Options that other commands have, by the option to give here."""

    @classmethod
    def of(cls, options: Sequence[str]) -> "type[Command]":
        """The command that a line with these options means: another one for another task."""
        del options
        return cls

    def defaults(self) -> "Command | None":
        """What options left out stand for, if that depends on the options given; the line is then read again."""
        return None

    @abstractmethod
    def run(self, console: Console) -> None:
        """Do the work. Raises `UsageError` for what the user can mend."""


def given(options: Sequence[str], name: str) -> str | None:
    """The value of an option in a line that has not been read yet; `None` where it is left out."""
    for place, word in enumerate(options):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == name:
            return value if equals else options[place + 1] if place + 1 < len(options) else None
    return None
