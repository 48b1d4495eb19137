"""The config of a run: where it is read from, and which models it names."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from jax_ordermerge import config as schema
from jax_ordermerge import layout
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import Config, shipped
from jax_ordermerge.errors import UserError, similar_path
from jax_ordermerge.layout import RunLayout, member_name
from jax_ordermerge.merge.recipe import schema as recipes
from jax_ordermerge.record import stored_config


def read_config(target: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, or the resolved config of a run directory; both may be in a bucket.

    A config of the package goes by its name, as `config.shipped.find` takes it.

    Raises:
        UserError: the file is absent or not valid, the directory is not a run directory, or its
            config was edited and contradicts its results, or an override would be ignored.
    """
    # A run keeps the name that it is reached by: the stored config may name the directory or bucket
    # where it was first written, and the run may have been moved or copied since.
    url = remote.address(target)
    if url is not None and not url.endswith((".yaml", ".yml")):
        _refuse_output(url, overrides)
        path = remote.fetch(f"{url}/{layout.CONFIG}")
        return schema.load_config(path, overrides, {"output": url})
    path = shipped.find(target) or remote.fetch(target)
    if path.is_file():
        if recipes.is_recipe(path):
            raise UserError(
                f"{path} is the recipe of a merge, and no config of an experiment; give it to"
                f" ordermerge merge {path} MERGED"
            )
        return schema.load_config(path, overrides)
    run = RunLayout(path)
    if not path.is_dir():
        near = similar_path(path) or shipped.suggest(target)
        raise UserError(
            f"config file {path} not found{near}; give a config file, a run directory, or a name"
            " that ordermerge configs lists"
        )
    if not run.is_run:
        is_model = (path / "config.json").is_file()
        raise UserError(
            f"{path} is {'a model, and ' if is_model else ''}not a run directory (it has no"
            f" {layout.CONFIG}); give a config file or a run directory"
        )
    _refuse_output(path, overrides)
    stored_config(run)
    # absolute where the config would read its ~ as the home directory
    output = path.absolute() if str(path).startswith("~") else path
    return schema.load_config(run.config, overrides, {"output": str(output)})


def _refuse_output(run: str | Path, overrides: Sequence[str]) -> None:
    """Refuse another output for a run directory, and a directory that the config cannot name."""
    if any(item.partition("=")[0].strip() == "output" for item in overrides):
        raise UserError(
            f"--set output would be ignored: {run} is a run directory, which keeps its results; to"
            f" train in another one give its config, {run}/{layout.CONFIG}"
        )
    if "{name}" in str(run):
        raise UserError(
            f"{run}: {{name}} stands for the name of the experiment in output; rename the directory"
        )


def model_names(config: Config) -> dict[str, str]:
    """Return `{name: kind}` of every model of an experiment, in the order of the report.

    Example:
        >>> model_names(Config())
        {'base': 'base', 'member_0': 'member', 'member_1': 'member', 'member_2': 'member',
         'member_3': 'member', 'average': 'merge', 'selection': 'merge'}
    """
    members = [member_name(member) for member in range(config.population.members)]
    return (
        {"base": "base"}
        | dict.fromkeys(members, "member")
        | dict.fromkeys(config.merge_names, "merge")
    )


def result_layouts(config: Config) -> list[RunLayout]:
    """Return the layout of the results of every population.

    Example:
        >>> [str(run.root) for run in result_layouts(Config(population={"replicates": 2}))]
        ['runs/experiment', 'runs/experiment/populations/1']
    """
    run = RunLayout(config.directory)
    return [run.population(number) for number in range(config.population.replicates)]


def write_config(config: Config, run: RunLayout, *, output: str) -> None:
    """Write the resolved config, which makes a directory a run directory.

    Args:
        config: of the run; its `output` is a directory on this machine.
        run: layout of that directory.
        output: where the user reaches the run, which may be a bucket.
    """
    # Of a bucket, so that the run continues on a machine that has no copy yet.
    config = config.model_copy(update={"output": output})
    layout.write_text(run.config, yaml.safe_dump(schema.to_dict(config), sort_keys=False))
