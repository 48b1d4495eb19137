"""Names of models, which every command that takes a model opens by `open_model`.

A name is a directory, a GGUF file, a hub name, `RUN/member_3`, `RUN/member_3@200` (its checkpoint
of step 200), `RUN/average` (a merge of a run), an Orbax directory, or one of these with an
adapter, `MODEL+ADAPTER`.
"""

import functools
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from jax.typing import DTypeLike

from jax_ordermerge import record
from jax_ordermerge.checkpoint import convert, gguf_files, orbax, remote
from jax_ordermerge.checkpoint.resolve import is_on_hub
from jax_ordermerge.config import Lora, Model, read_yaml
from jax_ordermerge.config.section import parse
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout, member_checkpoint, member_number, read_json
from jax_ordermerge.merge.sources import lora, peft_files, storage, unlisted
from jax_ordermerge.merge.sources.storage import AnySource, Source

Resolve = Callable[[str], Path]


class Member(NamedTuple):
    """A member of a run.

    Attributes:
        layout: of the run.
        number: of the member.
        step: of an earlier checkpoint; None is the trained member.
    """

    layout: RunLayout
    number: int
    step: int | None = None


def open_model(
    name: str,
    adapter: str | None = None,
    *,
    resolve: Resolve | None = None,
    dtype: DTypeLike | None = None,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> Source:
    """Open a model by name. Headers and shapes are checked, tensors are not read.

    Args:
        name: a Hugging Face directory, GGUF file or hub name; `RUN/member_3`, a member of a run, or
            `RUN/member_3@200`, at an earlier step that its training kept; `RUN/average`, a merge of
            it; an Orbax directory made by `ordermerge convert --to
            orbax`; or one of these with an adapter, `MODEL+ADAPTER`. The name of an existing
            directory is never split or parsed.
        adapter: directory or hub name of a LoRA adapter, if it is not part of the name.
        resolve: maps a name to a directory; by default `convert.resolve`.
        dtype: that the caller reads tensors in. A model with an adapter is rounded to it once;
            None is the dtype of its base.
        ignore: unknown keys of `config.json` to ignore. Of a member of a run, those of its config
            are ignored, too.
        allow_bin: read `.bin` files of PyTorch where a model or adapter has no safetensors.

    Raises:
        UserError: there is no such model, or it is not complete.

    Example:
        >>> open_model("embedded:quickstart").config.num_layers
        3
    """
    name, adapter = split_name(name, adapter)
    resolve = resolve or functools.partial(convert.resolve, allow_bin=allow_bin)
    if adapter is None:
        path = _find_directory(name, resolve, ignore)
        return _open_listed(path, name, ignore, allow_bin) if isinstance(path, Path) else path
    directory = resolve(adapter)
    # before the base is opened, which may have to be downloaded
    if not peft_files.is_adapter(directory):
        raise UserError(
            f"{adapter} in {name}+{adapter} is no adapter (it has no {peft_files.CONFIG}, or also a"
            " config.json); give MODEL+ADAPTER"
        )
    path, label = _find_directory(name, resolve, ignore), f"{name}+{adapter}"
    base = _open_listed(path, name, ignore, allow_bin) if isinstance(path, Path) else path
    return peft_files.open_adapter(base, directory, label, dtype=dtype, allow_bin=allow_bin)


def open_any(
    name: str,
    adapter: str | None = None,
    *,
    resolve: Resolve | None = None,
    dtype: DTypeLike | None = None,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> AnySource:
    """Open a model of any architecture, or an adapter by itself, to merge it tensor by tensor.

    A name may also be that of a safetensors file. A model of an architecture in the tensor table is
    opened as by `open_model`, with its checks.

    Args:
        name, adapter, resolve, dtype, ignore, allow_bin: see `open_model`.

    Raises:
        UserError: there is no such model, or it is not complete; or an adapter belongs to a model
            that is not in the table.
    """
    # an adapter on a base needs the table, which says which tensor each of its factors changes
    if split_name(name, adapter)[1] is None:
        file = remote.expand(name)
        if file.suffix == ".safetensors" and file.is_file():
            return unlisted.Unlisted(file, name)
        resolve = resolve or functools.partial(convert.resolve, allow_bin=allow_bin)
        path = _find_directory(name, resolve, ignore)
        if not isinstance(path, Path):
            return path
        # Orbax holds the tree of a listed model, not tensors by their names in files
        if not _is_orbax(path):
            return unlisted.open_directory(path, name, ignore, allow_bin=allow_bin)
    return open_model(
        name, adapter, resolve=resolve, dtype=dtype, ignore=ignore, allow_bin=allow_bin
    )


def split_name(name: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Return the parts of `MODEL+ADAPTER`; a name that has one part, or is split already, stays.

    Raises:
        UserError: a part is empty or has a revision, or there are several adapters.

    Example:
        >>> split_name("base+adapter"), split_name("base", "adapter"), split_name("base")
        (('base', 'adapter'), ('base', 'adapter'), ('base', None))
        >>> split_name("gs://bucket/run/member_0@200")
        ('gs://bucket/run/member_0@200', None)
    """
    # a path goes before the form MODEL+ADAPTER: directories may have any name
    if adapter is None and "+" in name and not _exists(name):
        name, adapter = _split(name)
    # taken for a part of the name, it would end in "no such model" and not say why
    for part in filter(None, (name, adapter)):
        if "@" in part and remote.address(part) is None and not _exists(part):
            raise UserError(
                f"model {part}: a revision (@) is not offered; download it and give the directory."
                " (Of a run, RUN/member_0@200 is the checkpoint of step 200.)"
            )
    return name, adapter


def _split(name: str) -> tuple[str, str]:
    splits = [
        (name[:place], name[place + 1 :]) for place, letter in enumerate(name) if letter == "+"
    ]
    if len(splits) > 1:
        # A `+` may stand in paths, too: the one that has an existing path on both sides, or else on
        # one of them. Adapters on adapters would need an order and a rounding between them.
        splits = [split for split in splits if all(map(_exists, split))] or [
            split for split in splits if any(map(_exists, split))
        ]
    if len(splits) != 1 or "" in splits[0]:
        raise UserError(f"model {name}: expected MODEL or MODEL+ADAPTER, with one adapter")
    return splits[0]


def _exists(name: str) -> bool:
    """Return whether a name is that of a path, or of a member or merge of a run on this disk."""
    path = remote.expand(name)
    layout = RunLayout(path.parent)
    is_of_run = _parse_member(path.name) is not None or layout.is_merged(path.name)
    return os.path.lexists(path) or (layout.is_run and is_of_run)


def is_composed(name: str) -> bool:
    """Return whether a name stands for more than a Hugging Face directory or hub name.

    That is a model with an adapter, a member or merge of a run, or an Orbax directory.

    Example:
        >>> is_composed("base+adapter"), is_composed("embedded:quickstart")
        (True, False)
    """
    path = remote.expand(name)
    if path.exists():
        # RUN/member_0 may be a directory of its own: the export
        return not (path / "config.json").is_file() and orbax.latest(path) is not None
    return "+" in name or _parse_member(path.name) is not None or find_merge(name) is not None


def is_downloaded(name: str, adapter: str | None = None) -> bool:
    """Return whether opening a model may download it from a hub.

    Example:
        >>> is_downloaded("meta-llama/Llama-2-7b-hf"), is_downloaded("embedded:quickstart")
        (True, False)
    """
    parts = filter(None, split_name(name, adapter))
    return any(is_on_hub(part) and not RunLayout(Path(part).parent).is_run for part in parts)


def find_member(name: str) -> Member | None:
    """Return a member of a run by its name, `RUN/member_3` or `RUN/member_3@200`; None for others.

    Example:
        >>> find_member("embedded:quickstart") is None
        True
    """
    path = remote.expand(name)
    parsed = _parse_member(path.name)
    if parsed is None:
        return None
    # a bucket holds the run but nothing of the name RUN/member_3: fetch the run
    layout = RunLayout(remote.fetch(path.parent))
    # a directory of that name, the export of the member, goes before its checkpoint
    is_member = layout.is_run and not (layout.root / path.name).exists()
    return Member(layout, *parsed) if is_member else None


def _parse_member(name: str) -> tuple[int, int | None] | None:
    number = member_number(name)
    return member_checkpoint(name) if number is None else (number, None)


def _find_directory(name: str, resolve: Resolve, ignore: Collection[str]) -> Path | Source:
    """Return the directory of a model without an adapter; a member of a run is opened."""
    member = find_member(name)
    if member is not None:
        return open_member(member.layout, member.number, name, ignore, step=member.step)
    path = find_merge(name)
    if path is None:
        is_fetched = remote.address(name) is not None and not name.endswith(gguf_files.SUFFIX)
        path = remote.fetch(name) if is_fetched else resolve(name)
    record.refuse_model_of_edited_run(path)
    layout = RunLayout(path)
    # also a run that is not trained yet, or in waves; models may have a config.yaml of their own
    is_model = (path / "config.json").is_file() or peft_files.is_adapter(path)
    if layout.is_run and not is_model:
        raise UserError(
            f"{name} is a run; name one of its members, as in {name}/member_0, or the directory of"
            f" a merge below {layout.merged('').relative_to(path)}"
        )
    return path


def _open_listed(path: Path, name: str, ignore: Collection[str], allow_bin: bool) -> Source:
    """Open a directory of an architecture in the tensor table."""
    if peft_files.is_adapter(path):
        raise lone_adapter(name)
    # `config.json` makes a Hugging Face directory, also where checkpoints lie in it
    if _is_orbax(path):
        return storage.open_orbax(path, name)
    return storage.Directory(path, name, ignore, allow_bin=allow_bin)


def _is_orbax(path: Path) -> bool:
    return not (path / "config.json").is_file() and orbax.latest(path) is not None


def lone_adapter(name: str) -> UserError:
    """Return the error about an adapter in the place of a model."""
    return UserError(
        f"{name} is an adapter; give the model that it belongs to as well, BASE+{name}"
    )


def find_merge(name: str) -> Path | None:
    """Return the directory of a merge by its name, `RUN/average`; None for other names."""
    path = remote.expand(name)
    layout = RunLayout(path.parent)
    if path.exists() or not layout.is_run:
        return None
    if layout.is_merged(path.name):
        return layout.merged(path.name)
    if "/" not in name:
        return None  # in the directory of a run, a hub name is still one
    merges = [path.name for path in layout.merged("").glob("*") if layout.is_merged(path.name)]
    listed = f"the merges {', '.join(sorted(merges))}" if merges else "no merges yet"
    raise UserError(
        f"model {name} does not exist; the run has {listed}, and members such as"
        f" {layout.root}/member_0, or {layout.root}/member_0@200 at the step 200"
    )


def open_member(
    layout: RunLayout,
    number: int,
    label: str,
    ignore: Collection[str] = (),
    *,
    step: int | None = None,
) -> Source:
    """Open a member of a run whose training is complete. Its tensors are float32.

    Args:
        layout: of the run.
        number: of the member.
        label: what the user called it.
        ignore: unknown keys of `config.json` of the base to ignore, besides those of the run.
        step: of an earlier checkpoint; None is the trained member.

    Raises:
        UserError: there is no such member, its training is not complete, the checkpoint was not
            kept, or the run was edited.
    """
    record.refuse_edited_config(layout)
    checkpoints = _member_checkpoints(layout, number, label)
    final = storage.final_checkpoint(checkpoints, label, step=step)
    # by number: a wave holds a part of the members, so its axis need not begin with member 0
    index = final.members.index(number)
    # Only these two sections say how to read a member. The rest of the config is of no concern
    # here, and may be of another version.
    sections = read_yaml(layout.config)
    model = parse(Model, sections.get("model") or {}, f"{layout.config}: model")
    # Not by `resolve` of the caller, which maps names of a recipe; the base is named by the run.
    base, ignore = convert.resolve(model.base), {*model.ignore_config_keys, *ignore}
    record.refuse_other_base(layout, model, record.base_digest(model, base))
    form = read_prompt_format(layout)
    export_dtype = (sections.get("merge") or {}).get("dtype") or base_dtype(model, base)
    if sections.get("lora") is not None:
        settings = parse(Lora, sections["lora"], f"{layout.config}: lora")
        base_model = storage.Directory(base, ignore=ignore, prompt_format=form)
        return lora.open_member(
            base_model,
            checkpoints,
            index,
            settings,
            label=label,
            branch=final.branch,
            step=final.step,
            export_dtype=export_dtype,
        )
    config = convert.load_config(base, ignore)
    return storage.Checkpoint(
        checkpoints,
        index,
        config,
        tokenizer=base,
        prompt_format=form,
        label=label,
        branch=final.branch,
        step=final.step,
        export_dtype=export_dtype,
    )


def read_prompt_format(layout: RunLayout) -> PromptFormat:
    """Return how the members of a run are asked; defaults where the run does not record it."""
    return PromptFormat.from_json((read_json(layout.data) or {}).get("train", {}))


def base_dtype(model: Model, base_dir: Path) -> str:
    """Return the dtype of a base, in which members and merges of a run are written by default.

    Args:
        model: section `model` of the run.
        base_dir: directory of its base.

    Raises:
        UserError: the base is stored in several dtypes, or in one that is not written.
    """
    if model.init == "random":
        return convert.named_dtype(base_dir)  # the tensors, if there are any, are not read
    base = storage.Directory(base_dir, ignore=model.ignore_config_keys)
    return storage.stored_dtype(base, "merge.dtype")


def _member_checkpoints(layout: RunLayout, number: int, label: str) -> Path:
    """Return the checkpoint directory of a member: that of its wave, if there were waves."""
    trained: list[int] = []
    for checkpoints in [*layout.wave_checkpoints(), layout.checkpoints]:
        step = orbax.latest(checkpoints)
        members = [] if step is None else orbax.metadata(checkpoints, step).get("members", [])
        if number in members:
            return checkpoints
        trained += members
    if trained:
        raise UserError(
            f"{label} does not exist; the run has the members {', '.join(map(str, trained))}"
        )
    return layout.checkpoints
