"""Choice of the next token: greedy, or drawn by name. Logits in, token ids out."""

import dataclasses
from collections.abc import Sequence
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge import rng
from jax_ordermerge.config.evaluation import SMALLEST_TEMPERATURE
from jax_ordermerge.errors import UserError

_OVERFLOWS: Final = 1e-30  # logits divided by less may be beyond float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the choice of tokens. The default is greedy.

    Attributes:
        temperature: logits are divided by it; 0, and what is below `SMALLEST_TEMPERATURE`, is
            greedy.
        top_k: draw among so many of the most likely tokens; None is all.
        top_p: then among the fewest most likely tokens whose probabilities reach this sum; None
            is all.
        seed: of the draws, see `row_key_bits`.

    Raises:
        UserError: a value is outside its range, or restricts draws where nothing is drawn.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).top_k is None
        True
        >>> Sampling(temperature=1.0, top_k=0)
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: top_k = 0 must be at least 1; leave it out for no limit
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the values."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature = {self.temperature} is not a finite number of at least 0; "
                "0 is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be at least 1; leave it out for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p = {self.top_p} must be above 0 and at most 1; leave it out for no limit"
            )
        # Ignoring them would look like a draw that happens to be greedy.
        for name in ("top_k", "top_p"):
            if self.is_greedy and getattr(self, name) is not None:
                raise UserError(
                    f"{name} = {getattr(self, name)} chooses among drawn tokens, temperature ="
                    f" {self.temperature:g} draws none; give a temperature above 0"
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < SMALLEST_TEMPERATURE


GREEDY = Sampling()


def row_key_bits(seed: int, names: Sequence[str | int]) -> np.ndarray:
    """Return the key bits of each row, uint32[B, 2], a function of the seed and the row's name.

    The key is not that of the place of a row in its batch: a row then draws the same tokens
    whatever the other rows, the batch size and the mesh are.

    Example:
        >>> row_key_bits(0, ["a", 1]).shape
        (2, 2)
    """
    return np.stack([rng.stream_key_bits(seed, "generate", name) for name in names])


def next_token(
    logits_BV: jax.Array, key_bits_B2: jax.Array, step: jax.Array | int, sampling: Sampling
) -> jax.Array:
    """Return the next token of each row, int32[B].

    A draw is the argmax of the logits with Gumbel noise, one number per token of the vocabulary.
    The noise depends on the row's key and the step alone, not on the sharding of the arrays.

    Args:
        logits_BV: float32.
        key_bits_B2: from `row_key_bits`; not read where nothing is drawn.
        step: number of tokens that the row has already.
        sampling: static under `jax.jit`.

    Example:
        >>> logits, key_bits = jnp.log(jnp.array([[0.1, 0.6, 0.3]] * 4)), row_key_bits(0, range(4))
        >>> next_token(logits, key_bits, 0, GREEDY).tolist()
        [1, 1, 1, 1]
        >>> next_token(logits, key_bits, 0, Sampling(temperature=1.0, top_p=0.5)).tolist()
        [1, 1, 1, 1]

    Source: Holtzman et al., "The curious case of neural text degeneration", 2020,
    https://arxiv.org/abs/1904.09751 (top_p).
    """
    # Static, so that a greedy program draws no noise.
    if sampling.is_greedy:
        return _argmax(logits_BV)
    if sampling.temperature < _OVERFLOWS:
        # the largest becomes 0, and the others at most -inf; else several would become inf
        logits_BV -= logits_BV.max(-1, keepdims=True)
    scaled_BV = logits_BV / jnp.float32(sampling.temperature)
    masked_BV = mask_unlikely(scaled_BV, sampling.top_k, sampling.top_p)

    def noise(key_bits: jax.Array) -> jax.Array:
        # threefry by name: the default implementation may differ between configurations.
        key = jax.random.fold_in(jax.random.wrap_key_data(key_bits, impl="threefry2x32"), step)
        return jax.random.gumbel(key, logits_BV.shape[-1:], jnp.float32)

    # Gumbel-max: argmax(logits + noise) is a sample of softmax(logits), without normalizing.
    return _argmax(masked_BV + jax.vmap(noise)(jnp.asarray(key_bits_B2)))


def mask_unlikely(logits_BV: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Return the logits with -inf on tokens that are not drawn.

    Tokens as likely as the last drawn one are drawn too, so that no order among ties matters.

    Example:
        >>> logits = jnp.log(jnp.array([[0.1, 0.5, 0.4]]))
        >>> jnp.isfinite(mask_unlikely(logits, None, 0.8)).tolist()
        [[False, True, True]]
    """
    V = logits_BV.shape[-1]
    # top_k first, as in transformers: top_p then sums the probabilities of those tokens alone.
    if top_k is not None and top_k < V:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p is not None and top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        shares_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
        # The last token whose predecessors stay below the sum is the one that reaches it.
        count_B1 = (before_BV < top_p).sum(-1, keepdims=True)
        least_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def _argmax(x_BV: jax.Array) -> jax.Array:
    # The first of the largest, as jnp.argmax. In two steps, because XLA on CPUs takes 30 times as
    # long for an argmax as for a max: a max per chunk, then an argmax of the few maxima and one
    # inside of the best chunk. Over [V, B], as the product with the head gives it there: rows side
    # by side fill vectors.
    B, V = x_BV.shape
    chunk = 128
    x_CcB = jnp.pad(x_BV.T, ((0, -V % chunk), (0, 0)), constant_values=-jnp.inf).reshape(
        -1, chunk, B
    )
    chunk_B = jnp.argmax(x_CcB.max(1), axis=0)
    offset_B = jnp.argmax(jnp.take_along_axis(x_CcB, chunk_B[None, None], axis=0)[0], axis=0)
    return (chunk_B * chunk + offset_B).astype(jnp.int32)
