"""Single jobs outside a run: convert, inspect and compare checkpoints, complete a prompt."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import compare, convert, orbax, remote, sidecar_files
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.commands import tables
from jax_ordermerge.config import Config
from jax_ordermerge.data import source
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import generation
from jax_ordermerge.evaluate.eval_model import encode
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling
from jax_ordermerge.experiment import waves
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.merge.sources import peft_files
from jax_ordermerge.train import members

DTYPES = ("float32", "bfloat16", "float16")


def convert_checkpoint(
    origin: Path, out: Path, *, to: str, member: int | None, dtype: str | None
) -> None:
    """Convert HF -> Orbax, Orbax -> HF, or one member of a run -> either; of a run with `lora` also -> a PEFT adapter.

    An Orbax directory made here keeps the model config and the tokenizer's origin in its metadata, so that the way back needs
    nothing else.

    Raises:
        UserError: unknown target, a source that is none of the three, or a member that does not exist.
    """
    if to not in ("hf", "orbax", "peft"):
        raise UserError(f"--to {to}: expected hf, orbax or peft")
    if dtype is not None:
        _check_dtype(dtype)
    with remote.new_directory(out) as target:
        _convert(remote.fetch(origin), target, to, member, dtype)


def _convert(origin: Path, out: Path, to: str, member: int | None, dtype: str | None) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; give a new directory")
    if to == "peft":
        _export_adapter(origin, out, member, dtype)
        return
    config, params, dtype, tokenizer = _load(origin, member, dtype)
    if to == "hf":
        convert.export(
            params,
            config,
            out,
            dtype=dtype,
            source=tokenizer,
            card=sidecar_files.model_card(out.name),
        )
    else:
        metadata = {"config": config.to_hf(dtype), "dtype": dtype, "tokenizer": str(tokenizer)}
        orbax.save(out, 0, {"params": params}, metadata)


def _load(
    origin: Path, member: int | None, dtype: str | None
) -> tuple[ModelConfig, tree.Tree, str, Path | None]:
    """Return config, parameters, their dtype and the directory of the tokenizer."""
    if (origin / "config.yaml").is_file():
        run, number, base, config = _member(origin, member)
        chosen = dtype or run.merge.dtype
        found = members.restore_member(
            run, config, meshes.make_mesh(), number, dtype=chosen, directory=waves.home(run, number)
        )
        return config, found, chosen, base
    if member is not None:
        raise UserError(f"--member goes with a run directory; {origin} has no config.yaml")
    step = orbax.latest(origin) if origin.is_dir() else None
    if step is not None:
        metadata = orbax.metadata(origin, step)
        if "config" not in metadata:
            raise UserError(
                f"{origin} is not an Orbax directory made by this command; give a run directory and --member"
            )
        config, chosen = ModelConfig.from_hf(metadata["config"]), dtype or metadata["dtype"]
        restored = orbax.restore(
            origin, step, {"params": convert.abstract_params(config, dtype=chosen)}
        )
        tokenizer = Path(metadata["tokenizer"])
        return config, restored["params"], chosen, tokenizer if tokenizer.is_dir() else None
    directory = convert.resolve(str(origin))
    reader = Reader(directory)
    chosen = dtype or reader.info(reader.names[0]).dtype.name
    config, params = convert.load_params(directory, dtype=chosen)
    return config, params, chosen, directory


def _member(origin: Path, member: int | None) -> tuple[Config, int, Path, ModelConfig]:
    """Return the config of a run, the member asked for, and the directory and config of its base."""
    run = read_config(origin)
    if member is None:
        raise UserError(
            f"{origin} is a run of {run.population.members} members; choose one with --member"
        )
    if not 0 <= member < run.population.members:
        raise UserError(f"--member {member}: the run has members 0 to {run.population.members - 1}")
    base = convert.resolve(run.model.base)
    return run, member, base, convert.load_config(base, run.model.ignore_config_keys)


def _export_adapter(origin: Path, out: Path, member: int | None, dtype: str | None) -> None:
    if not (origin / "config.yaml").is_file():
        raise UserError(
            f"--to peft goes with a run directory and --member; {origin} has no config.yaml"
        )
    run, number, base, config = _member(origin, member)
    adapter = members.restore_adapter(run, config, number, directory=waves.home(run, number))
    name = (
        str(base.absolute())
        if run.model.base.startswith("embedded:") or Path(run.model.base).exists()
        else run.model.base
    )
    assert run.lora is not None
    peft_files.write_adapter(out, adapter, config, run.lora, base=name, dtype=dtype or "float32")


def inspect_model(model: str, *, stats: bool, as_json: bool) -> str:
    """Return the table of a checkpoint's tensors as text or JSON; see `checkpoint.compare.inspect`."""
    found = compare.inspect(convert.resolve(model), stats=stats)
    return (
        json.dumps(tables.inspect_json(found), indent=1) + "\n"
        if as_json
        else _shown(tables.inspect_table(found))
    )


def compare_models(one: str, two: str, *, base: str | None, as_json: bool) -> tuple[str, bool]:
    """Return the differences of two checkpoints as text or JSON, and whether all bytes are equal."""
    known = None if base is None else convert.resolve(base)
    found = compare.difference(convert.resolve(one), convert.resolve(two), known)
    text = (
        json.dumps(tables.difference_json(found), indent=1) + "\n"
        if as_json
        else _shown(tables.difference_table(found))
    )
    return text, found.equal


def _shown(table: Table) -> str:
    text = io.StringIO()
    tables.show(table, text)
    return text.getvalue()


def complete(
    model: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    dtype: str,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Complete prompts.

    Args:
        model: directory, hub name or `embedded:NAME`.
        prompts: texts, tokenized as the tokenizer of the model begins them.
        max_new_tokens: at most.
        dtype: of the products.
        sampling: how tokens are chosen; a row is named by the number of its prompt.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected float32 or bfloat16")
    directory = convert.resolve(model)
    tokenizer = source.load_tokenizer(directory)
    config, params = convert.load_params(directory)
    generate = generation.make_generator(config, params, tokenizer, batch=8, dtype=dtype)
    return generate([encode(tokenizer, text) for text in prompts], max_new_tokens, sampling)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
