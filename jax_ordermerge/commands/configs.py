"""The configs that come with the package: a table of them, and a copy of one to edit."""

import json
import re
import shlex
from pathlib import Path

from jax_ordermerge import console
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.commands import tables
from jax_ordermerge.config import comments, shipped
from jax_ordermerge.config.names import name_problem
from jax_ordermerge.errors import UserError, did_you_mean


def list_configs(*, as_json: bool, width: int | None = None) -> str:
    """Return a table of the shipped configs, or JSON with all that their headers say.

    Args:
        as_json: return JSON.
        width: of the table in characters; by default as wide as its content.
    """
    configs = shipped.list_configs()
    if as_json:
        rows = [config._asdict() | {"path": str(config.path)} for config in configs]
        return console.to_json(rows)
    runs = [config for config in configs if config.hardware]
    tasks = [config for config in configs if not config.hardware]
    experiments = tables.text_table(
        ["ordermerge run ...", "what", "hardware", "time", "expect"],
        [[x.name, _sentence(x.summary), x.hardware, x.time, x.expect] for x in runs],
    )
    benchmarks = tables.text_table(
        ["ordermerge evaluate MODEL --config ...", "what"],
        [[x.name, _sentence(x.summary)] for x in tasks],
    )
    return f"{tables.to_text(experiments, width)}\n{tables.to_text(benchmarks, width)}"


def _sentence(text: str) -> str:
    """Return the first sentence, or clause before a colon, of a summary."""
    return re.split(r"[:;] |\. ", text)[0].removesuffix(".")


def write_config(name: str, out: Path | None) -> Path:
    """Write a copy of a shipped config whose comments say what each key means.

    Args:
        name: of the config, as `list_configs` has it.
        out: YAML file; by default the last part of the name in the current directory.

    Returns:
        the file.

    Raises:
        UserError: there is no such config, or the file exists or cannot be written.
    """
    source = shipped.find(name)
    if source is None:
        near = did_you_mean(name, [config.name for config in shipped.list_configs()])
        raise UserError(f"no config of this package is called {name}{near}; see ordermerge configs")
    path = check_new(out or Path(source.name))
    text = source.read_text(encoding="utf-8")
    # commands of the header are those of the copy, which is another experiment by its name
    text = text.replace(f"configs/{shipped.describe(source).name}.yaml", shlex.quote(str(path)))
    if out is not None:
        if named := re.search(r"^name: *(\S+)", text, flags=re.M):
            run = re.escape(named[1].strip("\"'"))
            text = re.sub(rf"\bruns/{run}(?![\w-])", lambda _: f"runs/{path.stem}", text)
        text = re.sub(r"^name: .*$", f"name: {json.dumps(path.stem)}", text, count=1, flags=re.M)
    atomic.replace(path, comments.annotate(text).encode())
    return path


def check_new(path: Path) -> Path:
    """Return the path of a config to write, which must not exist yet.

    Raises:
        UserError: it exists, is no name of a config, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists; give another file: ordermerge init ... NEW.yaml")
    if problem := name_problem(path.stem):
        raise UserError(f"{path}: the name {problem}; it names the run directory, too")
    atomic.check_writable(path, is_file=True)
    return path
