"""The command line: each command has its options here and its work in `commands` or `experiment`.

Nothing heavy is imported before a command runs, so `--help` takes milliseconds.
"""

import itertools
import os
import sys
import traceback
from typing import NoReturn

from jax_ordermerge import console, program_cache
from jax_ordermerge.cli import (  # noqa: F401  (they register their commands)
    first_steps,
    reference,
    runs,
    single_models,
)
from jax_ordermerge.cli.app import app
from jax_ordermerge.errors import PeerLost, Stopped, UserError, file_error, is_utf8
from jax_ordermerge.hardware import set_memory_fraction

_PATIENCE = 5.0  # seconds that a failing process waits for its peers


def _print_error(text: str) -> None:
    # a path in it may hold the end of a line
    line = text.replace("\n", "\\n")
    console.print_error(f"error: {line}")


def _check_arguments() -> None:
    for previous, argument in itertools.pairwise(sys.argv):
        # it would fail in every message and file that names it
        if not is_utf8(argument):
            raise UserError(f"{argument!r} is not UTF-8; rename the file or directory")
        # An empty path is the current directory, which nobody means who wrote "$RUN".
        if not argument and (previous == "--" or not previous.startswith("-")):
            raise UserError("an argument is empty: is a variable of the shell unset? give a path")


def main() -> NoReturn:
    """Run the command line. Its help lists the exit codes."""
    # Typer ends with SystemExit for its own errors. Ours are one line without a traceback: they are
    # about the input, not about this program. A process that fails waits some seconds for its
    # peers, which may be failing for the same reason; one that ends as all others do need not.
    code, patience = 0, None
    # no command has imported jax yet
    set_memory_fraction()
    program_cache.set_default()
    # pydantic would read the metadata of every installed package, to look for plugins
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        _check_arguments()
        app(standalone_mode=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except UserError as error:
        _print_error(str(error))
        code, patience = 2, _PATIENCE
    except Stopped as stopped:
        console.print_error(str(stopped))
        # no patience: all processes stopped at the same step, so none is waited for
        code = stopped.code
    except PeerLost as lost:
        _print_error(str(lost))
        code, patience = 1, 0.0  # there is no peer left to wait for
    except KeyboardInterrupt:
        console.print_error("interrupted; the same command continues at the last checkpoint")
        code, patience = 130, _PATIENCE
    except Exception as error:
        if (line := file_error(error)) is not None:
            _print_error(line)
        else:
            traceback.print_exc()
        code, patience = 1 if line is None else 2, _PATIENCE
    # jax at work means that there may be peers; importing it here would start it for nothing
    if "jax" in sys.modules:
        program_cache.prune()
        if patience is not None:
            from jax_ordermerge import processes

            processes.end(code, patience)
    sys.exit(code)
