"""Greedy answers of the members to fixed prompts while they are trained."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Config
from jax_ordermerge.data import chat, prompt_format
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.tokenizers import Tokenizer
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode, generation
from jax_ordermerge.evaluate.eval_model import NotFiniteError
from jax_ordermerge.json_types import Json
from jax_ordermerge.model import lora
from jax_ordermerge.tree import Tree


class Prompts(NamedTuple):
    """Fixed prompts, as texts and as tokens."""

    texts: list[str]
    tokens: list[list[int]]


def sampler(
    config: Config,
    model: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    splits: Mapping[str, Examples],
) -> Callable[[Tree, Tree], Json] | None:
    """Return `(trained, shared) -> {"prompts", "texts"}`, or None where `samples.every` is null.

    `trained` are the weights of the members, `shared` those of the base that adapters change.
    `texts` holds a list of answers per member. The weights are only read.

    Args:
        config: of the run; its section `samples` holds the settings.
        model: the architecture.
        tokenizer: of the base.
        mesh: where the weights are.
        splits: prompts come from held-out examples unless `samples.prompts` gives them.
    """
    settings = config.samples
    if settings.every is None:
        return None
    prompts = read_prompts(config, model, tokenizer, splits)
    merge_adapters = None
    if config.lora is not None:
        # generation takes dense models; the trained weights stay as they are
        dense = functools.partial(lora.dense, scale=lora.scale(config.lora))
        merge_adapters = jax.jit(jax.vmap(dense, (None, 0)))

    def sample(trained: Tree, shared: Tree) -> Json:
        generators = generation.make_generators(
            model,
            merge_adapters(shared, trained) if merge_adapters else trained,
            tokenizer,
            batch=len(prompts.tokens),  # one batch: the prompts are few
            dtype=config.model.compute_dtype,
            mesh=mesh,
        )
        texts = []
        for number, generate in enumerate(generators):
            try:
                answers = generate(prompts.tokens, settings.max_new_tokens)
            except NotFiniteError as error:
                raise error.named(
                    model=f"samples.every: the training diverged, model {number} of its wave"
                ) from error
            texts.append([text.strip() for text in answers])
        return {"prompts": prompts.texts, "texts": texts}

    return sample


def read_prompts(
    config: Config, model: ModelConfig, tokenizer: Tokenizer, splits: Mapping[str, Examples]
) -> Prompts:
    """Return the prompts of a run: those of the config, else the first held-out ones.

    Raises:
        UserError: there are none, or a prompt and its answer exceed the context.
    """
    # not training examples: the answers are to show what generalizes
    settings = config.samples
    held_out = splits.get("validation") or splits.get("test")
    if settings.prompts:
        # prompts of the config are templated as the training data were, else the members would be
        # asked in a form that they have never seen
        template = prompt_format.served_template(splits["train"]) or "plain"
        records = [Record.single_turn(prompt) for prompt in settings.prompts]
        tokens = [chat.prompt_tokens(record, template, tokenizer).tolist() for record in records]
        prompts = Prompts(list(settings.prompts), tokens)
    elif held_out is not None and held_out.prompts:
        # windows of texts, beside other sources, have no prompts
        with_prompt = [row for row in range(len(held_out)) if held_out.prompt(row).size]
        rows = with_prompt[: settings.count]
        prompts = Prompts(
            [held_out.prompts[row] for row in rows],
            [held_out.prompt(row).tolist() for row in rows],
        )
    else:
        raise UserError(
            "samples.every is set, but there are no prompts: give samples.prompts,"
            " or data with held-out prompts"
        )
    # refused here, since in the loop it would end a training at its first samples
    try:
        decode.check_prompts(model, prompts.tokens, settings.max_new_tokens)
    except UserError as error:
        raise UserError(f"samples.prompts, samples.max_new_tokens: {error}") from error
    return prompts
