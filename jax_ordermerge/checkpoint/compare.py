"""What lies in a checkpoint, and how two checkpoints differ. Any safetensors files: nothing here knows a model.

Tensors are read in slabs that stay in a core's cache and are summed in float64, by as many threads as there are cores. The numbers
do not depend on how many those are.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError

SLAB = 1 << 15  # elements in float64 at a time, 256 KiB an array
PIECE = 1 << 22  # elements that a thread takes at a time
_ROW = (
    1 << 13
)  # BLAS starts threads of its own for longer products, which cost more than they save and change the last bit
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_T = TypeVar("_T")


class Stats(NamedTuple):
    """Statistics of the elements of a tensor, or of all.

    Attributes:
        minimum, maximum, mean, std: of the finite elements, None where there is none; `std` divides by their number.
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
    """A row of `inspect`.

    Attributes:
        dtype: as numpy names it.
        file: name of the file it lies in.
        stats: None where they were not asked for.
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
    """How the elements of a pair of tensors differ, or those of all pairs; integers beyond 2^53 are rounded.

    Attributes:
        elements: how many each side has.
        same: how many have equal bits; equal values, where the dtypes differ.
        nonfinite: how many are NaN or infinite on a side (or in the base), which the next four leave out.
        max_abs: max |a - b|.
        max_rel: max |a - b| / max(|a|, |b|), from 0 to 2.
        cosine: <a, b> / (|a| |b|); None where one of them is zero.
        task_cosine: the same of the task vectors a - base and b - base; None without a base too.
        zeros_a, zeros_b: fraction of exact zeros.
        kept_a, kept_b: fraction left as it was in the base, of the elements that are in the base; compared as in `same`.
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
        equal: dtype, shape and bytes are.
        numbers: None where the shapes differ, or without elements.
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
        only_a, only_b: names of tensors on one side alone.
        not_in_base: names of pairs that the base lacks or has in another shape; empty without a base.
        total: over all pairs of one shape; None where there is none.
    """

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    not_in_base: tuple[str, ...]
    total: Numbers | None

    @property
    def equal(self) -> bool:
        """Both have the same tensors with the same bytes."""
        return not self.only_a and not self.only_b and all(pair.equal for pair in self.pairs)


def inspect(path: str | Path, *, stats: bool = False) -> Inventory:
    """List the tensors of a directory or safetensors file.

    Args:
        path: as for `Reader`.
        stats: read all tensors too; without, only the headers are read.

    Raises:
        UserError: see `Reader`.

    Example:
        >>> import tempfile, safetensors.numpy
        >>> file = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> safetensors.numpy.save_file(
        ...     {"w": np.array([[0.0, 3.0], [-1.0, np.inf]], np.float32)}, file
        ... )
        >>> found = inspect(file, stats=True)
        >>> found.tensors[0].name, found.tensors[0].dtype, found.tensors[0].shape, found.bytes
        ('w', 'float32', (2, 2), 16)
        >>> (
        ...     found.stats.minimum,
        ...     found.stats.maximum,
        ...     round(found.stats.std, 4),
        ...     found.stats.infs,
        ...     found.stats.zeros,
        ... )
        (-1.0, 3.0, 1.6997, 1, 1)
    """
    reader = Reader(path)
    sums = _measure(((name, (reader,)) for name in reader.names), _moments) if stats else {}
    rows = []
    for name in reader.names:
        dtype, shape = reader.info(name)
        elements = math.prod(shape)
        found = _stats(sums.get(name, [])) if stats else None
        rows.append(
            Tensor(
                name,
                dtype.name,
                shape,
                elements,
                elements * dtype.itemsize,
                reader.file(name).name,
                found,
            )
        )
    return Inventory(
        tensors=tuple(rows),
        elements=sum(row.elements for row in rows),
        bytes=sum(row.bytes for row in rows),
        files=len({row.file for row in rows}),
        stats=_stats([one for parts in sums.values() for one in parts]) if stats else None,
    )


def difference(a: str | Path, b: str | Path, base: str | Path | None = None) -> Difference:
    """Compare two checkpoints tensor by tensor, and what each did to a base.

    Args:
        a, b: directories or safetensors files.
        base: where both began, if the task vectors are asked for.

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
        >>> found = difference(folder / "a", folder / "b", folder / "base")
        >>> (
        ...     found.equal,
        ...     found.total.same,
        ...     found.total.max_abs,
        ...     found.total.cosine > 0.99,
        ...     found.total.task_cosine,
        ... )
        (False, 2, 0.5, True, 1.0)
        >>> (
        ...     f"{found.total.kept_a:.2f} {found.total.zeros_a:.2f}",
        ...     difference(folder / "a", folder / "a").equal,
        ... )
        ('0.67 0.33', True)
    """
    left, right = Reader(a), Reader(b)
    under = None if base is None else Reader(base)
    names_a, names_b = dict.fromkeys(left.names), dict.fromkeys(right.names)
    common = [name for name in names_a if name in names_b]
    shaped = [name for name in common if left.info(name).shape == right.info(name).shape]
    in_base = {} if under is None else {name: under.info(name).shape for name in under.names}
    based = {name for name in shaped if in_base.get(name) == left.info(name).shape}
    if under is not None and shaped and not based:
        raise UserError(
            f"base {base} has none of the tensors of {a} in their shapes; give the model that both began with"
        )

    def readers(name: str) -> tuple[Reader, ...]:
        return (left, right, under) if under is not None and name in based else (left, right)

    sums = _measure(((name, readers(name)) for name in shaped), _products)
    pairs = []
    for name in common:
        (dtype_a, shape_a), (dtype_b, shape_b) = left.info(name), right.info(name)
        numbers = _numbers(sums.get(name, []))
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
        not_in_base=() if under is None else tuple(name for name in common if name not in based),
        total=_numbers([one for parts in sums.values() for one in parts]),
    )


# ---------------------------------------------------------------- going through tensors


class _Piece(NamedTuple):
    name: str
    readers: tuple[Reader, ...]
    start: int
    stop: int


def _measure(
    tensors: Iterable[tuple[str, tuple[Reader, ...]]], slab: Callable[..., _T]
) -> dict[str, list[_T]]:
    """Return what `slab(room, *arrays)` finds in every slab, in order, per tensor; tensors without elements are left out."""

    def measure(piece: _Piece) -> list[_T]:
        found = []
        size = min(SLAB, piece.stop - piece.start)
        buffers = [np.empty(size, reader.info(piece.name).dtype) for reader in piece.readers]
        # every slab in the same memory: new pages from the system for each would take five times as long as the arithmetic
        room = np.empty((6, size))
        with np.errstate(all="ignore"):  # of values that are no numbers
            for start in range(piece.start, piece.stop, SLAB):
                arrays = [buffer[: piece.stop - start] for buffer in buffers]
                for reader, array in zip(piece.readers, arrays, strict=True):
                    reader.read_into(piece.name, start, array)
                found.append(slab(room[:, : len(arrays[0])], *arrays))
        return found

    pieces = [piece for name, readers in tensors for piece in _pieces(name, readers)]
    out: dict[str, list[_T]] = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for piece, found in zip(pieces, pool.map(measure, pieces), strict=True):
            out.setdefault(piece.name, []).extend(found)
    return out


def _pieces(name: str, readers: tuple[Reader, ...]) -> Iterator[_Piece]:
    elements = math.prod(readers[0].info(name).shape)
    for start in range(0, elements, PIECE):
        yield _Piece(name, readers, start, min(start + PIECE, elements))


def _float64(x: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    if x.dtype == _BFLOAT16:  # the upper half of a float32; five times as fast as the cast
        bits = np.left_shift(
            x.view(np.uint16), 16, dtype=np.uint32, out=spare.view(np.uint32)[: x.size]
        )
        out[:] = bits.view(np.float32)
    else:
        out[:] = x
    return out


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    whole = x.size - x.size % _ROW
    return float(
        np.vecdot(x[:whole].reshape(-1, _ROW), y[:whole].reshape(-1, _ROW)).sum()
        + np.dot(x[whole:], y[whole:])
    )


def _zeros(x: np.ndarray) -> int:
    return int(np.count_nonzero(x == 0))


# ---------------------------------------------------------------- one tensor


class _Moments(NamedTuple):
    finite: int
    minimum: float
    maximum: float
    mean: float
    squares: float  # sum of squared deviations from the mean
    nans: int
    infs: int
    zeros: int


def _moments(room: np.ndarray, values: np.ndarray) -> _Moments:
    x = _float64(values, room[0], room[1])
    size, nans, zeros, total = x.size, 0, _zeros(x), float(x.sum())
    if not math.isfinite(total):
        nans = int(np.count_nonzero(np.isnan(x)))
        x = x[np.isfinite(x)]
        total = float(x.sum())
    if not x.size:
        return _Moments(0, math.inf, -math.inf, 0.0, 0.0, nans, size - nans, zeros)
    mean, infs = total / x.size, size - nans - x.size
    from_mean = np.subtract(x, mean, out=room[1][: x.size])
    return _Moments(
        x.size, float(x.min()), float(x.max()), mean, _dot(from_mean, from_mean), nans, infs, zeros
    )


def _stats(parts: list[_Moments]) -> Stats:
    finite = sum(part.finite for part in parts)
    nans, infs, zeros = (
        sum(part.nans for part in parts),
        sum(part.infs for part in parts),
        sum(part.zeros for part in parts),
    )
    if not finite:
        return Stats(None, None, None, None, nans, infs, zeros)
    mean = sum(part.finite / finite * part.mean for part in parts)
    squares = sum(
        part.squares + part.finite * (part.mean - mean) * (part.mean - mean) for part in parts
    )
    lowest, highest = min(part.minimum for part in parts), max(part.maximum for part in parts)
    return Stats(lowest, highest, mean, math.sqrt(squares / finite), nans, infs, zeros)


# ---------------------------------------------------------------- two tensors, and a base


class _Products(NamedTuple):
    elements: int
    same: int
    nonfinite: int
    max_abs: float
    max_rel: float
    aa: float
    bb: float
    ab: float
    zeros_a: int
    zeros_b: int
    based: int  # elements that are in the base too
    kept_a: int
    kept_b: int
    task_aa: float
    task_bb: float
    task_ab: float


def _products(room: np.ndarray, *arrays: np.ndarray) -> _Products:
    """Measure a slab of a and b, or of a, b and the base."""
    values = [_float64(array, out, room[3]) for array, out in zip(arrays, room, strict=False)]
    (a, b), (x, y) = arrays[:2], values[:2]
    same, zeros, kept = _same(a, b, x, y), (_zeros(x), _zeros(y)), (0, 0, 0)
    if len(arrays) > 2:
        base, z = arrays[2], values[2]
        kept = a.size, _same(a, base, x, z), _same(b, base, y, z)
    if not all(math.isfinite(one.sum()) for one in values):
        finite = np.logical_and.reduce([np.isfinite(one) for one in values])
        values = [one[finite] for one in values]
        x, y = values[:2]
    spare = room[3:, : x.size]
    tops = (0.0, 0.0) if same == a.size or not x.size else _tops(x, y, spare)
    whole, task = _gram(x, y), (0.0, 0.0, 0.0)
    if len(arrays) > 2:
        task = _gram(
            np.subtract(x, values[2], out=spare[0]), np.subtract(y, values[2], out=spare[1])
        )
    return _Products(a.size, same, a.size - x.size, *tops, *whole, *zeros, *kept, *task)


def _same(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> int:
    if a.dtype != b.dtype:
        return int(np.count_nonzero(x == y))
    bits = f"u{a.dtype.itemsize}"
    return int(np.count_nonzero(a.view(bits) == b.view(bits)))


def _tops(x: np.ndarray, y: np.ndarray, spare: np.ndarray) -> tuple[float, float]:
    apart = np.abs(np.subtract(x, y, out=spare[0]), out=spare[0])
    larger = np.maximum(np.abs(x, out=spare[1]), np.abs(y, out=spare[2]), out=spare[1])
    relative = float(
        np.fmax.reduce(np.divide(apart, larger, out=spare[2]))
    )  # leaves out NaN, which is 0 / 0 here
    return float(apart.max()), 0.0 if math.isnan(relative) else relative


def _gram(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    return _dot(x, x), _dot(y, y), _dot(x, y)


def _numbers(parts: list[_Products]) -> Numbers | None:
    if not parts:
        return None
    columns: dict[str, Any] = dict(zip(_Products._fields, zip(*parts, strict=True), strict=True))
    s = _Products(
        **{
            name: (max if name in ("max_abs", "max_rel") else sum)(column)
            for name, column in columns.items()
        }
    )
    return Numbers(
        elements=s.elements,
        same=s.same,
        nonfinite=s.nonfinite,
        max_abs=s.max_abs,
        max_rel=s.max_rel,
        cosine=_cosine(s.aa, s.bb, s.ab),
        task_cosine=_cosine(s.task_aa, s.task_bb, s.task_ab),
        zeros_a=s.zeros_a / s.elements,
        zeros_b=s.zeros_b / s.elements,
        kept_a=s.kept_a / s.based if s.based else None,
        kept_b=s.kept_b / s.based if s.based else None,
    )


def _cosine(xx: float, yy: float, xy: float) -> float | None:
    # of equal tensors the first way is exactly 1; the second has no product that leaves the range of float64
    length = math.sqrt(xx * yy)
    if not 0 < length < math.inf:
        length = math.sqrt(xx) * math.sqrt(yy)
    return max(-1.0, min(1.0, xy / length)) if 0 < length < math.inf else None
