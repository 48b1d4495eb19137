"""What training minimizes.

It is a sum over examples, so that any cut of a batch into microbatches has the same gradient.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from jax_ordermerge import config
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.data.pack import SEQUENCES
from jax_ordermerge.model import llama, lora, loss, preference
from jax_ordermerge.model.kernels import Kernel
from jax_ordermerge.model.layers import Form
from jax_ordermerge.train.spec import TrainingSpec
from jax_ordermerge.tree import Tree

Microbatch = Mapping[str, jax.Array]


class ExampleSums(NamedTuple):
    """Sums per example, float32[B], or [B, S] of packed rows; 0 on padding.

    The loss of a batch is `losses.sum() / weights.sum()`.

    Attributes:
        losses: nats of the response tokens of the example, or the loss of its pair.
        weights: number of its response tokens, or 1 for a pair.
        scores: other quantities by name; their means over examples are logged.
    """

    losses: jax.Array
    weights: jax.Array
    scores: dict[str, jax.Array] | None = None


class Objective(Protocol):
    """A sum over a microbatch that is minimized by changing `params`, and the sums per example."""

    def __call__(
        self, params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        """Return the sum and the sums per example.

        Args:
            params: what is trained.
            batch: a microbatch.
            frozen: what all members share unchanged (the base), if the objective needs it.
        """


def sft(
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    remat: llama.Remat = "dots",
    kernel: Kernel = "xla",
    form: Form = "flat",
) -> Objective:
    """Return the supervised objective: the loss of the response tokens, summed over a microbatch.

    Args:
        model: the architecture.
        dtype: dtype of the matmuls.
        remat: what is recomputed in the backward pass.
        kernel: attention kernel.
        form: of the program, from `layers.choose_form`.

    Returns:
        An objective of the parameters of a model. A microbatch holds `tokens, targets, positions,
        segments` int32[B, T] and `weights` float32[B, T], 1 where the target belongs to the
        response. Where it holds `ids` int32[B, S], up to S examples share a row.

    Example:
        >>> import jax.numpy as jnp
        >>> model = ModelConfig(
        ...     vocab_size=4, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2
        ... )
        >>> zeros = jax.tree.map(jnp.zeros_like, llama.init_params(model, 0))
        >>> rows = jnp.zeros((2, 3), int)
        >>> batch = {
        ...     "tokens": rows,
        ...     "targets": rows,
        ...     "positions": rows,
        ...     "segments": rows + 1,
        ...     "weights": jnp.ones((2, 3)),
        ... }
        >>> total, sums = sft(model, dtype="float32")(zeros, batch)
        >>> round(total.item(), 4), sums.weights.tolist()  # 6 log 4
        (8.3178, [3.0, 3.0])
    """

    hidden = functools.partial(
        llama.hidden, model, dtype=dtype, remat=remat, kernel=kernel, form=form
    )

    def objective(
        params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        inputs = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = hidden(params, *inputs)
        # From the last hidden states and the head, in blocks: the logits of a batch [B, T, V] would
        # be the largest array of the step.
        targets, weights = batch["targets"], batch["weights"]
        # in packed rows the segments say which example a token belongs to
        packed = "ids" in batch and batch["ids"].ndim > 1
        segments, count = (batch["segments"], batch["ids"].shape[1]) if packed else (None, 0)
        total, sums = loss.linear_losses(
            x,
            llama.head(model, params),
            targets,
            weights,
            segments_BT=segments,
            count=count,
            softcap=model.logit_softcap,
            form=form,
        )
        return total, ExampleSums(sums, loss.by_example(weights, segments, count))

    return objective


def dpo(
    model: ModelConfig,
    settings: config.Dpo,
    *,
    dtype: DTypeLike,
    remat: llama.Remat = "dots",
    kernel: Kernel = "xla",
    form: Form = "flat",
) -> Objective:
    """Return the objective of direct preference optimization: losses of pairs, summed.

    Args:
        model: the architecture.
        settings: see `preference.pair_losses`.
        dtype, remat, kernel, form: as in `sft`.

    Returns:
        `(params, microbatch) -> (sum of losses, sums per pair)`, with the `scores` of
        `preference.scores`. A microbatch holds the arrays of `sft` as [B, 2, T], the chosen
        response before the rejected one, and `reference` float32[B, 2], the log-probabilities of
        both responses under the base.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_ordermerge import config
        >>> model = ModelConfig(
        ...     vocab_size=4, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2
        ... )
        >>> zeros = jax.tree.map(jnp.zeros_like, llama.init_params(model, 0))
        >>> rows = jnp.zeros((1, 2, 3), int)
        >>> batch = {
        ...     "tokens": rows,
        ...     "targets": rows,
        ...     "positions": rows,
        ...     "segments": rows + 1,
        ...     "weights": jnp.ones((1, 2, 3)),
        ... }
        >>> batch["reference"] = jnp.full((1, 2), -3 * jnp.log(4))
        >>> settings = config.Dpo()
        >>> total, sums = dpo(model, settings, dtype="float32")(zeros, batch)
        >>> round(total.item(), 4), sums.weights.tolist()  # log 2
        (0.6931, [1.0])
        >>> sums.scores["rewards/margins"].tolist()
        [0.0]
    """

    hidden = functools.partial(
        llama.hidden, model, dtype=dtype, remat=remat, kernel=kernel, form=form
    )
    sum_losses = functools.partial(loss.linear_losses, softcap=model.logit_softcap, form=form)

    def objective(
        params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        # The loss of a pair is a function f(s_chosen, s_rejected) of two sums over tokens. Its
        # gradient is that of these sums with the constant factors df/ds, the weights with which the
        # token losses are then differentiated. The price is one more matmul with the head;
        # `jax.grad` of the plain formula would keep the logits of both responses.
        flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in SEQUENCES}
        inputs = flat["tokens"], flat["positions"], flat["segments"]
        x, _ = hidden(params, *inputs)
        head, weights, reference = llama.head(model, params), flat["weights"], batch["reference"]
        _, sums = sum_losses(*jax.lax.stop_gradient((x, head)), flat["targets"], weights)
        logps, tokens = -sums.reshape(-1, 2), weights.sum(-1).reshape(-1, 2)
        real = (tokens.sum(-1) > 0).astype(sums.dtype)  # 0 for a pair of padding

        def pairs(logps: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses = real * preference.pair_losses(logps, reference, tokens, settings)
            return losses.sum(), losses

        slopes, losses = jax.grad(pairs, has_aux=True)(logps)
        total, _ = sum_losses(x, head, flat["targets"], weights * -slopes.reshape(-1, 1))
        scores = preference.scores(logps, reference, beta=settings.beta)
        # `total` has the gradient of the loss, but another value; the constant gives it its value
        value = total + jax.lax.stop_gradient(losses.sum() - total)
        return value, ExampleSums(losses, real, scores)

    return objective


def adapted(objective: Objective, scale: float) -> Objective:
    """Return an objective of the adapters of a model from one of its parameters.

    Args:
        objective: takes the parameters of the base with the adapter in them.
        scale: scale of the adapters, see `lora.join`.

    Returns:
        An objective whose `params` are the adapters and whose `frozen` is the base.
    """

    def over_adapters(
        params: Tree, batch: Microbatch, frozen: Tree | None = None
    ) -> tuple[jax.Array, ExampleSums]:
        # The base is an input and no constant of the program: all members share one copy of it.
        return objective(lora.join(frozen or {}, params, scale), batch, frozen)

    return over_adapters


def build(
    spec: TrainingSpec, model: ModelConfig, kernel: Kernel = "xla", form: Form = "flat"
) -> Objective:
    """Return the objective of a training, its attention by a kernel."""
    dtype, remat = spec.model.compute_dtype, spec.model.remat
    if spec.objective.kind == "dpo":
        return dpo(model, spec.objective, dtype=dtype, remat=remat, kernel=kernel, form=form)
    return sft(model, dtype=dtype, remat=remat, kernel=kernel, form=form)
