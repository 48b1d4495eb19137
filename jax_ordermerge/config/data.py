"""The section `data`: where examples come from and how they become rows of tokens."""

import datetime as dt
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

from jax_ordermerge.config.section import Section, parse
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

FormatName = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "text",
    "sharegpt",
    "alpaca",
    "question_answer",
    "preference",
]
TemplateName = Literal["auto", "plain", "alpaca", "gsm8k", "chat"]


class DataSource(Section):
    """One source of examples. What it leaves out is as the section `data` says."""

    path: str = Field(min_length=1, description="as data.train", examples=["alpaca.json"])
    name: str | None = Field(
        None,
        min_length=1,
        description="in reports and data.json; by default the path",
        examples=["alpaca"],
    )
    # A multiple of the rows and no share of the mixture: the meaning of one weight then does not
    # depend on the sizes and weights of the other sources.
    weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="how often an epoch has each row. 0.5: a random half of the rows, chosen once"
        " by the seed; 2: each row twice; 2.5: twice, and that half a third time. For data.train"
        " alone",
        json_schema_extra={"unit": "times per epoch", "with": "data.train"},
    )
    split: str | None = Field(
        None,
        min_length=1,
        description="of a hub dataset, e.g. train[:10%]; as owner/name@split",
        examples=["train[:10%]"],
        json_schema_extra={"with": "a hub dataset"},
    )
    format: FormatName | None = Field(
        None, description="as data.format, for this source", examples=["alpaca"]
    )
    template: TemplateName | None = Field(
        None, description="as data.template, for this source", examples=["chat"]
    )
    columns: dict[str, str] | None = Field(
        None, description="as data.columns, for this source", examples=[{"question": "problem"}]
    )
    ignore_columns: tuple[str, ...] | None = Field(
        None, description="as data.ignore_columns, for this source", examples=[["level"]]
    )
    limit: PositiveInt | None = Field(
        None,
        description="as data.limit, for this source",
        examples=[1000],
        json_schema_extra={"unit": "examples"},
    )

    @pydantic.model_serializer(mode="wrap")
    def _write_what_is_set(self, write: pydantic.SerializerFunctionWrapHandler) -> Json:
        # What is left out follows the section, so a null would be noise in config.yaml.
        return {name: value for name, value in write(self).items() if value is not None}

    @property
    def label(self) -> str:
        """The name of the source, by default its path."""
        return self.name or self.path


def _read_sources(value: object, info: pydantic.ValidationInfo) -> object:
    """Make a section of each mapping: the errors of a pydantic union name every alternative."""
    where = f"data.{info.field_name}" if info.field_name in ("train", "test") else info.field_name
    is_list = isinstance(value, (list, tuple))
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise UserError(f"{where} is an empty list; give a source")
    sources = []
    for number, item in enumerate(items):
        place = f"{where}[{number}]" if is_list else str(where)
        if isinstance(item, Mapping):
            if "kind" in item and "path" not in item:
                # from `--set data.train.weight=2`, which takes a bare text for the name of a kind
                raise UserError(f"{place} is a path; give a mapping, e.g. {{path: ..., weight: 2}}")
            item = parse(DataSource, item, place)
        if item == "" or not isinstance(item, (str, DataSource)):
            raise UserError(
                f"{place} = {item!r}: expected a path or name, a mapping with path, or a list of"
                " these"
            )
        sources.append(item)
    return tuple(sources) if is_list else sources[0]


# A path alone stays a text: the resolved config says what was written.
DataSources = Annotated[
    str | DataSource | tuple[str | DataSource, ...], pydantic.BeforeValidator(_read_sources)
]


def list_sources(sources: DataSources) -> tuple[DataSource, ...]:
    """Return the sources of a value of `data.train` or `data.test`, in its order.

    Example:
        >>> [source.path for source in list_sources(("a.jsonl", DataSource(path="b.jsonl")))]
        ['a.jsonl', 'b.jsonl']
    """
    listed = sources if isinstance(sources, tuple) else (sources,)
    return tuple(DataSource(path=item) if isinstance(item, str) else item for item in listed)


class Data(Section):
    """Training, validation and test examples."""

    # The defaults need no network and no files, so an empty config is an experiment.
    train: DataSources = Field(
        "generated:quickstart",
        description="jsonl, json, parquet, csv, tsv or txt file (also .gz and .zst, gs:// and"
        " s3://), a directory or a glob of such files, a hub dataset owner/name[:config][@split],"
        " generated:NAME, or a list of these; each may be a mapping with path, name, weight, split,"
        " format, template, columns, ignore_columns and limit",
    )
    test: DataSources | None = Field(
        None,
        description="held-out examples, never trained on; as train, without weights",
        examples=["held_out.jsonl"],
        json_schema_extra={"with": "not data.test_examples"},
    )
    # Apart from the test examples: the loss of a model that was chosen on examples is too low on
    # them.
    validation_examples: NonNegativeInt = Field(
        0,
        description="examples set aside from train by seed; the best member, merge or checkpoint"
        " is chosen on them",
        examples=[256],
        json_schema_extra={
            "unit": "examples",
            "with": "merge.auto and training.checkpoint = best need it",
        },
    )
    test_examples: NonNegativeInt = Field(
        0,
        description="examples set aside from train by seed, where test has no file of its own",
        examples=[200],
        json_schema_extra={"unit": "examples", "with": "not data.test"},
    )
    allow_overlap: bool = Field(
        False,
        description="count and report examples that two splits share, instead of refusing them; a"
        " search for a merge refuses shared validation examples all the same",
    )
    format: FormatName = Field("auto", description="form of the rows; auto decides by the columns")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="names in the files of columns of the format, e.g. {question: problem}",
        examples=[{"question": "problem"}],
    )
    ignore_columns: tuple[str, ...] = Field(
        (),
        description="columns of rows, or keys such as messages.name, that are passed over. All"
        " others that nothing reads are refused, except for names of metadata such as id, source,"
        " category or *_id",
        examples=[["messages.name"]],
    )
    template: TemplateName = Field("auto", description="how prompt and response become text")
    date: dt.date | None = Field(
        None,
        description="what chat templates that read the clock print, as 2026-12-31; by default the"
        " day on which the run was started first",
        examples=["2026-12-31"],
    )
    # 512 is the length in the recipe of Alpaca, from which the defaults of `Training` are, too,
    # except for the batch.
    max_length: PositiveInt = Field(
        512,
        description="tokens per example",
        json_schema_extra={"unit": "tokens", "with": "the positions of the base"},
    )
    # Truncation would teach a response without its end, and the model would not learn to stop.
    too_long: Literal["drop", "truncate"] = Field(
        "drop",
        description="what becomes of longer examples: drop counts them",
        json_schema_extra={"with": "data.max_length"},
    )
    learn: Literal["all", "last"] = Field(
        "all",
        description="answers of a conversation that are learned. all: in one example, or in one"
        " example each where the chat template changes earlier turns; weight: 0 on a message"
        " leaves it out",
    )
    # Refused by default: many bad rows are one format that was read as another.
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="rows without a response, of another form, or that the template refuses or"
        " shortens: refuse names all of them, drop counts them",
    )
    limit: PositiveInt | None = Field(
        None,
        description="use only the first so many training examples of each source: rows, or windows"
        " of texts",
        examples=[1000],
        json_schema_extra={"unit": "examples"},
    )
    test_limit: PositiveInt | None = Field(
        None,
        description="use only the first so many test examples of each source",
        examples=[200],
        json_schema_extra={"unit": "examples"},
    )
    # With packs all members see the same rows in other orders, which is what an experiment
    # compares. Bins compose new rows for each order.
    packing: Literal["none", "packs", "bins"] = Field(
        "none",
        description="several examples in one row of max_length tokens. packs: examples are packed"
        " once, and packs are ordered; bins: each order is packed by itself",
        json_schema_extra={"with": "not data.buckets, not dpo; bins: not population.level = batch"},
    )
    # Off by default: each length is a compilation of its own, and waste depends on the data.
    buckets: tuple[PositiveInt, ...] = Field(
        (),
        description="padded lengths below max_length; () pads to the longest example",
        examples=[[128, 256]],
        json_schema_extra={"unit": "tokens", "with": "not data.packing"},
    )

    @pydantic.model_validator(mode="after")
    def _check_sources(self) -> "Data":
        for split, sources in (("train", self.train), ("test", self.test)):
            for problem in _source_conflicts(split, list_sources(sources) if sources else ()):
                raise UserError(problem)
        return self

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


def _source_conflicts(split: str, sources: tuple[DataSource, ...]) -> Iterator[str]:
    labels = [source.label for source in sources]
    for source in sources:
        if labels.count(source.label) > 1:
            yield (
                f"data.{split} has the source {source.label} twice; give weight: 2 to use its rows"
                " twice, or each a name of its own"
            )
        if split == "test" and source.weight != 1:
            yield (
                f"data.test: weight {source.weight:g} of {source.label}: each held-out example"
                " counts once; remove it, or give limit"
            )
        if source.split and "@" in source.path:
            yield f"data.{split}: {source.path} names a split, and so does split; give one of them"
