"""What several processes read by rows is what one process reads by slices, and each byte once."""

import json
import math
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from jax_ordermerge import arch, tree
from jax_ordermerge.checkpoint import convert, exchange
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.mesh import make_mesh, partition
from jax_ordermerge.mesh_shape import AXES

# 25 and 40 rows: divided over 8 devices with a rest, and over an axis of 2 or 4 or not at all
ODD = arch.ModelConfig(
    family="qwen2",
    vocab_size=25,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    qkv_bias=True,
)
LLAMA_70B = arch.ModelConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return a model of random values over many magnitudes, with denormals."""
    directory = tmp_path_factory.mktemp("odd")
    generator = np.random.default_rng(3)
    arrays = {}
    for name, spec, _ in arch.hf_tensors(ODD):
        exponents = generator.integers(-42, 30, size=spec.hf_shape)
        values = generator.normal(size=spec.hf_shape) * 10.0**exponents
        arrays[name] = values.astype(np.float32).astype("bfloat16")
    safetensors.numpy.save_file(arrays, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(ODD.to_hf("bfloat16")))
    return directory


def counted(monkeypatch):
    """Return a list that receives the bytes of each positional read."""
    sizes: list[int] = []
    preadv = os.preadv

    def read(handle, buffers, offset):
        count = preadv(handle, buffers, offset)
        sizes.append(count)
        return count

    monkeypatch.setattr(os, "preadv", read)
    return sizes


@pytest.mark.parametrize(
    ("sizes", "members", "dtype"),
    [
        ({"order": 2, "fsdp": 2, "tensor": 2}, 4, "float32"),
        ({"fsdp": 2, "tensor": 4}, None, "bfloat16"),
        ({"tensor": 2, "data": 2, "sequence": 2}, 1, "float16"),
    ],
)
def test_the_bits_are_those_of_slices(directory, monkeypatch, sizes, members, dtype):
    mesh = make_mesh(**sizes)
    with np.errstate(over="ignore"):  # values up to 1e30 in float16
        expected = convert.load_params(directory, mesh, members=members, dtype=dtype)[1]
        abstract = tree.flatten(convert.abstract_params(ODD, mesh, members=members, dtype=dtype))
        reader = Reader(directory, read_ahead=False)
        read = counted(monkeypatch)
        arrays = {
            spec.path: convert.read_by_rows(reader, spec, abstract[spec.path])
            for spec in arch.tensor_table(ODD)
        }
    for path, array in tree.flatten(expected).items():
        assert array.sharding == arrays[path].sharding, path
        assert array.dtype == arrays[path].dtype
        for ours, theirs in zip(
            arrays[path].addressable_shards, array.addressable_shards, strict=True
        ):
            assert np.asarray(ours.data).tobytes() == np.asarray(theirs.data).tobytes(), path
    stored = sum(math.prod(reader.info(name).shape) * 2 for name in reader.names)
    assert sum(read) == stored
    # no device read a whole matrix
    assert max(read) <= 25 * 16 * 2 // 2


@pytest.mark.parametrize(
    "sizes", [(1, 1, 512, 1, 1), (2, 2, 16, 1, 8), (4, 1, 16, 2, 4), (1, 1, 64, 1, 8)]
)
def test_rows_of_a_70b_model_are_read_by_one_device_each(sizes):
    mesh = jax.sharding.AbstractMesh(sizes, AXES)
    for spec in arch.tensor_table(LLAMA_70B):
        shape, axes = spec.hf_shape, spec.axes[1:] if spec.stacked else spec.axes
        staging = exchange.stage(shape, partition(axes, shape, mesh), mesh)
        assert staging.groups * staging.pieces == mesh.size
        rows = [row for device in range(mesh.size) for row in range(*staging.rows(device))]
        assert rows == list(range(shape[0])), spec.path
        # evenly: a process is not to read more than its share, but for the rest of a division
        assert staging.padded <= -(-shape[0] // mesh.size) + 1, spec.path
