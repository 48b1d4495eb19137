"""Submission of a rendered file: `sbatch FILE`, `kubectl apply -f FILE` or `bash FILE`."""

import shutil
import subprocess
from pathlib import Path

from jax_ordermerge.errors import UserError
from jax_ordermerge.launch.target import TARGETS


def submit(target_name: str, path: Path) -> int:
    """Run a rendered file with the program of its target, and return the exit code.

    Raises:
        UserError: the program is not installed.

    Example:
        >>> import tempfile
        >>> script = Path(tempfile.mkdtemp()) / "a.sh"
        >>> _ = script.write_text("exit 3")
        >>> submit("ssh", script)
        3
    """
    # Checked first: subprocess would raise FileNotFoundError, with a traceback.
    command = TARGETS[target_name].submit_command
    if shutil.which(command[0]) is None:
        raise UserError(
            f"--submit needs {command[0]}, which is not installed here; write a file with --out"
            " and submit it where the program is"
        )
    # no shell, so a path with spaces is one argument
    return subprocess.run([*command, str(path)], check=False).returncode
