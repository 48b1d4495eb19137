"""What training minimizes, as a sum, so that any split of a batch into microbatches has the same gradient."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from jax_ordermerge import config as schema
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.data.pack import SEQUENCES
from jax_ordermerge.model import llama, lora, loss, preference
from jax_ordermerge.model.kernels import Kernel
from jax_ordermerge.tree import Tree

Microbatch = Mapping[str, jax.Array]


class ExampleSums(NamedTuple):
    """What an objective says of each example, float32[B], or [B, S] of packed rows; 0 on padding.

    The loss of a batch is `losses.sum() / weights.sum()`.

    Attributes:
        losses: summed over what the example is made of: nats of its response tokens, or the loss of its pair.
        weights: how much that is: number of tokens, or 1.
        scores: what else is watched, by name; means over examples are logged.
    """

    losses: jax.Array
    weights: jax.Array
    scores: dict[str, jax.Array] | None = None


class Objective(Protocol):
    """A sum over a microbatch that is minimized by changing `params`, and the sums of each example."""

    def __call__(
        self, params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        """Args: what is trained; a microbatch; what all members share as it is (the base), if the objective needs it."""


def sft(
    config: ModelConfig, *, dtype: DTypeLike, remat: llama.Remat = "dots", kernel: Kernel = "xla"
) -> Objective:
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
        >>> config = ModelConfig(
        ...     vocab_size=4, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2
        ... )
        >>> zeros = jax.tree.map(jnp.zeros_like, llama.init_params(config, 0))
        >>> rows = jnp.zeros((2, 3), int)
        >>> batch = {
        ...     "tokens": rows,
        ...     "targets": rows,
        ...     "positions": rows,
        ...     "segments": rows + 1,
        ...     "weights": jnp.ones((2, 3)),
        ... }
        >>> total, sums = sft(config, dtype="float32")(zeros, batch)
        >>> round(total.item(), 4), sums.weights.tolist()  # 6 log 4
        (8.3178, [3.0, 3.0])
    """

    def objective(
        params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        where = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = llama.hidden(config, params, *where, dtype=dtype, remat=remat, kernel=kernel)
        targets, weights = batch["targets"], batch["weights"]
        packed = "ids" in batch and batch["ids"].ndim > 1
        segments, count = (batch["segments"], batch["ids"].shape[1]) if packed else (None, 0)
        total, sums = loss.linear_losses(
            x, llama.head(config, params), targets, weights, segments_BT=segments, count=count
        )
        return total, ExampleSums(sums, loss.by_example(weights, segments, count))

    return objective


def dpo(
    config: ModelConfig,
    settings: schema.Objective,
    *,
    dtype: DTypeLike,
    remat: llama.Remat = "dots",
    kernel: Kernel = "xla",
) -> Objective:
    """Return the objective of direct preference optimization: the losses of pairs, summed over a microbatch.

    The loss of a pair depends on two sums over tokens, so its gradient is that of these sums with constant factors: the sums are
    made first, and the factors of the loss at them are the weights with which the token losses are then differentiated. Logits of
    all tokens never exist at once, as in `sft`, for one more product with the head.

    Args:
        config: the model.
        settings: see `preference.pair_losses`.
        dtype, remat, kernel: as in `sft`.

    Returns:
        `(params, microbatch) -> (sum of losses, sums of each pair)`, with the `scores` of `preference.scores`. A microbatch holds the
        arrays of `sft` as [B, 2, T], the chosen response before the rejected one, and `reference` float32[B, 2], the log-probabilities
        of both responses under the base.

    Example:
        >>> import jax.numpy as jnp
        >>> config = ModelConfig(
        ...     vocab_size=4, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2
        ... )
        >>> zeros = jax.tree.map(jnp.zeros_like, llama.init_params(config, 0))
        >>> rows = jnp.zeros((1, 2, 3), int)
        >>> batch = {
        ...     "tokens": rows,
        ...     "targets": rows,
        ...     "positions": rows,
        ...     "segments": rows + 1,
        ...     "weights": jnp.ones((1, 2, 3)),
        ... }
        >>> batch["reference"] = jnp.full((1, 2), -3 * jnp.log(4))
        >>> total, sums = dpo(config, schema.Objective(kind="dpo"), dtype="float32")(zeros, batch)
        >>> (
        ...     round(total.item(), 4),
        ...     sums.weights.tolist(),
        ...     sums.scores["rewards/margins"].tolist(),
        ... )  # log 2
        (0.6931, [1.0], [0.0])
    """

    def objective(
        params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in SEQUENCES}
        where = flat["tokens"], flat["positions"], flat["segments"]
        x, _ = llama.hidden(config, params, *where, dtype=dtype, remat=remat, kernel=kernel)
        head, weights, reference = llama.head(config, params), flat["weights"], batch["reference"]
        _, sums = loss.linear_losses(*jax.lax.stop_gradient((x, head)), flat["targets"], weights)
        logps, tokens = -sums.reshape(-1, 2), weights.sum(-1).reshape(-1, 2)
        real = (tokens.sum(-1) > 0).astype(sums.dtype)

        def pairs(logps: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses = real * preference.pair_losses(logps, reference, tokens, settings)
            return losses.sum(), losses

        slopes, losses = jax.grad(pairs, has_aux=True)(logps)
        total, _ = loss.linear_losses(x, head, flat["targets"], weights * -slopes.reshape(-1, 1))
        scores = preference.scores(logps, reference, beta=settings.beta)
        return total + jax.lax.stop_gradient(losses.sum() - total), ExampleSums(
            losses, real, scores
        )

    return objective


def adapted(objective: Objective, scale: float) -> Objective:
    """Return an objective of the adapters of a model from one of its parameters; the base is `frozen`.

    Args:
        objective: takes the base with the adapter in it, and the base alone as `frozen`.
        scale: of the adapters, see `lora.join`.
    """

    def over_adapters(
        params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        return objective(lora.join(frozen or {}, params, scale), batch, frozen)

    return over_adapters


def build(config: schema.Config, model: ModelConfig, kernel: Kernel = "xla") -> Objective:
    """Return the objective of a config, its attention by a kernel."""
    dtype, remat = config.model.compute_dtype, config.model.remat
    if config.objective.kind == "dpo":
        return dpo(model, config.objective, dtype=dtype, remat=remat, kernel=kernel)
    return sft(model, dtype=dtype, remat=remat, kernel=kernel)
