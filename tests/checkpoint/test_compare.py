"""Inventories and differences of checkpoints against naive numpy in float64.

The tests cover dtypes, shapes, slabs, and values that are not numbers.
"""

import io
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jax_ordermerge.checkpoint import compare
from jax_ordermerge.checkpoint.compare import Difference, difference, inspect
from jax_ordermerge.commands import tables
from jax_ordermerge.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = ["float64", "float32", "float16", BF16]
SHAPES = {"matrix": (37, 41), "vector": (5,), "scalar": (), "one": (1, 1, 1)}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Several pieces, slabs and rows in tensors of a thousand elements, with remainders."""
    for name, size in (("SLAB", 100), ("PIECE", 450), ("_ROW", 32)):
        monkeypatch.setattr(compare, name, size)


@pytest.fixture
def save(tmp_path):
    """Return `save(name, arrays) -> file`."""

    def write(name: str, arrays: dict[str, np.ndarray]) -> pathlib.Path:
        safetensors.numpy.save_file(
            {key: np.asarray(array, order="C") for key, array in arrays.items()}, tmp_path / name
        )
        return tmp_path / name

    return write


def random(dtype, seed=0, *, zeros=0.2) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    out = {}
    for name, shape in SHAPES.items():
        values = np.asarray(
            generator.normal(size=shape) * 10.0 ** generator.integers(-3, 3, size=shape)
        )
        values = np.where(generator.random(shape) < zeros, 0.0, values)
        out[name] = values.astype(dtype)
    return out


def changed(arrays: dict[str, np.ndarray], seed: int, *, unchanged=0.6) -> dict[str, np.ndarray]:
    """Return a fine-tune of `arrays`: part of the elements are unchanged."""
    generator = np.random.default_rng(seed)
    out = {}
    for name, array in arrays.items():
        delta = np.where(
            generator.random(array.shape) < unchanged, 0.0, generator.normal(size=array.shape) * 0.1
        )
        out[name] = (array.astype(np.float64) + delta).astype(array.dtype)
    return out


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1).astype(np.float64) for array in arrays.values()])


def cosine(x, y):
    return float(x @ y / np.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else None


def close(value, expected):
    assert value == (None if expected is None else pytest.approx(expected, rel=1e-12, abs=1e-15))


# ---------------------------------------------------------------- inspect


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_statistics(save, dtype):
    arrays = random(dtype)
    inventory = inspect(save("a", arrays), stats=True)
    assert {row.name for row in inventory.tensors} == set(arrays)
    for row in inventory.tensors:
        check_stats(row.stats, arrays[row.name].astype(np.float64))
        assert (row.dtype, row.shape, row.elements) == (
            np.dtype(dtype).name,
            SHAPES[row.name],
            arrays[row.name].size,
        )
        assert (row.bytes, row.file) == (arrays[row.name].nbytes, "a")
    check_stats(inventory.stats, flat(arrays))
    assert inventory.elements == sum(array.size for array in arrays.values())
    assert inventory.bytes == sum(array.nbytes for array in arrays.values())
    assert inventory.files == 1


def check_stats(stats, values):
    finite = values[np.isfinite(values)]
    naive = (
        (finite.min(), finite.max(), finite.mean(), finite.std()) if finite.size else (None,) * 4
    )
    for value, expected in zip(stats[:4], naive, strict=True):
        close(value, expected)
    assert stats[4:] == (np.isnan(values).sum(), np.isinf(values).sum(), (values == 0).sum())


@pytest.mark.parametrize("dtype", [*FLOATS, "bool", "int8", "uint8", "int32", "uint16"], ids=str)
def test_every_dtype_has_statistics(save, dtype):
    values = np.arange(300).reshape(3, 100).astype(dtype)
    check_stats(inspect(save("a", {"w": values}), stats=True).stats, values.astype(np.float64))


def test_values_that_are_not_numbers(save):
    values = random("float32")["matrix"]
    values[3, 4], values[20], values[30, :7] = np.nan, np.inf, -np.inf
    arrays = {
        "some": values,
        "none": np.full(250, np.nan, BF16),
        "zero": -np.zeros(3, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    stats = {row.name: row.stats for row in inspect(save("a", arrays), stats=True).tensors}
    for name, array in arrays.items():
        check_stats(stats[name], array.astype(np.float64))
    assert stats["zero"].zeros == 3
    assert stats["some"].infs == 48


def test_a_small_spread_far_from_zero(save):
    values = 1e6 + np.random.default_rng(0).normal(size=5000)
    check_stats(inspect(save("a", {"w": values}), stats=True).stats, values)


def test_shards_and_headers_alone(make_directory):
    directory, _, arrays = make_directory("tied", "bfloat16", 3)
    inventory = inspect(directory)
    assert inventory.files == 3
    assert inventory.stats is None
    assert all(row.stats is None for row in inventory.tensors)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert {row.name: row.file for row in inventory.tensors} == index["weight_map"]
    assert (
        inventory.bytes
        == index["metadata"]["total_size"]
        == sum(array.nbytes for array in arrays.values())
    )


# ---------------------------------------------------------------- difference


def naive(a: np.ndarray, b: np.ndarray, base: np.ndarray | None = None) -> dict[str, object]:
    x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    larger = np.maximum(abs(x), abs(y))
    out = {
        "same": int((x == y).sum()),  # no NaN and no -0.0 in these
        "max_abs": abs(x - y).max(),
        "max_rel": (abs(x - y)[larger > 0] / larger[larger > 0]).max(initial=0),
        "cosine": cosine(x, y),
        "zeros_a": (x == 0).mean(),
        "zeros_b": (y == 0).mean(),
        "task_cosine": None,
        "kept_a": None,
        "kept_b": None,
    }
    if base is not None:
        z = base.astype(np.float64).reshape(-1)
        out |= {
            "task_cosine": cosine(x - z, y - z),
            "kept_a": (x == z).mean(),
            "kept_b": (y == z).mean(),
        }
    return out


def check(numbers, expected):
    assert numbers.nonfinite == 0
    for name, value in expected.items():
        close(getattr(numbers, name), value)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_differences(save, dtype, with_base):
    base = random(dtype, 0)
    a, b = changed(base, 1), changed(base, 2)
    result = difference(save("a", a), save("b", b), save("base", base) if with_base else None)
    assert not result.equal
    for pair in result.pairs:
        check(
            pair.numbers, naive(a[pair.name], b[pair.name], base[pair.name] if with_base else None)
        )
        assert pair.equal == (a[pair.name].tobytes() == b[pair.name].tobytes())
    both = [flat({name: arrays[name] for name in SHAPES}) for arrays in (a, b, base)]
    check(result.total, naive(*both) if with_base else naive(*both[:2]))
    assert (result.only_a, result.only_b, result.not_in_base) == ((), (), ())


def test_a_checkpoint_equals_itself_and_its_shards(make_directory):
    directory, _, _ = make_directory("untied", "bfloat16", 3)
    single, *_ = make_directory("untied", "bfloat16", 1)
    result = difference(directory, single, single)
    assert result.equal
    assert result.total.same == result.total.elements
    assert (result.total.max_abs, result.total.max_rel, result.total.cosine) == (0.0, 0.0, 1.0)
    assert (result.total.kept_a, result.total.kept_b, result.total.task_cosine) == (1.0, 1.0, None)


def test_other_dtypes_compare_by_value(save):
    wide = random("float32")
    narrow = {name: array.astype(BF16) for name, array in wide.items()}
    result = difference(save("a", wide), save("b", narrow), save("base", wide))
    for pair in result.pairs:
        assert not pair.equal
        assert (pair.dtype_a, pair.dtype_b) == ("float32", "bfloat16")
        check(pair.numbers, naive(wide[pair.name], narrow[pair.name], wide[pair.name]))
    assert result.total.kept_a == 1.0
    assert 0.1 < result.total.kept_b < 0.5


def test_shapes_and_names_that_differ(save):
    a = {
        "both": np.ones(3, np.float32),
        "shape": np.ones((2, 3), np.float32),
        "a": np.ones(1, np.float32),
    }
    b = {
        "both": np.ones(3, np.float32),
        "shape": np.ones((3, 2), np.float32),
        "b": np.ones(1, np.float32),
    }
    result = difference(save("a", a), save("b", b), save("base", {"both": np.ones(3, np.float32)}))
    assert (result.only_a, result.only_b, result.not_in_base) == (("a",), ("b",), ("shape",))
    pairs = {pair.name: pair for pair in result.pairs}
    assert pairs["both"].equal
    assert not pairs["shape"].equal
    assert pairs["shape"].numbers is None
    assert (pairs["shape"].shape_a, pairs["shape"].shape_b) == ((2, 3), (3, 2))
    assert result.total.elements == 3
    assert not result.equal


def test_nothing_in_common(save):
    result = difference(save("a", {"x": np.ones(2)}), save("b", {"y": np.ones(2)}))
    assert (result.pairs, result.total, result.equal) == ((), None, False)


def test_an_unrelated_base_is_refused(save):
    with pytest.raises(UserError, match="has none of the tensors"):
        difference(
            save("a", {"x": np.ones(2)}), save("b", {"x": np.ones(2)}), save("c", {"x": np.ones(3)})
        )


def test_tensors_without_elements(save):
    a, b = {"x": np.zeros((0, 2), np.float32)}, {"x": np.zeros((0, 2), np.float16)}
    assert difference(save("a", a), save("a2", a)).equal
    assert not difference(save("a", a), save("b", b)).equal


@pytest.mark.parametrize("with_base", [True, False])
def test_elements_that_are_not_numbers_are_counted_and_left_out(save, with_base):
    base = random("float32")["matrix"]
    a, b = base + np.float32(0.5), base * np.float32(2)
    a[0, :3], b[0, 2:5], b[30, 1] = np.nan, np.inf, np.nan
    a[1, 1] = b[1, 1] = np.nan
    total = difference(
        save("a", {"w": a}), save("b", {"w": b}), save("base", {"w": base}) if with_base else None
    ).total
    finite = np.isfinite(a) & np.isfinite(b)
    expected = naive(a[finite], b[finite], base[finite] if with_base else None)
    assert total.nonfinite == 7
    assert total.same == (a.view(np.uint32) == b.view(np.uint32)).sum()
    for name in ("max_abs", "max_rel", "cosine", "task_cosine"):
        close(getattr(total, name), expected[name])


def test_equal_bits_are_equal_for_any_value(save):
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0], np.float32)
    assert difference(save("a", {"w": values}), save("b", {"w": values.copy()})).equal
    signs = difference(save("c", {"w": np.zeros(2)}), save("d", {"w": -np.zeros(2)}))
    assert not signs.equal
    assert (signs.total.same, signs.total.max_abs, signs.total.max_rel, signs.total.cosine) == (
        0,
        0.0,
        0.0,
        None,
    )


def test_the_ends_of_the_range(save):
    for size in (1e-300, 1e300, 5e-324, 1.7e308):
        a, b = np.array([size, size]), np.array([size, -size])
        total = difference(save("a", {"w": a}), save("b", {"w": b})).total
        assert total.cosine in (0.0, None)
        assert total.max_rel > 0.99


def test_opposite_vectors(save):
    a = np.random.default_rng(0).normal(size=999)
    assert difference(save("a", {"w": a}), save("b", {"w": -a})).total.cosine == -1.0


def test_threads_do_not_change_the_numbers(save, monkeypatch):
    a, b = save("a", random("float32", 0)), save("b", random("float32", 1))
    first = difference(a, b), inspect(a, stats=True)
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 7)
    assert (difference(a, b), inspect(a, stats=True)) == first


# ---------------------------------------------------------------- tables and JSON


def lines(table) -> str:
    tables.show(table, file := io.StringIO())
    return file.getvalue()


def test_tables_name_what_differs(save):
    base = random(BF16)
    a, b = changed(base, 1), changed(base, 2)
    a["vector"] = b["vector"]
    b |= {"[bold]\x1b[31m": np.ones(1), "scalar": np.ones(2)}
    text = lines(
        tables.difference_table(difference(save("a", a), save("b", b), save("base", base)))
    )
    assert "vector" not in text
    assert "[bold]?[31m" in text
    assert "bfloat16 | float64, scalar | 2" in text
    assert "cosine of a-base, b-base" in text
    assert "1 tensor not in the base" in text
    assert "all 4 in both" in text
    text = lines(tables.inspect_table(inspect(save("a", a), stats=True)))
    assert "37 x 41" in text
    assert "4 tensors" in text
    assert "1,524" in text


def test_json_has_every_pair_and_no_nan(save):
    a, b = random("float64"), random("float64", 1)
    a["vector"][:] = 1.7e308  # the squares overflow
    b["vector"][:] = -1.7e308
    for value in (
        tables.difference_json(
            difference(save("a", a), save("b", b), save("base", random("float64", 2)))
        ),
        tables.inspect_json(inspect(save("a", a), stats=True)),
    ):
        assert json.loads(json.dumps(value, allow_nan=False)) == value
    document = tables.difference_json(difference(save("a", a), save("a", a)))
    assert document["equal"] is True
    assert [pair["name"] for pair in document["pairs"]] == list(inspect_names(save("a", a)))
    assert document["pairs"][0]["numbers"]["cosine"] == 1.0


def inspect_names(path):
    return (row.name for row in inspect(path).tensors)


def test_a_difference_is_equal_only_without_leftovers():
    assert Difference((), (), (), (), None).equal
    assert not Difference((), (), ("b",), (), None).equal
