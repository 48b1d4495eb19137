"""Conversion of checkpoints: Hugging Face directories, Orbax checkpoints, and members of a run."""

import functools
from collections.abc import Collection
from pathlib import Path

import numpy as np

from jax_ordermerge import arch, console
from jax_ordermerge.checkpoint import (
    atomic,
    convert,
    gguf_files,
    orbax,
    remote,
    safetensors,
    sidecar_files,
)
from jax_ordermerge.commands import adapters
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import cards
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.layout import CONFIG, RunLayout, member_name
from jax_ordermerge.merge.sources import (
    public_names,
    references,
    storage,
)
from jax_ordermerge.merge.sources.storage import Source

TARGETS = ("hf", "orbax", "peft", "gguf")
DTYPES = convert.WRITABLE


def convert_checkpoint(
    source: str,
    out: Path,
    *,
    to: str,
    member: int | None = None,
    dtype: str | None = None,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
    base: str | None = None,
    rank: int | None = None,
) -> None:
    """Write a checkpoint in another format.

    Args:
        source: a model by any name that `references.open_model` takes; or a run, with `member`.
        out: directory to write, or its address in a bucket; of "gguf" a file.
        to: "hf", "orbax", or "peft": the adapter of a member that was trained with `lora`; of a
            weighted sum of adapters, RUN/average or a recipe; or with `rank` that of any model.
            Or "gguf", a file of llama.cpp.
        member: number of a member, where the source is a run.
        dtype: of the tensors; that of the source by default. Of "gguf" also one of
            `gguf_files.TYPES`.
        ignore: unknown keys of the `config.json` of an HF directory to ignore.
        allow_bin: read `.bin` files of PyTorch where there are no safetensors.
        base: with `rank`, the model that the adapter is for.
        rank: of the adapter that approximates the change from the base.

    Raises:
        UserError: an unknown target or dtype, options that do not go together, a source of another
            kind or of several dtypes, or a member that does not exist.
    """
    _check_target(out, to)
    dtypes = (*gguf_files.TYPES,) if to == "gguf" else DTYPES
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(dtypes)}")
    if (base is None) != (rank is None):
        raise UserError("--base and --rank go together: the rank of an adapter, and what it is for")
    if base is not None and rank is not None:
        if to != "peft":
            raise UserError(f"--base and --rank go with --to peft, not with --to {to}")
        adapters.check_low_rank(base, rank)
    # one file: what follows is about directories
    if to == "gguf":
        gguf_files.check_target(out)
        run = _find_member(source, member, ignore)
        _write_gguf(_open(source, run, dtype=None, ignore=ignore, allow_bin=allow_bin), out, dtype)
        return
    # names are checked before a bucket is read: fetching a model to refuse a typo wastes hours
    with remote.new_directory(out) as target:
        if target.exists():
            raise UserError(f"{target} exists already; give a new directory")
        atomic.check_vacant(target)
        run = _find_member(source, member, ignore)
        if to == "peft":
            # first, since it takes members too: of a dense one, or at a lower rank
            if base is not None and rank is not None:
                model = _open(source, run, dtype=None, ignore=ignore, allow_bin=allow_bin)
                # a key that a model has, and nothing here reads, mostly is its base's, too
                keys = ignore if run is None else read_config(run[0].root).model.ignore_config_keys
                of_base = references.open_model(base, ignore=keys, allow_bin=allow_bin)
                adapters.export_low_rank(
                    model, source, target, base=of_base, base_name=base, rank=rank, dtype=dtype
                )
            elif run is not None:
                adapters.export_member(run, target, dtype)
            else:
                adapters.export_merge(source, target, dtype, ignore=ignore, allow_bin=allow_bin)
            return
        model = _open(source, run, dtype=dtype, ignore=ignore, allow_bin=allow_bin)
        if dtype is None:
            # of a member that of the export, so that the bytes are those of the exported member
            dtype = model.export_dtype or storage.stored_dtype(model, "--dtype")
        if model.directory is None or not sidecar_files.has_tokenizer(model.directory):
            console.print_message(f"note: {source} has no tokenizer files, so {out} has none")
        if to == "hf":
            _write_hf(model, target, dtype, _card(source, run, model, dtype))
        else:
            _write_orbax(model, target, dtype)


def _check_target(out: Path, to: str) -> None:
    if to not in TARGETS:
        raise UserError(f"--to {to}: expected {', '.join(TARGETS[:-1])} or {TARGETS[-1]}")
    # a directory of that name would be taken for a file when it is read
    if to != "gguf" and out.suffix == gguf_files.SUFFIX:
        raise UserError(f"{out}: --to {to} writes a directory; for a GGUF file add --to gguf")


def _find_member(
    source: str, number: int | None, ignore: Collection[str]
) -> references.Member | None:
    """Return run and number of a member, by its name or by `--member`; None for another model."""
    run = references.find_member(source) if number is None else _member(source, number)
    if ignore:
        _check_ignore(source, run)
    return run


def _member(source: str, number: int) -> references.Member:
    layout = RunLayout(remote.fetch(source))
    if not layout.is_run:
        raise UserError(f"--member goes with a run directory; {source} has no {CONFIG}")
    # of all populations: replicates are numbered on
    count = read_config(layout.root).population.total
    if not 0 <= number < count:
        raise UserError(f"--member {number}: the run has members 0 to {count - 1}")
    return references.Member(layout, number)


def _check_ignore(source: str, run: references.Member | None) -> None:
    """Refuse `--ignore-config-keys` of what has no `config.json` of its own."""
    path = remote.expand(source)
    # an Orbax checkpoint has the config that `convert` has read, without what it ignored
    if run is not None or (path.is_dir() and orbax.latest(path) is not None):
        raise UserError(
            f"--ignore-config-keys goes with an HF directory, and {source} is none; a run has"
            " model.ignore_config_keys"
        )


def _open(
    source: str,
    run: references.Member | None,
    *,
    dtype: str | None,
    ignore: Collection[str],
    allow_bin: bool,
) -> Source:
    # by number: a directory RUN/member_3 may be an export, in another dtype
    if run is not None:
        layout, number, step = run
        label = f"{layout.root}/{member_name(number)}"
        return references.open_member(layout, number, label, step=step)
    return references.open_model(source, dtype=dtype, ignore=ignore, allow_bin=allow_bin)


def _write_hf(model: Source, target: Path, dtype: str, card: str) -> None:
    """Write a Hugging Face directory, one tensor in memory at a time."""
    safetensors.write(
        target,
        ((name, storage.read(model, name)) for name, _, _ in arch.hf_tensors(model.config)),
        config=model.config,
        dtype=np.dtype(dtype),
        tokenizer_from=model.directory,
        chat_template=model.prompt_format.chat_template,
        card=card,
    )


def _write_gguf(model: Source, out: Path, dtype: str | None) -> None:
    """Write a GGUF file, one tensor in memory at a time."""
    if dtype is None:
        dtype = model.export_dtype or storage.stored_dtype(model, "--dtype")
    notes = gguf_files.write(
        out,
        functools.partial(storage.read, model),
        config=model.config,
        dtype=dtype,
        tokenizer_from=model.directory,
        chat_template=model.prompt_format.chat_template,
        name=out.stem,
    )
    for note in notes:
        console.print_note(f"note: {note}")


def _write_orbax(model: Source, target: Path, dtype: str) -> None:
    """Write an Orbax checkpoint, from which the way back needs nothing else, wherever it lies."""
    if dtype == "float16":
        # refuses what overflows; arrays would hold infinities without a word
        for name, _, _ in arch.hf_tensors(model.config):
            safetensors.cast(storage.read(model, name), dtype, f"{model.label}: {name}")
    metadata = {"config": model.config.to_hf(dtype), "dtype": dtype}
    params = storage.load(model, dtype=dtype)
    # renamed when it is complete: a full disk leaves nothing that the next try would refuse
    with atomic.new_directory(target) as partial:
        if model.directory is not None:
            inside = partial / sidecar_files.CHECKPOINT_TOKENIZER
            inside.mkdir()
            template = model.prompt_format.chat_template
            sidecar_files.copy_tokenizer(model.directory, inside, template)
        orbax.save(partial, 0, {"params": params}, metadata)


def _card(source: str, run: references.Member | None, model: Source, dtype: str) -> str:
    """Return the text of the model card of a member, or of a model that changes its format."""
    form = model.prompt_format
    if run is not None:
        return cards.member_card(read_config(run.layout.root), run, form, dtype, adapter=False)
    base, adapter = references.split_name(source)
    name, short = public_names.public_name(base), public_names.short_names([source])[source]
    text = f"`{short}` in another format, as `ordermerge convert` wrote it. {name.origin}"
    if adapter is not None:
        text = f"The adapter of `{short}` and its base in one model. The base: {name.origin}"
    return sidecar_files.model_card(
        short,
        f"{text}.\n\n{prompt_section(form)}",
        base_model=name.card_id,
        # in another format a model is no child of itself, as a hub would show it
        relation=None if adapter is None else "finetune",
    )
