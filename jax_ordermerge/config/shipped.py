"""The configs that come with the package, by name, and what their comments say.

In a clone they are in `configs/`, in an installed package in `jax_ordermerge/configs/`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from jax_ordermerge.errors import did_you_mean

_INSTALLED = Path(__file__).parents[1] / "configs"
_CLONE = Path(__file__).parents[2] / "configs"
# Of the last lines of a header: what else a run needs, where it ran, how long, and what came out.
_FIELDS = ("needs", "hardware", "time", "expect")
_FIELD = re.compile(rf"({'|'.join(_FIELDS)}): (.*)", re.IGNORECASE)
_COMMAND = re.compile(r"^#   .*?(ordermerge (?:run|evaluate) .*)$", re.MULTILINE)


class ShippedConfig(NamedTuple):
    """A config of the package, as its header describes it.

    Attributes:
        name: what `ordermerge run` takes, e.g. `"quickstart"`, `"small/alpaca"`.
        path: of the file.
        summary: first paragraph of the header.
        command: that of the header which names the config, `ordermerge run ...` or
            `ordermerge evaluate ...`.
        needs: what the config lacks or does not bring, e.g. a base; empty if nothing.
        hardware: what it was run on, or is meant for; empty for evaluations of any model.
        time: how long it took there.
        expect: what came out.
    """

    name: str
    path: Path
    summary: str
    command: str
    needs: str
    hardware: str
    time: str
    expect: str


def directory() -> Path:
    """Return the directory of the configs."""
    return _INSTALLED if _INSTALLED.is_dir() else _CLONE


def find(target: str | Path) -> Path | None:
    """Return the file of a config of the package, or None where the target is something else.

    Args:
        target: a name, also as the path in a clone. What exists under that path goes first.

    Example:
        >>> find("quickstart") == find("configs/quickstart.yaml") or Path("configs").is_dir()
        True
        >>> find("nothing") is None
        True
    """
    text = str(target)
    name = text.removeprefix("configs/").removesuffix(".yaml")
    parts = name.split("/")
    # a bare `quickstart.yaml` is a file that is absent, and no name of ours
    is_name = text in (name, f"configs/{name}.yaml")
    if not is_name or {"", ".", ".."} & set(parts) or Path(text).exists():
        return None
    path = directory().joinpath(*parts[:-1], f"{parts[-1]}.yaml")
    return path if path.is_file() else None


def suggest(target: str | Path) -> str:
    """Return `" (did you mean 'x'?)"` where a target resembles the name of a config, else `""`.

    Example:
        >>> suggest("quikstart")
        " (did you mean 'quickstart'?)"
    """
    near = did_you_mean(str(target), [config.name for config in list_configs()])
    return near if near.startswith(" (did") else ""


def list_configs() -> list[ShippedConfig]:
    """Return the configs that `ordermerge run` and `ordermerge evaluate --config` take.

    The quickstart goes first. Files of hypotheses are no configs and are left out.

    Example:
        >>> quickstart = list_configs()[0]
        >>> quickstart.name, quickstart.hardware, quickstart.time
        ('quickstart', 'two CPU cores', '1 to 3 minutes')
    """
    root = directory()
    configs = [
        describe(path)
        for path in root.rglob("*.yaml")
        if _COMMAND.search(path.read_text(encoding="utf-8"))
    ]
    by_use = sorted(configs, key=lambda x: (x.command.split()[1] != "run", "/" in x.name, x.name))
    return sorted(by_use, key=lambda x: x.name != "quickstart")


def describe(path: Path) -> ShippedConfig:
    """Return what the header of a config says; see `ShippedConfig`."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    header = "\n".join(lines)
    name = path.relative_to(directory()).with_suffix("").as_posix()
    commands = _COMMAND.findall("\n".join(f"# {line}" for line in lines))
    # a header may begin with the run that this one is compared with
    command = next((x for x in commands if f"configs/{name}.yaml" in x), "")
    fields = dict.fromkeys(_FIELDS, "")
    current = ""
    for line in lines:
        if match := _FIELD.fullmatch(line):
            current = match[1].lower()
            fields[current] = match[2]
        elif current and line.startswith("  "):
            fields[current] += f" {line.strip()}"
        else:
            current = ""
    return ShippedConfig(
        name,
        path,
        " ".join(header.partition("\n\n")[0].split()),
        command.rstrip(" \\"),
        **{key: text.removesuffix(".") for key, text in fields.items()},
    )
