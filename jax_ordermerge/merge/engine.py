"""Merging Hugging Face directories: read a tensor, call a kernel under jit, write. Knows no formula and no random number."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import yaml

import jax_ordermerge
from jax_ordermerge import arch
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import atomic, companions, convert, safetensors
from jax_ordermerge.config import Dtype
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.merge import geometry, methods

SLAB_ELEMENTS = 1 << 24  # of one member in memory at a time: 32 MB in bfloat16
DTYPES: tuple[str, ...] = get_args(Dtype)
# what a fine-tune may change without being another architecture
_MAY_DIFFER = {"bos_token_id", "eos_token_ids", "pad_token_id", "initializer_range", "max_position_embeddings"}

_moments = jax.jit(geometry.moments)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A merge with everything checked and resolved."""

    config: ModelConfig
    readers: tuple[safetensors.Reader, ...]
    base: safetensors.Reader | None
    method: str
    parameters: dict[str, Any]
    weights: np.ndarray | None
    seed: int
    dtype: np.dtype[Any]
    slab_elements: int


def merge(
    members: Sequence[str | Path],
    base: str | Path | None,
    out: str | Path,
    *,
    method: str,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    tokenizer_from: str | Path | None = None,
    slab_elements: int = SLAB_ELEMENTS,
    shard_bytes: int = safetensors.SHARD_BYTES,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Merge model directories into a new one, one tensor at a time.

    The result has the bits that `population.merge` gives for the same members, for selection whatever the slabs.

    Args:
        members: Hugging Face directories of one architecture, in the order that weights and random choices refer to.
        base: directory of the base; may be None for methods that do not need it, and then no diagnostics are made.
        out: the directory to write; it must not exist or be empty. Config and tokenizer are those of the first member.
        method, seed, weights, parameters: as for `population.merge`.
        dtype: members and base are rounded to it before merging, and the output is stored in it; None is that of the members.
        tokenizer_from: directory of the tokenizer files, by default the first member.
        slab_elements: the largest part of a member's tensor that is held at once, where the method allows slabs.
        shard_bytes: largest size of an output file.
        progress: called as `progress(tensors done, tensors in all, name)`.

    Returns:
        What `merge.json` in the output holds: method, parameters, weights, seed, dtype, members, base, diagnostics.

    Raises:
        UserError: bad input; the architectures differ (the difference is named). Nothing is left behind.
    """
    job = _prepare(
        members, base, method=method, seed=seed, weights=weights, parameters=parameters, dtype=dtype, slab_elements=slab_elements
    )
    given_weights = None if weights is None else [float(w) for w in weights]
    recipe = {
        "merge_method": method,
        "models": [Path(one).name for one in members],
        "base_model": None if base is None else Path(base).name,
        "weights": given_weights,
        "parameters": job.parameters,
        "seed": seed,
        "dtype": job.dtype.name,
        "jax_ordermerge": jax_ordermerge.__version__,
    }
    found: list[tuple[str, geometry.Moments, int]] = []
    with atomic.new_directory(out) as partial:
        inner = partial / "model"
        safetensors.write(
            inner,
            _merged_tensors(job, found, progress),
            config=job.config,
            dtype=job.dtype,
            tokenizer_from=tokenizer_from or job.readers[0].directory,
            recipe=yaml.safe_dump(recipe, sort_keys=False),
            shard_bytes=shard_bytes,
        )
        for file in inner.iterdir():
            file.rename(partial / file.name)
        inner.rmdir()
        diagnostics = geometry.report(found) if found else None
        report = {
            **recipe,
            "models": [str(one) for one in members],
            "base_model": None if base is None else str(base),
            "diagnostics": diagnostics,
        }
        atomic.write_text(partial / "merge.json", json.dumps(report, indent=1) + "\n")
        atomic.write_text(partial / "README.md", _card(recipe, diagnostics))
    return report


def _prepare(
    members: Sequence[str | Path],
    base: str | Path | None,
    *,
    method: str,
    seed: int,
    weights: Sequence[float] | None,
    parameters: Mapping[str, Any] | None,
    dtype: str | None,
    slab_elements: int,
) -> _Job:
    checked = methods.check(method, parameters)
    if not members:
        raise UserError("nothing to merge: give the directories of the members")
    if methods.METHODS[method].needs_base(checked) and base is None:
        needs = "with resample " if method == "selection" else ""
        raise UserError(f"merge method {method} {needs}needs the base model; give it with --base")
    if slab_elements < 1:
        raise UserError(f"slab_elements = {slab_elements} must be positive")
    prepared = methods.check_weights(method, weights, len(members))
    readers = tuple(safetensors.Reader(one) for one in (*members, *([] if base is None else [base])))
    config = convert.load_config(members[0])
    for reader in readers:
        own = convert.load_config(reader.directory)
        _check_same(config, own, readers[0].directory, reader.directory)
        convert.check_tensors(reader, own)
    stored = _resolve_dtype(dtype, readers[: len(members)], config)
    base_reader = None if base is None else readers[-1]
    return _Job(config, readers[: len(members)], base_reader, method, checked, prepared, seed, stored, slab_elements)


def _check_same(config: ModelConfig, other: ModelConfig, first: Path, second: Path) -> None:
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(config, field.name), getattr(other, field.name)
        if field.name not in _MAY_DIFFER and a != b:
            raise UserError(
                f"{first} and {second} are of different architectures: {field.name} is {a!r} and {b!r}; only equal ones can be merged"
            )


def _resolve_dtype(dtype: str | None, readers: Sequence[safetensors.Reader], config: ModelConfig) -> np.dtype[Any]:
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"dtype '{dtype}' is not offered{did_you_mean(dtype, DTYPES)}")
        return np.dtype(jax.numpy.dtype(dtype))
    found = {reader.info(name).dtype for reader in readers for name, _, _ in arch.hf_tensors(config)}
    names = sorted(one.name for one in found)
    if len(found) > 1 or names[0] not in DTYPES:
        raise UserError(f"the members are stored in {' and '.join(names)}; choose one of {', '.join(DTYPES)} with dtype")
    return found.pop()


def _merged_tensors(
    job: _Job, found: list[tuple[str, geometry.Moments, int]], progress: Callable[[int, int, str], None] | None
) -> Iterator[tuple[str, np.ndarray]]:
    tensors = list(arch.hf_tensors(job.config))
    for number, (name, spec, layer) in enumerate(tensors, 1):
        words = methods.key_words(job.method, job.parameters, job.seed, name, layer)
        merged = np.empty(spec.hf_shape, job.dtype)
        moments = [_merge_slab(job, name, words, rows, merged) for rows in _slabs(job, spec.hf_shape)]
        if job.base is not None:
            summed = geometry.Moments(*(np.sum([one[i] for one in moments if one], axis=0) for i in (0, 1)))
            found.append((name, summed, math.prod(spec.hf_shape)))
        if progress is not None:
            progress(number, len(tensors), name)
        yield name, merged


def _slabs(job: _Job, shape: tuple[int, ...]) -> list[slice]:
    """Cut a tensor into runs of whole leading rows, if the method can be computed on them."""
    whole = methods.METHODS[job.method].unit(job.parameters) == "tensor"
    rows = shape[0] if whole else max(1, job.slab_elements // math.prod(shape[1:]))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _merge_slab(job: _Job, name: str, words: np.ndarray, rows: slice, merged: np.ndarray) -> geometry.Moments | None:
    """Write the merged rows; return their moments if there is a base."""
    members = [_read(reader, name, rows, job.dtype) for reader in job.readers]
    base = None if job.base is None else _read(job.base, name, rows, job.dtype)
    unit = methods.METHODS[job.method].unit(job.parameters)
    first = rows.start * (math.prod(merged.shape[1:]) if unit == "element" else 1)
    offset = None if unit == "tensor" else np.array([first & 0xFFFFFFFF, first >> 32], np.uint32)
    result = methods.run(
        members, base, job.weights, words, offset, method=job.method, parameters=tuple(job.parameters.items()), dtype=job.dtype
    )
    moments = None if base is None else geometry.total(jax.device_get(_moments(members, base, result)))
    merged[rows] = result
    # bfloat16 has the range of float32
    if job.dtype == np.float16 and np.isinf(merged[rows]).any() and not any(np.isinf(member).any() for member in members):
        raise UserError(f"the merged {name} overflows float16; choose dtype bfloat16 or float32")
    return moments


def _read(reader: safetensors.Reader, name: str, rows: slice, dtype: np.dtype[Any]) -> np.ndarray:
    return safetensors.cast(reader.read_slice(name, (rows,)), dtype, f"{reader.directory}: {name}")


def _card(recipe: Mapping[str, Any], diagnostics: Mapping[str, Any] | None) -> str:
    text = (
        f"{len(recipe['models'])} models of one architecture were merged by `{recipe['merge_method']}`"
        f" ({methods.METHODS[recipe['merge_method']].reference}).\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```"
    )
    if diagnostics is not None:
        text += "\n\n" + _table(diagnostics["total"])
    return companions.model_card(
        f"Merge of {len(recipe['models'])} models by {recipe['merge_method']}", text, relation="merge", tags=["merge"]
    )


def _table(total: Mapping[str, Any]) -> str:
    rows = [
        (f"elements that member {i} left at the base", f"{100 * fraction:.2f} %") for i, fraction in enumerate(total["unchanged"])
    ]
    rows.append(("elements that every member left at the base", f"{100 * total['unchanged_by_all']:.2f} %"))
    between = [c for i, row in enumerate(total["cosines"]) for c in row[i + 1 :] if c is not None]
    if between:
        rows.append(("cosines between the members' task vectors", f"{min(between):.4f} to {max(between):.4f}"))
    for label, name in (("norm of the merged task vector / mean norm", "norm_ratio"), ("lambda_eff", "lambda_eff")):
        if total[name] is not None:
            rows.append((label, f"{total[name]:.4f}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])
