"""The interface between a model and the tasks that evaluate it.

JAX is not imported here: the modules of task kinds build on this one and are read with a config.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jax_ordermerge.evaluate.sampling import Sampling

Pair: TypeAlias = tuple[list[int], list[int]]  # tokens of a context and of its continuation
# Of each pair the log-probability of the continuation, and whether it is what greedy decoding
# would write.
ScoreFn: TypeAlias = Callable[[Sequence[Pair]], tuple[Sequence[float], Sequence[bool]]]


class NotFiniteError(UserError):
    """Log-probabilities or logits of a model are NaN or infinite.

    Where it is raised neither the model nor the item is known: the callers add both.

    Attributes:
        problem: what is not finite.
        number: of the first pair or prompt with it, among those of the call.

    Example:
        >>> raise NotFiniteError("log-probability nan", 2).named(model="merged/x", item="17")
        Traceback (most recent call last):
            ...
        jax_ordermerge.evaluate.eval_model.NotFiniteError: merged/x: item 17: log-probability nan;
        the weights hold NaN or infinity, or overflow: check how the model was made
    """

    def __init__(
        self, problem: str, number: int, model: str = "the model", item: str | None = None
    ) -> None:
        where = f"input {number}" if item is None else f"item {item}"
        super().__init__(
            f"{model}: {where}: {problem}; the weights hold NaN or infinity, or overflow: check "
            "how the model was made"
        )
        self.problem, self.number = problem, number
        self._names = {"model": model, "item": item}

    def named(self, **names: str) -> "NotFiniteError":
        """Return the error with the name of its `model` or `item`."""
        # A new error instead of a changed one: the message is built when it is made.
        merged = self._names | names
        return NotFiniteError(
            self.problem, self.number, merged["model"] or "the model", merged["item"]
        )


@contextlib.contextmanager
def name_items(items: Sequence[object]) -> Iterator[None]:
    """Name the item in errors of scoring or generating one pair or prompt for each of `items`."""
    try:
        yield
    except NotFiniteError as error:
        # The number is of the call, whose inputs are in the order of `items`.
        raise error.named(item=str(items[error.number])) from error


class TextGenerator(Protocol):
    """Continues tokenized prompts: see `decode.generate`, whose tokens it decodes."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: "Sampling" = ...,
        names: Sequence[str | int] | None = None,
    ) -> list[str]:
        """Return the text after each prompt."""


class ItemExample(NamedTuple):
    """One item of a task, as the model saw it.

    Attributes:
        tokens: the whole prompt.
        answer: of the model.
        reference: the right answer; None where there is none.
    """

    tokens: Sequence[int]
    answer: str
    reference: str | None = None


class TaskResult(NamedTuple):
    """Result of a model on a task.

    Attributes:
        summary: metrics by name, and the number of items `n`.
        items: one row per item.
        example: the first item, for readers who check how the model is asked.
    """

    summary: Json
    items: list[Json]
    example: ItemExample | None = None


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """A model as tasks see it.

    Attributes:
        tokenizer: of the model.
        generate: continues prompts.
        score: scores given continuations.
        positions: the largest number of tokens that the model reads.
        name: of the model, for messages.
    """

    tokenizer: "PreTrainedTokenizerBase"
    generate: TextGenerator
    score: ScoreFn
    positions: int
    name: str = "the model"

    @property
    def start(self) -> int:
        """The token before a scored text: beginning of sequence, or else end of sequence.

        Raises:
            UserError: the tokenizer has neither.
        """
        token = self.tokenizer.bos_token_id
        # As in lm-evaluation-harness: models without BOS were trained on texts that EOS separates.
        if token is None:
            token = self.tokenizer.eos_token_id
        if token is None:
            raise UserError(
                "the tokenizer names neither a beginning nor an end of sequence; texts could not "
                "be scored from their first token"
            )
        return int(token)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; see `encode`."""
        return encode(self.tokenizer, text)


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the tokens of a text, after at most one beginning-of-sequence token.

    A text that begins with the token, as chat templates write it, gets no second one.
    """
    # Two of them would be an input that the model was not trained on.
    has_start = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not has_start, verbose=False)["input_ids"])
