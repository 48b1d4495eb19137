"""The section `data`: where examples come from and how they become rows of tokens."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from jax_ordermerge.config.section import Section
from jax_ordermerge.errors import UserError


class Data(Section):
    """Training, validation and test examples."""

    # The defaults need no network and no files, so an empty config is an experiment.
    train: str = Field(
        "generated:quickstart",
        description="json, jsonl, parquet or csv file (also gs:// and s3://), hub dataset, or"
        " generated:NAME",
    )
    test: str | None = Field(None, description="held-out examples, never trained on")
    # Apart from the test examples: the loss of a model that was chosen on examples is too low on
    # them.
    validation_examples: NonNegativeInt = Field(
        0,
        description="examples set aside from train by seed; the best member, merge or checkpoint"
        " is chosen on them",
    )
    test_examples: NonNegativeInt = Field(
        0, description="examples set aside from train by seed, where test has no file of its own"
    )
    allow_overlap: bool = Field(
        False,
        description="count and report examples that two splits share, instead of refusing them; a"
        " search for a merge refuses shared validation examples all the same",
    )
    format: Literal[
        "auto",
        "messages",
        "prompt_completion",
        "text",
        "sharegpt",
        "alpaca",
        "question_answer",
        "preference",
    ] = "auto"
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="names in the files of columns of the format, e.g. {question: problem}",
    )
    ignore_columns: tuple[str, ...] = Field(
        (),
        description="columns of rows, or keys such as messages.name, that are passed over. All"
        " others that nothing reads are refused, except for names of metadata such as id, source,"
        " category or *_id",
    )
    template: Literal["auto", "plain", "alpaca", "gsm8k", "chat"] = Field(
        "auto", description="how prompt and response become text"
    )
    # 512 is the length in the recipe of Alpaca, from which the defaults of `Training` are, too,
    # except for the batch.
    max_length: PositiveInt = Field(512, description="tokens per example")
    # Truncation would teach a response without its end, and the model would not learn to stop.
    too_long: Literal["drop", "truncate"] = "drop"
    learn: Literal["all", "last"] = Field(
        "all",
        description="answers of a conversation that are learned. all: in one example, or in one"
        " example each where the chat template changes earlier turns; weight: 0 on a message"
        " leaves it out",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="rows without a response, of another form, or that the template refuses or"
        " shortens: refuse names all of them, drop counts them",
    )
    limit: PositiveInt | None = Field(
        None,
        description="use only the first so many training examples: rows of the file, or windows"
        " of texts",
    )
    test_limit: PositiveInt | None = Field(
        None, description="use only the first so many test examples"
    )
    # With packs all members see the same rows in other orders, which is what an experiment
    # compares. Bins compose new rows for each order.
    packing: Literal["none", "packs", "bins"] = Field(
        "none",
        description="several examples in one row of max_length tokens. packs: examples are packed"
        " once, and packs are ordered; bins: each order is packed by itself",
    )
    # Off by default: each length is a compilation of its own, and waste depends on the data.
    buckets: tuple[PositiveInt, ...] = Field(
        (), description="padded lengths below max_length; () pads to the longest example"
    )

    # A method and no validator: the number of positions is known when the model is resolved.
    def check_length(self, positions: int, model: str) -> None:
        """Check that rows of `max_length` tokens fit the context of a model.

        Args:
            positions: of the model.
            model: its name, for the message.

        Raises:
            UserError: they do not.

        Example:
            >>> Data(max_length=512).check_length(2048, "llama-7b")
        """
        if self.max_length > positions:
            raise UserError(
                f"data.max_length = {self.max_length} is above the {positions} positions of"
                f" {model}; lower it"
            )
