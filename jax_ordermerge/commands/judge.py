"""A judge's choice between the outputs of two models."""

import os
from pathlib import Path

from jax_ordermerge.evaluate import judge


def judge_files(
    ours: Path, theirs: Path, endpoint: str, model: str, key_variable: str, out: Path | None
) -> str:
    """Judge two files of outputs and return the result in one sentence.

    Args:
        ours, theirs: see `evaluate.judge.read`.
        endpoint: address of an OpenAI-compatible server.
        model: name of the judge there.
        key_variable: environment variable of its API key, which is never printed.
        out: JSON file for the verdicts.
    """
    # keys are read from the environment: options of a command end in histories and process lists
    server = judge.Endpoint(endpoint, model, os.environ.get(key_variable))
    summary = judge.compare_files(server, ours, theirs, out)
    return (
        f"preferred in {100 * summary['win_rate']:.1f} % ± {100 * summary['se']:.1f} of"
        f" {summary['n']} instructions; {summary['turned']} verdicts turned with the order"
    )
