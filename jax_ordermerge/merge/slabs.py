"""One tensor of a plan, read from its sources: slab by slab, or as a whole where a method needs it.

Memory is reused throughout: the kernel hands out fresh pages one fault at a time, which takes three
times as long as reading a file from the page cache into pages that are there already.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from jax_ordermerge.checkpoint import safetensors
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods import parts, reductions, table
from jax_ordermerge.merge.plan import Output, Plan, View

# A CPU device uses memory of numpy as it is if it is aligned to 64 bytes, else it copies.
_ALIGNMENT = 64
Slab = tuple[int, tuple[int, ...]]  # index of the first element, and shape


class MemoryPool:
    """Memory for whole tensors, with a limit on the bytes in use.

    A tensor that is larger than the limit waits until it is alone. Released memory is kept for the
    next tensor of the same size.

    Attributes:
        limit: bytes.
        was_used: whether a method measures tensors before it merges them, or needs whole ones.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._in_use, self._changed = limit, 0, threading.Condition()
        self._free: list[np.ndarray] = []
        self.was_used = False

    def acquire(self, size: int) -> np.ndarray:
        """Return aligned memory, uint8[size]. Blocks until there is some below the limit."""
        with self._changed:
            self.was_used = True
            # without the first condition a tensor above the limit would wait for ever
            self._changed.wait_for(lambda: self._in_use == 0 or self._in_use + size <= self.limit)
            self._in_use += size
            # exactly this size: layers repeat, so most tensors have a predecessor of their size
            for i, memory in enumerate(self._free):
                if memory.size == size:
                    return self._free.pop(i)
            # free memory counts as well: give the oldest back to the system
            while self._free and self._in_use + sum(x.size for x in self._free) > self.limit:
                self._free.pop(0)
        return _aligned(size)

    def release(self, memory: np.ndarray) -> None:
        """Take back memory that nothing reads any more."""
        with self._changed:
            self._in_use -= memory.size
            self._free.append(memory)
            self._changed.notify_all()


class FileTensor:
    """One tensor of a plan, as a `parts.Tensor`. The context manager releases its memory.

    Args:
        plan: the plan.
        output: the tensor.
        slab_elements: elements per slab and model, a multiple of `reductions.BLOCK`.
        pool: memory for tensors that are loaded as a whole.
        allow_nan: whether elements may be NaN or infinite.
    """

    def __init__(
        self,
        plan: Plan,
        output: Output,
        slab_elements: int,
        pool: MemoryPool,
        *,
        allow_nan: bool = False,
    ) -> None:
        self._allow_nan = allow_nan
        # one element of no axis is merged as one of one axis
        self.shape = output.shape or (1,)
        self.count, self.weights = len(output.members), output.weights
        self.in_layer = output.layer is not None
        self._dtype = plan.dtype_of(output)
        self._plan, self._output, self._slab, self._pool = plan, output, slab_elements, pool
        self._unit = table.METHODS[output.method].unit(output.parameters)
        self._memory: np.ndarray | None = None
        self._loaded: dict[View, np.ndarray] = {}
        # all models one after another in the pool's memory, each at a multiple of the alignment
        size = output.size * self._dtype.itemsize
        self._stride = -(-size // _ALIGNMENT) * _ALIGNMENT
        self._is_checked = allow_nan
        # on the device once, and not with every slab
        self._key_bits = jax.device_put(
            table.key_bits(output.method, output.parameters, plan.seed, output.name, output.layer)
        )

    def __enter__(self) -> "FileTensor":
        return self

    def __exit__(self, *_: object) -> None:
        # the views go first: once it is released, another thread may overwrite the memory
        self._loaded.clear()
        if self._memory is not None:
            self._pool.release(self._memory)

    def total(
        self,
        function: Callable[..., Any],
        *arrays: Any,
        reduce: parts.Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """See `parts.Tensor.total`.

        The first call loads the tensor, since others will follow. One that is larger than the
        memory for such tensors is read again by each call, so that memory does not grow with it.
        """
        if not self._loaded:
            # also where this tensor is too large: smaller ones of the same merge are loaded
            self._pool.was_used = True
            if len(self._output.views) * self._stride <= self._pool.limit:
                self._load()
        # One thread measures a tensor, in file order: sums from several threads would come in
        # another order each time.
        sums, choices = parts.Sums(reduce), tuple(static.items())
        for part in self._measured_parts() if among is None else self._blocks(among):
            # this waits for the result, so that the next part may be in the same memory
            sums.add(
                parts.measure(part, *arrays, function=function, static=choices, dtype=self._dtype)
            )
        return sums.result()

    def slabs(self) -> Iterator[Slab]:
        """Yield the slabs in which the tensor is merged: what the unit of the method allows."""
        # in blocks, whatever the shape: full slabs of all tensors then run one compiled program
        if self._unit == "element":
            for start in range(0, self._output.size, self._slab):
                yield start, _in_blocks(min(self._slab, self._output.size - start))
        elif self._unit == "tensor" or len(self.shape) < 2:
            # in the memory of the pool, which bounds how many workers hold a whole tensor
            if not self._loaded:
                self._load()
            yield 0, self.shape
        else:
            yield from self._row_slabs()

    def _row_slabs(self, multiple: int = 1) -> Iterator[Slab]:
        """Yield runs of whole rows, a multiple of some number in each but the last."""
        width = math.prod(self.shape[1:])
        # at least one row, however wide: a method of rows cannot merge a part of one
        rows = max(self._slab // width // multiple, 1) * multiple
        for first in range(0, self.shape[0], rows):
            yield first * width, (min(rows, self.shape[0] - first), *self.shape[1:])

    def _load(self) -> None:
        size, views = self._output.size, self._output.views
        # one allocation for all models: tensors of one shape, of which a model has many, reuse it
        self._memory = self._pool.acquire(len(views) * self._stride)
        for i, view in enumerate(views):
            out = self._memory[i * self._stride :][: size * self._dtype.itemsize].view(self._dtype)
            self._loaded[view] = self._read_into(view, 0, out)
            # before anything is computed from it: a cut, a norm or a cosine would be NaN
            if not self._is_checked and not safetensors.is_finite(out):
                self.refuse_not_finite()
        self._is_checked = True

    def _measured_parts(self) -> Iterator[parts.Part]:
        """Yield the tensor in parts, each of which may be in the memory of the one before."""
        slabs = self.slabs() if self._unit == "element" else iter([(0, self.shape)])
        if self._unit != "element" and len(self.shape) >= 2:
            # Floating sums are made of blocks of 256 elements. A slab with a part of a block would
            # add in another order, so its bits would depend on the size of the slabs.
            width = math.prod(self.shape[1:])
            slabs = self._row_slabs(reductions.BLOCK // math.gcd(width, reductions.BLOCK))
        for start, shape in slabs:
            part = self.part(start, shape)
            models = part.members if part.base is None else (*part.members, part.base)
            if not self._is_checked and not all(map(safetensors.is_finite, models)):
                self.refuse_not_finite()
            yield part
        self._is_checked = True

    def _blocks(self, elements: Sequence[int]) -> Iterator[parts.Part]:
        """Yield the blocks with these elements. One small program serves tensors of all shapes."""
        for start in sorted(
            {element // reductions.BLOCK * reductions.BLOCK for element in elements}
        ):
            yield self.part(start, (min(reductions.BLOCK, self._output.size - start),))

    def refuse_not_finite(self) -> NoReturn:
        """Raise the error about a tensor with NaN or infinities.

        Raises:
            UserError: with the model, the tensor, and how many elements there are.
        """
        for view in self._output.views:
            source = self._plan.sources[view.source]
            values = np.empty(self._output.size, source.info(view.name).dtype)
            source.read_into(view.name, 0, values)
            count = int(np.count_nonzero(~np.isfinite(values.astype(np.float32))))
            if count:
                raise UserError(
                    f"{source.label}: {view.name} has {count} of {values.size} elements that are"
                    " NaN or infinite; mend the model, or allow them (--allow-nan)"
                )
        # finite in the files, and beyond the range of the dtype that is merged
        raise UserError(
            f"{self._output.name} has elements that overflow {self._dtype.name}; choose float32"
        )

    def part(self, start: int, shape: tuple[int, ...], with_base: bool = True) -> parts.Part:
        """Return a slab of all models.

        Its arrays may be in buffers that the next call from the same thread overwrites. They are
        passed to the device without a copy, so the result must be ready before that call.
        """
        size, base = math.prod(shape), self._output.base
        members = tuple(
            self.read(view, start, size, slot).reshape(shape)
            for slot, view in enumerate(self._output.members)
        )
        base_part = (
            self.read(base, start, size, self.count).reshape(shape)
            if with_base and base is not None
            else None
        )
        if shape == self.shape:
            # no offset instead of 0: the program of a whole tensor need not add it
            return parts.Part(members, base_part, self._key_bits)
        # in two words: jax has no 64-bit integers by default, and 2^32 elements are not unheard of
        offset = np.array([start & 0xFFFFFFFF, start >> 32], np.uint32)
        row = np.uint32(0 if len(self.shape) < 2 else start // math.prod(self.shape[1:]))
        return parts.Part(members, base_part, self._key_bits, offset, row)

    def read(self, view: View, start: int, size: int, slot: int) -> np.ndarray:
        """Return consecutive elements of a model in the dtype that is merged.

        Args:
            view: the tensor of the model.
            start: index of the first element.
            size: number of elements.
            slot: number of the buffer, where the tensor is not loaded.
        """
        if view in self._loaded:
            return self._loaded[view][start : start + size]
        return self._read_into(view, start, _thread_buffer(size, self._dtype, slot))

    def _read_into(self, view: View, start: int, out: np.ndarray) -> np.ndarray:
        source = self._plan.sources[view.source]
        stored_dtype = source.info(view.name).dtype
        if stored_dtype == out.dtype:
            # the common case: straight into the memory that the device reads
            source.read_into(view.name, start, out)
        else:
            # `cast` refuses values that the dtype cannot hold, which `out[:] =` would make infinite
            stored = np.empty(out.size, stored_dtype)
            source.read_into(view.name, start, stored)
            out[:] = safetensors.cast(stored, out.dtype, f"{source.label}: {view.name}")
        return out


def _in_blocks(size: int) -> tuple[int, ...]:
    """Return the shape of a run of elements: rows of one block each if possible, else flat.

    What is the same for all elements of a block, such as its hash, is then computed once per block.
    """
    return (size,) if size % reductions.BLOCK else (size // reductions.BLOCK, reductions.BLOCK)


_thread = threading.local()


def _thread_buffer(size: int, dtype: np.dtype, slot: int) -> np.ndarray:
    """Return an array in the buffer of this thread and slot, which grows as needed."""
    # One buffer per model, since a slab of all models is in memory at once. Per thread, without a
    # lock; a worker uses the same pages for all of its tensors.
    buffers: dict[int, np.ndarray] = _thread.__dict__.setdefault("buffers", {})
    nbytes = size * dtype.itemsize
    if slot not in buffers or buffers[slot].nbytes < nbytes:
        buffers[slot] = _aligned(nbytes)
    return buffers[slot][:nbytes].view(dtype)


def _aligned(size: int) -> np.ndarray:
    """Return memory that a CPU device uses without a copy, uint8[size]."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
