"""Text generators: functions that continue tokenized prompts with one model, or with several."""

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode
from jax_ordermerge.evaluate.eval_model import TextGenerator
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling
from jax_ordermerge.tree import Tree, size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (prompts, max_new_tokens, sampling, names). Names belong to it: other names draw other tokens.
_Request: TypeAlias = tuple[
    tuple[tuple[int, ...], ...], int, Sampling, tuple[str | int, ...] | None
]


def make_generator(
    config: ModelConfig,
    params: Tree,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch: int,
    dtype: str,
) -> TextGenerator:
    """Return the generator of one model.

    Args:
        config: the model.
        params: its parameters.
        tokenizer: of the model; special tokens are left out of the texts.
        batch: rows of a program.
        dtype: of the products, `"float32"` or `"bfloat16"`.

    Raises:
        UserError: the model names no end-of-sequence token. The generator raises NotFiniteError.
    """
    continue_tokens = functools.partial(
        decode.generate,
        config,
        params,
        eos_ids=_eos_ids(config, tokenizer),
        dtype=dtype,
        batch=batch,
    )

    def generate(
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        names: Sequence[str | int] | None = None,
    ) -> list[str]:
        rows = continue_tokens(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, names=names
        )
        return _decode_texts(tokenizer, rows)

    return generate


def make_generators(
    config: ModelConfig,
    population: Tree,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch: int,
    dtype: str,
    mesh: Mesh | None = None,
) -> list[TextGenerator]:
    """Return a generator for each of several models that generate in one program.

    The first generator that gets a request generates for all models. The others then return their
    texts of the same request from memory, as long as the generators live.

    Args:
        config: the model.
        population: parameters with a leading member axis, see `decode.generate_members`.
        tokenizer, batch, dtype: see `make_generator`.
        mesh: where the parameters are; None is that of `jax.set_mesh`.

    Raises:
        UserError: the model names no end-of-sequence token.
    """
    continue_tokens = functools.partial(
        decode.generate_members,
        config,
        population,
        eos_ids=_eos_ids(config, tokenizer),
        dtype=dtype,
        batch=batch,
    )
    rows: dict[_Request, list[list[list[int] | None]]] = {}

    def generate(
        member: int,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        names: Sequence[str | int] | None = None,
    ) -> list[str]:
        request: _Request = (
            tuple(map(tuple, prompts)),
            max_new_tokens,
            sampling,
            None if names is None else tuple(names),
        )
        # All processes get the same requests in the same order, so all of them generate here or
        # none does.
        if request not in rows:
            # A generator may be called outside of the mesh context that its parameters need.
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                rows[request] = continue_tokens(
                    prompts, max_new_tokens=max_new_tokens, sampling=sampling, names=names
                )
        # Checked member by member: an error names the model whose logits are not finite.
        return _decode_texts(tokenizer, decode.require_finite(rows[request][member]))

    # The models are evaluated one after another, but generate at the first call: this list is what
    # lets a task treat each as a single model.
    return [functools.partial(generate, member) for member in range(size(population))]


def _decode_texts(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[list[int]]) -> list[str]:
    # special tokens would stand in answers that are compared as text
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _eos_ids(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    # A config may name several, e.g. one for turns of a chat; a tokenizer names one. Servers stop
    # at either, and a fine-tune with another tool may have changed that of the tokenizer alone.
    ids = dict.fromkeys((*config.eos_token_ids, tokenizer.eos_token_id))
    ids.pop(None, None)
    if not ids:
        raise UserError(
            "neither config.json nor the tokenizer names an end-of-sequence token; generation "
            "could not stop"
        )
    return tuple(ids)
