"""Carrying out a plan over files: read, call a method, write, with every core at work. Knows no formula and no random number.

A tensor is the unit of work. Workers take tensors in file order; one that needs sums over a whole tensor holds it in memory, every
other one goes through it in slabs. Each slab is written straight to its place in the output, so nothing waits for an order and no
result depends on threads. What is done is noted in a journal beside the output, by which a merge that was cut off goes on.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import resource
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jax_ordermerge
from jax_ordermerge import processes, rng
from jax_ordermerge.checkpoint import atomic, safetensors
from jax_ordermerge.checkpoint.shards import SHARD_BYTES, ShardFiles
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import diagnostics, manifest
from jax_ordermerge.merge.manifest import Done
from jax_ordermerge.merge.methods import parts, reductions, table
from jax_ordermerge.merge.plan import Output, Plan, View

SLAB_ELEMENTS = (
    1 << 20
)  # of one member in memory at a time: 2 MB in bfloat16, which stays in a core's cache
HELD_BYTES = 3 << 28  # of whole tensors in memory at a time, unless one alone is larger
SAMPLED = 16  # diagnostics of a slab are made from its first sixteenth ...
SAMPLED_ABOVE = 1 << 18  # ... if it has more elements than this
_JOURNAL = "journal"
_ALIGNMENT = 64  # bytes; what a CPU device wants of memory that it takes without a copy

Progress = Callable[[int, int, str], None]


def merge_plan(
    plan: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    slab_elements: int = SLAB_ELEMENTS,
    shard_bytes: int = SHARD_BYTES,
    with_diagnostics: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge models into a new Hugging Face directory.

    The result has the bits that `population.merge` gives for the same members, whatever the slabs and the workers.

    Args:
        plan: what to do.
        out: the directory to write; it must not exist or be empty. A merge that was cut off is gone on with.
        workers: threads, by default one a core.
        slab_elements: of one member that are held at once, where the method allows it.
        shard_bytes: largest size of an output file.
        with_diagnostics: measure the task vectors where a base is known.
        progress: called as `progress(tensors done, tensors in all, name)`.

    Returns:
        What `merge.json` in the output holds.

    Raises:
        UserError: bad input, or the disk is full. Nothing is left under `out`.
    """
    if slab_elements < 1:
        raise UserError(f"slab_elements = {slab_elements} must be positive")
    table = {one.name: one.shape for one in plan.outputs}
    index, count = jax.process_index(), jax.process_count()
    with _workspace(out, _fingerprint(plan, shard_bytes)) as (partial, resumed):
        with ShardFiles(partial, table, plan.out_dtype, shard_bytes) as files:
            left = _read_journals(partial, plan) if resumed else {}
            with processes.barrier(f"create {out}"):
                if not left and index == 0:
                    files.create()
            job = _Job(
                plan, files, slab_elements, with_diagnostics, partial / f"{_JOURNAL}-{index}"
            )
            with processes.barrier(f"merge {out}"):
                # each process its share; the files are on storage that all of them see
                job.run(
                    plan.outputs[index::count],
                    left,
                    workers or len(os.sched_getaffinity(0)) + 1,
                    progress,
                )
        with processes.barrier(f"finish {out}"):
            done = _read_journals(partial, plan)
        if index == 0:
            for journal in partial.glob(f"{_JOURNAL}-*"):
                journal.unlink()
            manifest.write(partial, plan, [done[output.name] for output in plan.outputs])
        return manifest.report(plan, [done[output.name] for output in plan.outputs])


@contextlib.contextmanager
def _workspace(out: str | Path, fingerprint: str) -> Iterator[tuple[Path, bool]]:
    """Yield `atomic.resumable_directory`, which process 0 makes and renames for all of them."""
    with contextlib.ExitStack() as stack:
        found = None
        with processes.barrier(f"open {out}"):
            if jax.process_index() == 0:
                found = stack.enter_context(atomic.resumable_directory(out, fingerprint))
        resumed = processes.broadcast(found is not None and found[1])
        yield atomic.partial_path(out) if found is None else found[0], resumed


def estimate(plan: Plan, workers: int | None = None) -> tuple[int, float]:
    """Return about how many bytes of memory a merge takes, and how many seconds besides writing, from merging one of its tensors.

    Nothing is written. The runtime itself is counted with what the process has now.
    """
    threads = workers or len(os.sched_getaffinity(0)) + 1
    middle = sorted(plan.outputs, key=lambda one: math.prod(one.shape))[-len(plan.outputs) // 3]
    job = _Job(plan, None, SLAB_ELEMENTS, True, Path(os.devnull))
    job.merge(middle)  # compiles
    start = time.perf_counter()
    job.merge(middle)
    seconds = (
        (time.perf_counter() - start)
        / math.prod(middle.shape)
        * sum(math.prod(one.shape) for one in plan.outputs)
        / threads
    )
    models = len(middle.members) + 2
    largest = (
        max(math.prod(one.shape) for one in plan.outputs) * models * plan.dtype.itemsize
        if job.holds
        else 0
    )
    slabs = threads * models * SLAB_ELEMENTS * plan.dtype.itemsize
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + largest + slabs, seconds


def _fingerprint(plan: Plan, shard_bytes: int) -> str:
    sources = [[source.label, source.identity()] for source in plan.sources]
    outputs = [
        [
            one.name,
            one.method,
            dict(one.parameters),
            None if one.weights is None else one.weights.tolist(),
        ]
        for one in plan.outputs
    ]
    content = [
        jax_ordermerge.__version__,
        dict(plan.recipe),
        plan.stochastic,
        plan.seed,
        plan.out_dtype.name,
        sources,
        outputs,
        shard_bytes,
    ]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _read_journals(partial: Path, plan: Plan) -> dict[str, Done]:
    """Return the finished tensors that all processes noted; a line that was cut off is passed over."""
    found, names = {}, {output.name for output in plan.outputs}
    for line in [
        line
        for path in sorted(partial.glob(f"{_JOURNAL}-*"))
        for line in path.read_text().splitlines()
    ]:
        with contextlib.suppress(ValueError):
            one = json.loads(line)
            moments = (
                None
                if one["moments"] is None
                else diagnostics.Moments(*map(np.array, one["moments"]))  # type: ignore[arg-type]
            )
            if one["name"] in names:
                found[one["name"]] = Done(**{**one, "moments": moments})
    return found


class _Memory:
    """Memory of whole tensors, at most so many bytes at once; a tensor larger than that waits until it is alone.

    What was given back is used again for a tensor of the same size: fresh pages cost three times what it takes to read into old ones.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._changed = limit, 0, threading.Condition()
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """Return so many bytes, uint8[size], aligned; wait for them."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._limit)
            self._held += size
            at = next((i for i, one in enumerate(self._free) if one.size == size), None)
            if at is not None:
                return self._free.pop(at)
            while self._free and self._held + sum(one.size for one in self._free) > self._limit:
                self._free.pop(0)
        return _aligned(size, np.dtype(np.uint8))

    def give(self, memory: np.ndarray) -> None:
        """Take back what nothing reads any more."""
        with self._changed:
            self._held -= memory.size
            self._free.append(memory)
            self._changed.notify_all()


class _Job:
    """One merge under way: what its workers share."""

    def __init__(
        self,
        plan: Plan,
        files: ShardFiles | None,
        slab_elements: int,
        with_diagnostics: bool,
        journal: Path,
    ) -> None:
        self.plan, self.files, self.with_diagnostics = plan, files, with_diagnostics
        self.slab = -(-slab_elements // reductions.BLOCK) * reductions.BLOCK
        self.memory = _Memory(HELD_BYTES)
        self.holds = False  # whether some method asked for sums over a whole tensor
        self._journal, self._lock, self._stop = journal, threading.Lock(), threading.Event()

    def run(
        self,
        outputs: Sequence[Output],
        left: dict[str, Done],
        workers: int,
        progress: Progress | None,
    ) -> None:
        """Merge the tensors that are not among those left from before, and note each in the journal."""
        finished = 0

        def work(output: Output) -> None:
            nonlocal finished
            if self._stop.is_set():
                return
            before = left.get(output.name)
            # the bytes decide: what a journal says of a file that lost them is not believed
            done = before if before and self._is_there(before) else self.merge(output)
            with self._lock:
                if done is not before:
                    with self._journal.open("a") as file:
                        file.write(
                            "\n" + json.dumps(_plain(done))
                        )  # on a line of its own, whatever was cut off before it
                finished += 1
                if progress is not None:
                    progress(finished, len(outputs), output.name)

        with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
            futures = [pool.submit(work, output) for output in outputs]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION)[0]:
                    future.result()
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()

    def merge(self, output: Output) -> Done:
        """Merge one tensor and write it, if there are files."""
        with _FileTensor(self, output) as tensor:
            # in a function of its own, so that nothing refers to memory that is given back
            return self._merge_slabs(tensor, output)

    def _merge_slabs(self, tensor: "_FileTensor", output: Output) -> Done:
        known, static = parts.split_static(table.prepare(tensor, output.method, output.parameters))

        needs_base = table.METHODS[output.method].needs_base(output.parameters)
        rounding = (
            rng.stream_key_bits(self.plan.seed, "round", output.name)
            if self.plan.stochastic
            else None
        )
        program = {
            "method": output.method,
            "static": static,
            "dtype": self.plan.dtype,
            "out": self.plan.out_dtype,
        }
        measured = self.with_diagnostics and output.base is not None
        crc, found = 0, []
        for start, shape in tensor.slabs():
            part = tensor.part(start, shape, needs_base)
            count = _sampled(math.prod(shape)) if measured else 0
            base = (
                tensor.read(output.base, start, count, len(output.members) + 1) if count else None
            )
            result, *rest = _merge_slab(part, known, rounding, base, count=count, **program)
            written = np.asarray(result)
            found.append((jax.device_get(rest), count))
            self._refuse_overflow(output.name, written, part)
            if self.files is not None:
                self.files.write(output.name, start * written.itemsize, written)
            crc = zlib.crc32(written.reshape(-1).view(np.uint8).data, crc)
        return _done(output, needs_base, crc, found)

    def _is_there(self, done: Done) -> bool:
        return self.files is not None and self.files.digest(done.name) == done.crc32

    def _refuse_overflow(self, name: str, written: np.ndarray, part: parts.Part) -> None:
        # bfloat16 has the range of float32
        if written.dtype != np.float16 or not np.isinf(written).any():
            return
        if not any(np.isinf(np.asarray(member)).any() for member in part.members):
            raise UserError(
                f"the merged {name} overflows float16; choose dtype bfloat16 or float32"
            )


class _FileTensor:
    """One tensor of a plan, read from its sources, as a `parts.Tensor`; a context, within which it may be held in memory."""

    def __init__(self, job: _Job, output: Output) -> None:
        self._job, self._output = job, output
        self.shape, self.count, self.weights = output.shape, len(output.members), output.weights
        self.base = output.base
        self._size = math.prod(output.shape)
        self._unit = table.METHODS[output.method].unit(output.parameters)
        self._held: dict[View, np.ndarray] = {}
        self._parts: list[parts.Part] = []
        self._memory: np.ndarray | None = None
        self._words = jax.device_put(
            table.key_bits(
                output.method, output.parameters, job.plan.seed, output.name, output.layer
            )
        )

    def __enter__(self) -> "_FileTensor":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        self._parts.clear()
        if self._memory is not None:
            self._job.memory.give(self._memory)

    def total(
        self,
        function: Callable[..., Any],
        *arrays: Any,
        reduce: parts.Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """See `parts.Tensor.total`: the tensor is held from the first call on, and gone through slab by slab."""
        self._hold()
        sums, chosen = parts.Sums(reduce), tuple(static.items())
        for part in self._parts if among is None else self._blocks(among):
            sums.add(
                parts.measure(
                    part, *arrays, function=function, static=chosen, dtype=self._job.plan.dtype
                )
            )
        return sums.result()

    def _runs(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield parts whose sums add up to the same bits whatever the slab: multiples of 256 elements, in rows if the method asks so."""
        width = math.prod(self.shape[1:])
        if self._unit == "element" or len(self.shape) < 2:
            step = self._job.slab if self._unit == "element" else self._size
            for start in range(0, self._size, step):
                yield start, (min(step, self._size - start),)
            return
        least = reductions.BLOCK // math.gcd(width, reductions.BLOCK)
        rows = max(self._job.slab // width // least, 1) * least
        for first in range(0, self.shape[0], rows):
            yield first * width, (min(rows, self.shape[0] - first), *self.shape[1:])

    def slabs(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield first element and shape of the parts in which the tensor is merged."""
        unit, slab = self._unit, self._job.slab
        if unit == "element":
            for start in range(0, self._size, slab):
                yield start, (min(slab, self._size - start),)
        elif unit == "tensor" or len(self.shape) < 2:
            yield 0, self.shape
        else:
            width = math.prod(self.shape[1:])
            rows = max(1, slab // width)
            for first in range(0, self.shape[0], rows):
                yield first * width, (min(rows, self.shape[0] - first), *self.shape[1:])

    def part(self, start: int, shape: Sequence[int], with_base: bool) -> parts.Part:
        """Return a part; its arrays may lie in buffers that the next call of this thread uses again."""
        size = math.prod(shape)
        members = tuple(
            self.read(view, start, size, slot).reshape(shape)
            for slot, view in enumerate(self._output.members)
        )
        base = (
            self.read(self.base, start, size, self.count).reshape(shape)
            if with_base and self.base is not None
            else None
        )
        # memory of numpy goes in as it is: it is aligned, and nobody writes to it before the result is there
        if tuple(shape) == tuple(self.shape):
            return parts.Part(members, base, self._words)
        offset = np.array([start & 0xFFFFFFFF, start >> 32], np.uint32)
        row = np.uint32(0 if len(self.shape) < 2 else start // math.prod(self.shape[1:]))
        return parts.Part(members, base, self._words, offset, row)

    def read(self, view: View | None, start: int, size: int, slot: int | None = None) -> np.ndarray:
        """Return consecutive elements in the dtype that is merged, from memory where the tensor is held."""
        assert view is not None
        if view in self._held:
            return self._held[view][start : start + size]
        return _read(self._job.plan, view, start, _buffer(size, self._job.plan.dtype, slot))

    def _hold(self) -> None:
        if self._held:
            return
        views = [*self._output.members, *([] if self.base is None else [self.base])]
        dtype = self._job.plan.dtype
        self._job.holds = True
        each = -(-self._size * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._memory = self._job.memory.take(len(views) * each)
        room = [
            self._memory[i * each :][: self._size * dtype.itemsize].view(dtype)
            for i in range(len(views))
        ]
        self._held = {
            view: _read(self._job.plan, view, 0, out) for view, out in zip(views, room, strict=True)
        }
        self._parts = [
            self.part(start, shape, self.base is not None) for start, shape in self._runs()
        ]

    def _blocks(self, among: Sequence[int]) -> Iterator[parts.Part]:
        """Yield the blocks that hold these elements of what is held: one small program serves tensors of all shapes."""
        for start in sorted({one // reductions.BLOCK * reductions.BLOCK for one in among}):
            yield self.part(
                start, (min(reductions.BLOCK, self._size - start),), self.base is not None
            )


def _read(plan: Plan, view: View, start: int, out: np.ndarray) -> np.ndarray:
    source = plan.sources[view.source]
    stored = source.info(view.name).dtype
    if stored == out.dtype:
        source.read_into(view.name, start, out)
        return out
    raw = np.empty(out.size, stored)
    source.read_into(view.name, start, raw)
    out[:] = safetensors.cast(raw, out.dtype, f"{source.label}: {view.name}")
    return out


_buffers = threading.local()


def _buffer(size: int, dtype: np.dtype[Any], slot: int | None) -> np.ndarray:
    """Return an array of this thread, used again for the same slot: fresh memory costs more than reading into it."""
    if slot is None:
        return _aligned(size, dtype)
    kept: dict[int, np.ndarray] = _buffers.__dict__.setdefault("kept", {})
    if slot not in kept or kept[slot].nbytes < size * dtype.itemsize:
        kept[slot] = _aligned(size * dtype.itemsize, np.dtype(np.uint8))
    return kept[slot][: size * dtype.itemsize].view(dtype)


def _aligned(size: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return memory that a CPU device takes as it is, without a copy."""
    raw = np.empty(size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


def _sampled(size: int) -> int:
    """Return how many elements of a slab the diagnostics look at."""
    return size if size <= SAMPLED_ABOVE else size // SAMPLED


@functools.partial(jax.jit, static_argnames=("count", "method", "static", "dtype", "out"))
def _merge_slab(
    part: parts.Part,
    known: dict[str, jax.Array],
    rounding: jax.Array | None,
    base: jax.Array | None,
    *,
    count: int,
    method: str,
    static: table.Static,
    dtype: np.dtype[Any],
    out: np.dtype[Any],
) -> tuple[jax.Array, jax.Array, diagnostics.Moments | None]:
    """Return the merged slab, checksums of what was read, and moments of its first elements if a base is given: one call, one wait."""
    result = table.merge_part(
        part, known, rounding, method=method, static=static, dtype=dtype, out=out
    )
    models = (*part.members, *([] if part.base is None else [part.base]))
    checksums = diagnostics.checksums(models, part.offset)
    if base is None:
        return result, checksums, None
    width = math.gcd(count, reductions.BLOCK)
    own = [x.reshape(-1)[:count].reshape(-1, width) for x in (*part.members, base, result)]
    # compared in what is stored in the end
    *task_vectors, start, end = [parts.round_to(x, out) for x in own]
    moments = diagnostics.moments(task_vectors, start, end)
    count_redrawn = table.METHODS[method].count_redrawn(dict(static))
    if count_redrawn is not None:
        first = jax.tree.map(lambda x: x.reshape(-1)[:count], (part.members, part.base))
        looked_at = part._replace(members=first[0], base=first[1])
        moments = moments._replace(
            redrawn=count_redrawn(looked_at, known["weights"], **dict(static))
        )
    return result, checksums, moments


def _done(output: Output, needs_base: bool, crc: int, found: list[tuple[Any, int]]) -> Done:
    checksums = np.sum([one[0].astype(np.uint64) for one, _ in found], axis=0)
    unread = [None] if output.base is not None and not needs_base else []
    moments = [diagnostics.total(one[1]) for one, count in found if count]
    total = diagnostics.add(moments) if moments else None
    return Done(
        output.name,
        f"{crc:08x}",
        [int(x) & 0xFFFFFFFF for x in checksums] + unread,
        total,
        sum(count for _, count in found),
    )


def _plain(done: Done) -> dict[str, Any]:
    moments = None if done.moments is None else [x.tolist() for x in done.moments]
    return {**done._asdict(), "moments": moments}
