"""A base model with a LoRA adapter on it, read as the dense model W + s B A that the two stand for; and adapters as PEFT keeps them."""

import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import atomic, orbax, safetensors, shards, sidecar_files
from jax_ordermerge.checkpoint.safetensors import TensorInfo
from jax_ordermerge.config import Lora
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.sources.storage import Source
from jax_ordermerge.model.lora import PREFIX, A, B, scale, table, targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = {A: "A", B: "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}
_ROWS = 128  # of one matrix product: always the same blocks, so that the bits do not depend on the run that is asked for
# keys of adapter_config.json that change W + s B A, and the values at which they do not
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (
        True,
        False,
        None,
        "gaussian",
        "eva",
        "orthogonal",
    ),  # others change the base too
}
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# keys that say nothing about the merged matrix: the names in the file say which modules it changes
_NEUTRAL = {
    "task_type",
    "peft_version",
    "revision",
    "base_model_name_or_path",
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "megatron_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "runtime_config",
}


class _Product(NamedTuple):
    """The change s B A of one matrix: how to read B [out, r] and A [r, in], float32, and s."""

    factors: Callable[[], tuple[np.ndarray, np.ndarray]]
    scale: float

    def part(self, start: int, size: int) -> np.ndarray:
        """Return `size` elements of s B A from row-major number `start` on, float32."""
        b, a = self.factors()
        width = a.shape[1]
        first, last = start // width // _ROWS * _ROWS, -(-(start + size) // width)
        blocks = [b[row : row + _ROWS] @ a for row in range(first, last, _ROWS)]
        rows = np.concatenate(blocks).reshape(-1)[start - first * width :][:size]
        return np.float32(self.scale) * rows


class LoRA:
    """A base and a PEFT adapter directory (`adapter_config.json`, `adapter_model.safetensors`).

    A matrix is W + s B A with s = lora_alpha / r (or / sqrt(r), rslora), computed in float32 and rounded once to the dtype of W.
    `fan_in_fan_out` means nothing in these architectures, as in PEFT. Modules saved whole replace those of the base, in its dtype;
    embeddings may have other rows then.

    Args:
        base: what it was trained on.
        adapter: the directory.
        label: what the user called both.

    Raises:
        UserError: the adapter is of a kind that changes something else as well, or does not fit the base.
    """

    def __init__(self, base: Source, adapter: str | Path, label: str) -> None:
        directory = Path(adapter)
        settings = safetensors.read_json(directory / CONFIG)
        _refuse_other_kinds(directory, settings)
        self._base, self._path, self.label = base, directory / WEIGHTS, label
        self._reader = safetensors.Reader(self._path)
        self._products: dict[str, _Product] = {}
        self._whole: dict[str, str] = {}
        self._sort(settings)
        self._drop_tied_head()
        self.config = dataclasses.replace(base.config, vocab_size=self._rows())
        self.directory = directory if (directory / "tokenizer.json").is_file() else base.directory

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`: the base's, but for the rows of modules saved whole."""
        info = self._base.info(name)
        return (
            TensorInfo(info.dtype, self._reader.info(self._whole[name]).shape)
            if name in self._whole
            else info
        )

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        if name not in self._whole and name not in self._products:
            self._base.read_into(name, start, out)
            return
        owner, inner = (
            (self._reader, self._whole[name]) if name in self._whole else (self._base, name)
        )
        found = np.empty(out.size, owner.info(inner).dtype)
        owner.read_into(inner, start, found)
        if name in self._products:
            found = found.astype(np.float32) + self._products[name].part(start, out.size)
        out.reshape(-1)[:] = safetensors.cast(found, out.dtype, f"{self.label}: {name}")

    def identity(self) -> str:
        """See `Source.identity`."""
        stat = self._path.stat()
        return f"{self._base.identity()} {self._path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"

    def _factors(self, a: str, b: str, embedding: bool) -> tuple[np.ndarray, np.ndarray]:
        read_a, read_b = (self._reader.read(name).astype(np.float32) for name in (a, b))
        return (
            (read_a.T, read_b.T) if embedding else (read_b, read_a)
        )  # embeddings are stored the other way round

    def _sort(self, settings: Mapping[str, Any]) -> None:
        """Find what every tensor of the file is for."""
        found: dict[str, dict[str, str]] = {}
        known = {
            name
            for name, _, _ in arch.hf_tensors(
                dataclasses.replace(self._base.config, tie_embeddings=False)
            )
        }
        for name in self._reader.names:
            ending = next((end for end in _PARTS if name.endswith(end)), None)
            target = name.removesuffix(ending or "").removeprefix(PREFIX)
            target = target.replace(".modules_to_save", "").replace(".base_layer", "")
            target = f"{target}.weight" if ending else target
            if not name.startswith(PREFIX) or target not in known:
                raise UserError(
                    f"{self._path} has the tensor {name}, which is no part of a LoRA of {self._base.label}"
                )
            if ending is None:
                self._whole[target] = name
            else:
                found.setdefault(target, {})[_PARTS[ending]] = name
        for target, pair in found.items():
            self._products[target] = self._product(target, pair, settings)

    def _product(
        self, target: str, pair: Mapping[str, str], settings: Mapping[str, Any]
    ) -> _Product:
        if pair.keys() != {"A", "B"}:
            raise UserError(
                f"{self._path} has only one of the two matrices for {target}; the file is not complete"
            )
        if target not in {name for name, _, _ in arch.hf_tensors(self._base.config)}:
            raise UserError(
                f"{self._path} changes {target}, which {self._base.label} ties to its embedding; this is not offered"
            )
        a, b = (self._reader.info(pair[part]).shape for part in "AB")
        embedding = "embedding" in pair["A"]
        shape = (a[-1], b[0]) if embedding else (b[0], a[-1])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or shape != self.info(target).shape:
            raise UserError(
                f"{self._path}: matrices of {a} and {b} do not fit {target} of {self.info(target).shape}"
            )
        module = target.removesuffix(".weight")
        rank = _pattern(settings.get("rank_pattern"), module, settings["r"])
        if rank != a[0]:
            raise UserError(
                f"{self._path}: {module} has rank {a[0]}, {CONFIG} says {rank}; the two files must belong together"
            )
        alpha = _pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        factor = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        return _Product(
            functools.partial(self._factors, pair["A"], pair["B"], embedding), float(factor)
        )

    def _drop_tied_head(self) -> None:
        embedding, head = _vocabulary_names(self._base.config)
        if not self._base.config.tie_embeddings or head not in self._whole:
            return
        saved = self._whole.pop(head)
        if embedding not in self._whole or not np.array_equal(
            self._reader.read(saved), self._reader.read(self._whole[embedding])
        ):
            raise UserError(
                f"{self._path} saves {head}, which {self._base.label} ties to its embedding; this is not offered"
            )

    def _rows(self) -> int:
        """Return the rows of the embedding, having checked all whole tensors against the base."""
        vocabulary = _vocabulary_names(self._base.config)
        rows = {
            self.info(name).shape[0]
            for name, spec, _ in arch.hf_tensors(self._base.config)
            if spec.axes[0] == "vocab"
        }
        for target, name in self._whole.items():
            shape, wanted = self._reader.info(name).shape, self._base.info(target).shape
            if shape[1:] != wanted[1:] or (shape != wanted and target not in vocabulary):
                raise UserError(
                    f"{self._path}: {name} has shape {shape}, {self._base.label} has {wanted}"
                )
        if len(rows) > 1:
            raise UserError(
                f"{self.label}: embedding and output head have {' and '.join(map(str, sorted(rows)))} rows"
            )
        return rows.pop()


class Trained:
    """A member of a run with `lora`: the base of the run and one adapter of its checkpoint, as a dense model in float32.

    Args:
        base: of the run.
        checkpoints: of the run, complete.
        place: of the member on the axis `M`.
        settings: of the run.
        label: what the user called it.
        branch: of the checkpoint, where the adapters lie.

    Raises:
        UserError: the checkpoint is not of such a training.
    """

    def __init__(
        self,
        base: Source,
        checkpoints: Path,
        place: int,
        settings: Lora,
        label: str,
        branch: str = "params",
    ) -> None:
        step = orbax.latest(checkpoints)
        if step is None:
            raise UserError(f"{checkpoints} has no complete checkpoint; finish the training first")
        self._base, self._path, self.label = base, checkpoints / str(step), label
        self.config, self.directory = base.config, base.directory
        specs = table(base.config, settings)
        arrays = orbax.open_member(
            checkpoints, step, place, {f"{branch}/{spec.path}": spec.shape for spec in specs}
        )

        @functools.lru_cache(
            maxsize=2 * len(specs)
        )  # a tensor is read in many runs, by several threads
        def factors(a: str, b: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
            return arrays[f"{branch}/{b}"].read(layer), arrays[f"{branch}/{a}"].read(layer)

        factor = scale(settings)
        self._products = {
            name: _Product(functools.partial(factors, a.path, b.path, layer), factor)
            for target, a, b in zip(
                targets(base.config, settings), specs[::2], specs[1::2], strict=True
            )
            for layer, name in enumerate(target.hf_names())
        }

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`: the base's in float32, as the weights of a member are."""
        return TensorInfo(np.dtype(np.float32), self._base.info(name).shape)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        found = np.empty(out.size, self._base.info(name).dtype)
        self._base.read_into(name, start, found)
        found = found.astype(np.float32)
        out.reshape(-1)[:] = (
            found + self._products[name].part(start, out.size) if name in self._products else found
        )

    def identity(self) -> str:
        """See `Source.identity`."""
        return f"{self._base.identity()} {self._path.resolve()}:{self._path.stat().st_mtime_ns}"


def write_adapter(
    directory: str | Path,
    adapter: tree.Tree,
    config: ModelConfig,
    settings: Lora,
    *,
    base: str,
    dtype: DTypeLike = np.float32,
) -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`, and a model card.

    Args:
        directory: the target; it must not exist or be empty.
        adapter: the dict of `model.lora.table`.
        config: of the model that it belongs to.
        settings: rank, alpha and targets.
        base: name or directory of that model.
        dtype: of the tensors.

    Raises:
        UserError: the target is not empty.
    """
    specs, arrays = table(config, settings), tree.flatten(adapter)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": sorted(
            {spec.hf_name.split(".")[-2] for spec in targets(config, settings)}
        ),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic.new_directory(directory) as partial:
        atomic.write_text(partial / CONFIG, json.dumps(described, indent=2) + "\n")
        public = None if Path(base).exists() else base
        atomic.write_text(
            partial / "README.md",
            sidecar_files.model_card(Path(directory).name, base_model=public, relation="adapter"),
        )
        shapes = {name: spec.hf_shape for spec in specs for name in spec.hf_names()}
        with shards.ShardFiles(partial, shapes, dtype, sys.maxsize) as files:
            files.create()
            for spec in specs:
                for name, values in zip(
                    spec.hf_names(), np.asarray(arrays[spec.path]), strict=True
                ):
                    files.write(name, 0, safetensors.cast(values, dtype, name))
        (partial / shards.SINGLE).rename(partial / WEIGHTS)


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter and not a model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def _refuse_other_kinds(directory: Path, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items() if "peft_type" in settings else [("peft_type", None)]:
        allowed = _MUST_BE.get(key, (False, None, "", [], {}))
        # 1 is not true here: types count too
        if key not in _READ | _NEUTRAL and not any(
            type(value) is type(one) and value == one for one in allowed
        ):
            shown = (
                ", ".join(repr(one) for one in allowed if one is not None)
                if key in _MUST_BE
                else "absent"
            )
            raise UserError(
                f"{directory / CONFIG}: {key} = {value!r} is not supported (supported: {shown})"
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float) or not settings[key] > 0:
            raise UserError(
                f"{directory / CONFIG}: {key} = {settings.get(key)!r}, expected a positive number"
            )
    if not (directory / WEIGHTS).is_file():
        others = sorted(path.name for path in directory.glob("adapter_model.*"))
        raise UserError(
            f"{directory} has no {WEIGHTS}{f' but {others[0]}; convert it to safetensors' if others else ''}"
        )


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that the end of a module's name matches, as PEFT does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _vocabulary_names(config: arch.ModelConfig) -> tuple[str, str]:
    names = {
        spec.kind: spec.hf_name
        for spec in arch.tensor_table(dataclasses.replace(config, tie_embeddings=False))
    }
    return names["embedding"], names["head"]
