"""The tensors of a checkpoint, and the differences between two, for any safetensors files.

Tensors are read in slabs that stay in the cache of a core, and are summed in float64 by one thread
per core. The results do not depend on the number of threads.
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from jax_ordermerge.checkpoint.safetensors import Reader, Tensors
from jax_ordermerge.errors import UserError

SLAB = 1 << 15  # elements per slab: 256 KiB per array in float64
PIECE = 1 << 22  # elements per task of a thread
# BLAS starts threads of its own for longer inner products. They cost more than they save, and they
# change the last bit.
_ROW = 1 << 13
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_T = TypeVar("_T")


class Stats(NamedTuple):
    """Statistics of the elements of one tensor, or of all.

    Attributes:
        minimum, maximum, mean, std: over the finite elements, None if there are none; `std` divides
            by their number.
        nans, infs, zeros: counts; -0.0 is a zero.
    """

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    nans: int
    infs: int
    zeros: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of an inventory.

    Attributes:
        name: name in the file.
        dtype: numpy's name of the dtype.
        shape, elements, bytes: size.
        file: name of the file.
        stats: statistics; None if they were not requested.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    bytes: int
    file: str
    stats: Stats | None


@dataclass(frozen=True)
class Inventory:
    """The tensors of a checkpoint in file order, and their totals."""

    tensors: tuple[Tensor, ...]
    elements: int
    bytes: int
    files: int
    stats: Stats | None


class Numbers(NamedTuple):
    """Differences between the elements of a pair of tensors, or of all pairs.

    Integers beyond 2^53 are rounded.

    Attributes:
        elements: elements on each side.
        same: elements with equal bits; with equal values if the dtypes differ.
        nonfinite: elements that are NaN or infinite on a side (or in the base). The next four
            figures leave them out.
        max_abs: max |a - b|.
        max_rel: max |a - b| / max(|a|, |b|), from 0 to 2.
        cosine: <a, b> / (|a| |b|); None if one of them is zero.
        task_cosine: the same for the task vectors a - base and b - base; None without a base.
        zeros_a, zeros_b: fraction of exact zeros.
        kept_a, kept_b: fraction that equals the base, as in `same`, of the elements that the base
            has.
    """

    elements: int
    same: int
    nonfinite: int
    max_abs: float
    max_rel: float
    cosine: float | None
    task_cosine: float | None
    zeros_a: float
    zeros_b: float
    kept_a: float | None
    kept_b: float | None


@dataclass(frozen=True)
class Pair:
    """A tensor that both checkpoints have.

    Attributes:
        name: name in the files.
        dtype_a, dtype_b, shape_a, shape_b: of each side.
        equal: whether dtype, shape and bytes are equal.
        numbers: differences; None if the shapes differ, or without elements.
    """

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    equal: bool
    numbers: Numbers | None


@dataclass(frozen=True)
class Difference:
    """The result of `difference`.

    Attributes:
        pairs: tensors on both sides, in the order of the first.
        only_a, only_b: names of tensors on one side only.
        not_in_base: names of pairs that the base lacks or has in another shape.
        total: differences over all pairs of equal shape; None if there are none.
    """

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    not_in_base: tuple[str, ...]
    total: Numbers | None

    @property
    def equal(self) -> bool:
        """Whether both have the same tensors with the same bytes."""
        return not self.only_a and not self.only_b and all(pair.equal for pair in self.pairs)


def inspect(path: str | Path | Tensors, *, stats: bool = False) -> Inventory:
    """List the tensors of a directory, a safetensors file, or another model.

    Args:
        path: see `Reader`; or a model that is open.
        stats: whether to read all tensors for statistics; by default only headers are read.

    Raises:
        UserError: see `Reader`.

    Example:
        >>> import tempfile, safetensors.numpy
        >>> file = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> values = np.array([[0.0, 3.0], [-1.0, np.inf]], np.float32)
        >>> safetensors.numpy.save_file({"w": values}, file)
        >>> inventory = inspect(file, stats=True)
        >>> inventory.tensors[0].name, inventory.tensors[0].shape, inventory.bytes
        ('w', (2, 2), 16)
        >>> inventory.stats.minimum, inventory.stats.maximum, inventory.stats.infs
        (-1.0, 3.0, 1)
    """
    reader = _open(path)
    # all tensors are measured together: small ones share the threads
    moments = _measure(dict.fromkeys(reader.names, (reader,)), _moments) if stats else {}
    tensors = []
    for name in reader.names:
        dtype, shape = reader.info(name)
        elements = math.prod(shape)
        tensors.append(
            Tensor(
                name=name,
                dtype=dtype.name,
                shape=shape,
                elements=elements,
                bytes=elements * dtype.itemsize,
                file=reader.file(name).name,
                stats=_combine_moments(moments.get(name, [])) if stats else None,
            )
        )
    return Inventory(
        tensors=tuple(tensors),
        elements=sum(tensor.elements for tensor in tensors),
        bytes=sum(tensor.bytes for tensor in tensors),
        files=len({tensor.file for tensor in tensors}),
        stats=_combine_moments(list(itertools.chain(*moments.values()))) if stats else None,
    )


def difference(
    a: str | Path | Tensors, b: str | Path | Tensors, base: str | Path | Tensors | None = None
) -> Difference:
    """Compare two checkpoints tensor by tensor, and their task vectors relative to a base.

    Args:
        a, b: directories, safetensors files, or models that are open.
        base: checkpoint that both started from, to compare task vectors.

    Raises:
        UserError: see `Reader`; or the base has none of the tensors.

    Example:
        >>> import tempfile, safetensors.numpy
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, values in (
        ...     ("base", [1.0, 2.0, 0.0]),
        ...     ("a", [1.0, 3.0, 0.0]),
        ...     ("b", [1.0, 2.5, 0.0]),
        ... ):
        ...     safetensors.numpy.save_file({"w": np.array(values, np.float32)}, folder / name)
        >>> total = difference(folder / "a", folder / "b", folder / "base").total
        >>> total.same, total.max_abs, total.task_cosine
        (2, 0.5, 1.0)
        >>> f"{total.cosine:.2f} {total.kept_a:.2f} {total.zeros_a:.2f}"
        '1.00 0.67 0.33'
        >>> difference(folder / "a", folder / "a").equal
        True
    """
    left, right = _open(a), _open(b)
    reference = None if base is None else _open(base)
    # dicts as ordered sets: results are in the order of the first checkpoint
    names_a, names_b = dict.fromkeys(left.names), dict.fromkeys(right.names)
    common = [name for name in names_a if name in names_b]
    base_shapes = (
        {name: reference.info(name).shape for name in reference.names} if reference else {}
    )
    readers: dict[str, tuple[Tensors, ...]] = {}
    not_in_base = []
    for name in common:
        shape = left.info(name).shape
        comparable = shape == right.info(name).shape
        in_base = comparable and base_shapes.get(name) == shape
        if comparable:
            readers[name] = (left, right, reference) if reference and in_base else (left, right)
        if reference and not in_base:
            not_in_base.append(name)
    if reference and readers and len(not_in_base) == len(common):
        raise UserError(
            f"base {base} has none of the tensors of {a} in their shapes; give the model that both"
            " started from"
        )
    products = _measure(readers, _products)
    pairs = []
    for name in common:
        (dtype_a, shape_a), (dtype_b, shape_b) = left.info(name), right.info(name)
        numbers = _combine_products(products.get(name, []))
        # a pair without numbers has equal bytes if it has no elements; shapes decide
        equal = (
            dtype_a == dtype_b
            and shape_a == shape_b
            and (numbers is None or numbers.same == numbers.elements)
        )
        pairs.append(Pair(name, dtype_a.name, dtype_b.name, shape_a, shape_b, equal, numbers))
    return Difference(
        pairs=tuple(pairs),
        only_a=tuple(name for name in names_a if name not in names_b),
        only_b=tuple(name for name in names_b if name not in names_a),
        not_in_base=tuple(not_in_base),
        total=_combine_products(list(itertools.chain(*products.values()))),
    )


# ------------------------------------------------------------------------------ reading in slabs


def _open(model: str | Path | Tensors) -> Tensors:
    return Reader(model) if isinstance(model, str | Path) else model


class _Piece(NamedTuple):
    """A range of elements of a tensor, the same in each of the readers."""

    name: str
    readers: tuple[Tensors, ...]
    start: int
    stop: int


def _measure(
    tensors: Mapping[str, tuple[Tensors, ...]], measure_slab: Callable[..., _T]
) -> dict[str, list[_T]]:
    """Return the results of `measure_slab(scratch, *arrays)` by tensor, slab by slab.

    Tensors without elements have no results.
    """

    def measure(piece: _Piece) -> list[_T]:
        results = []
        size = min(SLAB, piece.stop - piece.start)
        # All slabs use the same memory: new pages for each would take five times as long as the
        # arithmetic.
        buffers = [np.empty(size, reader.info(piece.name).dtype) for reader in piece.readers]
        scratch = np.empty((6, size))
        with np.errstate(all="ignore"):  # NaN and infinities are counted, not reported
            for start in range(piece.start, piece.stop, SLAB):
                arrays = [buffer[: piece.stop - start] for buffer in buffers]
                for reader, array in zip(piece.readers, arrays, strict=True):
                    reader.read_into(piece.name, start, array)
                results.append(measure_slab(scratch[:, : len(arrays[0])], *arrays))
        return results

    # Pieces and not tensors: one embedding may have half of all elements, and would be read by one
    # thread while the others wait.
    pieces = []
    for name, readers in tensors.items():
        elements = math.prod(readers[0].info(name).shape)
        for start in range(0, elements, PIECE):
            pieces.append(_Piece(name, readers, start, min(start + PIECE, elements)))
    results: dict[str, list[_T]] = {}
    # numpy releases the lock of the interpreter; results come in the order of the pieces
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for piece, slabs in zip(pieces, pool.map(measure, pieces), strict=True):
            results.setdefault(piece.name, []).extend(slabs)
    return results


def _float64(x: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Cast into `out` and return it."""
    if x.dtype == _BFLOAT16:
        # the upper half of a float32: five times as fast as the cast of ml_dtypes
        bits = scratch.view(np.uint32)[: x.size]
        np.left_shift(x.view(np.uint16), 16, dtype=np.uint32, out=bits)
        out[:] = bits.view(np.float32)
    else:
        out[:] = x
    return out


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """Return the inner product, in rows that are short enough for one thread of BLAS."""
    end = x.size - x.size % _ROW
    rows = np.vecdot(x[:end].reshape(-1, _ROW), y[:end].reshape(-1, _ROW))
    return float(rows.sum() + np.dot(x[end:], y[end:]))


def _count_zeros(x: np.ndarray) -> int:
    return int(np.count_nonzero(x == 0))


# ------------------------------------------------------------------------------------ one tensor


class _Moments(NamedTuple):
    finite: int
    minimum: float
    maximum: float
    mean: float
    squares: float  # sum of squared deviations from the mean
    nans: int
    infs: int
    zeros: int


def _moments(scratch: np.ndarray, values: np.ndarray) -> _Moments:
    # One sum tells whether all elements are finite, which is cheaper than a mask. It may overflow
    # for tensors of float64; the masks below are then right, too.
    x = _float64(values, scratch[0], scratch[1])
    size, nans, zeros, total = x.size, 0, _count_zeros(x), float(x.sum())
    if not math.isfinite(total):
        nans = int(np.count_nonzero(np.isnan(x)))
        x = x[np.isfinite(x)]
        total = float(x.sum())
    if not x.size:
        return _Moments(0, math.inf, -math.inf, 0.0, 0.0, nans, size - nans, zeros)
    mean, infs = total / x.size, size - nans - x.size
    deviations = np.subtract(x, mean, out=scratch[1][: x.size])
    squares = _dot(deviations, deviations)
    return _Moments(x.size, float(x.min()), float(x.max()), mean, squares, nans, infs, zeros)


def _combine_moments(slabs: list[_Moments]) -> Stats:
    """Combine slabs by the formula of Chan et al., which does not lose digits far from zero."""
    finite = sum(slab.finite for slab in slabs)
    nans = sum(slab.nans for slab in slabs)
    infs = sum(slab.infs for slab in slabs)
    zeros = sum(slab.zeros for slab in slabs)
    if not finite:
        return Stats(None, None, None, None, nans, infs, zeros)
    # Weighted means: a sum of the values themselves may overflow.
    mean = sum(slab.finite / finite * slab.mean for slab in slabs)
    squares = sum(
        slab.squares + slab.finite * (slab.mean - mean) * (slab.mean - mean) for slab in slabs
    )
    lowest, highest = min(slab.minimum for slab in slabs), max(slab.maximum for slab in slabs)
    return Stats(lowest, highest, mean, math.sqrt(squares / finite), nans, infs, zeros)


# ------------------------------------------------------------------------- two tensors, and a base


class _Products(NamedTuple):
    elements: int
    same: int
    nonfinite: int
    max_abs: float
    max_rel: float
    aa: float  # inner products, of finite elements only
    bb: float
    ab: float
    zeros_a: int
    zeros_b: int
    in_base: int  # elements that the base has too
    kept_a: int
    kept_b: int
    task_aa: float  # inner products of a - base and b - base
    task_bb: float
    task_ab: float


def _products(scratch: np.ndarray, *arrays: np.ndarray) -> _Products:
    """Measure a slab of a and b, or of a, b and the base."""
    values = [_float64(array, out, scratch[3]) for array, out in zip(arrays, scratch, strict=False)]
    (a, b), (x, y) = arrays[:2], values[:2]
    same, zeros, unchanged = _count_equal(a, b, x, y), (_count_zeros(x), _count_zeros(y)), (0, 0, 0)
    if len(arrays) > 2:
        base, z = arrays[2], values[2]
        unchanged = a.size, _count_equal(a, base, x, z), _count_equal(b, base, y, z)
    # a sum is finite if all elements are, but for an overflow, which the masks below then clear up
    if not all(math.isfinite(value.sum()) for value in values):
        finite = np.logical_and.reduce([np.isfinite(value) for value in values])
        values = [value[finite] for value in values]
        x, y = values[:2]
    spare = scratch[3:, : x.size]
    # equal slabs are the common case in a comparison of fine-tunes: skip three passes
    maxima = (0.0, 0.0) if same == a.size or not x.size else _max_differences(x, y, spare)
    gram, task_gram = _gram(x, y), (0.0, 0.0, 0.0)
    if len(arrays) > 2:
        z = values[2]
        task_gram = _gram(np.subtract(x, z, out=spare[0]), np.subtract(y, z, out=spare[1]))
    return _Products(a.size, same, a.size - x.size, *maxima, *gram, *zeros, *unchanged, *task_gram)


def _count_equal(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> int:
    """Count equal bits of a and b, or equal values x and y if their dtypes differ."""
    if a.dtype != b.dtype:
        return int(np.count_nonzero(x == y))
    # bits, so that NaN equals itself and -0.0 differs from 0.0
    bits = f"u{a.dtype.itemsize}"
    return int(np.count_nonzero(a.view(bits) == b.view(bits)))


def _max_differences(x: np.ndarray, y: np.ndarray, spare: np.ndarray) -> tuple[float, float]:
    """Return the largest absolute and the largest relative difference."""
    distance = np.abs(np.subtract(x, y, out=spare[0]), out=spare[0])
    larger = np.maximum(np.abs(x, out=spare[1]), np.abs(y, out=spare[2]), out=spare[1])
    # 0 / 0 is NaN, which fmax ignores
    relative = float(np.fmax.reduce(np.divide(distance, larger, out=spare[2])))
    return float(distance.max()), 0.0 if math.isnan(relative) else relative


def _gram(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    return _dot(x, x), _dot(y, y), _dot(x, y)


def _combine_products(slabs: list[_Products]) -> Numbers | None:
    if not slabs:
        return None
    columns = zip(_Products._fields, zip(*slabs, strict=True), strict=True)
    total = _Products(
        *(max(column) if name.startswith("max_") else sum(column) for name, column in columns)
    )
    return Numbers(
        elements=total.elements,
        same=total.same,
        nonfinite=total.nonfinite,
        max_abs=total.max_abs,
        max_rel=total.max_rel,
        cosine=_cosine(total.aa, total.bb, total.ab),
        task_cosine=_cosine(total.task_aa, total.task_bb, total.task_ab),
        zeros_a=total.zeros_a / total.elements,
        zeros_b=total.zeros_b / total.elements,
        kept_a=total.kept_a / total.in_base if total.in_base else None,
        kept_b=total.kept_b / total.in_base if total.in_base else None,
    )


def _cosine(xx: float, yy: float, xy: float) -> float | None:
    # For equal tensors the first product is exact, so the cosine is exactly 1; the second does not
    # leave the range of float64.
    length = math.sqrt(xx * yy)
    if not 0 < length < math.inf:
        length = math.sqrt(xx) * math.sqrt(yy)
    # Rounding may lead a little beyond 1, where nobody expects a cosine.
    return max(-1.0, min(1.0, xy / length)) if 0 < length < math.inf else None
