"""Processes that are forked from one that has imported jax, transformers and this package.

The imports of a command take five seconds of CPU, which is most of what a tiny training takes.
A process that is made here is a real one: it has a pid, streams, signals and an exit code.
"""

import atexit
import functools
import multiprocessing
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from types import TracebackType

PRELOADED = [
    "jax_ordermerge.cli.runs",
    "jax_ordermerge.experiment.pipeline",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
]
AT_IMPORT = ("JAX_", "HF_", "OPENBLAS_", "MPL")  # variables that the imported packages read once

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(PRELOADED)
_environment: dict[str, str] = {}  # what the server was started with


def _at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(AT_IMPORT)}


@functools.cache
def _outputs() -> str:
    """Make the directory of all output."""
    directory = tempfile.mkdtemp(prefix="output-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _run(code: str | None, arguments: list[str], cwd: str, env: dict[str, str], out: str) -> None:
    """Do in the new process what `python -m jax_ordermerge` or `python -c` does."""
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{out}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[1:] = arguments
    try:
        if code is None:
            runpy.run_module("jax_ordermerge", run_name="__main__", alter_sys=True)
        else:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        # multiprocessing ends a process without them; those of jax leave the other processes
        atexit._run_exitfuncs()


class Command:
    """`python -m jax_ordermerge ARGUMENTS`, or `python -c CODE ARGUMENTS`, with few imports to do.

    It has what tests use of `subprocess.Popen`; its output goes to files.
    """

    def __init__(
        self,
        arguments: list[object],
        *,
        code: str | None = None,
        cwd: str | os.PathLike[str] = ".",
        env: dict[str, str] | None = None,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        _environment.update(_environment or _at_import(environment))
        if _at_import(environment) != _environment:
            raise ValueError(
                f"the imports were done with {_environment}, which {_at_import(environment)} is not"
            )
        self._output = tempfile.mkdtemp(dir=_outputs())
        self.args = [str(argument) for argument in arguments]
        self._process = _SERVER.Process(
            target=_run,
            args=(code, self.args, os.path.abspath(cwd), environment, self._output),
        )
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        return self._read("stderr")

    def _read(self, stream: str) -> str:
        file = pathlib.Path(self._output, stream)
        return file.read_text() if file.exists() else ""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            TimeoutError: it has not ended within so many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"{self.args} has not ended within {timeout} s\n{self.stderr}")
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return what it has written to stdout and stderr."""
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that has not ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Command":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        self.wait()


def run(
    arguments: list[object],
    *,
    check: bool = False,
    timeout: float | None = None,
    code: str | None = None,
    cwd: str | os.PathLike[str] = ".",
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` with the output as text.

    Raises:
        subprocess.CalledProcessError: with `check`, its exit code is not 0.
    """
    with Command(arguments, code=code, cwd=cwd, env=env) as command:
        stdout, stderr = command.communicate(timeout)
        done = subprocess.CompletedProcess(command.args, command.wait(), stdout, stderr)
    if check:
        done.check_returncode()
    return done
