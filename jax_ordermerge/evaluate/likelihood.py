"""Log-likelihoods of texts: how a text is cut into pairs of context and continuation.

Source: the definitions of lm-evaluation-harness (Gao et al.,
https://zenodo.org/records/12608602), with which the numbers agree.
"""

import math
from collections.abc import Callable, Sequence

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import Pair, ScoreFn, name_items


def make_pair(
    encode: Callable[[str], list[int]], context: str, continuation: str, start: int
) -> Pair:
    """Return the tokens of a context and of its continuation, cut out of those of both together.

    The texts are not tokenized alone: a token may reach over the border. Spaces at the end of the
    context go to the continuation, because tokenizers join them with the word that follows.

    Args:
        encode: from text to tokens.
        context: may be empty; its tokens are then `start` alone.
        continuation: not empty.
        start: token before a text, see `EvalModel.start`.

    Example:
        >>> letters = lambda text: [ord(letter) for letter in text]
        >>> make_pair(letters, "ab ", "c", 0), make_pair(letters, "", "c", 0)
        (([97, 98], [32, 99]), ([0], [99]))
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    tokens = encode(context + continuation)
    # Without a context the first token is scored too, after `start`, which a tokenizer may have
    # added by itself.
    if not context:
        return [start], tokens[tokens[:1] == [start] :]
    # A token across the border belongs to the continuation, as in lm-evaluation-harness.
    size = len(encode(context))
    return tokens[:size], tokens[size:]


def truncate_pair(context: Sequence[int], continuation: Sequence[int], positions: int) -> Pair:
    """Drop the first tokens of a context that is too long: the model reads all tokens but the last.

    Raises:
        UserError: the continuation alone is too long.

    Example:
        >>> truncate_pair([1, 2, 3], [4, 5], 3)
        ([2, 3], [4, 5])
    """
    if len(continuation) > positions:
        raise UserError(
            f"a continuation of {len(continuation)} tokens does not fit the {positions} positions "
            "of the model; shorten it"
        )
    # Plus one, because the last token is predicted and never read.
    return list(context)[-(positions + 1 - len(continuation)) :], list(continuation)


def windows(tokens: Sequence[int], start: int, positions: int) -> list[Pair]:
    """Cut a text into pairs that together predict each of its tokens once.

    The first window follows `start`, every other one the last token of the window before it. The
    last window is usually shorter; its context is extended to the length that the model reads.

    Args:
        tokens: of the text.
        start: token before the text.
        positions: of the model.

    Example:
        >>> windows(range(10), -1, 4)
        [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    """
    pairs: list[Pair] = [([start], list(tokens[:positions]))] if len(tokens) else []
    for first in range(positions, len(tokens), positions):
        # Counted from the end of the window: a shorter last one then has a longer context.
        end = min(first + positions, len(tokens))
        pairs.append((list(tokens[end - positions - 1 : first]), list(tokens[first:end])))
    return pairs


def rolling_logprobs(
    score: ScoreFn, texts: Sequence[Sequence[int]], start: int, positions: int
) -> list[float]:
    """Return the log-probability of each text in nats; see `windows`.

    Args:
        score: of a model.
        texts: tokens of each.
        start, positions: see `windows`.

    Example:
        >>> score = lambda pairs: ([-float(len(continuation)) for _, continuation in pairs], [])
        >>> rolling_logprobs(score, [[1, 2, 3], []], 0, 2)
        [-3.0, 0.0]
    """
    pairs = [windows(tokens, start, positions) for tokens in texts]
    # One call for all texts, so that batches are full.
    with name_items([text for text, text_pairs in enumerate(pairs) for _ in text_pairs]):
        logprobs = iter(score([pair for text_pairs in pairs for pair in text_pairs])[0])
    # fsum rounds once, whatever the number of windows.
    return [math.fsum(float(next(logprobs)) for _ in text_pairs) for text_pairs in pairs]
