"""The command line: each command has its options here and its work in `commands` or `experiment`.

Nothing heavy is imported before a command runs, so `--help` takes milliseconds.
"""

import sys
import traceback
from typing import NoReturn

from jax_ordermerge.cli import runs, single_models  # noqa: F401  (they register their commands)
from jax_ordermerge.cli.app import app
from jax_ordermerge.errors import PeerLost, Stopped, UserError

_PATIENCE = 5.0  # seconds that a failing process waits for its peers


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 2 bad input, 130 interrupted by SIGINT and 143 by SIGTERM (a training has
    then saved a checkpoint), 1 a failure.
    """
    # Typer ends with SystemExit for its own errors. Ours are one line without a traceback: they are
    # about the input, not about this program. A process that fails waits some seconds for its
    # peers, which may be failing for the same reason; one that ends as all others do need not.
    code, patience = 0, None
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code, patience = 2, _PATIENCE
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        # no patience: all processes stopped at the same step, so none is waited for
        code = stopped.code
    except PeerLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        code, patience = 1, 0.0  # there is no peer left to wait for
    except KeyboardInterrupt:
        print("interrupted; the same command continues at the last checkpoint", file=sys.stderr)
        code, patience = 130, _PATIENCE
    except Exception:
        traceback.print_exc()
        code, patience = 1, _PATIENCE
    # jax at work means that there may be peers; importing it here would start it for nothing
    if patience is not None and "jax" in sys.modules:
        from jax_ordermerge import processes

        processes.end(code, patience)
    sys.exit(code)
