"""Entry point: finds the sub-command, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from equilibria.core.errors import UserError, is_out_of_memory, nearest

COMMANDS = {
    "train": "train a recipe: equilibria train [RECIPE | CONFIG.json | --resume RUN] [options]",
    "eval": "score a run, with other solver steps or memory: equilibria eval RUN [options]",
    "report": "show runs in one HTML page: equilibria report RUN [RUN ...] [--output FILE.html]",
    "generate": "continue a text: equilibria generate RUN --prompt TEXT [options]",
    "share": "a folder for others, or the hub: equilibria share RUN --folder DIR --push OWNER/NAME",
    "convert": "bring weights of the first public DEQ code into ours: equilibria convert FILE",
    "data": "list, download and check published texts: equilibria data list | get NAME",
    "recipes": "list the recipes with the number to expect",
}
"""Sub-commands and what they do; each is a module of this package with a `main(arguments)`."""

EXIT_USER_ERROR = 2
EXIT_TRAINING_ERROR = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `equilibria` and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {_short_of_memory(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; nobody is left to tell
        return 141
    except OSError as error:
        # here and not above: light commands load nothing of the training
        from equilibria.train.files import disk_error

        print(f"error: {disk_error(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else EXIT_USER_ERROR
    if given[0] in ("-V", "--version", "version"):
        print(f"equilibria {_version()}")
        return 0
    command = given[0]
    if command not in COMMANDS:
        raise UserError(
            f"there is no command {command!r}{nearest(command, COMMANDS)} "
            f"(there are: {', '.join(COMMANDS)})"
        )
    return importlib.import_module(f"equilibria.cli.{command}").main(given[1:])


def _short_of_memory(error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return (
        f"memory ran out ({reason}); lower what the configuration asks for (batch size, segment "
        "length, the solver's history_size and max_steps), or use a machine with more"
    )


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "equilibria: Deep Equilibrium Models from the command line",
            "",
            *lines,
            "",
            "'equilibria COMMAND --help' lists all options of a command; --version shows ours.",
        ]
    )


def _version() -> str:
    from equilibria import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
