"""Tables of one checkpoint, and of the differences between two."""

from collections.abc import Collection
from pathlib import Path

from jax_ordermerge import arch, console
from jax_ordermerge.checkpoint import compare, convert, gguf_files, remote, safetensors, torch_files
from jax_ordermerge.commands import tables
from jax_ordermerge.merge.sources import peft_files, references
from jax_ordermerge.merge.sources.storage import Source
from jax_ordermerge.record import refuse_model_of_edited_run


def inspect_model(
    model: str,
    *,
    stats: bool,
    as_json: bool,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> str:
    """Return the tensors of a checkpoint as a table or JSON; see `checkpoint.compare.inspect`."""
    inventory = compare.inspect(_open(model, ignore, allow_bin), stats=stats)
    if as_json:
        # the exact numbers; the table rounds them
        return console.to_json(tables.inspect_json(inventory))
    return tables.to_text(tables.inspect_table(inventory))


def compare_models(
    a: str,
    b: str,
    *,
    base: str | None,
    as_json: bool,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> tuple[str, bool]:
    """Return the differences of two checkpoints as text, and whether all bytes are equal.

    Args:
        a, b: names of models, see `references.open_model`, or safetensors files.
        base: with it, task vectors are compared, too.
        as_json: return JSON in place of a table.
        ignore: unknown keys of `config.json` to ignore.
        allow_bin: read `.bin` files of PyTorch.
    """
    names = [a, b] if base is None else [a, b, base]
    adapters = [name for name in names if peft_files.is_adapter(remote.expand(name))]
    # two adapters have tensors of the same names; a model has others
    if adapters and len(adapters) < len(names):
        raise references.lone_adapter(adapters[0])
    # those on this machine first: a mistake in one of them costs no download
    opened = {
        name: _open(name, ignore, allow_bin) for name in sorted(names, key=references.is_downloaded)
    }
    difference = compare.difference(*(opened[name] for name in names))
    if as_json:
        text = console.to_json(tables.difference_json(difference))
    else:
        text = tables.to_text(tables.difference_table(difference))
    return text, difference.equal


class _Model:
    """A member, an Orbax checkpoint, or a model with an adapter, as `safetensors.Tensors`."""

    def __init__(self, source: Source) -> None:
        self.names = [name for name, _, _ in arch.hf_tensors(source.config)]
        self.info, self.read_into = source.info, source.read_into
        self._label = source.label

    def file(self, name: str) -> Path:
        """Return the name of the model: its tensors need not lie in files of their own."""
        return Path(self._label)


def _open(name: str, ignore: Collection[str], allow_bin: bool) -> safetensors.Tensors:
    """Open a model by any name that `merge` takes, or a safetensors file."""
    path = remote.expand(name)
    refuse_model_of_edited_run(path)
    # Read as files where there are any: tensors that no architecture has are listed, too.
    stored = ("*.safetensors", "pytorch_model*.bin")
    is_file = path.is_file() and path.suffix != gguf_files.SUFFIX
    if is_file or any(any(path.glob(pattern)) for pattern in stored):
        return torch_files.open_tensors(path, allow_bin=allow_bin)
    if path.is_dir() or references.is_composed(name):
        return _Model(references.open_model(name, ignore=ignore, allow_bin=allow_bin))
    directory = convert.resolve(name, allow_bin=allow_bin)
    return torch_files.open_tensors(directory, allow_bin=allow_bin)
