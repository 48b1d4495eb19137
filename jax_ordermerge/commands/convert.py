"""Conversion of checkpoints: Hugging Face directories, Orbax checkpoints, and members of a run."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import atomic, convert, orbax, remote, safetensors, sidecar_files
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import waves
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.layout import CONFIG, RunLayout, member_name
from jax_ordermerge.merge.sources import peft_export, references, storage
from jax_ordermerge.merge.sources.references import read_prompt_format
from jax_ordermerge.merge.sources.storage import Source
from jax_ordermerge.record import base_digest, refuse_other_base
from jax_ordermerge.train import members

TARGETS = ("hf", "orbax", "peft")
DTYPES = ("float32", "bfloat16", "float16")


def convert_checkpoint(
    source: str,
    out: Path,
    *,
    to: str,
    member: int | None = None,
    dtype: str | None = None,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Write a checkpoint in another format.

    Args:
        source: a model by any name that `references.open_model` takes; or a run, with `member`.
        out: directory to write, or its address in a bucket.
        to: "hf", "orbax", or "peft" for the adapter of a member that was trained with `lora`.
        member: number of a member, where the source is a run.
        dtype: of the tensors; that of the source by default.
        ignore: unknown keys of the `config.json` of an HF directory to ignore.
        allow_bin: read `.bin` files of PyTorch where there are no safetensors.
        log: receives one-line messages.

    Raises:
        UserError: an unknown target or dtype, a source of another kind or of several dtypes, or a
            member that does not exist.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: expected {', '.join(TARGETS[:-1])} or {TARGETS[-1]}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    # names are checked before a bucket is read: fetching a model to refuse a typo wastes hours
    with remote.new_directory(out) as target:
        if target.exists():
            raise UserError(f"{target} exists already; give a new directory")
        run = _find_member(source, member)
        if to == "peft":
            _export_adapter(source, run, target, dtype)
            return
        model = _open(source, run, dtype=dtype, ignore=ignore, allow_bin=allow_bin)
        if dtype is None:
            # of a member that of the export, so that the bytes are those of the exported member
            dtype = _stored_dtype(model) if run is None else read_config(run[0].root).merge.dtype
        if model.directory is None or not sidecar_files.has_tokenizer(model.directory):
            log(f"note: {source} has no tokenizer files, so {out} has none")
        write = _write_hf if to == "hf" else _write_orbax
        write(model, target, dtype)


def _find_member(source: str, number: int | None) -> tuple[RunLayout, int] | None:
    """Return run and number of a member, by its name or by `--member`; None for another model."""
    if number is None:
        return references.find_member(source)
    layout = RunLayout(remote.fetch(source))
    if not layout.is_run:
        raise UserError(f"--member goes with a run directory; {source} has no {CONFIG}")
    count = read_config(layout.root).population.total
    if not 0 <= number < count:
        raise UserError(f"--member {number}: the run has members 0 to {count - 1}")
    return layout, number


def _open(
    source: str,
    run: tuple[RunLayout, int] | None,
    *,
    dtype: str | None,
    ignore: Collection[str],
    allow_bin: bool,
) -> Source:
    path = remote.expand(source)
    if ignore and (run is not None or (path.is_dir() and orbax.latest(path) is not None)):
        raise UserError(
            f"--ignore-config-keys goes with an HF directory, and {source} is none; a run has"
            " model.ignore_config_keys"
        )
    if run is not None:
        layout, number = run
        return references.open_member(layout, number, f"{layout.root}/{member_name(number)}")
    return references.open_model(source, dtype=dtype, ignore=ignore, allow_bin=allow_bin)


def _write_hf(model: Source, target: Path, dtype: str) -> None:
    """Write a Hugging Face directory, one tensor in memory at a time."""
    safetensors.write(
        target,
        ((name, storage.read(model, name)) for name, _, _ in arch.hf_tensors(model.config)),
        config=model.config,
        dtype=np.dtype(dtype),
        tokenizer_from=model.directory,
        chat_template=model.prompt_format.chat_template,
        card=sidecar_files.model_card(target.name, prompt_section(model.prompt_format)),
    )


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


def _stored_dtype(model: Source) -> str:
    """Return the dtype of all tensors of a model, which config.json need not have."""
    dtypes: dict[str, str] = {}
    for name, _, _ in arch.hf_tensors(model.config):
        dtypes.setdefault(model.info(name).dtype.name, name)
    # One of them for all would round some tensors, or widen them, without a word.
    if len(dtypes) > 1 or not dtypes.keys() <= set(DTYPES):
        listed = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise UserError(
            f"{model.label} is stored in {listed}; choose one of {', '.join(DTYPES)} with --dtype"
        )
    return next(iter(dtypes))


def _export_adapter(
    source: str, run: tuple[RunLayout, int] | None, out: Path, dtype: str | None
) -> None:
    if run is None:
        raise UserError(f"--to peft goes with a member of a run, RUN/member_0, not with {source}")
    layout, number = run
    config = read_config(layout.root)
    base_dir = convert.resolve(config.model.base)
    refuse_other_base(layout, config.model, base_digest(config.model, base_dir))
    form = read_prompt_format(layout)
    model = convert.load_config(base_dir, config.model.ignore_config_keys).with_ends(form.stops)
    wave = waves.member_layout(layout, number)
    adapter = members.restore_adapter(training_spec(config), model, wave, number)
    assert config.lora is not None  # restore_adapter refuses a run without it
    # The adapter names its base, which PEFT loads by that name: a hub name works anywhere.
    base = config.model.base
    if base.startswith("embedded:") or Path(base).exists():
        base = str(base_dir.absolute())  # PEFT loads it from any working directory
    peft_export.write_adapter(
        out,
        adapter,
        model,
        config.lora,
        base=base,
        dtype=dtype or "float32",
        tokenizer_from=base_dir,
        prompt_format=form,
    )
