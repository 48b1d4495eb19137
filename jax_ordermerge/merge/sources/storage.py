"""Where the tensors of a model to be merged come from: a Hugging Face directory, a member of a run, an Orbax directory.

A source reads runs of consecutive elements by Hugging Face name, from any thread. Other kinds wrap these and answer the same calls:
`Untied`, `lora.LoRA`, `lora.Trained`, `vocabulary.Rows`. `references.open_model` finds the kind that a name stands for.
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
from jax_ordermerge.arch import ModelConfig, TensorSpec
from jax_ordermerge.checkpoint import convert, orbax, placement, safetensors
from jax_ordermerge.checkpoint.safetensors import TensorInfo
from jax_ordermerge.errors import UserError


class Source(Protocol):
    """A model that can be read in parts.

    Attributes:
        label: what the user called it.
        config: its architecture.
        directory: where its tokenizer files may lie, if anywhere.
    """

    @property
    def label(self) -> str: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def directory(self) -> Path | None: ...

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor.

        Raises:
            UserError: the model has no such tensor.
        """

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Read consecutive elements, from row-major number `start` on, into an array of the tensor's dtype."""

    def identity(self) -> str:
        """Return text that changes when the files do: what a resumed merge compares."""


class Directory:
    """A Hugging Face directory; all its headers and its config are checked on opening.

    Example:
        >>> model = Directory(convert.resolve("embedded:quickstart"))
        >>> model.info("model.norm.weight").shape
        (128,)
    """

    def __init__(
        self, directory: str | Path, label: str | None = None, ignore: Iterable[str] = ()
    ) -> None:
        self._reader = safetensors.Reader(directory)
        self.label = str(directory) if label is None else label
        self.directory = Path(directory)
        self.config = convert.load_config(directory, ignore)
        convert.check_tensors(self._reader, self.config)

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        return self._reader.info(name)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        self._reader.read_into(name, start, out)

    def identity(self) -> str:
        """See `Source.identity`."""
        files = sorted({path.resolve() for path in self.directory.glob("*.safetensors")})
        return " ".join(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)


class _Stored:
    """Arrays of the tensor table in a checkpoint, by their Hugging Face names."""

    def __init__(
        self,
        checkpoints: str | Path,
        member: int | None,
        config: ModelConfig,
        tokenizer: Path | None,
        label: str,
        branch: str = "params",
    ) -> None:
        step = orbax.latest(checkpoints)
        if step is None:
            raise UserError(f"{checkpoints} has no complete checkpoint; finish the training first")
        self.label, self.config, self.directory = label, config, tokenizer
        self._path = Path(checkpoints) / str(step)
        self._specs = {name: (spec, layer) for name, spec, layer in arch.hf_tensors(config)}
        shapes = {f"{branch}/{spec.path}": spec.shape for spec in arch.tensor_table(config)}
        opened = orbax.open_member(checkpoints, step, member, shapes)
        self._arrays = {name.removeprefix(f"{branch}/"): array for name, array in opened.items()}

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        if name not in self._specs:
            raise UserError(f"{self.label} has no tensor {name}; it is of another architecture")
        spec, _ = self._specs[name]
        return TensorInfo(self._arrays[spec.path].dtype, spec.hf_shape)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`: whole rows are read, and those at the ends cut."""
        spec, layer = self._specs[name]
        array = self._arrays[spec.path]
        width = math.prod(spec.hf_shape[1:])
        first, last = start // width, -(-(start + out.size) // width)
        rows = array.read(*(() if layer is None else (layer,)), slice(first, last))
        out.reshape(-1)[:] = rows.reshape(-1)[start - first * width :][: out.size]

    def identity(self) -> str:
        """See `Source.identity`."""
        return f"{self._path.resolve()}:{self._path.stat().st_mtime_ns}"


class Member(_Stored):
    """One member of a population in an Orbax checkpoint, `{branch: dict with a leading axis M}`; the others are not read."""

    def __init__(
        self,
        checkpoints: str | Path,
        member: int,
        config: ModelConfig,
        *,
        tokenizer: Path | None,
        label: str,
        branch: str = "params",
    ) -> None:
        super().__init__(checkpoints, member, config, tokenizer, label, branch)


class Orbax(_Stored):
    """An Orbax directory of one model, as `ordermerge convert --to orbax` makes it.

    Raises:
        UserError: it was made by something else, or is damaged.
    """

    def __init__(self, directory: str | Path, label: str | None = None) -> None:
        label = str(directory) if label is None else label
        step = orbax.latest(directory)
        metadata = {} if step is None else orbax.metadata(directory, step)
        if "config" not in metadata:
            raise UserError(
                f"{label} is not an Orbax directory made by `ordermerge convert`; convert it to Hugging Face's format"
            )
        tokenizer = Path(metadata["tokenizer"])
        config = ModelConfig.from_hf(metadata["config"])
        super().__init__(directory, None, config, tokenizer if tokenizer.is_dir() else None, label)


class Untied:
    """A model of tied embeddings as one of an output head of its own, which is the embedding again."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.label, self.directory = inner, inner.label, inner.directory
        self.config = dataclasses.replace(inner.config, tie_embeddings=False)
        names = {
            spec.kind: spec.hf_name for spec in arch.tensor_table(self.config) if not spec.stacked
        }
        self._names = {names["head"]: names["embedding"]}

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        return self.inner.info(self._names.get(name, name))

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        self.inner.read_into(self._names.get(name, name), start, out)

    def identity(self) -> str:
        """See `Source.identity`."""
        return self.inner.identity()


class Finished(NamedTuple):
    """The last checkpoint of a training that has come to its end.

    Attributes:
        step: of the checkpoint.
        members: their numbers, in the order of the axis `M`.
        branch: where in the checkpoint the members lie: the averages, or the best weights, where the training kept them.
    """

    step: int
    members: tuple[int, ...]
    branch: str


def finished(checkpoints: Path, label: str = "") -> Finished:
    """Return what the last checkpoint says of itself.

    Args:
        checkpoints: of a training.
        label: what the user called it, for the message.

    Raises:
        UserError: there is none, it is not of a training, or the training has not come to its end.

    Example:
        >>> finished(Path("nowhere/checkpoints"), "nowhere/member_0")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: nowhere/member_0: no checkpoint in nowhere/checkpoints; run the training first
    """
    who = f"{label}: " if label else ""
    step = orbax.latest(checkpoints)
    if step is None:
        raise UserError(f"{who}no checkpoint in {checkpoints}; run the training first")
    kept = orbax.metadata(checkpoints, step)
    if not isinstance(kept.get("steps"), int) or not isinstance(kept.get("members"), list):
        raise UserError(
            f"{who}the checkpoint of step {step} in {checkpoints} is not that of a training"
        )
    if step < kept["steps"]:
        raise UserError(
            f"{who}the training in {checkpoints} stands at step {step} of {kept['steps']}; run it again to continue"
        )
    return Finished(step, tuple(kept["members"]), kept.get("weights", "params"))


def load(
    models: Source | Sequence[Source], mesh: Mesh | None = None, *, dtype: DTypeLike
) -> tree.Tree:
    """Return the parameter dict of a model, or of several as a population [M, ...], as (sharded) arrays.

    Each process reads the rows that its own devices hold.

    Args:
        models: one source, or several of one architecture.
        mesh: where the arrays go, by the logical axes of the tensor table; None is the default device.
        dtype: of the arrays; what is read is rounded to it once.

    Example:
        >>> model = Directory(convert.resolve("embedded:quickstart"))
        >>> load([model, model], dtype="float32")["norm"]["weight"].shape
        (2, 128)
    """
    several = isinstance(models, Sequence)
    chosen = models if isinstance(models, Sequence) else (models,)
    config = chosen[0].config
    abstract = convert.abstract_params(
        config, mesh, members=len(chosen) if several else None, dtype=dtype
    )
    flat = tree.flatten(abstract)

    def part(spec: TensorSpec, index: tuple[slice, ...]) -> np.ndarray:
        mine, inner = (chosen[index[0]], index[1:]) if several else (chosen, index)
        names, inner = (
            (spec.hf_names()[inner[0]], inner[1:]) if spec.stacked else (spec.hf_names(), inner)
        )
        read = np.stack(
            [[_rows(one, name, spec.hf_shape, inner) for name in names] for one in mine]
        )
        return read.reshape(
            *read.shape[:several], *read.shape[1 : 1 + spec.stacked], *read.shape[2:]
        )

    return tree.unflatten(
        {
            spec.path: placement.place(flat[spec.path], functools.partial(part, spec))
            for spec in arch.tensor_table(config)
        }
    )


def _rows(
    source: Source, name: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """Return part of a tensor, having read all columns of its rows."""
    first, last, _ = index[0].indices(shape[0])
    out = np.empty((last - first, *shape[1:]), source.info(name).dtype)
    source.read_into(name, first * math.prod(shape[1:]), out)
    return out[(slice(None), *index[1:])]
