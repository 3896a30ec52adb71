import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Something the user asked for cannot be done.

    The message is one line that names the thing and what to write instead; the command line prints it without a
    traceback and leaves with exit code 2.
    """


class LostProcessError(Exception):
    """Another process of a training ended. One line, like that of `UsageError`; exit code 3."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a registry, with the nearest names first."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {name!r}: {guess}there are {', '.join(known)}")
