"""Randomness by name: every key of the project comes from `stream`."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def stream_key_bits(seed: int, *names: str | int) -> np.ndarray:
    """Return the 64 key bits of a named stream as two words, without touching a device.

    The bits are the first 8 bytes of BLAKE2b over the seed and the names, each written with its type and length, so that
    neither `("a", "bc")` and `("ab", "c")` nor `1` and `"1"` collide, and no arithmetic on seeds can make two streams meet.

    Args:
        seed: any Python integer.
        names: what the stream is for, from coarse to fine, e.g. `("merge", "select", hf_name)`.

    Returns:
        uint32[2].

    Raises:
        TypeError: a name is neither a string nor an integer.

    Example:
        >>> stream_key_bits(0, "order", 1).tolist()
        [424303284, 2451000716]
        >>> (stream_key_bits(0, "a", 1) == stream_key_bits(1, "a", 0)).all()
        np.False_
    """
    digest = hashlib.blake2b(digest_size=8, person=b"ordermerge")
    for part in (seed, *names):
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"a stream is named by strings and integers, got {part!r}")
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return np.frombuffer(digest.digest(), dtype="<u4").astype(np.uint32)


def stream(seed: int, *names: str | int) -> jax.Array:
    """Return the typed threefry key of a named stream (scalar key array). Same rules as `stream_words`.

    Example:
        >>> key = stream(0, "init", "model.norm.weight")
        >>> key.shape
        ()
    """
    # threefry is named outright: its bits do not depend on the backend or on the sharding of what is drawn
    return jax.random.wrap_key_data(jnp.asarray(stream_key_bits(seed, *names)), impl="threefry2x32")
