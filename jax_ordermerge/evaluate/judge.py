"""A pairwise judge behind an OpenAI-compatible endpoint, on output files as of AlpacaEval.

Every pair is shown in both orders, because judges prefer a position. A win counts 1, a verdict that
changes with the order 1/2.

Sources: Dubois et al., "AlpacaFarm", 2023, https://arxiv.org/abs/2305.14387 (format, question);
Zheng et al., "Judging LLM-as-a-judge", 2023, https://arxiv.org/abs/2306.05685 (both orders).
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
from typing import TypeAlias

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.metrics import mean_and_error
from jax_ordermerge.layout import Json

QUESTION = """Which of two answers to an instruction would people prefer: the one that is more \
helpful, correct and to the point?

### Instruction
{instruction}

### Answer A
{first}

### Answer B
{second}

Reply with one letter, A or B."""
_PAUSES = (1.0, 4.0, 16.0)  # seconds before further tries, where the endpoint is busy
_BUSY = (429, 500, 502, 503)  # status codes


Output: TypeAlias = Mapping[str, str]  # `instruction`, `output`, and what AlpacaEval adds


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """The endpoint of a judge.

    Attributes:
        url: up to the version, e.g. `http://localhost:8000/v1`.
        model: its name there.
        key: sent as a bearer token, and never shown.
        timeout: seconds to wait for an answer.
    """

    url: str
    model: str
    # Not in the repr, so that no log or traceback shows it.
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 120.0

    def ask(self, text: str) -> str:
        """Return the answer of the model to a message, at temperature 0.

        Raises:
            UserError: the endpoint is out of reach, refuses, or answers in another form.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            # Some models write a few words before the letter.
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        # urlopen would also read file: addresses.
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"judge {self.url}: expected an address such as http://localhost:8000/v1"
            )
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        # None marks the last try. Only a busy server is asked again: a wrong key does not get
        # right.
        for pause in (*_PAUSES, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    # Servers differ in the fields around it; this one is the same everywhere.
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                error.close()
                if pause is None or error.code not in _BUSY:
                    raise UserError(
                        f"judge {address} answers {error.code} {error.reason}; check address, "
                        "model and key"
                    ) from error
                time.sleep(pause)
            # After HTTPError, which is an OSError, too.
            except OSError as error:
                raise UserError(
                    f"judge {address} cannot be reached ({error}); check the address"
                ) from error
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"judge {address} does not answer as chat completions do; check the address"
                ) from error
        raise AssertionError("the last try returns or raises")


def prefers(endpoint: Endpoint, instruction: str, first: str, second: str) -> float:
    """Return 1 if the judge prefers the first answer, 0 if the second, 1/2 if it names neither."""
    answer = endpoint.ask(QUESTION.format(instruction=instruction, first=first, second=second))
    # A whole word: the A of "Answer" is none.
    letter = re.search(r"\b([AB])\b", answer)
    return 0.5 if letter is None else float(letter.group(1) == "A")


def compare(
    endpoint: Endpoint,
    ours: Sequence[Output],
    theirs: Sequence[Output],
    *,
    workers: int = 4,
) -> tuple[Json, list[Json]]:
    """Judge the outputs of two models on the same instructions, each pair in both orders.

    Args:
        endpoint: the judge.
        ours, theirs: rows with `instruction` and `output`, in the same order; see `read`.
        workers: number of questions that are asked at the same time.

    Returns:
        `win_rate`, `se`, `n` and `turned`, the number of pairs whose verdict depends on the order.
        Per instruction `instruction`, `first` and `second` (1 if the judge prefers ours, shown
        first and second) and their mean `win`.

    Raises:
        UserError: the instructions differ, there are none, or the endpoint does not answer.
    """
    # Compared by text: files of other runs may have other items or another order.
    if [row["instruction"] for row in ours] != [row["instruction"] for row in theirs]:
        raise UserError(
            "the two files of outputs have different instructions; judge models on the same ones, "
            "in the same order"
        )
    if not ours:
        raise UserError("the files of outputs are empty; there is nothing to judge")

    def judge_both_orders(our_row: Output, their_row: Output) -> Json:
        instruction = our_row["instruction"]
        first = prefers(endpoint, instruction, our_row["output"], their_row["output"])
        second = 1.0 - prefers(endpoint, instruction, their_row["output"], our_row["output"])
        # a verdict that turns with the order is a tie, which keeps the bias of the judge out of the
        # mean
        win = (first + second) / 2
        return {"instruction": instruction, "first": first, "second": second, "win": win}

    # Threads wait for the network; the endpoint batches what arrives at the same time.
    with ThreadPoolExecutor(workers) as pool:
        items = list(pool.map(judge_both_orders, ours, theirs))
    mean, error = mean_and_error([item["win"] for item in items])
    turned = sum(item["first"] != item["second"] for item in items)
    return {"win_rate": mean, "se": error, "n": len(items), "turned": turned}, items


def compare_files(
    endpoint: Endpoint, ours: str | Path, theirs: str | Path, out: Path | None = None
) -> Json:
    """Judge two files of outputs and return the summary of `compare`.

    Args:
        endpoint: the judge.
        ours, theirs: files of outputs.
        out: file for the summary and the verdict on every item.
    """
    summary, items = compare(endpoint, read(ours), read(theirs))
    if out is not None:
        verdicts = {"judge": endpoint.model, **summary, "items": items}
        atomic.replace(out, json.dumps(verdicts, indent=1).encode())
    return summary


def read(path: str | Path) -> list[Json]:
    """Read a file of outputs: a JSON list of objects with `instruction` and `output`.

    Raises:
        UserError: there is no such file, or it has another form.
    """
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no file of outputs: {error}") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"instruction", "output"} <= set(row) for row in rows
    ):
        raise UserError(
            f"{path}: expected a list of objects with instruction and output, as AlpacaEval's "
            "model_outputs.json"
        )
    return rows
