"""Names of models: a directory, hub name, `RUN/member_3`, Orbax directory, or `MODEL+ADAPTER`."""

from collections.abc import Callable, Collection
from pathlib import Path

from jax.typing import DTypeLike

from jax_ordermerge import record
from jax_ordermerge.checkpoint import convert, orbax, remote
from jax_ordermerge.config import Lora, Model, read_yaml
from jax_ordermerge.config.section import parse
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout, member_number, read_json
from jax_ordermerge.merge.sources import lora, peft_files, storage
from jax_ordermerge.merge.sources.storage import Source

Resolve = Callable[[str], Path]


def open_model(
    name: str,
    adapter: str | None = None,
    *,
    resolve: Resolve = convert.resolve,
    dtype: DTypeLike | None = None,
    ignore: Collection[str] = (),
) -> Source:
    """Open a model by name. Headers and shapes are checked, tensors are not read.

    Args:
        name: a Hugging Face directory or hub name; `RUN/member_3`, a member of a run; an Orbax
            directory made by `ordermerge convert --to orbax`; or one of these with an adapter,
            `MODEL+ADAPTER`. The name of an existing directory is never split or parsed.
        adapter: directory or hub name of a LoRA adapter, if it is not part of the name.
        resolve: maps a name to a directory.
        dtype: that the caller reads tensors in. A model with an adapter is rounded to it once;
            None is the dtype of its base.
        ignore: unknown keys of `config.json` to ignore. Of a member of a run, those of its config
            are ignored, too.

    Raises:
        UserError: there is no such model, or it is not complete.

    Example:
        >>> open_model("embedded:quickstart").config.num_layers
        3
    """
    if adapter is None and "+" in name and not Path(name).expanduser().exists():
        name, _, adapter = name.partition("+")
        # Adapters on adapters would need an order and a rounding between them.
        if not name or not adapter or "+" in adapter:
            raise UserError(
                f"model {name}+{adapter}: expected MODEL or MODEL+ADAPTER, with one adapter"
            )
    if adapter is None:
        return _open_base(name, resolve, ignore)
    base, label = _open_base(name, resolve, ignore), f"{name}+{adapter}"
    return peft_files.open_adapter(base, resolve(adapter), label, dtype=dtype)


def is_composed(name: str) -> bool:
    """Return whether a name stands for more than a Hugging Face directory or hub name.

    That is a model with an adapter, a member of a run, or an Orbax directory.

    Example:
        >>> is_composed("base+adapter"), is_composed("embedded:quickstart")
        (True, False)
    """
    path = Path(name).expanduser()
    if path.exists():
        # RUN/member_0 may be a directory of its own: the export
        return not (path / "config.json").is_file() and orbax.latest(path) is not None
    return "+" in name or member_number(path.name) is not None


def _open_base(name: str, resolve: Resolve, ignore: Collection[str]) -> Source:
    path = Path(name).expanduser()
    number = member_number(path.name)
    in_bucket = remote.address(name) is not None
    if in_bucket:
        # a bucket holds the run but nothing of the name RUN/member_3: fetch the run
        path = remote.fetch(path) if number is None else remote.fetch(path.parent) / path.name
    # a directory of that name, the export of the member, goes before its checkpoint
    if number is not None and not path.exists() and RunLayout(path.parent).is_run:
        return _open_member(RunLayout(path.parent), number, name, ignore)
    if "@" in name and not path.exists():
        raise UserError(
            f"model {name}: a revision (@) is not offered; download it and give the directory"
        )
    # From here on it is a directory on this machine, whatever was named.
    path = path if in_bucket else resolve(name)
    record.refuse_model_of_edited_run(path)
    layout = RunLayout(path)
    if layout.is_run and layout.checkpoints.is_dir():
        raise UserError(
            f"{name} is a run; name one of its members, as in {name}/member_0, or the directory of"
            f" a merge below {layout.merged('').relative_to(path)}"
        )
    if peft_files.is_adapter(path):
        raise UserError(
            f"{name} is an adapter; give the model that it belongs to as well, BASE+{name}"
        )
    # `config.json` makes a Hugging Face directory, also where checkpoints lie in it
    if not (path / "config.json").is_file() and orbax.latest(path) is not None:
        return storage.open_orbax(path, name)
    return storage.Directory(path, name, ignore)


def _open_member(layout: RunLayout, number: int, label: str, ignore: Collection[str]) -> Source:
    """Open a member of a run whose training is complete."""
    record.refuse_edited_config(layout)
    checkpoints = _member_checkpoints(layout, number)
    final = storage.final_checkpoint(checkpoints, label)
    if number not in final.members:
        raise UserError(
            f"{label} does not exist; the run has the members {', '.join(map(str, final.members))}"
        )
    index = final.members.index(number)
    # Only these two sections say how to read a member. The rest of the config is of no concern
    # here, and may be of another version.
    sections = read_yaml(layout.config)
    model = parse(Model, sections.get("model") or {}, f"{layout.config}: model")
    # Not by `resolve` of the caller, which maps names of a recipe; the base is named by the run.
    base, ignore = convert.resolve(model.base), {*model.ignore_config_keys, *ignore}
    record.refuse_other_base(layout, model, record.base_digest(model, base))
    form = read_prompt_format(layout)
    if sections.get("lora") is not None:
        settings = parse(Lora, sections["lora"], f"{layout.config}: lora")
        base_model = storage.Directory(base, ignore=ignore, prompt_format=form)
        return lora.open_member(
            base_model, checkpoints, index, settings, label=label, branch=final.branch
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
    )


def read_prompt_format(layout: RunLayout) -> PromptFormat:
    """Return how the members of a run are asked; defaults where the run does not record it."""
    return PromptFormat.from_json((read_json(layout.data) or {}).get("train", {}))


def _member_checkpoints(layout: RunLayout, number: int) -> Path:
    """Return the checkpoint directory of a member: that of its wave, if there were waves."""
    for checkpoints in layout.wave_checkpoints():
        step = orbax.latest(checkpoints)
        if step is not None and number in orbax.metadata(checkpoints, step).get("members", ()):
            return checkpoints
    return layout.checkpoints
