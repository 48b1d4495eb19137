"""Completion of prompts by one model."""

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from jax_ordermerge.data import chat, dates, files, tokenizers, turns
from jax_ordermerge.data.formats import Record
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import generation
from jax_ordermerge.evaluate.eval_model import NotFiniteError, encode
from jax_ordermerge.evaluate.matching import truncate
from jax_ordermerge.evaluate.sampling import Sampling
from jax_ordermerge.json_types import Json
from jax_ordermerge.merge.sources import references, storage

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
        mistake = "both are given" if prompts else "neither is given"
        raise UserError(f"prompts come from --prompt TEXT or from --prompts FILE: {mistake}")
    if path is None:
        return [{"prompt": text} for text in prompts]
    # A line is a prompt here, where a text file of training data is one text.
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
        # The answer would overwrite the column that the user may want to compare it with.
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


@dataclasses.dataclass(frozen=True)
class Asking:
    """How prompts are put to a model.

    Attributes:
        raw: continue the prompts as they are, without the chat template of the model.
        system: system message before each prompt.
        variables: further variables of the chat template, e.g. `enable_thinking`.
    """

    raw: bool = False
    system: str | None = None
    variables: Json = dataclasses.field(default_factory=dict)


def complete(
    model: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    dtype: str,
    sampling: Sampling,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
    asking: Asking | None = None,
    log: Callable[[str], None] = print,
) -> list[str]:
    """Return one completion per prompt.

    Args:
        model: any name that `references.open_model` takes.
        prompts: user messages for the chat template of the model; texts where it has none.
        max_new_tokens: largest number of tokens per completion.
        dtype: of the products, float32 or bfloat16.
        sampling: how tokens are chosen. Draws depend on the number of the prompt, not on the batch.
        ignore: unknown keys of `config.json` to ignore.
        allow_bin: read `.bin` files of PyTorch where there are no safetensors.
        asking: how prompts are put to the model.
        log: receives one-line messages.

    Raises:
        UserError: bad input, or options that the chat template does not take.
    """
    # Before the model is opened, which may be a download.
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected float32 or bfloat16")
    source = references.open_model(model, ignore=ignore, allow_bin=allow_bin)
    if source.directory is None:
        raise UserError(f"{model} has no tokenizer files; convert it to a directory that has them")
    tokenizer = tokenizers.load_tokenizer(source.directory)
    # A member is asked as it was trained, which the tokenizer files of its base do not know.
    if source.prompt_format.chat_template is not None:
        tokenizer.chat_template = source.prompt_format.chat_template
    # a member reads the date that it was trained with; any other model reads today's
    date = dates.pin_date(tokenizer, recorded=source.prompt_format.date)
    tokens = _tokens(prompts, asking or Asking(), tokenizer, log)
    if date is not None:
        log(f"the chat template prints {date} as today's date")
    # float32 in memory, whatever the files have; `dtype` is that of the products alone
    params = storage.load(source, dtype="float32")
    generate = generation.make_generator(
        source.config, params, tokenizer, batch=_BATCH, dtype=dtype
    )
    try:
        return generate(tokens, max_new_tokens, sampling)
    except NotFiniteError as error:
        raise error.named(model=model) from error


def read_variables(items: Sequence[str]) -> Json:
    """Return the variables of `--variable KEY=VALUE`. A value that is not JSON is a text.

    Raises:
        UserError: an item has another form.

    Example:
        >>> read_variables(["enable_thinking=false", "date_string=1 May 2020"])
        {'enable_thinking': False, 'date_string': '1 May 2020'}
    """
    variables: Json = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not (name and sign):
            raise UserError(f"--variable {item}: expected KEY=VALUE, as in enable_thinking=false")
        # JSON and not YAML, which makes an object of "a: b"
        try:
            variables[name] = json.loads(text)
        except ValueError:
            variables[name] = text
    return variables


def _tokens(
    prompts: Sequence[str],
    asking: Asking,
    tokenizer: tokenizers.Tokenizer,
    log: Callable[[str], None],
) -> list[list[int]]:
    """Return the tokens of prompts, in the chat template of the model unless it has none."""
    if asking.raw or not tokenizer.chat_template:
        if asking.system is not None or asking.variables:
            option = "--variable" if asking.system is None else "--system"
            reason = "--raw leaves it out" if asking.raw else "the model has none"
            raise UserError(f"{option} goes with a chat template; {reason}")
        return [encode(tokenizer, text) for text in prompts]
    log("prompts are user messages in the chat template of the model; --raw continues them as text")
    system = [] if asking.system is None else [{"role": "system", "content": asking.system}]
    records = [
        Record(
            messages=(
                *system,
                {"role": "user", "content": prompt},
                # a record ends in a response; its prompt is what comes before
                {"role": "assistant", "content": ""},
            ),
            template_kwargs=asking.variables,
        )
        for prompt in prompts
    ]
    _check_read(records, asking, tokenizer)
    return [chat.prompt_tokens(record, "chat", tokenizer).tolist() for record in records]


def _check_read(records: Sequence[Record], asking: Asking, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse a system message or a variable that changes no prompt: templates ignore others."""

    def render_prompts(variables: Json) -> list[str]:
        return [
            turns.render_chat(
                tokenizer,
                dataclasses.replace(record, template_kwargs=variables),
                -1,
                generation=True,
            )
            for record in records
        ]

    # Rendered with and without: what a template reads cannot be seen from its text.
    prompts = render_prompts(asking.variables)
    for name in asking.variables:
        without = {key: value for key, value in asking.variables.items() if key != name}
        # Over all prompts: a template may read a variable in some of them only.
        if render_prompts(without) == prompts:
            raise UserError(f"--variable {name}: the chat template of the model does not read it")
    if asking.system is not None and any(asking.system.strip() not in prompt for prompt in prompts):
        raise UserError("--system: the chat template of the model leaves it out")
