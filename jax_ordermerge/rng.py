"""Random streams by name: every key of the package comes from `stream`."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax


def stream_key_bits(seed: int, *names: str | int) -> np.ndarray:
    """Return the 64 key bits of a named stream as two words, on the host.

    Args:
        seed: any Python integer.
        names: purpose of the stream, from coarse to fine, e.g. `("merge", "select", hf_name)`.

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
    # A hash, not arithmetic on seeds: `seed + epoch` makes streams of neighbouring seeds meet. Type
    # and length go in with each part, so that neither ("a", "bc") and ("ab", "c") nor 1 and "1"
    # collide.
    digest = hashlib.blake2b(digest_size=8, person=b"ordermerge")
    for part in (seed, *names):
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"a stream is named by strings and integers, got {part!r}")
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return np.frombuffer(digest.digest(), dtype="<u4").astype(np.uint32)


def stream(seed: int, *names: str | int) -> "jax.Array":
    """Return the key of a named stream, a scalar key array; see `stream_key_bits`.

    Args:
        seed: any Python integer.
        names: purpose of the stream, from coarse to fine, e.g. `"merge", "select", hf_name`.

    Returns:
        A key of `jax.random`, shape [].

    Raises:
        TypeError: a name is neither a string nor an integer.

    Example:
        >>> key = stream(0, "init", "model.norm.weight")
        >>> key.shape
        ()
    """
    import jax  # orders and previews of data need the bits alone
    import jax.numpy as jnp

    # threefry explicitly, not the default implementation: its bits depend neither on the backend
    # nor on the sharding of the array that is drawn
    return jax.random.wrap_key_data(jnp.asarray(stream_key_bits(seed, *names)), impl="threefry2x32")
