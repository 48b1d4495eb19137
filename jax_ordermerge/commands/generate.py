"""Completion of prompts by one model."""

from collections.abc import Collection, Sequence
from pathlib import Path

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.data import files, tokenizers
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import generation
from jax_ordermerge.evaluate.eval_model import NotFiniteError, encode
from jax_ordermerge.evaluate.matching import truncate
from jax_ordermerge.evaluate.sampling import Sampling
from jax_ordermerge.layout import Json
from jax_ordermerge.record import refuse_model_of_edited_run

_BATCH = 8  # prompts per program; a caller with thousands uses `ordermerge evaluate`


def read_prompts(prompts: Sequence[str], path: Path | None) -> list[Json]:
    """Return rows with the column `prompt`: the prompts of the command line, or those of a file.

    Args:
        prompts: texts.
        path: `.txt` with a prompt per line, or a file of rows as data sets are (JSON, JSON Lines,
            CSV, Parquet) with the column `prompt`.

    Raises:
        UserError: there are none, there are both, or a row has no prompt.
    """
    if bool(prompts) == (path is not None):
        given = "both are given" if prompts else "neither is given"
        raise UserError(f"prompts come from --prompt TEXT or from --prompts FILE: {given}")
    if path is None:
        return [{"prompt": text} for text in prompts]
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {path} cannot be read: {error}") from error
        rows: list[Json] = [{"prompt": line.rstrip("\r")} for line in lines if line.strip()]
        if not rows:
            raise UserError(f"--prompts {path} holds no line of text; write a prompt per line")
        return rows
    rows = files.load(str(path), "prompts")
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise UserError(
                f"--prompts {path}: row {number} has no text in the column prompt, its columns are "
                f"{', '.join(map(str, row))}"
            )
        if "completion" in row:
            raise UserError(
                f"--prompts {path}: row {number} has a column completion already; rename it"
            )
    return rows


def check_stops(stops: Sequence[str]) -> Sequence[str]:
    """Return the texts that end a completion.

    Raises:
        UserError: one is empty, which would be found at the start of every text.
    """
    if "" in stops:
        raise UserError("--stop is empty; give the text that ends a completion")
    return stops


def complete_rows(rows: Sequence[Json], texts: Sequence[str], stops: Sequence[str]) -> list[Json]:
    """Return the rows with their `completion`, which ends before the first of the stop texts.

    Example:
        >>> complete_rows([{"prompt": "a", "id": 7}], [" b. c"], ["."])
        [{'prompt': 'a', 'id': 7, 'completion': ' b'}]
    """
    return [
        {**row, "completion": truncate(text, stops)} for row, text in zip(rows, texts, strict=True)
    ]


def complete(
    model: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    dtype: str,
    sampling: Sampling,
    ignore: Collection[str] = (),
) -> list[str]:
    """Return one completion per prompt.

    Args:
        model: directory, hub name or `embedded:NAME`.
        prompts: texts; the tokenizer puts its first tokens before them.
        max_new_tokens: largest number of tokens per completion.
        dtype: of the products, float32 or bfloat16.
        sampling: how tokens are chosen. Draws depend on the number of the prompt, not on the batch.
        ignore: unknown keys of `config.json` to ignore.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected float32 or bfloat16")
    refuse_model_of_edited_run(model)
    directory = convert.resolve(model)
    tokenizer = tokenizers.load_tokenizer(directory)
    # float32 in memory, whatever the files have; `dtype` is that of the products alone
    config, params = convert.load_params(directory, ignore=ignore)
    generate = generation.make_generator(config, params, tokenizer, batch=_BATCH, dtype=dtype)
    try:
        return generate([encode(tokenizer, text) for text in prompts], max_new_tokens, sampling)
    except NotFiniteError as error:
        raise error.named(model=model) from error
