"""Tasks by log-likelihood: multiple choice, and perplexity of texts. Knows of a model only how it scores continuations.

Source: the definitions of lm-evaluation-harness (Gao et al., https://zenodo.org/records/12608602), with which the numbers agree.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import answers
from jax_ordermerge.evaluate.prompts import Question, Row, chosen, text
from jax_ordermerge.evaluate.tasks.choices import ChoiceTask
from jax_ordermerge.evaluate.tasks.texts import TextTask

Pair = tuple[list[int], list[int]]
Score = Callable[[Sequence[Pair]], tuple[Sequence[float], Sequence[bool]]]
Encode = Callable[[str], list[int]]


def pair(encode: Encode, context: str, continuation: str, start: int) -> Pair:
    """Return the tokens of a context and of what follows it, cut out of those of the whole text.

    Spaces at the end of the context go to the continuation, with whose first word a tokenizer joins them.

    Args:
        encode: text -> tokens, with those that stand before every text.
        context: may be empty; it then is `start` alone.
        continuation: not empty.
        start: token before a text, beginning of sequence or, where there is none, its end.

    Example:
        >>> letters = lambda text: [ord(letter) for letter in text]
        >>> pair(letters, "ab ", "c", 0), pair(letters, "", "c", 0)
        (([97, 98], [32, 99]), ([0], [99]))
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = encode(context + continuation)
    if not context:
        return [start], whole[whole[:1] == [start] :]
    size = len(encode(context))
    return whole[:size], whole[size:]


def fitted(context: Sequence[int], continuation: Sequence[int], positions: int) -> Pair:
    """Return the pair without its first tokens where it does not fit: the model reads all tokens but the last.

    Raises:
        UserError: the continuation alone does not fit.

    Example:
        >>> fitted([1, 2, 3], [4, 5], 3)
        ([2, 3], [4, 5])
    """
    if len(continuation) > positions:
        raise UserError(
            f"a continuation of {len(continuation)} tokens does not fit the {positions} positions of the model; shorten it"
        )
    return list(context)[-(positions + 1 - len(continuation)) :], list(continuation)


def windows(tokens: Sequence[int], start: int, positions: int) -> list[Pair]:
    """Cut a text into pairs that together hold each of its tokens once as something to predict.

    The first window follows `start`; every other follows the last token of the one before it, except that the last one, where it is
    shorter, is given as many tokens before it as the model holds.

    Args:
        tokens: of the text.
        start: token before the text.
        positions: of the model.

    Example:
        >>> windows(range(10), -1, 4)
        [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    """
    found: list[Pair] = [([start], list(tokens[:positions]))] if len(tokens) else []
    for first in range(positions, len(tokens), positions):
        end = min(first + positions, len(tokens))
        found.append((list(tokens[end - positions - 1 : first]), list(tokens[first:end])))
    return found


def rolling(
    score: Score, texts: Sequence[Sequence[int]], start: int, positions: int
) -> list[float]:
    """Return the log-probability of each text in nats, all of its tokens predicted once; see `windows`.

    Args:
        score: pairs -> log-probabilities, and whether each is greedy.
        texts: tokens of each.
        start, positions: see `windows`.

    Example:
        >>> rolling(
        ...     lambda pairs: ([-float(len(pair[1])) for pair in pairs], []), [[1, 2, 3], []], 0, 2
        ... )
        [-3.0, 0.0]
    """
    cut = [windows(tokens, start, positions) for tokens in texts]
    logps = iter(score([one for own in cut for one in own])[0])
    return [math.fsum(float(next(logps)) for _ in own) for own in cut]


def run_choices(
    task: ChoiceTask,
    asked: Sequence[Question],
    encode: Encode,
    score: Score,
    *,
    start: int,
    positions: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let a model choose: the choice whose text it finds likeliest after the prompt.

    Args:
        task: of kind `multiple_choice`.
        asked: see `prompts.questions`.
        encode: text -> tokens, with those that stand before every text.
        score: pairs -> log-probabilities, and whether each is greedy.
        start: token before a text.
        positions: of the model.

    Returns:
        `accuracy` with `se` (the choice of the highest log-probability), `acc_norm` with `acc_norm_se` (of the highest one a character),
        `acc_bytes` with `acc_bytes_se` (a byte), `n`; and for each item `{"id", "prompt", "reference", "answer", "correct",
        "correct_norm", "correct_bytes", "logps", "greedy"}`, the last two one a choice.

    Example:
        >>> row = {"choices": ["no", "certainly"], "answer": 1}
        >>> one = Question(0, row, "Is it?", "Is it?", "certainly")
        >>> task = ChoiceTask(
        ...     name="t",
        ...     kind="multiple_choice",
        ...     data="x",
        ...     choices="{{choices}}",
        ...     answer="{{answer}}",
        ... )
        >>> letters = lambda text: [ord(letter) for letter in text]
        >>> found, items = run_choices(
        ...     task,
        ...     [one],
        ...     letters,
        ...     lambda pairs: ([-3.0, -4.0], [False, False]),
        ...     start=0,
        ...     positions=99,
        ... )
        >>> found["accuracy"], found["acc_norm"], items[0]["answer"]
        (0.0, 1.0, 'no')
    """
    known = [chosen(task, one.row) for one in asked]
    pairs = []
    for one, (choices, _) in zip(asked, known, strict=True):
        assert isinstance(one.asked, str)
        for choice in choices:
            pairs.append(
                fitted(*pair(encode, one.asked, f"{task.delimiter}{choice}", start), positions)
            )
    found = score(pairs)
    logps, greedy = (iter(part) for part in found)
    items: list[dict[str, Any]] = []
    for one, (choices, right) in zip(asked, known, strict=True):
        own = np.array([float(next(logps)) for _ in choices])
        picks = {
            "correct": int(np.argmax(own)),
            "correct_norm": int(np.argmax(own / [len(choice) for choice in choices])),
            "correct_bytes": int(np.argmax(own / [len(choice.encode()) for choice in choices])),
        }
        items.append(
            {
                "id": one.id,
                "prompt": one.prompt,
                "reference": one.reference,
                "answer": choices[picks["correct"]],
            }
            | {name: pick == right for name, pick in picks.items()}
            | {"logps": own.tolist(), "greedy": [bool(next(greedy)) for _ in choices]}
        )
    summary: dict[str, Any] = {}
    for name, key in (
        ("accuracy", "correct"),
        ("acc_norm", "correct_norm"),
        ("acc_bytes", "correct_bytes"),
    ):
        mean, error = answers.accuracy([item[key] for item in items])
        summary |= {name: mean, "se" if name == "accuracy" else f"{name}_se": error}
    return summary | {"n": len(items)}, items


def run_perplexity(
    task: TextTask, rows: Sequence[Row], encode: Encode, score: Score, *, start: int, positions: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure how likely a model finds whole texts, each by itself, however long.

    Args:
        task: of kind `perplexity`; its `text` says what the text of a row is.
        rows: of its file.
        encode, score, start, positions: see `run_choices`.

    Returns:
        `word_perplexity`, `byte_perplexity`, `token_perplexity` (exp of minus the log-probability a word, byte or token, over all texts
        together), `bits_per_byte` with `se` (texts are what is sampled), `words`, `bytes`, `tokens`, `n`; and for each text `{"id",
        "logp", "words", "bytes", "tokens"}`. Words are what white space parts. Tokens are those that are predicted.

    Raises:
        UserError: no text has any tokens.

    Example:
        >>> task = TextTask(name="t", kind="perplexity", data="x")
        >>> letters = lambda text: [ord(letter) for letter in text]
        >>> half = lambda pairs: ([-math.log(2) * len(pair[1]) for pair in pairs], [])
        >>> found, items = run_perplexity(
        ...     task, [{"text": "a b"}, {"text": "cd"}], letters, half, start=0, positions=2
        ... )
        >>> (
        ...     round(found["byte_perplexity"], 6),
        ...     round(found["bits_per_byte"], 6),
        ...     found["words"],
        ...     found["tokens"],
        ... )
        (2.0, 1.0, 3, 5)
    """
    texts = [text(task.text, row) for row in rows]
    tokens = [encode(one) for one in texts]
    logps = rolling(score, tokens, start, positions)
    items: list[dict[str, Any]] = [
        {
            "id": number,
            "logp": logp,
            "words": len(re.split(r"\s+", one)),
            "bytes": len(one.encode()),
            "tokens": len(own),
        }
        for number, (one, own, logp) in enumerate(zip(texts, tokens, logps, strict=True))
    ]
    total = math.fsum(logps)
    counts = {name: sum(item[name] for item in items) for name in ("words", "bytes", "tokens")}
    if not counts["bytes"] or not counts["tokens"]:
        raise UserError(f"evaluation task {task.name} has no text, check its data and limit")
    means = {name: -total / count for name, count in counts.items()}
    n, share = len(items), -total / counts["bytes"]
    left = [-item["logp"] - share * item["bytes"] for item in items]
    error = math.sqrt(math.fsum(x * x for x in left) * n / max(n - 1, 1)) / counts["bytes"]
    perplexities = {
        f"{name[:-1]}_perplexity": math.exp(min(mean, 700.0)) for name, mean in means.items()
    }
    return perplexities | {
        "bits_per_byte": share / math.log(2),
        "se": error / math.log(2),
        **counts,
        "n": n,
    }, items
