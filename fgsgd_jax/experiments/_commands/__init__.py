"""The subcommands of `fgsgd`, each in a file of its own."""

from ._bounds import Bounds
from ._command import Command as Command
from ._compare import Compare
from ._demo import Demo
from ._train import Train

COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "demo": Demo,
    "compare": Compare,
    "bounds": Bounds,
}
