"""The application, and the arguments and options that several commands share."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option
from typer.models import OptionInfo

from jax_ordermerge import __version__, console
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from jax_ordermerge.config import Config
    from jax_ordermerge.layout import RunLayout


# click joins the lines of a paragraph, unless it begins with this sign
_EXIT_CODES = """\b
Exit codes:
  0    done
  1    a failure; of diff: the models differ; of doctor: the run would fail
  2    bad input: one line says what was given, what is expected and what to do
  130  stopped by Ctrl-C, 143 by SIGTERM; a training has saved a checkpoint, and
       the same command continues it
  134  another process of the run was lost; start all of them again
"""

app = typer.Typer(
    name="ordermerge",
    help="Fine-tune one base model in k data orders, measure what the order did, and merge the k"
    " models into one.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # as wide as the terminal, so that examples stay on one line where there is space for them
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print_result(f"ordermerge {__version__}")
        raise typer.Exit


def _set_json(wanted: bool) -> bool:
    console.set_json(wanted)
    return wanted


def _set_quiet(wanted: bool) -> bool:
    console.set_quiet(wanted)
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    # the version ends the program by itself; commands without --json do not set it
    console.set_json(False)


RunArgument = Annotated[
    Path,
    Argument(
        metavar="CONFIG|RUN",
        help="YAML config, name of one that `configs` lists, or the run directory that it made.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, e.g. --set training.learning_rate=1e-5. May be repeated.",
    ),
]


def json_option(text: str = "Print the result as JSON.") -> OptionInfo:
    """Return the option `--json`, with what it does in a command of several modes."""
    return Option("--json", help=text, callback=_set_json)


AsJson = Annotated[bool, json_option()]
Quiet = Annotated[
    bool,
    Option(
        "--quiet",
        "-q",
        help="Print results and errors alone: no messages, no progress.",
        callback=_set_quiet,
    ),
]
IgnoreKeys = Annotated[
    list[str] | None,
    Option(
        "--ignore-config-keys",
        metavar="KEY,...",
        help="Unknown keys of config.json that the model does not depend on.",
    ),
]
AllowBin = Annotated[
    bool,
    Option("--allow-bin", help="Read .bin weights of PyTorch (tensors only; needs torch)."),
]
Runs = Annotated[list[Path], Argument(metavar="RUN...", help="Run directories.")]
Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="HF or Orbax directory, GGUF file, hub name, embedded:NAME, RUN/member_0, RUN/average"
        " (a merge) or MODEL+ADAPTER.",
    ),
]


# Commands import what they need when they run. Typer calls one of them per process, so imports at
# the top would only make all others, and --help, as slow as the slowest.
def read_config(target: Path, overrides: list[str] | None) -> "Config":
    from jax_ordermerge.experiment import run_config

    return run_config.read_config(target, overrides or ())


def refuse_options(
    context: typer.Context,
    mode: str,
    allowed: Collection[str] = (),
    *,
    ignored: Collection[str] = (),
) -> None:
    """Refuse options that were given although this mode of a command does not read them.

    Args:
        context: of the command.
        mode: what the command does here, for the message.
        allowed: names of the parameters that this mode reads.
        ignored: names of those that it does not read; by default all but the allowed ones.

    Raises:
        UserError: an option would be ignored.
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        is_option = parameter.param_type_name == "option"
        is_read = name not in ignored if ignored else name in allowed
        source = context.get_parameter_source(name)
        # every mode is quiet where that is asked for
        is_read |= name == "quiet"
        # defaults and environment variables are not what the user asked for here
        if not is_option or is_read or source is None or source.name != "COMMANDLINE":
            continue
        raise UserError(f"{parameter.opts[0]} would be ignored: {mode}; leave it out")


def check_outputs(*outputs: Path | None, are_files: bool = False) -> None:
    """Refuse results that could not be written, before the work that they are of.

    Raises:
        UserError: a path is in a bucket or cannot be written.
    """
    from jax_ordermerge.checkpoint import atomic, remote

    for output in outputs:
        if output is None:
            continue
        if remote.address(output) is not None:
            raise UserError(f"{remote.address(output)}: give a path on a disk for these results")
        atomic.check_writable(output, is_file=are_files)


def split_keys(texts: list[str] | None) -> tuple[str, ...]:
    """Return the keys of `--ignore-config-keys`, which may be repeated."""
    return tuple(key.strip() for text in texts or () for key in text.split(",") if key.strip())


def run_through(
    stage: str, target: Path, overrides: list[str] | None
) -> tuple["Config", "RunLayout"]:
    """Run the stages of a run up to one, and return its config and its directory."""
    from jax_ordermerge.experiment import pipeline
    from jax_ordermerge.layout import RunLayout

    config = read_config(target, overrides)
    return config, RunLayout(pipeline.run(config, through=stage, log=console.print_message))
