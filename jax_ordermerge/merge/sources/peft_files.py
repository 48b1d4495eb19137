"""Directories of LoRA adapters in the format of PEFT, read as dense models.

Source: PEFT 0.21, https://github.com/huggingface/peft.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import (
    json_files,
    safetensors,
    sidecar_files,
    torch_files,
)
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import JsonRow, JsonValue
from jax_ordermerge.merge.sources.lora import LoRA, Product, TrainedRows
from jax_ordermerge.merge.sources.storage import Source, Untied, ZeroBiases, vocabulary_tensors
from jax_ordermerge.model.lora import PREFIX, A, B

CONFIG, STEM = "adapter_config.json", "adapter_model"
WEIGHTS, _BIN_WEIGHTS = f"{STEM}.safetensors", f"{STEM}.bin"
# Ends of the names in the weights file -> the part of the adapter.
_PARTS = {
    A: "A",
    B: "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "bias",
    ".token_adapter.trainable_tokens_delta": "rows",
}
# In the name of a weight that `modules_to_save` replaces: written where the vocabulary grew.
_ORIGINAL = ".original_module"
# Keys of adapter_config.json that change W + s B A, and the values with which they do not. All
# other values of `init_lora_weights` (pissa, olora, corda, loftq) change the base, too.
NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_REQUIRED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "lora_only", "all", None),
    "init_lora_weights": NEUTRAL_INITS,
}
# Values with which any other key is as good as absent.
ABSENT: tuple[object, ...] = (False, None, "", [], {})
_READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "ensure_weight_tying",
    "trainable_token_indices",
}
# Keys without influence on the merged matrix. The names in the weights file say which modules are
# adapted, so `target_modules` and the like are not needed. PEFT ignores `fan_in_fan_out` for the
# linear layers of these architectures.
_IGNORED = {
    "task_type",
    "peft_version",
    "revision",
    "base_model_name_or_path",
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "megatron_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "fan_in_fan_out",
    "runtime_config",
}


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter and not a model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def open_adapter(
    base: Source,
    adapter: str | Path,
    label: str,
    *,
    dtype: DTypeLike | None = None,
    allow_bin: bool = False,
) -> LoRA:
    """Open a base with a PEFT adapter on it, as the dense model that PEFT's forward computes.

    A changed matrix is W + s B A with s = lora_alpha / r, or lora_alpha / sqrt(r) with
    `use_rslora`; DoRA then scales its rows. Modules that the adapter saves as a whole replace those
    of the base, and trained tokens replace rows of the embedding. Embeddings may have other rows
    than the base.

    An adapter of the embedding alone, or of the head alone, unties a base that ties the two: PEFT
    changes one of the two modules, and the other keeps the weights of the base. With
    `ensure_weight_tying`, and where the vocabulary merely grew, the model stays tied.

    Args:
        base: the model that the adapter was trained on.
        adapter: directory with `adapter_config.json` and `adapter_model.safetensors`.
        label: what the user called both.
        dtype: of the result, to which the float32 sum is rounded once; None is the dtype of each
            tensor of the base.
        allow_bin: read `adapter_model.bin` where there are no safetensors.

    Raises:
        UserError: the adapter changes what cannot be read, or does not fit the base.
    """
    directory = Path(adapter)
    settings = json_files.read_json(directory / CONFIG)
    _check_settings(directory, settings)
    path = directory / WEIGHTS
    if not path.is_file() and (directory / _BIN_WEIGHTS).is_file():
        path = directory / _BIN_WEIGHTS
    if not path.is_file():
        raise UserError(f"{directory} has no {WEIGHTS}")
    reader = torch_files.open_tensors(path, allow_bin=allow_bin)
    file = _AdapterFile(base, path, reader, settings)
    parts, saved, originals = file.tensors()
    base = file.untie(parts, saved, originals)
    base = file._replace(base=base).add_biases(parts)
    # From here on the base that the merge reads: untied, it also has a head to compare with.
    file = file._replace(base=base)
    products = {
        target: file.product(target, names, saved.get(target))
        for target, names in parts.items()
        if names.keys() != {"rows"}
    }
    rows = file.check_saved(saved, label)
    stat = path.stat()
    return LoRA(
        base,
        products,
        label=label,
        identity=f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}",
        dtype=None if dtype is None else jnp.dtype(dtype),
        saved={target: (file.reader, name) for target, name in saved.items()},
        rows=rows,
        trained_rows={
            target: file.trained_rows(target, names["rows"], rows)
            for target, names in parts.items()
            if "rows" in names
        },
        biases=file.biases(parts),
        directory=directory if (directory / "tokenizer.json").is_file() else None,
        stops=sidecar_files.generation_stops(directory),
    )


class _AdapterFile(NamedTuple):
    """The weights file of an adapter, and the base that it has to fit."""

    base: Source
    path: Path
    reader: safetensors.StoredTensors
    settings: JsonRow

    def tensors(self) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
        """Return the tensors of the file by the Hugging Face name of the matrix that they change.

        Returns:
            Parts, `{matrix: {"A": name in the file, ...}}` with the parts of `_PARTS`; matrices
            saved as a whole, `{matrix: name in the file}`; and weights that a base with a grown
            vocabulary had in place of a saved module, in the same form.
        """
        parts: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        originals: dict[str, str] = {}
        # an adapter may hold a head of its own although the base ties it; see `untie`
        matrices = {name for name, _, _ in arch.hf_tensors(self.base.config)}
        matrices.update(vocabulary_tensors(self.base.config))
        for name in self.reader.names:
            # No suffix is the end of another, so the first that fits is the only one.
            suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
            target = name.removesuffix(suffix or "").removeprefix(PREFIX)
            if _ORIGINAL in target:
                originals[target.replace(_ORIGINAL, "")] = name
                continue
            # parts of the name that the wrapper modules of PEFT add
            target = target.replace(".modules_to_save", "").replace(".base_layer", "")
            target = f"{target}.weight" if suffix else target
            if not name.startswith(PREFIX) or target not in matrices:
                raise UserError(
                    f"{self.path} has the tensor {name}, "
                    f"which is no part of a LoRA of {self.base.label}"
                )
            if suffix is None:
                saved[target] = name
            else:
                parts.setdefault(target, {})[_PARTS[suffix]] = name
        return parts, saved, originals

    def untie(
        self,
        parts: dict[str, dict[str, str]],
        saved: dict[str, str],
        originals: Mapping[str, str],
    ) -> Source:
        """Return the base, untied where the adapter makes embedding and head differ.

        What the file says of the head is removed from `parts` and `saved` where the model stays
        tied, and completed where it does not.

        Raises:
            UserError: the file has a head that contradicts its settings.
        """
        if not self.base.config.tie_embeddings:
            return self.base
        embedding, head = vocabulary_tensors(self.base.config)
        modules = [str(name).split(".")[-1] for name in self.settings.get("modules_to_save") or ()]
        # With tying, PEFT gives the head the very weights of the embedding, and writes them twice.
        # Trained tokens are tied without being asked to.
        if self.settings.get("ensure_weight_tying") or "rows" in parts.get(embedding, ()):
            parts.pop(head, None)
            saved.pop(head, None)
            return self.base
        if embedding in parts or head in parts or {"embed_tokens", "lm_head"} & {*modules}:
            # The module that is not trained keeps the weights of the base. They are in the file
            # where the vocabulary grew, under the name of either.
            grown = {"embed_tokens": embedding, "lm_head": head}
            untrained = [name for module, name in grown.items() if module not in modules]
            in_file = [saved[name] for name in untrained if name in saved] + [*originals.values()]
            for name in untrained:
                if in_file:
                    saved.setdefault(name, in_file[0])
            return Untied(self.base)
        # A head that equals the embedding is redundant: the vocabulary grew.
        if head in saved:
            values = self.reader.read(saved.pop(head))
            if embedding not in saved or not np.array_equal(
                values, self.reader.read(saved[embedding])
            ):
                raise UserError(
                    f"{self.path} saves {head}, which {self.base.label} ties to its embedding and"
                    f" which modules_to_save of {CONFIG} does not name; the two files must belong"
                    " together"
                )
        return self.base

    def trained_rows(self, target: str, name: str, rows: int) -> TrainedRows:
        """Return the rows of `trainable_token_indices` of one matrix."""
        listed = self.settings.get("trainable_token_indices")
        module = target.removesuffix(".weight")
        if isinstance(listed, Mapping):
            listed = _match_pattern(
                {re.escape(key): value for key, value in listed.items()}, module, None
            )
        values = self.reader.read(name).astype(np.float32)
        numbers = np.asarray(listed if listed is not None else [], np.int64)
        width = self.base.info(target).shape[1]
        if values.shape != (len(numbers), width) or not len(numbers):
            raise UserError(
                f"{self.path}: {name} has shape {values.shape}, trainable_token_indices of {CONFIG}"
                f" names {len(numbers)} rows of {width}; the two files must belong together"
            )
        if numbers.min() < 0 or numbers.max() >= rows or len({*numbers.tolist()}) < len(numbers):
            raise UserError(
                f"{self.path}: trainable_token_indices of {CONFIG} names row {numbers.max()};"
                f" {self.base.label} has {rows} rows, and each may be named once"
            )
        # Sorted, as `TrainedRows` promises; PEFT writes them in the order of the setting.
        order = np.argsort(numbers)
        return TrainedRows(numbers[order], values[order])

    def add_biases(self, parts: Mapping[str, Mapping[str, str]]) -> Source:
        """Return the base, with biases of zero where the adapter adds one and the base has none.

        Raises:
            UserError: a model of this family cannot have the bias.
        """
        names = {name for name, _, _ in arch.hf_tensors(self.base.config)}
        biases = [_bias_of(target) for target, tensors in parts.items() if "bias" in tensors]
        absent = [bias for bias in biases if bias not in names]
        for bias in absent:
            if ".layers." not in bias:
                raise UserError(
                    f"{self.path} adds {bias} (lora_bias), which a model of the family of"
                    f" {self.base.label} cannot have"
                )
        if not absent:
            return self.base
        try:
            return ZeroBiases(
                self.base,
                attention=any(".self_attn." in bias for bias in absent),
                mlp=any(".mlp." in bias for bias in absent),
            )
        except UserError as error:
            raise UserError(f"{self.path} adds {absent[0]} (lora_bias): {error}") from error

    def biases(self, parts: Mapping[str, Mapping[str, str]]) -> dict[str, np.ndarray]:
        """Return the changes of biases (`lora_bias`): name -> float32[out]."""
        changes = {}
        for target, tensors in parts.items():
            if "bias" not in tensors:
                continue
            # The scale of the matrix belongs to its bias, too: PEFT scales the output of the layer
            # B.
            scale = self.product(target, tensors, None).scale
            changes[_bias_of(target)] = np.float32(scale) * self.reader.read(
                tensors["bias"]
            ).astype(np.float32)
        return changes

    def product(self, target: str, names: Mapping[str, str], saved: str | None) -> Product:
        """Return the change of one matrix, having checked shapes and rank."""
        if not {"A", "B"} <= names.keys():
            raise UserError(
                f"{self.path} has only one of the two matrices for {target}; "
                "the file is not complete"
            )
        if ("magnitude" in names) != bool(self.settings.get("use_dora")):
            raise UserError(
                f"{self.path}: use_dora of {CONFIG} is {self.settings.get('use_dora')}, and"
                f" {target} has {'a' if 'magnitude' in names else 'no'} lora_magnitude_vector; the"
                " two files must belong together"
            )
        a, b = (self.reader.info(names[factor]).shape for factor in "AB")
        # the factors of an embedding [V, D] are A [r, V] and B [D, r], those of a linear layer
        # [out, in] are A [r, in] and B [out, r]
        is_embedding = "embedding" in names["A"]
        shape = (a[-1], b[0]) if is_embedding else (b[0], a[-1])
        expected = (self.base.info(target) if saved is None else self.reader.info(saved)).shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or shape != expected:
            raise UserError(
                f"{self.path}: matrices of {a} and {b} do not fit {target} of {expected}"
            )
        module = target.removesuffix(".weight")
        # The shape knows the rank; the setting is compared with it, because alpha is divided by
        # what the setting says.
        rank = _match_pattern(self.settings.get("rank_pattern"), module, self.settings["r"])
        if rank != a[0]:
            raise UserError(
                f"{self.path}: {module} has rank {a[0]}, {CONFIG} says {rank}; "
                "the two files must belong together"
            )
        alpha = _match_pattern(
            self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"]
        )
        # rank-stabilized LoRA divides by sqrt(r), so that its change keeps its size as r grows
        scale = alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        read_factors = functools.partial(self._read_factors, names["A"], names["B"], is_embedding)
        if "magnitude" not in names:
            return Product(read_factors, float(scale))
        magnitude = self.reader.read(names["magnitude"]).astype(np.float32).reshape(-1)
        if len(magnitude) != shape[is_embedding]:
            raise UserError(
                f"{self.path}: {names['magnitude']} has {len(magnitude)} elements,"
                f" expected {shape[is_embedding]}"
            )
        # PEFT transposes an embedding first, so that its magnitudes are of columns
        return Product(read_factors, float(scale), magnitude, is_embedding)

    def _read_factors(
        self, a_name: str, b_name: str, is_embedding: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        a, b = (self.reader.read(name).astype(np.float32) for name in (a_name, b_name))
        # PEFT computes an embedding as a lookup in A^T, so the weight is (B A)^T = A^T B^T
        return (a.T, b.T) if is_embedding else (b, a)

    def check_saved(self, saved: Mapping[str, str], label: str) -> int:
        """Compare saved matrices with those of the base; return the rows of the embedding."""
        vocabulary = vocabulary_tensors(self.base.config)
        for target, name in saved.items():
            shape, expected = self.reader.info(name).shape, self.base.info(target).shape
            if shape[1:] != expected[1:] or (shape != expected and target not in vocabulary):
                raise UserError(
                    f"{self.path}: {name} has shape {shape}, {self.base.label} has {expected}"
                )
        rows = {
            (self.reader.info(saved[name]) if name in saved else self.base.info(name)).shape[0]
            for name, spec, _ in arch.hf_tensors(self.base.config)
            if spec.axes[0] == "vocab"
        }
        if len(rows) > 1:
            listed = " and ".join(map(str, sorted(rows)))
            raise UserError(f"{label}: embedding and output head have {listed} rows")
        return rows.pop()


def _bias_of(target: str) -> str:
    """Return the name of the bias beside a matrix."""
    return f"{target.removesuffix('.weight')}.bias"


def _check_settings(directory: Path, settings: JsonRow) -> None:
    # Unknown keys are errors: releases of PEFT add variants, and a merge that ignored one would be
    # wrong without a sign of it.
    for key, value in settings.items() if "peft_type" in settings else [("peft_type", None)]:
        allowed = _REQUIRED.get(key, ABSENT)
        # types count: 1 equals True, and is not what PEFT writes
        is_allowed = any(type(value) is type(x) and value == x for x in allowed)
        if key not in _READ | _IGNORED and not is_allowed:
            supported = ", ".join(repr(x) for x in _REQUIRED.get(key, ()) if x is not None)
            raise UserError(
                f"{directory / CONFIG}: {key} = {value!r} is not supported "
                f"(supported: {supported or 'absent'})"
            )
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{directory / CONFIG}: {key} = {value!r}, expected a positive number")


def _match_pattern(patterns: JsonRow | None, module: str, default: JsonValue) -> JsonValue:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
