"""Names of models for readers elsewhere: cards and recipes are published, paths are private."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.checkpoint.resolve import PACKAGED
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout, member_checkpoint, member_number
from jax_ordermerge.merge.sources.references import split_name

_EMBEDDED = "embedded:"
_HUB_CACHE = "models--"  # huggingface_hub keeps ORG/NAME in models--ORG--NAME/snapshots/REVISION


class PublicName(NamedTuple):
    """A model as a reader on another machine may know it.

    Attributes:
        text: the name on a hub; `RUN/member_3`; or the last part of the path, links resolved.
        kind: what the name is of.
    """

    text: str
    kind: Literal["hub", "embedded", "run", "package", "bucket", "file", "directory"]

    @property
    def card_id(self) -> str:
        """The name with the characters that hubs allow in `base_model`.

        Example:
            >>> PublicName("quickstart/member_0", "run").card_id
            'quickstart-member_0'
        """
        if self.kind == "hub":
            return self.text
        # a slash would make it the name of a stranger's model; hubs refuse -- and ..
        return re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9_.]+", "-", self.text)).strip("-.")

    @property
    def origin(self) -> str:
        """The name and where the model comes from, as Markdown.

        Example:
            >>> PublicName("SmolLM2-135M", "directory").origin
            '`SmolLM2-135M` (a directory, not from a hub)'
        """
        if self.kind == "hub":
            return f"[`{self.text}`](https://huggingface.co/{self.text})"
        places = {
            "embedded": "shipped with jax_ordermerge",
            "package": "from another Python package",
            "run": "made by a run of jax_ordermerge",
            "bucket": "from a bucket",
            "file": "a GGUF file, not from a hub",
            "directory": "a directory, not from a hub",
        }
        return f"`{self.text}` ({places[self.kind]})"


def public_name(model: str) -> PublicName:
    """Return the public name of a model, without an adapter.

    Args:
        model: a directory, hub name, address, `embedded:NAME`, `RUN/member_3` or `RUN/average`.

    Example:
        >>> public_name("meta-llama/Llama-2-7b-hf").text, public_name("gs://mine/tuned/").text
        ('meta-llama/Llama-2-7b-hf', 'tuned')
        >>> public_name("/home/me/SmolLM2-135M"), public_name("embedded:quickstart").text
        (PublicName(text='SmolLM2-135M', kind='directory'), 'quickstart')
    """
    if model.startswith(_EMBEDDED):
        name = model.removeprefix(_EMBEDDED)
        return PublicName(name, "package" if name in PACKAGED else "embedded")
    if (address := remote.address(model)) is not None:
        return PublicName(Path(address).name, "bucket")
    path = remote.expand(model)
    real = path.resolve()
    run_layout = RunLayout(real.parent)
    # RUN/average is no path, and looks like a name on a hub
    if run_layout.is_run and run_layout.is_merged(real.name) and not real.exists():
        real = run_layout.merged(real.name)
    if (run := _run_of(real)) is not None:
        return PublicName(str(real.relative_to(run.parent)), "run")
    # OWNER/NAME has one slash; what has more is a path, though it may be gone
    if not (path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1):
        return PublicName(model, "hub")
    cache = real.parents[1].name if real.parent.name == "snapshots" else ""
    if cache.startswith(_HUB_CACHE):
        return PublicName(cache.removeprefix(_HUB_CACHE).replace("--", "/"), "hub")
    return PublicName(real.name, "file" if real.is_file() else "directory")


def split_label(label: str) -> tuple[str, str | None]:
    """Return model and adapter of an opened model; see `split_name`.

    Example:
        >>> split_label("base+adapter"), split_label("base")
        (('base', 'adapter'), ('base', None))
    """
    try:
        return split_name(label)
    except UserError:
        # A recipe may give model and adapter apart, each with a plus in its name.
        return label, None


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Return `{model: name}` for a recipe: public names, with more of a path where two are equal.

    Args:
        models: as `references.open_model` takes them, also `MODEL+ADAPTER`.

    Example:
        >>> short_names(["/data/tuned/a", "org/b+/data/adapter"])
        {'/data/tuned/a': 'a', 'org/b+/data/adapter': 'org/b+adapter'}
        >>> short_names(["/data/one/final", "/data/two/final"])
        {'/data/one/final': 'one/final', '/data/two/final': 'two/final'}
    """
    names = dict.fromkeys(models, "")
    for model in names:
        parts = filter(None, split_label(model))
        names[model] = "+".join(public_name(part).text for part in parts)
    for name in set(names.values()):
        # one model may be spelled in several ways
        paths = {
            model: remote.expand(model).resolve().parts for model in names if names[model] == name
        }
        if len(set(paths.values())) > 1:
            names |= _longer_names(paths)
    return names


def _longer_names(paths: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    for length in range(2, max(map(len, paths.values()))):
        names = {model: "/".join(parts[-length:]) for model, parts in paths.items()}
        if len(set(names.values())) == len(set(paths.values())):
            return names
    return {model: "/".join(parts) for model, parts in paths.items()}


def _run_of(path: Path) -> Path | None:
    """Return RUN of RUN/member_0 and of the directory of a merge in it; None of other paths."""
    is_member = member_number(path.name) is not None or member_checkpoint(path.name) is not None
    if is_member and RunLayout(path.parent).is_run:
        return path.parent
    run = RunLayout(path.parent.parent)
    return run.root if run.is_run and run.merged(path.name) == path else None
