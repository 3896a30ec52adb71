from abc import ABC, abstractmethod
from typing import ClassVar

from rich.console import Console


class Command(ABC):
    """A subcommand: a dataclass of its options, which the command line fills in, and what it does with them."""

    instead: ClassVar[dict[str, str]] = {}
    """Options that other commands have, by the option to give here."""

    def defaults(self) -> "Command | None":
        """What options left out stand for, if that depends on the options given; the line is then read again."""
        return None

    @abstractmethod
    def run(self, console: Console) -> None:
        """Do the work. Raises `UsageError` for what the user can mend."""
