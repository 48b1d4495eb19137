"""A pairwise judge behind any OpenAI-compatible endpoint, on files in the form of AlpacaEval: lists of instruction and output.

Every pair is shown in both orders, because judges prefer a place: a win counts 1, a verdict that turns with the order 1/2.

Source of the format and of the question: Dubois et al., "AlpacaFarm", 2023, https://arxiv.org/abs/2305.14387; of the orders: Zheng et
al., "Judging LLM-as-a-judge", 2023, https://arxiv.org/abs/2306.05685.
"""

import dataclasses
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError

QUESTION = """Which of two answers to an instruction would people prefer: the one that is more helpful, correct and to the point?

### Instruction
{instruction}

### Answer A
{first}

### Answer B
{second}

Reply with one letter, A or B."""
_RETRIES = (1.0, 4.0, 16.0)  # seconds between tries where the endpoint is busy


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a judge answers.

    Attributes:
        url: up to the version, e.g. `http://localhost:8000/v1`.
        model: its name there.
        key: sent as a bearer token, and never shown.
        timeout: seconds to wait for an answer.
    """

    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 120.0

    def ask(self, text: str) -> str:
        """Return what the model answers to a message, at temperature 0.

        Raises:
            UserError: the endpoint cannot be reached, refuses, or answers in another form.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        address = f"{self.url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"judge {self.url}: expected an address such as http://localhost:8000/v1"
            )
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for pause in (*_RETRIES, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                error.close()
                if pause is None or error.code not in (429, 500, 502, 503):
                    raise UserError(
                        f"judge {address} answers {error.code} {error.reason}; check address, model and key"
                    ) from error
                time.sleep(pause)
            except OSError as error:
                raise UserError(
                    f"judge {address} cannot be reached ({error}); check the address"
                ) from error
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"judge {address} answers in no form of chat completions; check the address"
                ) from error
        raise AssertionError("the last try returns or raises")


def prefers(endpoint: Endpoint, instruction: str, first: str, second: str) -> float:
    """Return 1 where the judge prefers the first answer, 0 where the second, 1/2 where it names neither."""
    said = endpoint.ask(QUESTION.format(instruction=instruction, first=first, second=second))
    letter = re.search(r"\b([AB])\b", said)
    return 0.5 if letter is None else float(letter.group(1) == "A")


def compare(
    endpoint: Endpoint,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    *,
    workers: int = 4,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judge the outputs of two models on the same instructions, each pair in both orders.

    Args:
        endpoint: the judge.
        ours, theirs: rows with `instruction` and `output`, as `read` returns them, in the same order.
        workers: questions asked at the same time.

    Returns:
        `{"win_rate", "se", "n", "turned"}` (`turned`: pairs whose verdict follows the order), and for each instruction `instruction`,
        `first` and `second` (what the judge said with ours shown first, and second: 1 for ours) and `win`, their mean.

    Raises:
        UserError: other instructions, none, or an endpoint that does not answer.
    """
    if [row["instruction"] for row in ours] != [row["instruction"] for row in theirs]:
        raise UserError(
            "the two files of outputs have different instructions; judge models on the same ones, in the same order"
        )
    if not ours:
        raise UserError("the files of outputs are empty; there is nothing to judge")

    def both(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
        own, other = pair
        first = prefers(endpoint, own["instruction"], own["output"], other["output"])
        second = 1.0 - prefers(endpoint, own["instruction"], other["output"], own["output"])
        return {
            "instruction": own["instruction"],
            "first": first,
            "second": second,
            "win": (first + second) / 2,
        }

    with ThreadPoolExecutor(workers) as pool:
        items = list(pool.map(both, zip(ours, theirs, strict=True)))
    wins, count = [item["win"] for item in items], len(items)
    mean = sum(wins) / count
    error = (sum((win - mean) ** 2 for win in wins) / max(count - 1, 1) / count) ** 0.5
    turned = sum(item["first"] != item["second"] for item in items)
    return {"win_rate": mean, "se": error, "n": count, "turned": turned}, items


def compare_files(
    endpoint: Endpoint, ours: str | Path, theirs: str | Path, out: Path | None = None
) -> dict[str, Any]:
    """Judge two files of outputs, write the verdicts of every item to a file where one is named, and return what `compare` found."""
    found, items = compare(endpoint, read(ours), read(theirs))
    if out is not None:
        atomic.replace(
            out, json.dumps({"judge": endpoint.model, **found, "items": items}, indent=1).encode()
        )
    return found


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of outputs: a JSON list of objects with `instruction` and `output`.

    Raises:
        UserError: no such file, or another form.
    """
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no file of outputs: {error}") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"instruction", "output"} <= set(row) for row in rows
    ):
        raise UserError(
            f"{path}: expected a list of objects with instruction and output, as AlpacaEval's model_outputs.json"
        )
    return rows
