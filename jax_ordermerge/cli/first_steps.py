"""Commands to begin with: the configs of the package, and a config of one's own."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from jax_ordermerge import console
from jax_ordermerge.cli.app import AsJson, Overrides, Quiet, app, refuse_options
from jax_ordermerge.errors import UserError


@app.command()
def configs(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the configs of the package: hardware, time, result.

    Each runs by its name:

    ordermerge run quickstart
    """
    import shutil
    import sys

    from jax_ordermerge.commands import configs as command

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    console.print_result(command.list_configs(as_json=as_json, width=width), end="")


@app.command()
def init(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        Argument(
            metavar="[NAME] [OUT.yaml]",
            help="A config that `configs` lists, unless --model and --data are given; and the file"
            " to write, by default NAME.yaml or experiment.yaml.",
        ),
    ] = None,
    *,
    model: Annotated[
        str | None, Option(help="Base model: HF directory, GGUF file or hub name.")
    ] = None,
    data: Annotated[str | None, Option(help="Training data: file, directory, hub dataset.")] = None,
    test: Annotated[
        str | None, Option(help="Test data; by default some examples are set aside.")
    ] = None,
    hardware: Annotated[
        str | None,
        Option(help="v5p:4x4x2, h100:8, cpu:8; by default the devices of this machine."),
    ] = None,
    members: Annotated[
        int, Option(min=1, help="Number of members, each in an order of its own.")
    ] = 4,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Write a config to edit: a copy, or one for your data.

    A copy of one of the package; or one for a model, data and devices.

    ordermerge init quickstart mine.yaml

    ordermerge init --model MODEL --data train.csv --hardware h100:8 mine.yaml

    Comments say what each key means, or why its value was chosen.
    """
    arguments = names or []
    if model is None or data is None:
        mode = "it goes with --model and --data"
        refuse_options(
            context, mode, ignored=["model", "data", "test", "hardware", "members", "overrides"]
        )
        path = _write_shipped(arguments)
        summary = ""
    else:
        from jax_ordermerge.commands import init as command

        if len(arguments) > 1:
            raise UserError(
                f"{arguments[0]} would be ignored: with --model give one file, OUT.yaml"
            )
        path = Path(arguments[0] if arguments else "experiment.yaml")
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{path}: expected a file to write that ends in .yaml")
        request = command.Request(model, data, test, hardware, members, tuple(overrides or ()))
        summary = f": {command.write_config(request, path)}"
    console.print_message(f"wrote {path}{summary}\nnext: ordermerge run {shlex.quote(str(path))}")


def _write_shipped(names: list[str]) -> Path:
    from jax_ordermerge.commands import configs as command

    if not 1 <= len(names) <= 2:
        raise UserError(
            "init needs the name of a config (see ordermerge configs) and a file to write at most;"
            " or --model and --data"
        )
    return command.write_config(names[0], Path(names[1]) if len(names) == 2 else None)
