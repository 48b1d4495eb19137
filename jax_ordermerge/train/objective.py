"""What training minimizes, as a sum, so that any split of a batch into microbatches has the same gradient."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.model import llama, lora, loss
from jax_ordermerge.model.kernels import Kernel
from jax_ordermerge.tree import Tree

Microbatch = Mapping[str, jax.Array]


class ExampleSums(NamedTuple):
    """Sums over the response tokens of each example, float32[B], or [B, S] of packed rows; 0 on padding.

    Attributes:
        losses: summed token losses in nats.
        tokens: number of tokens.
    """

    losses: jax.Array
    tokens: jax.Array


class Objective(Protocol):
    """A sum over a microbatch that is minimized by changing `params`, and the sums of each example."""

    def __call__(self, params: Tree, batch: Microbatch, frozen: Tree | None = None) -> tuple[jax.Array, ExampleSums]:
        """Args: what is trained; a microbatch; what all members share as it is (the base), if the objective needs it."""


def sft(config: ModelConfig, *, dtype: DTypeLike, remat: llama.Remat = "dots", kernel: Kernel = "xla") -> Objective:
    """Return the supervised objective: the loss of the response tokens, summed over a microbatch.

    Args:
        config: the model.
        dtype: of the products.
        remat: what is recomputed in the backward pass.
        kernel: of attention.

    Returns:
        An objective of the parameters of a model. A microbatch holds `tokens, targets, positions, segments`
        int32[B, T] and `weights` float32[B, T], 1 where the target belongs to the response. `ids` int32[B, S], if they are there, say
        that up to S examples share a row.

    Example:
        >>> import jax.numpy as jnp
        >>> config = ModelConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
        >>> zeros = jax.tree.map(jnp.zeros_like, llama.init_params(config, 0))
        >>> rows = jnp.zeros((2, 3), int)
        >>> batch = {"tokens": rows, "targets": rows, "positions": rows, "segments": rows + 1, "weights": jnp.ones((2, 3))}
        >>> total, sums = sft(config, dtype="float32")(zeros, batch)
        >>> round(total.item(), 4), sums.tokens.tolist()  # 6 log 4
        (8.3178, [3.0, 3.0])
    """

    def objective(params: Tree, batch: Microbatch, frozen: Tree | None = None) -> tuple[jax.Array, ExampleSums]:
        where = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = llama.hidden(config, params, *where, dtype=dtype, remat=remat, kernel=kernel)
        targets, weights = batch["targets"], batch["weights"]
        packed = "ids" in batch and batch["ids"].ndim > 1
        segments, count = (batch["segments"], batch["ids"].shape[1]) if packed else (None, 0)
        total, sums = loss.linear_losses(x, llama.head(config, params), targets, weights, segments_BT=segments, count=count)
        return total, ExampleSums(sums, loss.by_example(weights, segments, count))

    return objective


def adapted(objective: Objective, scale: float) -> Objective:
    """Return an objective of the adapters of a model from one of its parameters; the base is `frozen`.

    Args:
        objective: takes the base with the adapter in it, and the base alone as `frozen`.
        scale: of the adapters, see `lora.join`.
    """

    def over_adapters(params: Tree, batch: Microbatch, frozen: Tree | None = None) -> tuple[jax.Array, ExampleSums]:
        return objective(lora.join(frozen or {}, params, scale), batch, frozen)

    return over_adapters
