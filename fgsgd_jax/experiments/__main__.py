"""The command line, `fgsgd`."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

USAGE_ERROR = 2
LOST_PROCESS = 3
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `fgsgd` with these arguments, or those of the process.

    What the user can mend ends in one line on standard error and exit code 2, without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal or a pipe that cannot show ζ shows a question mark.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except ModuleNotFoundError as error:
        if (error.name or "fgsgd_jax").partition(".")[0] == "fgsgd_jax":
            raise
        _fail(f"the package {error.name!r} is missing: in a checkout, pip install '.[experiments]'", USAGE_ERROR)
    except KeyboardInterrupt as interruption:
        # The command says what to do about it, where there is anything.
        _fail("; ".join(["interrupted", *map(str, interruption.args)]), INTERRUPTED)


def _dispatch(arguments: list[str]) -> None:
    # Imported here, since all that is heavy or optional is behind these, and `main` says what is missing.
    import tyro
    from rich.console import Console

    from ._commands import COMMANDS
    from ._errors import LostProcessError, UsageError, unknown

    try:
        if not arguments or arguments[0].startswith("-"):
            # Of the commands' own options this knows nothing: `fgsgd COMMAND --help` does.
            tyro.extras.subcommand_cli_from_dict(
                {name: _described(command) for name, command in COMMANDS.items()},
                prog="fgsgd",
                description="Train networks whose weights stay on manifolds. Options: `fgsgd COMMAND --help`.",
                args=arguments,
            )
            return
        name, *options = arguments
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        kind = COMMANDS[name].of(options)
        for given in options:
            if (word := given.partition("=")[0].replace("_", "-")) in kind.instead:
                raise UsageError(f"{word} is no option of `fgsgd {name}`: give {kind.instead[word]}")
        # Comments are not for users.
        how: dict[str, Any] = {"prog": f"fgsgd {name}", "args": options, "config": [tyro.conf.HelptextFromCommentsOff]}
        command = tyro.cli(kind, **how)
        if (defaults := command.defaults()) is not None:
            command = tyro.cli(kind, default=defaults, **how)
        command.run(Console())
    except UsageError as error:
        _say(str(error))
        if error.program:
            print("\n" + error.program, file=sys.stderr, flush=True)
        sys.exit(USAGE_ERROR)
    except LostProcessError as error:
        _say(str(error))
        # Leaving in the usual way waits for the others, one of whom is gone.
        os._exit(LOST_PROCESS)


def _described(command: type) -> Callable[[], None]:
    def nothing() -> None:
        pass

    nothing.__doc__ = command.__doc__
    return nothing


def _fail(message: str, code: int) -> NoReturn:
    _say(message)
    sys.exit(code)


def _say(message: str) -> None:
    print("fgsgd: " + " ".join(message.split()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
