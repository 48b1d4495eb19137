"""A base model with low-rank adapters on it, read as the dense model W + s B A.

DoRA scales the rows of W + s B A to trained lengths (Liu et al. 2024,
https://arxiv.org/abs/2402.09353). Trained rows of an embedding replace those of the base.

The product is added in float32 on the host, in blocks of rows with fixed borders. So the bits of an
element depend neither on which elements are read together nor on the storage of the adapter.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_ordermerge.checkpoint import orbax, safetensors
from jax_ordermerge.checkpoint.safetensors import TensorInfo
from jax_ordermerge.config import Lora
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.merge.sources.storage import Source, latest_step
from jax_ordermerge.model.lora import scale, table, targets

# Rows per matrix product. BLAS sums in an order that depends on the shape of its operands, so the
# blocks are always the same, whichever elements are asked for.
_ROWS = 128


class Product(NamedTuple):
    """The change s B A of one matrix.

    Attributes:
        read_factors: returns B [out, r] and A [r, in], float32.
        scale: s.
        magnitude: length that DoRA gives to each row of W + s B A, float32[out], or to each column
            of an embedding, float32[in]; None for LoRA.
        of_columns: whether the magnitudes are of columns.
    """

    read_factors: Callable[[], tuple[np.ndarray, np.ndarray]]
    scale: float
    magnitude: np.ndarray | None = None
    of_columns: bool = False

    def elements(self, start: int, size: int) -> np.ndarray:
        """Return `size` elements of s B A from row-major index `start` on, float32."""
        b, a = self.read_factors()
        width = a.shape[1]
        # from the border of a block on, see `_ROWS`
        first, last = start // width // _ROWS * _ROWS, -(-(start + size) // width)
        blocks = [b[row : row + _ROWS] @ a for row in range(first, last, _ROWS)]
        elements = np.concatenate(blocks).reshape(-1)[start - first * width :][:size]
        return np.float32(self.scale) * elements


class TrainedRows(NamedTuple):
    """Rows of a matrix that replace those of the base.

    Attributes:
        numbers: int[n], sorted.
        values: float32[n, in].
    """

    numbers: np.ndarray
    values: np.ndarray


class LoRA:
    """A base with adapters, as a `Source`.

    Args:
        base: the model that the adapters were trained on.
        products: Hugging Face name of each adapted matrix -> its change.
        label: what the user called it.
        identity: of the adapters, see `Source.identity`.
        dtype: of the result; None is the dtype of each tensor of the base. The sum W + s B A is
            computed in float32 and rounded to it once.
        saved: name -> tensor that replaces that of the base, as (reader, name in it).
        rows: of the embedding, if the saved one has other rows than the base.
        trained_rows: name -> rows that replace those of the base.
        biases: name -> float32 array that is added to the bias of the base.
        directory: where the tokenizer files may be; None is the directory of the base.
        stops: end-of-sequence tokens before those of the base.
        export_dtype: see `Source`.
    """

    def __init__(
        self,
        base: Source,
        products: Mapping[str, Product],
        *,
        label: str,
        identity: str,
        dtype: np.dtype | None = None,
        saved: Mapping[str, tuple[safetensors.StoredTensors, str]] | None = None,
        rows: int | None = None,
        trained_rows: Mapping[str, TrainedRows] | None = None,
        biases: Mapping[str, np.ndarray] | None = None,
        directory: Path | None = None,
        stops: Iterable[int] = (),
        export_dtype: str | None = None,
    ) -> None:
        self._base, self._products, self._saved = base, products, saved or {}
        self._trained_rows, self._biases = trained_rows or {}, biases or {}
        self._column_scales: dict[str, np.ndarray] = {}
        self._identity, self._dtype, self.export_dtype = identity, dtype, export_dtype
        self.label, self.directory = label, directory or base.directory
        # an adapter with a tokenizer of its own may have been trained with another template
        self.prompt_format = PromptFormat() if directory else base.prompt_format
        # an adapter that was trained with new tokens saves a longer embedding
        config = dataclasses.replace(base.config, vocab_size=rows or base.config.vocab_size)
        self.config = config.with_ends(stops)

    @property
    def base(self) -> Source:
        """The model that the adapters were trained on."""
        return self._base

    @property
    def products(self) -> Mapping[str, Product]:
        """Hugging Face name of each adapted matrix -> its change."""
        return self._products

    @property
    def replaced(self) -> set[str]:
        """Names of tensors that change by other means than a product."""
        return {*self._saved, *self._trained_rows, *self._biases}

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        dtype, shape = self._base.info(name)
        if name in self._saved:
            reader, stored_name = self._saved[name]
            shape = reader.info(stored_name).shape
        return TensorInfo(self._dtype or dtype, shape)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        is_changed = any(
            name in changes for changes in (self._products, self._trained_rows, self._biases)
        )
        reader, stored_name = self._saved.get(name, (self._base, name))
        # Most tensors: straight from the file into the caller's array.
        if not is_changed and reader.info(stored_name).dtype == out.dtype:
            reader.read_into(stored_name, start, out)
            return
        # in float32 and rounded once by `cast`; in bfloat16 s B A would round before it is added
        values = (
            self._changed(name, start, out.size)
            if is_changed
            else self._stored(name, start, out.size)
        )
        out.reshape(-1)[:] = safetensors.cast(values, out.dtype, f"{self.label}: {name}")

    def _stored(self, name: str, start: int, size: int) -> np.ndarray:
        """Return elements of a tensor without its change, in their dtype."""
        # a saved matrix replaces that of the base, and may have a change of its own on top
        reader, stored_name = self._saved.get(name, (self._base, name))
        values = np.empty(size, reader.info(stored_name).dtype)
        reader.read_into(stored_name, start, values)
        return values

    def _changed(self, name: str, start: int, size: int) -> np.ndarray:
        """Return elements of a changed tensor, float32."""
        product = self._products.get(name)
        width = math.prod(self.info(name).shape[1:])
        if product is not None and product.magnitude is not None and not product.of_columns:
            # the length of a row needs the whole row
            first, last = start // width, -(-(start + size) // width)
            rows = self._sum(name, product, first * width, (last - first) * width)
            rows = rows.reshape(-1, width)
            norms = np.linalg.norm(rows, axis=1)
            rows = rows * (product.magnitude[first:last] / norms)[:, None]
            values = rows.reshape(-1)[start - first * width :][:size]
        elif product is not None:
            values = self._sum(name, product, start, size)
            if product.of_columns:
                columns = np.arange(start, start + size) % width
                values = values * self._scales_of_columns(name, product)[columns]
        else:
            values = self._stored(name, start, size).astype(np.float32)
        if name in self._biases:
            values = values + self._biases[name][start : start + size]
        for number, row in zip(*self._trained_rows.get(name, ((), ())), strict=True):
            # the part of the row that was asked for, which may begin or end within it
            begin = max(number * width, start)
            end = min((number + 1) * width, start + size)
            if begin < end:
                row_start = begin - number * width
                values[begin - start : end - start] = row[row_start : row_start + end - begin]
        return values

    def _sum(self, name: str, product: Product, start: int, size: int) -> np.ndarray:
        """Return elements of W + s B A, float32."""
        values = self._stored(name, start, size).astype(np.float32)
        return values + product.elements(start, size)

    def _scales_of_columns(self, name: str, product: Product) -> np.ndarray:
        """Return magnitude per length of each column of W + s B A, float32[in]."""
        # Once per matrix. Two threads may both compute it, with the same bits.
        if name not in self._column_scales:
            assert product.magnitude is not None
            rows, width = self.info(name).shape
            # In float64 over the blocks in their order: the same bits whichever part is asked for
            # first.
            squares = np.zeros(width)
            for first in range(0, rows, _ROWS):
                count = min(_ROWS, rows - first)
                block = self._sum(name, product, first * width, count * width)
                squares += np.square(block.reshape(-1, width), dtype=np.float64).sum(axis=0)
            scales = product.magnitude / np.sqrt(squares)
            self._column_scales[name] = scales.astype(np.float32)
        return self._column_scales[name]

    def identity(self) -> str:
        """See `Source.identity`."""
        return f"{self._base.identity()} {self._identity}"


def open_member(
    base: Source,
    checkpoints: Path,
    index: int,
    settings: Lora,
    *,
    label: str,
    branch: str = "params",
    step: int | None = None,
    export_dtype: str | None = None,
) -> LoRA:
    """Open a member of a run with `lora`: the base of the run and one adapter of its checkpoint.

    Tensors are float32, as the weights of a member trained without adapters are.

    Args:
        base: base model of the run.
        checkpoints: checkpoint directory of the run.
        index: of the member on the axis `M`.
        settings: section `lora` of the run.
        label: what the user called it.
        branch: branch of the checkpoint with the adapters.
        step: of the checkpoint; None is the last.
        export_dtype: see `Source`.

    Raises:
        UserError: the checkpoint is not of such a training.
    """
    step = latest_step(checkpoints) if step is None else step
    specs = table(base.config, settings)
    shapes = {f"{branch}/{spec.path}": spec.shape for spec in specs}
    arrays = orbax.open_member(checkpoints, step, index, shapes)

    # Several threads read one matrix in many parts, and each part needs both factors.
    @functools.lru_cache(maxsize=2 * len(specs))
    def read_factors(a: str, b: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        return arrays[f"{branch}/{b}"].read(layer), arrays[f"{branch}/{a}"].read(layer)

    adapted = zip(targets(base.config, settings), specs[::2], specs[1::2], strict=True)
    products = {
        name: Product(functools.partial(read_factors, a.path, b.path, layer), scale(settings))
        for target, a, b in adapted
        for layer, name in enumerate(target.hf_names())
    }
    path = checkpoints / str(step)
    identity = f"{path.resolve()}:{path.stat().st_mtime_ns}:{index}"
    dtype = np.dtype(np.float32)
    return LoRA(
        base, products, label=label, identity=identity, dtype=dtype, export_dtype=export_dtype
    )
