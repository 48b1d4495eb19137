"""Conversion of checkpoints: Hugging Face directories, Orbax checkpoints, and members of a run."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from jax_ordermerge import arch
from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert, orbax, remote, sidecar_files
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import Config
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import waves
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.layout import CONFIG, RunLayout
from jax_ordermerge.merge.sources import peft_files
from jax_ordermerge.merge.sources.references import read_prompt_format
from jax_ordermerge.record import base_digest, refuse_model_of_edited_run, refuse_other_base
from jax_ordermerge.train import members
from jax_ordermerge.tree import Tree

TARGETS = ("hf", "orbax", "peft")
DTYPES = ("float32", "bfloat16", "float16")


class LoadedModel(NamedTuple):
    """A model in memory.

    Attributes:
        config: its architecture.
        params: its parameters.
        dtype: of the parameters.
        tokenizer_dir: directory of its tokenizer; None where there is none.
        prompt_format: how it was asked in training, where a run says so.
    """

    config: ModelConfig
    params: Tree
    dtype: str
    tokenizer_dir: Path | None
    prompt_format: PromptFormat = PromptFormat()


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    to: str,
    member: int | None,
    dtype: str | None,
    ignore: Collection[str] = (),
    log: Callable[[str], None] = print,
) -> None:
    """Write a checkpoint in another format.

    Args:
        source: an HF directory, an Orbax directory written by this function, or a run directory.
        out: directory to write, or its address in a bucket.
        to: "hf", "orbax", or "peft" for the adapter of a member that was trained with `lora`.
        member: of a run directory.
        dtype: of the tensors; that of the source by default.
        ignore: unknown keys of the `config.json` of an HF directory to ignore.
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
        local = remote.fetch(source)
        if target.exists():
            raise UserError(f"{target} exists already; give a new directory")
        if ignore and (RunLayout(local).is_run or _orbax_step(local) is not None):
            raise UserError(
                f"--ignore-config-keys goes with an HF directory, and {source} is none; a run has"
                " model.ignore_config_keys"
            )
        if to == "peft":
            _export_adapter(local, target, member, dtype)
            return
        model = _load(local, member, dtype, ignore)
        if model.tokenizer_dir is None or not sidecar_files.has_tokenizer(model.tokenizer_dir):
            log(f"note: {source} has no tokenizer files, so {out} has none")
        if to == "hf":
            card = sidecar_files.model_card(target.name, prompt_section(model.prompt_format))
            convert.export(
                model.params,
                model.config,
                target,
                dtype=model.dtype,
                source=model.tokenizer_dir,
                chat_template=model.prompt_format.chat_template,
                card=card,
            )
        else:
            # Orbax stores arrays alone; with these and the tokenizer the way back needs nothing
            # else, wherever the checkpoint is moved.
            metadata = {"config": model.config.to_hf(model.dtype), "dtype": model.dtype}
            if model.tokenizer_dir is not None:
                inside = target / sidecar_files.CHECKPOINT_TOKENIZER
                inside.mkdir(parents=True)
                template = model.prompt_format.chat_template
                sidecar_files.copy_tokenizer(model.tokenizer_dir, inside, template)
            # the arrays last: a step that is complete has its tokenizer
            orbax.save(target, 0, {"params": model.params}, metadata)


def _load(
    source: Path, member: int | None, dtype: str | None, ignore: Collection[str]
) -> LoadedModel:
    if RunLayout(source).is_run:
        run, number, base_dir, config, form = _open_member(source, member)
        # by default the dtype of the export, so that the bytes are those of the exported member
        dtype = dtype or run.merge.dtype
        layout = waves.member_layout(RunLayout(source), number)
        params = members.restore_member(
            training_spec(run), config, meshes.make_mesh(), layout, number, dtype=dtype
        )
        # members share the tokenizer of the base: training does not change it
        return LoadedModel(config, params, dtype, base_dir, form)
    if member is not None:
        raise UserError(f"--member goes with a run directory; {source} has no {CONFIG}")
    step = _orbax_step(source)
    if step is not None:
        # an Orbax directory of a training has another tree, of which a member must be picked
        metadata = orbax.metadata(source, step)
        if "config" not in metadata:
            raise UserError(
                f"{source} is not an Orbax directory made by this command;"
                " give a run directory and --member"
            )
        config, dtype = ModelConfig.from_hf(metadata["config"]), dtype or metadata["dtype"]
        abstract = {"params": convert.abstract_params(config, dtype=dtype)}
        params = orbax.restore(source, step, abstract)["params"]
        tokenizer_dir = sidecar_files.tokenizer_in_checkpoint(source)
        return LoadedModel(config, params, dtype, tokenizer_dir)
    refuse_model_of_edited_run(source)
    directory = convert.resolve(str(source))
    dtype = dtype or _stored_dtype(directory, ignore)
    config, params = convert.load_params(directory, dtype=dtype, ignore=ignore)
    return LoadedModel(config, params, dtype, directory)


def _orbax_step(source: Path) -> int | None:
    # a hub name is no directory, and is resolved later
    return orbax.latest(source) if source.is_dir() else None


def _stored_dtype(directory: Path, ignore: Collection[str]) -> str:
    """Return the dtype of all tensors of a model, which config.json need not have."""
    reader = Reader(directory)
    dtypes: dict[str, str] = {}
    for name, _, _ in arch.hf_tensors(convert.load_config(directory, ignore)):
        if name in reader.names:
            dtypes.setdefault(reader.info(name).dtype.name, name)
    # One of them for all would round some tensors, or widen them, without a word.
    if dtypes and (len(dtypes) > 1 or not dtypes.keys() <= set(DTYPES)):
        listed = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise UserError(
            f"{directory} is stored in {listed}; choose one of {', '.join(DTYPES)} with --dtype"
        )
    # without a tensor of the model, loading says what is wrong
    return next(iter(dtypes), DTYPES[0])


def _open_member(
    run_dir: Path, member: int | None
) -> tuple[Config, int, Path, ModelConfig, PromptFormat]:
    """Return the config of a run, the member, and the base: directory, architecture, prompts."""
    run = read_config(run_dir)
    count = run.population.total
    # No default: member 0 in place of a forgotten option would look like a result.
    if member is None:
        raise UserError(f"{run_dir} is a run of {count} members; choose one with --member")
    if not 0 <= member < count:
        raise UserError(f"--member {member}: the run has members 0 to {count - 1}")
    base_dir = convert.resolve(run.model.base)
    refuse_other_base(RunLayout(run_dir), run.model, base_digest(run.model, base_dir))
    form = read_prompt_format(RunLayout(run_dir))
    config = convert.load_config(base_dir, run.model.ignore_config_keys).with_ends(form.stops)
    return run, member, base_dir, config, form


def _export_adapter(source: Path, out: Path, member: int | None, dtype: str | None) -> None:
    if not RunLayout(source).is_run:
        raise UserError(
            f"--to peft goes with a run directory and --member; {source} has no {CONFIG}"
        )
    run, number, base_dir, config, form = _open_member(source, member)
    layout = waves.member_layout(RunLayout(source), number)
    adapter = members.restore_adapter(training_spec(run), config, layout, number)
    assert run.lora is not None  # restore_adapter refuses a run without it
    # The adapter names its base, which PEFT loads by that name: a hub name works anywhere.
    base = run.model.base
    if base.startswith("embedded:") or Path(base).exists():
        base = str(base_dir.absolute())  # PEFT loads it from any working directory
    peft_files.write_adapter(
        out,
        adapter,
        config,
        run.lora,
        base=base,
        dtype=dtype or "float32",
        tokenizer_from=base_dir,
        prompt_format=form,
    )
