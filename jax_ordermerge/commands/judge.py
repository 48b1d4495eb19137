"""A judge's choice between the outputs of two models."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import judge
from jax_ordermerge.evaluate.endpoint import Endpoint
from jax_ordermerge.evaluate.metrics import percent_and_error
from jax_ordermerge.experiment.context import Log
from jax_ordermerge.json_types import Json


class JudgeOptions(NamedTuple):
    """Options of `ordermerge judge` about the judge.

    Attributes:
        endpoint: address of an OpenAI-compatible server.
        model: name of the judge there.
        key_variable: environment variable of its API key, which is never printed.
        max_tokens: of a reply.
        temperature: of a reply.
        request: JSON object of further fields of each request; null leaves a field out.
        workers: number of questions that are asked at the same time.
    """

    endpoint: str
    model: str
    key_variable: str
    max_tokens: int
    temperature: float
    request: str
    workers: int


def judge_files(
    ours: Path,
    theirs: Path,
    options: JudgeOptions,
    *,
    out: Path | None,
    replies: Path | None,
    log: Log,
) -> Json:
    """Judge two files of outputs and return the summary of `evaluate.judge.compare`.

    Args:
        ours, theirs: see `evaluate.judge.read`.
        options: of the judge.
        out: JSON file for the verdicts.
        replies: file of the replies, see `evaluate.judge.compare_files`.
        log: receives lines about the progress.
    """
    server = Endpoint(
        options.endpoint,
        options.model,
        # keys are read from the environment: options end in histories and process lists
        os.environ.get(options.key_variable),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        request=_request_fields(options.request),
    )
    return judge.compare_files(
        server, ours, theirs, out, replies=replies, workers=options.workers, log=log
    )


def describe(summary: Json) -> str:
    """Return a summary of `judge_files` in one sentence.

    Example:
        >>> describe({"win_rate": 0.5, "se": 0.25, "n": 4, "turned": 1, "unread": 0})
        'preferred in 50.0 % ± 25.0 of 4 instructions; 1 verdicts turned with the order'
    """
    unread = summary["unread"]
    return (
        f"preferred in {percent_and_error(summary['win_rate'], summary['se'], '±')} of"
        f" {summary['n']} instructions; {summary['turned']} verdicts turned with the order"
        + (f"; {unread} more could not be read and are left out" if unread else "")
    )


def _request_fields(text: str) -> Json:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    # Messages are the question itself, and a stream of parts is not read.
    if not isinstance(fields, dict) or "messages" in fields or "stream" in fields:
        raise UserError(
            f"--request {text}: expected a JSON object of fields of a request, such as "
            '\'{"max_tokens": null, "max_completion_tokens": 2048}\', without messages and stream'
        )
    return fields
