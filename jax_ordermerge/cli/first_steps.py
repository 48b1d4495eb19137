"""Commands to begin with: the configs of the package, and a config of one's own."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from jax_ordermerge.cli.app import AsJson, app


@app.command()
def configs(as_json: AsJson = False) -> None:
    """List the configs that come with the package: hardware, time and what to expect.

    ordermerge run quickstart
    """
    import shutil
    import sys

    from jax_ordermerge.commands import configs as command

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(command.list_configs(as_json=as_json, width=width), nl=False)


@app.command()
def init(
    name: Annotated[str, Argument(metavar="NAME", help="A config that `configs` lists.")],
    out: Annotated[
        Path | None, Argument(metavar="[OUT.yaml]", help="File to write; NAME.yaml by default.")
    ] = None,
) -> None:
    """Write a config to edit, whose comments say what each key means.

    ordermerge init quickstart mine.yaml
    """
    from jax_ordermerge.commands import configs as command

    path = command.write_config(name, out)
    typer.echo(f"wrote {path}; next: ordermerge run {path}")
