"""The command that explains the keys of a config."""

from typing import Annotated

import typer
from typer import Argument

from jax_ordermerge.cli.app import AsJson, app


@app.command()
def config(
    key: Annotated[
        str | None,
        Argument(metavar="[KEY]", help="A key or section, e.g. training; all keys by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain config keys: type, unit, default, example.

    Also what each goes with or excludes.

    ordermerge config training.learning_rate

    Any key can be set with --set KEY=VALUE, or in the YAML file of a run.
    """
    from jax_ordermerge.config import reference

    typer.echo(reference.describe_json(key) if as_json else reference.describe(key))
