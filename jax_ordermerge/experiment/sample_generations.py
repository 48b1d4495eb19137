"""The members' answers to fixed prompts while they are trained."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Config
from jax_ordermerge.data import chat
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.formats import Record
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import harness
from jax_ordermerge.model import lora
from jax_ordermerge.tree import Tree


def sampler(
    config: Config, model: ModelConfig, tokenizer: Any, mesh: Mesh, splits: dict[str, Examples]
) -> Callable[[Tree, Tree], dict[str, Any]] | None:
    """Return `(what members have for themselves, what they share) -> {"prompts", "texts"}`, or None where nothing is asked.

    `texts` holds for each member its greedy answers to the prompts. The weights are read and not changed.

    Args:
        config: of the run; `samples` says what is asked.
        model: the architecture.
        tokenizer: of the base.
        mesh: where the weights are.
        splits: where the prompts come from that the config does not give.

    Raises:
        UserError: there is nothing to ask, or a prompt is too long.
    """
    settings = config.samples
    if settings.every is None:
        return None
    prompts, tokens = _asked(config, tokenizer, splits)
    longest = max(map(len, tokens))
    if longest + settings.max_new_tokens > model.max_position_embeddings:
        raise UserError(
            f"samples: a prompt of {longest} tokens and samples.max_new_tokens = {settings.max_new_tokens} exceed the context of"
            f" {model.max_position_embeddings}; shorten the prompt or lower samples.max_new_tokens"
        )
    dense = (
        jax.jit(jax.vmap(functools.partial(lora.dense, scale=lora.scale(config.lora)), (None, 0)))
        if config.lora
        else None
    )

    def sample(own: Tree, shared: Tree) -> dict[str, Any]:
        population = dense(shared, own) if dense else own
        writers = harness.generators(
            model,
            population,
            tokenizer,
            batch=len(tokens),
            dtype=config.model.compute_dtype,
            mesh=mesh,
        )
        texts = [
            [text.strip() for text in write(tokens, settings.max_new_tokens)] for write in writers
        ]
        return {"prompts": prompts, "texts": texts}

    return sample


def _asked(
    config: Config, tokenizer: Any, splits: dict[str, Examples]
) -> tuple[list[str], list[list[int]]]:
    """Return the prompts as text and as tokens."""
    if config.samples.prompts:
        template = splits["train"].sources.get("template", "plain")
        records = [Record.asked(prompt) for prompt in config.samples.prompts]
        return list(config.samples.prompts), [
            chat.prompt_tokens(one, template, tokenizer).tolist() for one in records
        ]
    held = splits.get("validation") or splits.get("test")
    if held is None or not held.prompts:
        raise UserError(
            "samples.every is set and there is nothing to ask: give samples.prompts, or data with held-out prompts"
        )
    rows = range(min(config.samples.count, len(held)))
    return [held.prompts[row] for row in rows], [held.prompt(row).tolist() for row in rows]
