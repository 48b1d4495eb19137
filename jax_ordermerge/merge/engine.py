"""Carries out a plan over files with every core. Contains no formula and draws no random number.

The unit of work is a tensor. Workers take tensors in file order and go through each in slabs; where
a method needs sums over a whole tensor, it is loaded first. Slabs are written straight to their
place in the output, so no worker waits for another, and no result depends on threads. A journal
beside the output records finished tensors, so that an interrupted merge continues.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import resource
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import jax_ordermerge
from jax_ordermerge import processes, rng
from jax_ordermerge.arch import UnlistedConfig
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.checkpoint.shards import SHARD_BYTES, STEMS, ShardFiles
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import diagnostics, journal, manifest, slab_moments
from jax_ordermerge.merge.journal import TensorRecord
from jax_ordermerge.merge.methods import parts, reductions, table
from jax_ordermerge.merge.plan import Output, Plan
from jax_ordermerge.merge.slabs import FileTensor, MemoryPool

SLAB_ELEMENTS = 1 << 20  # per model: 2 MB in bfloat16 stay in the cache of a core
# Memory for tensors of which a method measures something first. Larger ones are read by each pass,
# and alone in memory where the method needs all elements at once.
LOADED_BYTES = 3 << 28

Progress = Callable[[int, int, str], None]


def merge_plan(
    plan: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    slab_elements: int = SLAB_ELEMENTS,
    shard_bytes: int = SHARD_BYTES,
    with_diagnostics: bool = True,
    allow_nan: bool = False,
    progress: Progress | None = None,
) -> manifest.Report:
    """Merge models into a new Hugging Face directory.

    The result has the bits of `population.merge` for the same members, for any number of slabs and
    workers. With several processes, each merges a share; all must see the directory.

    Args:
        plan: what to do.
        out: directory to write; it must not exist or be empty. An interrupted merge continues.
        workers: number of threads, by default one more than the cores.
        slab_elements: elements of each model that are in memory at once, if the method allows it.
        shard_bytes: largest size of an output file.
        with_diagnostics: measure the task vectors of tensors with a base.
        allow_nan: merge elements that are NaN or infinite like any other, and count them in the
            notes of the report.
        progress: called as `progress(finished tensors, all tensors, name)`.

    Returns:
        The content of `merge.json`.

    Raises:
        UserError: bad input, an element of a model is not finite, or the disk is full. Nothing is
            left under `out` then.
    """
    if slab_elements < 1:
        raise UserError(f"slab_elements = {slab_elements} must be positive")
    shapes = {output.name: output.shape for output in plan.outputs}
    stem = STEMS[0]
    if isinstance(plan.config, UnlistedConfig):
        stem = plan.config.stem
        # PEFT reads a single file, whatever its size
        shard_bytes = sys.maxsize if plan.config.is_adapter else shard_bytes
    process, process_count = jax.process_index(), jax.process_count()
    with _open_workspace(out, _fingerprint(plan, shard_bytes)) as (directory, is_resumed):
        with ShardFiles(
            directory,
            shapes,
            plan.out_dtype,
            shard_bytes,
            dtypes={output.name: plan.out_dtype_of(output) for output in plan.outputs},
            shared=process_count > 1,
            stem=stem,
        ) as files:
            finished = journal.read(directory, shapes) if is_resumed else {}
            with processes.barrier(f"create {out}"):
                # headers and layout follow from the plan: an interrupted merge has the same files
                if not finished and process == 0:
                    files.create()
            merger = _Merger(plan, files, slab_elements, with_diagnostics, allow_nan)
            with processes.barrier(f"merge {out}"):
                _merge_all(
                    merger,
                    # tensors of all layers take turns, so that the shares are of about one size
                    plan.outputs[process::process_count],
                    finished,
                    journal.path_of(directory, process),
                    workers or _default_workers(),
                    progress,
                )
        with processes.barrier(f"finish {out}"):
            # the other processes have recorded their shares
            finished = journal.read(directory, shapes)
        # in the order of the plan, whichever thread or process was first
        records = [finished[output.name] for output in plan.outputs]
        if process == 0:
            journal.remove(directory)
            manifest.write(directory, plan, records)
        return manifest.report(plan, records)


def estimate(plan: Plan, workers: int | None = None) -> tuple[int, float]:
    """Estimate a merge by merging one of its tensors. Nothing is written.

    Args:
        plan: what would be done.
        workers: number of threads, by default one more than the cores.

    Returns:
        Bytes of memory, including what this process has now, and seconds without writing.
    """
    workers = workers or _default_workers()
    merged = [output for output in plan.outputs if not output.copied]
    outputs = sorted(merged, key=lambda output: output.size)
    # larger than most tensors, which are norms and biases, and quicker than an embedding
    sample, largest = outputs[-len(outputs) // 3], outputs[-1]
    merger = _Merger(plan, None, SLAB_ELEMENTS, with_diagnostics=True)
    merger.merge(sample)  # compiles
    start = time.perf_counter()
    merger.merge(sample)
    seconds_per_element = (time.perf_counter() - start) / sample.size
    seconds = seconds_per_element * sum(output.size for output in outputs) / workers

    # of members, base and result
    element_bytes = (len(sample.members) + 2) * plan.dtype_of(sample).itemsize
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory += workers * SLAB_ELEMENTS * element_bytes
    if merger.pool.was_used:
        # the pool holds whole tensors, at some time the largest that it must
        method = table.METHODS[largest.method]
        needs_whole = method.unit(largest.parameters) == "tensor"
        largest_bytes = largest.size * element_bytes
        memory += largest_bytes if needs_whole else min(largest_bytes, LOADED_BYTES)
    # of one tensor: methods that need much of it merge one at a time
    memory += max(
        output.size * table.METHODS[output.method].workspace(len(output.members))
        for output in outputs
    )
    return memory, seconds


def _default_workers() -> int:
    # one more than the cores: one worker is reading or writing most of the time
    return len(os.sched_getaffinity(0)) + 1


def _fingerprint(plan: Plan, shard_bytes: int) -> str:
    """Return a digest of all that the bytes of the output depend on."""
    # Not in it are workers, slabs and processes, since no byte depends on them: a merge may
    # continue with others.
    content = [
        # another version may round in another order
        jax_ordermerge.__version__,
        plan.recipe,
        plan.stochastic,
        plan.seed,
        plan.out_dtype.name,
        [[source.label, source.identity()] for source in plan.sources],
        [
            [
                *(output.name, output.method, output.parameters),
                *(np.array(output.weights).tolist(), plan.out_dtype_of(output).name),
            ]
            for output in plan.outputs
        ],
        shard_bytes,
    ]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _open_workspace(out: str | Path, fingerprint: str) -> Iterator[tuple[Path, bool]]:
    """Enter `atomic.resumable_directory`, which process 0 creates and renames for all processes."""
    with contextlib.ExitStack() as stack:
        # the others neither lock nor rename: they write into the directory that process 0 made
        directory, is_resumed = atomic.partial_path(out), False
        with processes.barrier(f"open {out}"):
            if jax.process_index() == 0:
                directory, is_resumed = stack.enter_context(
                    atomic.resumable_directory(out, fingerprint)
                )
        yield directory, bool(processes.broadcast(is_resumed))


def _merge_all(
    merger: "_Merger",
    outputs: Sequence[Output],
    finished: Mapping[str, TensorRecord],
    journal_path: Path,
    workers: int,
    progress: Progress | None,
) -> None:
    """Merge the tensors that are not finished, and record each in the journal."""
    lock, stop = threading.Lock(), threading.Event()
    count = 0

    def work(output: Output) -> None:
        nonlocal count
        if stop.is_set():
            return
        record = finished.get(output.name)
        # The journal may know of bytes that a crash of the machine has lost, since neither of the
        # two is flushed to the disk before the end. So the bytes in the file decide.
        is_finished = record is not None and merger.is_written(record)
        new_record = None if is_finished else merger.merge(output)
        # the lock also covers `progress`, which need not be safe to call from several threads
        with lock:
            if new_record is not None:
                journal.append(journal_path, new_record)
            count += 1
            if progress is not None:
                progress(count, len(outputs), output.name)

    # Threads and not processes: reading, compiled programs and CRC-32 run without Python's lock,
    # and memory is shared.
    with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        futures = [pool.submit(work, output) for output in outputs]
        try:
            done = wait(futures, return_when=FIRST_EXCEPTION)[0]
            # in file order: of several errors the first is raised
            for future in futures:
                if future in done:
                    future.result()
        finally:
            # after an error the workers end with their tensor, and nothing new is started
            stop.set()
            for future in futures:
                future.cancel()


class _SlabResult(NamedTuple):
    """What is computed of a slab.

    Attributes:
        merged: the slab, in the dtype of the output.
        checksums: uint32[M (+1)], of the slabs of members (and base).
        not_finite: uint32[M (+1)], numbers of their elements that are NaN or infinite.
    """

    merged: jax.Array
    checksums: jax.Array
    not_finite: jax.Array


class _Merger:
    """Merges the tensors of a plan, from any thread.

    Args:
        plan: the plan.
        files: the output; None computes and writes nothing.
        slab_elements: see `merge_plan`.
        with_diagnostics: see `merge_plan`.
        allow_nan: see `merge_plan`.
    """

    def __init__(
        self,
        plan: Plan,
        files: ShardFiles | None,
        slab_elements: int,
        with_diagnostics: bool,
        allow_nan: bool = False,
    ) -> None:
        self.plan, self.files, self.with_diagnostics = plan, files, with_diagnostics
        self.allow_nan = allow_nan
        # whole blocks: floating sums must not depend on the slabs, see `reductions.block_sums`
        self.slab_elements = -(-slab_elements // reductions.BLOCK) * reductions.BLOCK
        self.pool = MemoryPool(LOADED_BYTES)

    def is_written(self, record: TensorRecord) -> bool:
        """Whether the output has the bytes that a record tells of."""
        return self.files is not None and self.files.digest(record.name) == record.crc32

    def merge(self, output: Output) -> TensorRecord:
        """Merge one tensor and write it."""
        if output.copied:
            return self._copy(output)
        with (
            FileTensor(
                self.plan, output, self.slab_elements, self.pool, allow_nan=self.allow_nan
            ) as tensor,
            # coefficients that come from NaN are NaN, as was asked for
            np.errstate(all="ignore") if self.allow_nan else contextlib.nullcontext(),
        ):
            # a function of its own: its local variables refer to memory that is then released
            return self._merge_slabs(tensor, output)

    def _copy(self, output: Output) -> TensorRecord:
        """Write a tensor that all models share as it is."""
        view, dtype = output.members[0], self.plan.out_dtype_of(output)
        crc = 0
        for start in range(0, output.size, self.slab_elements):
            part = np.empty(min(self.slab_elements, output.size - start), dtype)
            self.plan.sources[view.source].read_into(view.name, start, part)
            if self.files is not None:
                self.files.write(output.name, start * dtype.itemsize, part)
            crc = zlib.crc32(part.view(np.uint8).data, crc)
        # one checksum for all: the plan has compared them
        count = len(output.views)
        return TensorRecord(output.name, f"{crc:08x}", [crc] * count, None, 0, [0] * count)

    def _merge_slabs(self, tensor: FileTensor, output: Output) -> TensorRecord:
        plan, method = self.plan, table.METHODS[output.method]
        arrays, static = parts.split_static(method.prepare(tensor, **output.parameters))
        needs_base = method.needs_base(output.parameters)
        # a stream of its own: rounding at random does not change what the method draws
        rounding = rng.stream_key_bits(plan.seed, "round", output.name) if plan.stochastic else None
        dtype, out = plan.dtype_of(output), plan.out_dtype_of(output)
        crc, elements, checksums, moments = 0, 0, [], []
        not_finite = np.zeros(len(output.members) + (needs_base and output.base is not None), int)
        for start, shape in tensor.slabs():
            part = tensor.part(start, shape, needs_base)
            # static arguments: few values occur in a model, so few programs are compiled
            result = _merge_slab(
                part, arrays, rounding, method=output.method, static=static, dtype=dtype, out=out
            )
            # This waits for the program. Only then may the next `part` overwrite the buffers, which
            # the device reads in place.
            merged = np.asarray(result.merged)
            not_finite += np.asarray(result.not_finite, int)
            if not_finite.any() and not self.allow_nan:
                tensor.refuse_not_finite()
            _refuse_overflow(output.name, merged, part)
            if self.files is not None:
                self.files.write(output.name, start * merged.itemsize, merged)
            # here and not from the file afterwards: the slab is in the cache
            crc = zlib.crc32(merged.reshape(-1).view(np.uint8).data, crc)
            checksums.append(np.asarray(result.checksums, np.uint64))
            if self.with_diagnostics and output.base is not None:
                sampled = slab_moments.sample_size(math.prod(shape))
                # in a buffer of its own: a method that needs the base has it in the one before
                base = tensor.read(output.base, start, sampled, len(output.members) + 1)
                moments.append(
                    slab_moments.measure(
                        part,
                        base,
                        merged,
                        arrays,
                        start,
                        method=output.method,
                        static=static,
                        out=out,
                    )
                )
                elements += sampled
        # checksums are sums modulo 2^32, so those of the slabs add up to that of the tensor
        model_checksums: list[int | None] = [int(x) & 0xFFFFFFFF for x in np.sum(checksums, axis=0)]
        if output.base is not None and not needs_base:
            # only the sampled elements of the base were read
            model_checksums.append(None)
        return TensorRecord(
            output.name,
            f"{crc:08x}",
            model_checksums,
            diagnostics.add(moments) if moments else None,
            elements,
            not_finite.tolist(),
        )


@functools.partial(jax.jit, static_argnames=("method", "static", "dtype", "out"))
def _merge_slab(
    part: parts.Part,
    arrays: dict[str, jax.Array],
    rounding: jax.Array | None,
    *,
    method: str,
    static: table.Static,
    dtype: np.dtype,
    out: np.dtype,
) -> _SlabResult:
    """Merge a slab and compute its checksums in one program, so that each is dispatched once.

    Args:
        part: the slab of all models.
        arrays: what the method's `prepare` returned.
        rounding: uint32[2], key of stochastic rounding, or None.
        method, static, dtype, out: see `table.merge_part`.
    """
    merged = table.merge_part(
        part, arrays, rounding, method=method, static=static, dtype=dtype, out=out
    )
    models = part.members if part.base is None else (*part.members, part.base)
    return _SlabResult(merged, *diagnostics.scan(models, part.offset))


def _refuse_overflow(name: str, merged: np.ndarray, part: parts.Part) -> None:
    """Refuse infinities that no member has. Only float16 has less range than float32."""
    if merged.dtype != np.float16 or not np.isinf(merged).any():
        return
    # an infinity that a member has is passed on like any other value
    if not any(np.isinf(np.asarray(member)).any() for member in part.members):
        raise UserError(f"the merged {name} overflows float16; choose dtype bfloat16 or float32")
