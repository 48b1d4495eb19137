"""Models on disk that a merge reads: Hugging Face directories and Orbax checkpoints.

A source reads consecutive elements of a tensor by its Hugging Face name, from any thread. Other
kinds wrap a source and have the same methods: `Untied`, `lora.LoRA` and
`vocabulary.RemappedVocabulary`. `references.open_model` opens the kind that a name stands for.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig, TensorSpec, UnlistedConfig
from jax_ordermerge.checkpoint import convert, orbax, placement, sidecar_files, torch_files
from jax_ordermerge.checkpoint.safetensors import TensorInfo, Tensors
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError


class AnySource(Protocol):
    """A model that can be read in parts, of an architecture in the tensor table or not.

    Attributes:
        label: what the user called it.
        config: its architecture, or what is known of one that is not in the table.
        directory: where its tokenizer files may be, if anywhere.
        prompt_format: how it was asked in training, where a run says so.
        export_dtype: dtype in which the run writes a member that is kept in float32; None where
            the tensors are in the dtype of the model.
    """

    @property
    def label(self) -> str: ...

    @property
    def config(self) -> ModelConfig | UnlistedConfig: ...

    @property
    def directory(self) -> Path | None: ...

    @property
    def prompt_format(self) -> PromptFormat: ...

    @property
    def export_dtype(self) -> str | None: ...

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor.

        Raises:
            UserError: the model has no such tensor.
        """

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill an array of the tensor's dtype with its elements from row-major index `start` on."""

    def identity(self) -> str:
        """Return text that changes when the files change. A resumed merge compares it."""


class Source(AnySource, Protocol):
    """A model whose architecture is in the tensor table."""

    @property
    def config(self) -> ModelConfig: ...


class Directory:
    """A Hugging Face directory. Opening it checks the config and all headers.

    Args:
        directory: the directory.
        label: what the user called it.
        ignore: unknown keys of `config.json` to ignore.
        prompt_format: see `Source`; of a base, that of its run.
        allow_bin: read `.bin` files of PyTorch where there are no safetensors.

    Example:
        >>> model = Directory(convert.resolve("embedded:quickstart"))
        >>> model.info("model.norm.weight").shape
        (128,)
    """

    export_dtype = None

    def __init__(
        self,
        directory: str | Path,
        label: str | None = None,
        ignore: Iterable[str] = (),
        *,
        prompt_format: PromptFormat | None = None,
        allow_bin: bool = False,
    ) -> None:
        self._reader = torch_files.open_tensors(Path(directory), allow_bin=allow_bin)
        self.label = str(directory) if label is None else label
        self.directory = Path(directory)
        self.prompt_format = prompt_format or PromptFormat()
        self.config = convert.load_config(directory, ignore).with_ends(self.prompt_format.stops)
        # now, and not in the middle of a merge that has run for an hour
        convert.check_tensors(self._reader, self.config)
        # Nothing between: a directory is the reader of its files.
        self.info, self.read_into = self._reader.info, self._reader.read_into

    def identity(self) -> str:
        """See `Source.identity`."""
        return files_identity(self._reader)


def files_identity(tensors: Tensors) -> str:
    """Return text that changes when the files of a model change."""
    # symbolic links are resolved: a hub's cache points them at another blob for a new revision
    stored = {tensors.file(name) for name in tensors.names}
    files = sorted({path.resolve() for path in stored})
    return " ".join(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)


class Checkpoint:
    """A model in a step of an Orbax checkpoint directory.

    Args:
        checkpoints: the directory.
        member: index along the axis `M` of a population, whose other members are not read; None
            for arrays without that axis.
        config: the architecture.
        tokenizer: directory of the tokenizer files.
        prompt_format: see `Source`.
        label: what the user called it.
        branch: branch of the checkpoint with the entries of the tensor table.
        step: of the checkpoint; None is the last.
        export_dtype: see `Source`.

    Raises:
        UserError: there is no complete checkpoint, or it has other arrays.
    """

    def __init__(
        self,
        checkpoints: str | Path,
        member: int | None,
        config: ModelConfig,
        *,
        tokenizer: Path | None,
        prompt_format: PromptFormat | None = None,
        label: str,
        branch: str = "params",
        step: int | None = None,
        export_dtype: str | None = None,
    ) -> None:
        # Fixed on opening, so that all tensors are of one step.
        step = latest_step(checkpoints) if step is None else step
        self.export_dtype = export_dtype
        self.prompt_format = prompt_format or PromptFormat()
        self.config = config.with_ends(self.prompt_format.stops)
        self.member, self.label, self.directory = member, label, tokenizer
        self._path = Path(checkpoints) / str(step)
        self._specs = {name: (spec, layer) for name, spec, layer in arch.hf_tensors(config)}
        # compared with the checkpoint here: a member of another architecture fails before the merge
        shapes = {f"{branch}/{spec.path}": spec.shape for spec in arch.tensor_table(config)}
        arrays = orbax.open_member(checkpoints, step, member, shapes)
        self._arrays = {path.removeprefix(f"{branch}/"): array for path, array in arrays.items()}

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        if name not in self._specs:
            raise UserError(f"{self.label} has no tensor {name}; it is of another architecture")
        spec, _ = self._specs[name]
        return TensorInfo(self._arrays[spec.path].dtype, spec.hf_shape)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        spec, layer = self._specs[name]
        # the store reads boxes of indices, so whole rows are read and their ends dropped
        width = math.prod(spec.hf_shape[1:])
        first, last = start // width, -(-(start + out.size) // width)
        # An array of the checkpoint is an entry of the table, with all layers; a tensor is one of
        # them.
        index = (slice(first, last),) if layer is None else (layer, slice(first, last))
        rows = self._arrays[spec.path].read(*index)
        out.reshape(-1)[:] = rows.reshape(-1)[start - first * width :][: out.size]

    def identity(self) -> str:
        """See `Source.identity`."""
        return f"{self._path.resolve()}:{self._path.stat().st_mtime_ns}:{self.member}"


def open_orbax(directory: str | Path, label: str) -> Checkpoint:
    """Open an Orbax directory of one model, as `ordermerge convert --to orbax` makes it.

    Raises:
        UserError: it was made by something else, or is damaged.
    """
    step = orbax.latest(directory)
    metadata = {} if step is None else orbax.metadata(directory, step)
    # A training writes checkpoints with a digest under this key; its members are opened through
    # their run.
    if not isinstance(metadata.get("config"), dict):
        raise UserError(
            f"{label} is not an Orbax directory made by `ordermerge convert`; "
            "convert it to Hugging Face's format"
        )
    return Checkpoint(
        directory,
        None,
        ModelConfig.from_hf(metadata["config"]),
        tokenizer=sidecar_files.tokenizer_in_checkpoint(directory),
        label=label,
    )


def stored_dtype(source: Source, setting: str) -> str:
    """Return the dtype of all tensors of a model, which config.json need not have.

    Args:
        source: the model.
        setting: where the user may choose another dtype, for the error.

    Raises:
        UserError: the tensors are of several dtypes, or of one that is not written.

    Example:
        >>> stored_dtype(Directory(convert.resolve("embedded:quickstart")), "--dtype")
        'bfloat16'
    """
    dtypes: dict[str, str] = {}
    for name, _, _ in arch.hf_tensors(source.config):
        dtypes.setdefault(source.info(name).dtype.name, name)
    # One of them for all would round some tensors, or widen them, without a word.
    if len(dtypes) > 1 or not dtypes.keys() <= set(convert.WRITABLE):
        listed = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise UserError(
            f"{source.label} is stored in {listed}; choose one of {', '.join(convert.WRITABLE)}"
            f" with {setting}"
        )
    return next(iter(dtypes))


class Untied:
    """A model with tied embeddings, seen as one whose output head is a copy of its embedding."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.label, self.directory = inner, inner.label, inner.directory
        self.prompt_format, self.export_dtype = inner.prompt_format, inner.export_dtype
        self.config = dataclasses.replace(inner.config, tie_embeddings=False)
        embedding, head = vocabulary_tensors(inner.config)
        # nothing is copied: the head is read from where the embedding is
        self._names = {head: embedding}

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        return self.inner.info(self._names.get(name, name))

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        self.inner.read_into(self._names.get(name, name), start, out)

    def identity(self) -> str:
        """See `Source.identity`."""
        return self.inner.identity()


class ZeroBiases:
    """A model without biases, seen as one of the same family whose biases are zero.

    Args:
        inner: the model.
        attention, mlp: whether these matrices of all layers get biases.

    Raises:
        UserError: the family has no such biases.
    """

    def __init__(self, inner: Source, *, attention: bool, mlp: bool) -> None:
        family = arch.FAMILIES[inner.config.family]
        if (attention and not family.attention_bias) or (mlp and not family.mlp_bias):
            matrices = "attention" if attention and not family.attention_bias else "mlp"
            raise UserError(
                f"{inner.label} has no biases of {matrices}, and a model of its family"
                f" ({inner.config.family}) cannot have them"
            )
        self.inner, self.label, self.directory = inner, inner.label, inner.directory
        self.prompt_format, self.export_dtype = inner.prompt_format, inner.export_dtype
        has_qkv, has_output = inner.config.qkv_bias, inner.config.output_bias
        self.config = dataclasses.replace(
            inner.config,
            qkv_bias=attention or has_qkv,
            output_bias=attention or has_output,
            mlp_bias=mlp or inner.config.mlp_bias,
        )
        present = {name for name, _, _ in arch.hf_tensors(inner.config)}
        self._added = {name for name, _, _ in arch.hf_tensors(self.config)} - present

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        if name not in self._added:
            return self.inner.info(name)
        # one element per output, in the dtype of the matrix that it is added to
        dtype, shape = self.inner.info(name.removesuffix("bias") + "weight")
        return TensorInfo(dtype, shape[:1])

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        if name in self._added:
            out[...] = 0
        else:
            self.inner.read_into(name, start, out)

    def identity(self) -> str:
        """See `Source.identity`."""
        return self.inner.identity()


def vocabulary_tensors(config: ModelConfig) -> tuple[str, str]:
    """Return the names of the embedding and of the output head, also where the two are tied.

    Example:
        >>> vocabulary_tensors(convert.load_config(convert.resolve("embedded:quickstart")))
        ('model.embed_tokens.weight', 'lm_head.weight')
    """
    # untied, since the table of a tied model has no head
    table = arch.tensor_table(dataclasses.replace(config, tie_embeddings=False))
    # Of other kinds there are many; of these two there is one tensor each.
    names = {spec.kind: spec.hf_name for spec in table}
    return names["embedding"], names["head"]


class FinalCheckpoint(NamedTuple):
    """The last checkpoint of a complete training.

    Attributes:
        step: of the checkpoint.
        members: numbers of the members, in the order of the axis `M`.
        branch: where the members are in the checkpoint: "params", or the branch of the averages
            or of the best weights, if the training kept these.
    """

    step: int
    members: tuple[int, ...]
    branch: str


def latest_step(checkpoints: str | Path) -> int:
    """Return the step of the last complete checkpoint.

    Raises:
        UserError: there is none.
    """
    step = orbax.latest(checkpoints)
    if step is None:
        raise UserError(f"{checkpoints} has no complete checkpoint; finish the training first")
    return step


def final_checkpoint(
    checkpoints: Path, label: str = "", *, step: int | None = None
) -> FinalCheckpoint:
    """Describe the last checkpoint of a complete training, or an earlier one, from its metadata.

    Args:
        checkpoints: checkpoint directory of a training.
        label: what the user called it, for the error message.
        step: of an earlier checkpoint; None is the last.

    Raises:
        UserError: there is no checkpoint, it is not of a training, the training is not complete, or
            the earlier checkpoint was not kept.

    Example:
        >>> final_checkpoint(Path("nowhere/checkpoints"), "nowhere/member_0")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: nowhere/member_0: no checkpoint in nowhere/checkpoints; \
run the training first
    """
    prefix = f"{label}: " if label else ""
    latest = orbax.latest(checkpoints)
    if latest is None:
        raise UserError(f"{prefix}no checkpoint in {checkpoints}; run the training first")
    metadata = orbax.metadata(checkpoints, latest)
    steps, members = metadata.get("steps"), metadata.get("members")
    # a model that `convert` wrote is a checkpoint as well, with other metadata
    if not isinstance(steps, int) or not isinstance(members, list):
        raise UserError(
            f"{prefix}the checkpoint of step {latest} in {checkpoints} is not that of a training"
        )
    if latest < steps:  # a merge of half-trained members would look like any other
        raise UserError(
            f"{prefix}the training in {checkpoints} stands at step {latest} of {steps}; "
            "run it again to continue"
        )
    saved = orbax.steps(checkpoints)
    if step is not None and step not in saved:
        raise UserError(
            f"{prefix}the checkpoint of step {step} in {checkpoints} was not kept (there are"
            f" {', '.join(map(str, saved))}); a training keeps those that the merges of its config"
            " average"
        )
    # absent where the last weights are the result, neither averages nor the best
    return FinalCheckpoint(
        latest if step is None else step, tuple(members), metadata.get("weights", "params")
    )


def read(model: Source, name: str) -> np.ndarray:
    """Return a tensor of a model, in its dtype.

    Raises:
        UserError: the model has no such tensor.

    Example:
        >>> model = Directory(convert.resolve("embedded:quickstart"))
        >>> read(model, "model.norm.weight").shape
        (128,)
    """
    dtype, shape = model.info(name)
    out = np.empty(shape, dtype)
    model.read_into(name, 0, out)
    return out


def load(
    models: Source | Sequence[Source], mesh: Mesh | None = None, *, dtype: DTypeLike
) -> tree.Tree:
    """Return the parameter dict of a model, or of several as a population [M, ...].

    Each process reads the rows that its own devices hold.

    Args:
        models: one source, or several of one architecture.
        mesh: where the arrays go, by the logical axes of the tensor table; None is the default
            device.
        dtype: of the arrays; tensors are rounded to it once.

    Example:
        >>> model = Directory(convert.resolve("embedded:quickstart"))
        >>> load([model, model], dtype="float32")["norm"]["weight"].shape
        (2, 128)
    """
    # A sequence of one model is a population of one: its arrays have the axis `M`.
    is_population = isinstance(models, Sequence)
    members = models if isinstance(models, Sequence) else (models,)
    config = members[0].config
    abstract = convert.abstract_params(
        config, mesh, members=len(members) if is_population else None, dtype=dtype
    )
    # What each device is to hold; nothing is read yet.
    flat = tree.flatten(abstract)

    def read_shard(spec: TensorSpec, index: tuple[slice, ...]) -> np.ndarray:
        """Return the part [(M), (L), *rows] of an entry that one device holds."""
        # What a device holds may be some members, some layers and some rows of these.
        chosen, names = members, spec.hf_names()
        if is_population:
            chosen, index = members[index[0]], index[1:]
        if spec.stacked:
            names, index = names[index[0]], index[1:]
        # both leading axes are made here, and those that the entry lacks are removed below
        shard = np.stack(
            [[_read_part(model, name, spec.hf_shape, index) for name in names] for model in chosen]
        )
        missing_axes = ([] if is_population else [0]) + ([] if spec.stacked else [1])
        return shard.squeeze(tuple(missing_axes))

    return tree.unflatten(
        {
            spec.path: placement.place(flat[spec.path], functools.partial(read_shard, spec))
            for spec in arch.tensor_table(config)
        }
    )


def _read_part(
    source: Source, name: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """Return part of a tensor. Rows are consecutive in the file, so all their columns are read."""
    first, last, _ = index[0].indices(shape[0])
    # In the dtype of the file; the array of the device has its own, and is rounded once.
    out = np.empty((last - first, *shape[1:]), source.info(name).dtype)
    source.read_into(name, first * math.prod(shape[1:]), out)
    return out[(slice(None), *index[1:])]
