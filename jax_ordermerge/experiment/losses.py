"""Losses of a model, or of a population as one model, on the examples of a run."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_ordermerge.config import Dpo
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import scoring
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.model import kernels, preference
from jax_ordermerge.tree import Tree


class Losses(NamedTuple):
    """Losses by example, float64[n]; of the sequences of preference pairs float64[n, 2].

    Attributes:
        sums: summed over the response tokens, in nats; of a pair its loss.
        counts: what the sums are divided by: response tokens, or 1 per pair.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Mean loss of each example."""
        return self.sums / self.counts

    @property
    def mean(self) -> float:
        """Loss per token over all examples, as training has it: long examples weigh more."""
        # a ratio of sums, and no mean of means
        return float(self.sums.sum() / self.counts.sum())

    def by_source(self, examples: Examples) -> Json | None:
        """Return loss, its standard error and the number of examples by source.

        None where all examples are of one source.
        """
        sources = examples.rows_by_source
        if len(sources) < 2:
            return None
        parts = {name: Losses(self.sums[rows], self.counts[rows]) for name, rows in sources.items()}
        return {
            name: {"loss": part.mean, "loss_se": part.standard_error, "examples": len(part.sums)}
            for name, part in parts.items()
        }

    @property
    def standard_error(self) -> float | None:
        """Standard error of `mean` as a ratio estimator with whole examples as sampling unit.

        None, undefined, for one example.
        """
        # Tokens of one example are not independent draws, examples are. The variance is that of
        # the residuals s_i - m c_i, with n / (n - 1) because m is estimated from the same examples.
        n, total = len(self.sums), self.counts.sum()
        if n < 2:
            return None
        mean = self.sums.sum() / total
        residuals = self.sums - mean * self.counts
        return float(math.sqrt((residuals**2).sum() * n / (n - 1)) / total)


def require_finite(losses: Losses, examples: Examples, model: str) -> Losses:
    """Return the losses of a model, all of which are finite.

    Raises:
        UserError: with the model, the number and the first of the examples whose loss is not.
    """
    # One NaN makes every mean NaN, which JSON does not hold; a comparison with it is always false.
    broken = np.flatnonzero(~np.isfinite(losses.sums).reshape(len(losses.sums), -1).all(1))
    if broken.size:
        raise UserError(
            f"{model}: the losses of {broken.size} of {len(losses.sums)} examples are NaN or "
            f"infinite, first that of example {examples.ids[broken[0]]}; its weights hold NaN or "
            "infinity, or overflow: check how it was made"
        )
    return losses


def example_losses(
    ctx: RunContext,
    params: Tree,
    examples: Examples,
    members: Literal["each", "ensemble"] = "each",
) -> Losses:
    """Return the losses of one model on examples, by the objective of the run.

    Args:
        ctx: of the run.
        params: of the model; with `members="ensemble"` of a population, whose logits are averaged.
        examples: of any split; pairs need their reference log-probabilities.
        members: how a population is treated.
    """
    # two steps, because an evaluation of pairs needs the losses of both responses as well
    sequences = sequence_losses(ctx, params, examples, members=members)
    return objective_losses(ctx, examples, sequences)


def sequence_losses(
    ctx: RunContext,
    params: Tree,
    examples: Examples,
    *,
    members: Literal["each", "ensemble"] = "each",
    on_progress: Callable[[int], None] | None = None,
) -> Losses:
    """Return the cross-entropy of every response: shape [n], or [n, 2] for preference pairs.

    Args:
        ctx, params, members: see `example_losses`.
        examples: need no reference log-probabilities.
        on_progress: receives the number of sequences that are done.
    """
    config, sequences = ctx.config, examples.sequences
    dtype = config.model.compute_dtype
    sums, counts = scoring.losses(
        ctx.model,
        params,
        sequences,
        batch=config.analysis.batch,
        lengths=pack.bucket_lengths(sequences.longest, config.data.buckets),
        dtype=dtype,
        mesh=ctx.mesh,
        kernel=kernels.choose(config.model.attention, ctx.model, ctx.mesh, dtype=dtype),
        members=members,
        on_progress=on_progress,
    )
    # Row 0: one model, or an ensemble, is a population of one. Sums over a data set are taken in
    # float64 from here on, so that their order does not show in the digits that are reported.
    shape = (-1,) if examples.rejected is None else (-1, 2)
    return Losses(
        sums[0].astype(np.float64).reshape(shape), counts.astype(np.float64).reshape(shape)
    )


def objective_losses(ctx: RunContext, examples: Examples, sequences: Losses) -> Losses:
    """Return the losses that the objective defines, from the cross-entropy of the responses."""
    if examples.rejected is None:
        return sequences
    objective = ctx.config.objective
    assert isinstance(objective, Dpo)  # no other objective has pairs
    assert examples.reference is not None
    losses = preference.pair_losses(
        jnp.asarray(-sequences.sums),
        jnp.asarray(examples.reference),
        jnp.asarray(sequences.counts),
        objective,
    )
    return Losses(np.asarray(losses).astype(np.float64), examples.loss_counts)
