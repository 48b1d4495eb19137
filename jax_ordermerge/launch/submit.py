"""Hand a rendered text to the program that runs it."""

import shutil
import subprocess
from pathlib import Path

from jax_ordermerge.errors import UserError

_PROGRAMS = {
    "tpu-vm": ("bash",),
    "gke": ("kubectl", "apply", "-f"),
    "slurm": ("sbatch",),
    "ssh": ("bash",),
}


def submit(target: str, file: Path) -> int:
    """Run `sbatch FILE`, `kubectl apply -f FILE` or `bash FILE`, and return its exit code.

    Raises:
        UserError: the program is not installed.

    Example:
        >>> import tempfile
        >>> script = Path(tempfile.mkdtemp()) / "a.sh"
        >>> _ = script.write_text("exit 3")
        >>> submit("ssh", script)
        3
    """
    program, *arguments = _PROGRAMS[target]
    if shutil.which(program) is None:
        raise UserError(
            f"--submit needs {program}, which is not installed here; write a file with --out and take it where it is"
        )
    return subprocess.run([program, *arguments, str(file)], check=False).returncode
