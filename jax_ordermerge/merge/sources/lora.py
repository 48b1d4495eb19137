"""A base model with low-rank adapters on it, read as the dense model W + s B A.

The product is added in float32 on the host, in blocks of rows with fixed borders. So the bits of an
element depend neither on which elements are read together nor on the storage of the adapter.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_ordermerge.checkpoint import orbax, safetensors
from jax_ordermerge.checkpoint.safetensors import TensorInfo
from jax_ordermerge.config import Lora
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
    """

    read_factors: Callable[[], tuple[np.ndarray, np.ndarray]]
    scale: float

    def elements(self, start: int, size: int) -> np.ndarray:
        """Return `size` elements of s B A from row-major index `start` on, float32."""
        b, a = self.read_factors()
        width = a.shape[1]
        # from the border of a block on, see `_ROWS`
        first, last = start // width // _ROWS * _ROWS, -(-(start + size) // width)
        blocks = [b[row : row + _ROWS] @ a for row in range(first, last, _ROWS)]
        elements = np.concatenate(blocks).reshape(-1)[start - first * width :][:size]
        return np.float32(self.scale) * elements


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
        directory: where the tokenizer files may be; None is the directory of the base.
    """

    def __init__(
        self,
        base: Source,
        products: Mapping[str, Product],
        *,
        label: str,
        identity: str,
        dtype: np.dtype | None = None,
        saved: Mapping[str, tuple[safetensors.Reader, str]] | None = None,
        rows: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self._base, self._products, self._saved = base, products, saved or {}
        self._identity, self._dtype = identity, dtype
        self.label, self.directory = label, directory or base.directory
        self.config = dataclasses.replace(base.config, vocab_size=rows or base.config.vocab_size)

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        dtype, shape = self._base.info(name)
        if name in self._saved:
            reader, stored_name = self._saved[name]
            shape = reader.info(stored_name).shape
        return TensorInfo(self._dtype or dtype, shape)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        # a saved matrix replaces that of the base, and may have a change of its own on top
        reader, stored_name = self._saved.get(name, (self._base, name))
        stored_dtype = reader.info(stored_name).dtype
        if name not in self._products and stored_dtype == out.dtype:
            reader.read_into(stored_name, start, out)
            return
        values = np.empty(out.size, stored_dtype)
        reader.read_into(stored_name, start, values)
        if name in self._products:
            change = self._products[name].elements(start, out.size)
            # in float32 and rounded once by `cast` below; in bfloat16 s B A would round before it
            # is added
            values = values.astype(np.float32) + change
        out.reshape(-1)[:] = safetensors.cast(values, out.dtype, f"{self.label}: {name}")

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

    Raises:
        UserError: the checkpoint is not of such a training.
    """
    step = latest_step(checkpoints)
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
    identity = f"{path.resolve()}:{path.stat().st_mtime_ns}"
    dtype = np.dtype(np.float32)
    return LoRA(base, products, label=label, identity=identity, dtype=dtype)
