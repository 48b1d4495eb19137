"""The reader refuses broken files in one line; the safetensors library reads written ones."""

import json
import os
import pathlib
import stat
import weakref

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from jax_ordermerge import arch
from jax_ordermerge.checkpoint.safetensors import Reader, cast, write
from jax_ordermerge.errors import UserError

TINY = arch.ModelConfig(
    vocab_size=6,
    hidden_size=4,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    eos_token_ids=(2, 3),
)


def library_read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(file, "np") as handle:
            assert handle.metadata() == {"format": "pt"}
            names = handle.keys()
            out |= {name: handle.get_tensor(name) for name in names}
    return out


def header_file(path: pathlib.Path, header: object, data: bytes = b"") -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def values(config: arch.ModelConfig = TINY):
    generator = np.random.default_rng(0)
    return [
        (name, generator.normal(size=spec.hf_shape).astype(np.float32))
        for name, spec, _ in arch.hf_tensors(config)
    ]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_files_of_the_library(make_directory, dtype, shards):
    directory, _, arrays = make_directory("untied", dtype, shards)
    reader = Reader(directory)
    assert set(reader.names) == set(arrays)
    assert reader.config["dtype"] == dtype
    for name, array in arrays.items():
        assert reader.info(name) == (array.dtype, array.shape)
        assert reader.read(name).tobytes() == array.tobytes()
        assert not reader.read(name).flags.writeable
        part = (slice(1, 3), *([slice(None)] * (array.ndim - 1)))
        assert reader.read_slice(name, part).tobytes() == array[part].tobytes()


def test_all_dtypes_and_empty_tensors(tmp_path):
    kinds = [
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    ]
    arrays = {kind: np.arange(5).astype(kind) for kind in kinds}
    arrays |= {
        "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    reader = Reader(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        assert reader.read(name).dtype == array.dtype
        np.testing.assert_array_equal(reader.read(name), array)


def test_names_are_in_file_order(tmp_path):
    header = {"late": entry(offsets=(8, 16)), "early": entry(offsets=(0, 8))}
    assert Reader(header_file(tmp_path / "a.safetensors", header, bytes(16))).names == (
        "early",
        "late",
    )


BROKEN = {
    "overlap": (
        {"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))},
        12,
        "begins at byte 4 of the data, expected 8",
    ),
    "gap": ({"a": entry(offsets=(4, 12))}, 12, "begins at byte 4 of the data, expected 0"),
    "size": ({"a": entry(shape=(3,))}, 8, "needs 12 bytes"),
    "truncated": ({"a": entry()}, 7, "is truncated: 8 bytes of tensors expected, 7 present"),
    "longer": ({"a": entry()}, 9, "has bytes after the last tensor"),
    "dtype": ({"a": entry(dtype="F4")}, 8, "dtype 'F4', which is not supported"),
    "negative": ({"a": entry(shape=(-2,))}, 8, "lists of numbers from 0"),
    "boolean": ({"a": entry(shape=(True, 2))}, 8, "lists of numbers from 0"),
    "huge": ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, 0, "no array can have"),
    "fields": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "exactly dtype, shape and data_offsets"),
    "list": ([1], 0, "not a JSON object"),
    "metadata": ({"__metadata__": {"format": 1}}, 0, "strings to strings"),
    "duplicate": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}',
        0,
        "occurs twice",
    ),
    "json": (b'{"a":', 0, "not valid JSON"),
    "deep": (b"[" * 5000, 0, "not valid JSON"),
    "newline": ({"a\nb": entry(shape=(3,))}, 8, "a b F32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_in_one_line(tmp_path, case):
    header, size, text = BROKEN[case]
    path = header_file(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(UserError) as caught:
        Reader(path)
    assert text in str(caught.value)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"abc", bytes(8), (2**40).to_bytes(8, "little") + b"{}", b"\xff" * 20]
)
def test_files_without_a_header_are_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.safetensors is truncated or not a safetensors file"):
        Reader(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "Q4"]) | JSON}
    | {key: st.lists(st.integers(-1, 9), max_size=3) | JSON for key in ("shape", "data_offsets")}
)
HEADERS = st.dictionaries(st.text(max_size=6), ENTRIES | JSON, max_size=3).map(
    lambda h: json.dumps(h).encode()
)


@hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    header=HEADERS | st.binary(max_size=60), data=st.binary(max_size=24), cut=st.integers(0, 80)
)
def test_any_header_is_read_or_refused(tmp_path_factory, header, data, cut):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    header_file(path, header, data)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut] if cut < 40 else content)
    check_read_or_refused(path)


@hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
@hypothesis.given(place=st.integers(0, 199), byte=st.integers(0, 255), cut=st.integers(0, 3))
def test_any_damage_is_read_or_refused(tmp_path_factory, place, byte, cut):
    path = tmp_path_factory.getbasetemp() / "damage.safetensors"
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8)}, path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(bytes(content[: len(content) - cut]))
    check_read_or_refused(path)


def check_read_or_refused(path: pathlib.Path) -> None:
    problem = ""
    try:
        reader = Reader(path)
    except UserError as error:
        problem = str(error)
    if problem:
        assert path.name in problem
        assert problem.isprintable()
        return
    for name in reader.names:
        assert reader.read(name).shape == reader.info(name).shape
        reader.read(name).tobytes()


def test_missing_paths(tmp_path):
    with pytest.raises(UserError, match="nowhere not found"):
        Reader(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .*it has no safetensors"):
        Reader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model\.bin; ordermerge convert .* --allow-bin"):
        Reader(tmp_path)


def test_truncated_shard_is_named(make_directory):
    directory, *_ = make_directory(shards=3)
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is truncated"):
        Reader(directory)


def test_absent_shard_is_named(make_directory):
    directory, *_ = make_directory(shards=3)
    (directory / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"names the shard model-00003-of-00003\.safetensors, which is absent"
    ):
        Reader(directory)


def test_single_file_beside_shards_is_refused(make_directory):
    directory, *_ = make_directory(shards=2)
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"both model\.safetensors and an index with shards"):
        Reader(directory)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: m.pop("model.norm.weight"),
            "model.norm.weight is not placed there by the index",
        ),
        (lambda m: m.update(more="model-00001-of-00002.safetensors"), "more is not in it"),
        (lambda m: m.update(more="../x.safetensors"), "not the plain name of a file"),
        (lambda m: m.update(more=3), "must name the file of each tensor"),
        (lambda m: m.clear(), "must name the file of each tensor"),
    ],
)
def test_index_and_headers_must_agree(make_directory, change, text):
    directory, *_ = make_directory(shards=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        Reader(directory)
    assert text in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_broken_json_files(make_directory, content):
    directory, *_ = make_directory(shards=2)
    (directory / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        Reader(directory)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 300, 1])
def test_the_library_reads_written_files(tmp_path, dtype, shard_bytes):
    target = tmp_path / "deep" / "out"
    tensors = values()
    write(target, reversed(tensors), config=TINY, dtype=dtype, shard_bytes=shard_bytes)
    stored = library_read(target)
    assert set(stored) == {name for name, _ in tensors}
    for name, array in tensors:
        expected = array.astype(np.dtype(dtype))
        assert stored[name].dtype == expected.dtype
        assert stored[name].tobytes() == expected.tobytes()
    files = sorted(p.name for p in target.glob("*.safetensors*"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"]
        == sum(a.size for _, a in tensors) * np.dtype(dtype).itemsize
    )
    shards = len(files) - 1
    assert set(index["weight_map"].values()) == {
        f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)
    }
    assert list(index["weight_map"]) == list(Reader(target).names)
    assert shards == len(tensors) if shard_bytes == 1 else 1 < shards < len(tensors)


def test_shards_stay_within_the_bound(tmp_path):
    write(tmp_path / "out", values(), config=TINY, dtype="float32", shard_bytes=300)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert sum(a.nbytes for a in safetensors.numpy.load_file(file).values()) <= 300


def test_arrays_that_are_not_contiguous(tmp_path):
    arrays = dict(values())
    strided = {
        name: np.asfortranarray(a) if a.ndim == 2 else np.stack([a, a], axis=1)[:, 0]
        for name, a in arrays.items()
    }
    assert not any(a.flags.c_contiguous for a in strided.values())
    write(tmp_path / "out", strided.items(), config=TINY, dtype="float32")
    for name, array in library_read(tmp_path / "out").items():
        np.testing.assert_array_equal(array, arrays[name])


def test_casts_round_to_nearest_even():
    # halfway between two bfloat16 values: the even one wins, in both directions
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000], np.uint32).view(np.float32)
    assert cast(halves, "bfloat16").view(np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF82]


def test_overflow_of_float16_is_refused(tmp_path):
    tensors = values()
    tensors[0][1][0, 0] = 70000.0
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight has values that overflow float16"
    ):
        write(tmp_path / "out", tensors, config=TINY, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref[np.ndarray]] = []

    def tensors():
        for name, spec, _ in arch.hf_tensors(TINY):
            assert all(ref() is None for ref in alive), f"a tensor before {name} is still in memory"
            array = np.ones(spec.hf_shape, np.float32)
            alive.append(weakref.ref(array))
            pair = [(name, array)]
            del array
            yield pair.pop()

    write(tmp_path / "out", tensors(), config=TINY, dtype="bfloat16")
    assert len(alive) == len(list(arch.hf_tensors(TINY)))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_midway_leaves_nothing(tmp_path, error):
    def broken():
        yield from values()[:5]
        assert any("out.partial-" in p.name for p in tmp_path.iterdir())
        assert not (tmp_path / "out").exists()
        raise error

    with pytest.raises(error):
        write(tmp_path / "out", broken(), config=TINY, dtype="float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v: v[:-1], r"lm_head\.weight was not given \(1 of 21"),
        (lambda v: [*v, v[0]], "given twice"),
        (lambda v: [("other", v[0][1])], "other is not part of the model"),
        (lambda v: [(v[0][0], v[0][1].T)], r"has shape \(4, 6\), expected \(6, 4\)"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, change, text):
    with pytest.raises(ValueError, match=text):
        write(tmp_path / "out", change(values()), config=TINY, dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_target_that_is_not_empty_is_refused(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    write(target, values(), config=TINY, dtype="float32")  # an empty directory is fine
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(UserError, match="out is not empty"):
        write(target, values(), config=TINY, dtype="bfloat16")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file"):
        write(tmp_path / "file", values(), config=TINY, dtype="float32")


def test_modes_follow_the_umask_and_leftovers_go(tmp_path):
    (tmp_path / "out.partial-0123abcd").mkdir()
    (tmp_path / "out.partial-of-someone").mkdir()
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", values(), config=TINY, dtype="float32")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o640}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial-of-someone"]


def test_same_input_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, values(), config=TINY, dtype="bfloat16", shard_bytes=300)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second
