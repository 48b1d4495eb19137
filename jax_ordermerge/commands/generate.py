"""Completion of prompts by one model."""

from collections.abc import Sequence

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.data import tokenizers
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import generation
from jax_ordermerge.evaluate.eval_model import NotFiniteError, encode
from jax_ordermerge.evaluate.sampling import Sampling

_BATCH = 8  # prompts per program; a caller with thousands uses `ordermerge evaluate`


def complete(
    model: str, prompts: Sequence[str], *, max_new_tokens: int, dtype: str, sampling: Sampling
) -> list[str]:
    """Return one completion per prompt.

    Args:
        model: directory, hub name or `embedded:NAME`.
        prompts: texts; the tokenizer puts its first tokens before them.
        max_new_tokens: largest number of tokens per completion.
        dtype: of the products, float32 or bfloat16.
        sampling: how tokens are chosen. Draws depend on the number of the prompt, not on the batch.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected float32 or bfloat16")
    directory = convert.resolve(model)
    tokenizer = tokenizers.load_tokenizer(directory)
    # float32 in memory, whatever the files have; `dtype` is that of the products alone
    config, params = convert.load_params(directory)
    generate = generation.make_generator(config, params, tokenizer, batch=_BATCH, dtype=dtype)
    try:
        return generate([encode(tokenizer, text) for text in prompts], max_new_tokens, sampling)
    except NotFiniteError as error:
        raise error.named(model=model) from error
