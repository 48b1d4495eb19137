"""A digest of the base model, by which a run notices that its files were exchanged."""

import hashlib
import json
from pathlib import Path

import numpy as np

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import Config

_DIGESTED = 2**15  # elements of each tensor that enter the digest


def base_digest(config: Config, base_dir: Path) -> str:
    """Return a SHA-256 of a base: its config, and name, shape, dtype and head of every tensor.

    Two bases are told apart by the first elements of their tensors. All bytes would be safer, but
    every start of a run would read hundreds of gigabytes.
    """
    architecture = json.loads((base_dir / "config.json").read_text())
    head = json.dumps([architecture, config.model.init, config.seed], sort_keys=True)
    digest = hashlib.sha256(head.encode())
    # of a random base no tensor is read, and there need be none
    if config.model.init == "pretrained":
        reader = Reader(base_dir)
        for name in sorted(reader.names):
            info = reader.info(name)
            # whole rows from the start of a tensor are one contiguous read per file
            rows = max(1, _DIGESTED * info.shape[0] // max(1, int(np.prod(info.shape))))
            index = (slice(0, rows), *[slice(None)] * (len(info.shape) - 1))
            first = np.ascontiguousarray(reader.read_slice(name, index))
            digest.update(f"{name} {info.dtype} {info.shape}".encode() + first.tobytes())
    return digest.hexdigest()
