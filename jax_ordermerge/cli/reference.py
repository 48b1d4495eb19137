"""The command that explains the keys of a config."""

from typing import Annotated

from typer import Argument

from jax_ordermerge import console
from jax_ordermerge.cli.app import AsJson, Quiet, app


@app.command()
def config(
    key: Annotated[
        str | None,
        Argument(metavar="[KEY]", help="A key or section, e.g. training; all keys by default."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Explain config keys: type, unit, default, example.

    Also what each goes with or excludes.

    ordermerge config training.learning_rate

    Any key can be set with --set KEY=VALUE, or in the YAML file of a run.
    """
    from jax_ordermerge.config import reference

    if as_json:
        console.print_result(reference.describe_json(key), end="")
    else:
        console.print_result(reference.describe(key))
