"""Files made to break the reader: it reads the bytes of the file, or refuses in one printable line.

Hundreds of damaged headers and indexes, the same in every run. What the reader accepts the
safetensors library must accept too, with the same bytes.
"""

import copy
import json
import pathlib
import time
import tracemalloc
from typing import Any

import hypothesis
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.checkpoint.shards import INDEX, SINGLE
from jax_ordermerge.errors import UserError

MANY = hypothesis.settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
SLACK, TIMES = 1 << 20, 12  # memory: a MiB for Python itself, and so many times the files
SECONDS = 30.0
DATA = bytes(range(64))
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
    "d": {"dtype": "I8", "shape": [31, 1], "data_offsets": [33, 64]},
    "e": {"dtype": "F64", "shape": [0, 5], "data_offsets": [64, 64]},
}
NASTY = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "a\nb",
    "a\r\nerror: b",
    "\x00",
    "a\x00b",
    "\x1b[31mred",
    "\x7f",
    "\u2028",
    "\u202etxt",
    "\ud800",
    "a\udcff",
    "\ufeff",
    "é",
    "e\u0301",
    "🦙",
    "n" * 5000,
    "__metadata__",
    "a",
    "b",
    "__proto__",
    "%s%n",
    "{0}",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    INDEX,
    SINGLE,
    "config.json",
    "n" * 255 + ".safetensors",
]
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    8,
    24,
    32,
    64,
    65,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    2**64 + 24,
    10**40,
    10**4000,
    -(2**63),
    0.0,
    24.0,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]
DTYPES = [
    "F32",
    "BF16",
    "F16",
    "F64",
    "U8",
    "I8",
    "BOOL",
    "I64",
    "U64",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
    "f32",
    "float32",
    "",
    "F32 ",
]


def written(header: object, data: bytes = DATA, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def check(directory: pathlib.Path) -> str:
    """Read all tensors and return ""; return the message if the directory is refused."""
    allowed = SLACK + TIMES * sum(file.stat().st_size for file in directory.iterdir())
    tracemalloc.start()
    began = time.perf_counter()
    try:
        reader = Reader(directory)
        tensors = {name: (reader.info(name), reader.read(name)) for name in reader.names}
        parts = [
            reader.read_slice(name, (slice(1, 2),))
            for name in reader.names
            if reader.info(name).shape
        ]
    except UserError as error:
        message = str(error)
        assert 0 < len(message) < 600
        assert message.isprintable()
        assert directory.name in message
        return message
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= allowed
        assert time.perf_counter() - began < SECONDS
    assert all(
        part.size <= tensors[name][1].size
        for part, name in zip(parts, (n for n in tensors if tensors[n][0].shape), strict=True)
    )
    same_as_the_library(directory, tensors)
    return ""


def same_as_the_library(directory: pathlib.Path, tensors: dict[str, Any]) -> None:
    theirs: dict[str, Any] = {}
    index = directory / INDEX
    files = (
        set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {SINGLE}
    )
    for file in files:
        theirs |= dict(safetensors.deserialize((directory / file).read_bytes()))
    assert tensors.keys() == theirs.keys()
    for name, (info, array) in tensors.items():
        assert array.shape == info.shape == tuple(theirs[name]["shape"])
        assert array.dtype == info.dtype
        assert array.tobytes() == bytes(theirs[name]["data"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("hostile")


def check_single(folder: pathlib.Path, content: bytes) -> str:
    (folder / SINGLE).write_bytes(content)
    return check(folder)


# ---------------------------------------------------------------- wrong headers

PATHS = [
    (name, key)
    for name in HEADER
    if name != "__metadata__"
    for key in ("dtype", "shape", "data_offsets")
]
JSON = st.recursive(
    st.sampled_from([None, True, False, *NUMBERS, *NASTY, *DTYPES])
    | st.integers(-(2**70), 2**70)
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=40) | st.dictionaries(st.sampled_from(NASTY), inner, max_size=4)
    ),
    max_leaves=8,
)
LISTS = st.lists(st.sampled_from(NUMBERS) | st.integers(-2, 70), max_size=4)
SLIDES = st.tuples(st.integers(-70, 70), st.integers(-70, 70))


@st.composite
def wrong_headers(draw: st.DrawFn) -> bytes:
    """A valid header with one to three wrong values."""
    header = copy.deepcopy(HEADER)
    twice = b""
    for _ in range(draw(st.integers(1, 3))):
        name, key = draw(st.sampled_from(PATHS))
        entry = header.get(name)
        kind = draw(
            st.sampled_from(
                [
                    "value",
                    "list",
                    "slide",
                    "dtype",
                    "name",
                    "swap",
                    "entry",
                    "extra",
                    "twice",
                    "metadata",
                    "drop",
                ]
            )
        )
        if kind == "metadata":
            header["__metadata__"] = draw(JSON)
        elif kind == "twice":
            twice = json.dumps({draw(st.sampled_from(NASTY)): HEADER["e"]}).encode()[1:-1] + b", "
        elif kind == "entry":
            header[name] = draw(JSON)
        elif kind == "drop":
            header.pop(name, None)
        elif kind == "name":
            header[draw(st.sampled_from(NASTY))] = header.pop(name, HEADER["e"])
        elif not isinstance(entry, dict):
            continue
        elif kind == "value":
            entry[key] = draw(JSON)
        elif kind == "list":
            entry[draw(st.sampled_from(["shape", "data_offsets"]))] = draw(LISTS)
        elif kind == "slide" and entry.get("data_offsets") == HEADER[name]["data_offsets"]:
            entry["data_offsets"] = [
                a + b for a, b in zip(entry["data_offsets"], draw(SLIDES), strict=True)
            ]
        elif kind == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif kind == "swap" and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = entry["data_offsets"][::-1]
        elif kind == "extra":
            entry[draw(st.sampled_from(NASTY))] = draw(JSON)
    return (
        b"{"
        + twice
        + json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")[1:]
    )


@MANY
@hypothesis.given(text=wrong_headers())
def test_wrong_headers(folder, text):
    check_single(folder, written(text))


@MANY
@hypothesis.given(
    text=st.just(json.dumps(HEADER).encode()) | wrong_headers(),
    length=st.integers(-8, 80)
    | st.sampled_from([2**20, 10**8, 10**8 + 1, 2**31, 2**40, 2**63, 2**64]),
    data=st.integers(-5, 5),
)
def test_wrong_lengths(folder, text, length, data):
    content = written(
        text,
        DATA[: 64 + min(data, 0)] + bytes(max(data, 0)),
        length=min(max(0, len(text) + length), 2**64 - 1),
    )
    check_single(folder, content)


# ---------------------------------------------------------------- damage

FLIPS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 7) | st.integers(1, 255)),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, flips: list[tuple[int, int]], cut: int, inserted: bytes) -> bytes:
    out = bytearray(content)
    for place, change in flips:
        out[place % len(out)] ^= change
    place = flips[0][0] % len(out)
    return bytes(out[:place] + inserted + out[place:])[: max(0, len(out) - cut)]


@MANY
@hypothesis.given(
    flips=FLIPS, cut=st.just(0) | st.integers(0, 600), inserted=st.just(b"") | st.binary(max_size=9)
)
def test_flipped_cut_and_inserted_bytes(folder, flips, cut, inserted):
    check_single(folder, damaged(written(HEADER), flips, cut, inserted))


@MANY
@hypothesis.given(
    digits=st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from(b'0123456789-+.eE,:[]{}"\\u \t')),
        min_size=1,
        max_size=3,
    )
)
def test_other_characters_in_the_header(folder, digits):
    text = bytearray(json.dumps(HEADER).encode())
    for place, character in digits:
        text[place % len(text)] = character
    check_single(folder, written(bytes(text)))


# ---------------------------------------------------------------- indexes

FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEXED = {
    "metadata": {"total_size": 40},
    "weight_map": {"a": FILES[0], "b": FILES[0], "c": FILES[1], "d": FILES[1]},
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("sharded")
    arrays = {name: np.arange(1, 6, dtype=np.float32) * ord(name) for name in "abcd"}
    for file, names in zip(FILES, ("ab", "cd"), strict=True):
        safetensors.numpy.save_file({name: arrays[name] for name in names}, directory / file)
    (directory / "config.json").write_text("{}")
    (directory.parent / "outside.safetensors").write_bytes((directory / FILES[0]).read_bytes())
    return directory


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """A valid index with one to three wrong values."""
    index = copy.deepcopy(INDEXED)
    twice = b""
    for _ in range(draw(st.integers(1, 3))):
        places, name, nasty = (
            index.get("weight_map"),
            draw(st.sampled_from("abcd")),
            draw(st.sampled_from(NASTY)),
        )
        kind = draw(
            st.sampled_from(
                [
                    "file",
                    "outside",
                    "name",
                    "more",
                    "exchange",
                    "twice",
                    "drop",
                    "metadata",
                    "value",
                    "map",
                    "all",
                ]
            )
        )
        if kind == "all":
            index = draw(JSON)
        elif kind == "twice":
            twice = b'"weight_map": ' + json.dumps(draw(JSON)).encode() + b", "
        if not isinstance(index, dict):
            break
        if kind in ("map", "metadata"):
            index["weight_map" if kind == "map" else "metadata"] = draw(JSON)
        elif not isinstance(places, dict):
            continue
        elif kind == "file":
            places[name] = nasty
        elif kind == "outside":
            places[name] = draw(
                st.sampled_from(
                    [
                        "../outside.safetensors",
                        f"./{FILES[0]}",
                        f"x/../{FILES[0]}",
                        f"{FILES[0]}/",
                        "/proc/self/mem",
                    ]
                )
            )
        elif kind == "name":
            places[nasty] = places.pop(name, FILES[0])
        elif kind == "more":
            places[nasty] = draw(st.sampled_from(FILES))
        elif kind == "value":
            places[name] = draw(JSON)
        elif kind == "exchange":
            places["a"], places["c"] = places.get("c", FILES[1]), places.get("a", FILES[0])
        elif kind == "drop":
            places.pop(name, None)
    text = json.dumps(index).encode()
    return b"{" + twice + text[1:] if isinstance(index, dict) and index else text


@MANY
@hypothesis.given(text=indexes())
def test_wrong_indexes(sharded, text):
    (sharded / INDEX).write_bytes(text)
    check(sharded)


@MANY
@hypothesis.given(
    flips=FLIPS, cut=st.just(0) | st.integers(0, 200), inserted=st.just(b"") | st.binary(max_size=9)
)
def test_damaged_indexes(sharded, flips, cut, inserted):
    (sharded / INDEX).write_bytes(damaged(json.dumps(INDEXED).encode(), flips, cut, inserted))
    check(sharded)


# Extremes, one by one.
HUGE = {
    "a shape of terabytes": {
        "a": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    },
    "a shape beyond any array": {
        "a": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}
    },
    "sizes that wrap around to the right one": {
        "a": {"dtype": "U8", "shape": [2**32 + 8, 2**32], "data_offsets": [0, 64]}
    },
    "too many axes": {"a": {"dtype": "U8", "shape": [1] * 65 + [64], "data_offsets": [0, 64]}},
    "a shape of many numbers": {
        "a": {"dtype": "U8", "shape": [1] * 100_000, "data_offsets": [0, 64]}
    },
    "a name of a megabyte": {"n" * 10**6: {"dtype": "U8", "shape": [1], "data_offsets": [0, 64]}},
    "a dtype of a megabyte": {"a": {"dtype": "\n" * 10**6, "shape": [64], "data_offsets": [0, 64]}},
    "the same name": b'{"' + b"\\n" * 10**5 + b'":0,"' + b"\\n" * 10**5 + b'":0}',
    "an integer of 5000 digits": b'{"a":{"dtype":"U8","shape":['
    + b"9" * 5000
    + b'],"data_offsets":[0,64]}}',
    "a float of 100,000 digits": b'{"a":{"dtype":"U8","shape":[0.'
    + b"1" * 100_000
    + b'],"data_offsets":[0,64]}}',
    "deep lists": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a mark of the byte order": b"\xef\xbb\xbf" + json.dumps(HEADER).encode(),
    "UTF-16": json.dumps(HEADER).encode("utf-16-le"),
    "half a surrogate pair": {"\ud800": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}},
    "a second object": json.dumps(HEADER).encode() + b"{}",
}


@pytest.mark.parametrize("case", HUGE)
def test_extremes_are_refused(folder, case):
    assert check_single(folder, written(HUGE[case]))


def test_the_untouched_files_are_read(folder, sharded):
    assert check_single(folder, written(HEADER)) == ""
    assert check_single(folder, written(json.dumps(HEADER).encode() + b" " * 5)) == ""
    (sharded / INDEX).write_text(json.dumps(INDEXED))
    assert check(sharded) == ""


@pytest.mark.parametrize("name", NASTY)
def test_names_that_strings_allow_are_read(folder, name):
    header = {name: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}
    message = check_single(folder, written(json.dumps(header).encode()))
    assert bool(message) == (name in ("__metadata__", "\ud800", "a\udcff"))


@pytest.mark.parametrize("name", [name for name in NASTY if name not in FILES])
def test_shards_that_no_index_may_name(sharded, name):
    index = copy.deepcopy(INDEXED)
    index["weight_map"]["a"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    assert check(sharded)


def test_an_index_of_many_names_is_quick(sharded):
    names = {f"tensor.{i}": FILES[i % 2] for i in range(50_000)}
    (sharded / INDEX).write_text(json.dumps({"weight_map": names}))
    assert "disagree" in check(sharded)
