import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path

# What people write out, by the names that schemes have for it.
WORDS = {
    "euclidean": "euc",
    "sgd": "euc",
    "baseline": "euc",
    "sphere": "sp",
    "oblique": "ob",
    "stiefel": "st",
    "orthogonal": "st",
    "weightnorm": "wn",
    "decay": "wd",
}


class UsageError(Exception):
    """Something the user asked for cannot be done.

    The message is one line that names the thing and what to write instead; the command line prints it without a
    traceback and leaves with exit code 2. What is to be typed in more than one line, `program`, is printed below it.
    """

    def __init__(self, message: str, program: str = ""):
        super().__init__(message)
        self.program = program


class LostProcessError(Exception):
    """Another process of a training ended. One line, like that of `UsageError`; exit code 3."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a registry, with the nearest name first."""
    known = list(known)
    return UsageError(f"unknown {kind} {name!r}: {did_you_mean(name, known)}there are {', '.join(known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question, with a space behind it; nothing where none is near."""
    known, lower = list(known), name.lower()
    near = [WORDS[lower]] if WORDS.get(lower) in known else difflib.get_close_matches(lower, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def resume_command(folder: Path) -> str:
    """What to type to go on with the run in this folder."""
    return f"fgsgd train --run-dir {shlex.quote(str(folder))} --resume"
