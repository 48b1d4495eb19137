"""A digest of a model, by which a run notices that the files of its base were exchanged."""

import hashlib
import json
from pathlib import Path

import numpy as np

from jax_ordermerge.checkpoint.safetensors import Reader

_DIGESTED = 2**15  # elements of each tensor that enter the digest


def model_digest(directory: Path, *, with_tensors: bool = True) -> str:
    """Return a SHA-256 of a model: its config, and name, shape, dtype and head of every tensor.

    Two models are told apart by the first elements of their tensors. All bytes would be safer, but
    every start of a run would read hundreds of gigabytes.

    Args:
        directory: a Hugging Face directory.
        with_tensors: whether the tensors count; of a base that is drawn at random none is read.
    """
    architecture = json.loads((directory / "config.json").read_text())
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    if with_tensors:
        reader = Reader(directory)
        for name in sorted(reader.names):
            info = reader.info(name)
            # whole rows from the start of a tensor are one contiguous read per file
            rows = max(1, _DIGESTED * info.shape[0] // max(1, int(np.prod(info.shape))))
            index = (slice(0, rows), *[slice(None)] * (len(info.shape) - 1))
            first = np.ascontiguousarray(reader.read_slice(name, index))
            digest.update(f"{name} {info.dtype} {info.shape}".encode() + first.tobytes())
    return digest.hexdigest()
