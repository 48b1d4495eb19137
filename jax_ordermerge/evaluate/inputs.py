"""The data of tasks: rows of their files, shots, and prompts in the format of the training data."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jax_ordermerge.config import Data
from jax_ordermerge.config.data import DataSource, list_sources
from jax_ordermerge.config.evaluation import ShotsTask, Task
from jax_ordermerge.data import chat, files, formats, source
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.messages import Message
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import encode
from jax_ordermerge.evaluate.prompts import Formatter, Prompt, Question, make_question
from jax_ordermerge.json_types import Json, JsonRow
from jax_ordermerge.rng import stream_key_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class TaskInputs:
    """Reads what tasks ask.

    Attributes:
        data: section `data` of the config: how rows are read and templated where the task has no
            templates, and the files where it names none.
        tokenizer: of the model.
        test: examples of `data.test` if they are loaded already.
        seed: of the run, for shots that are drawn.
    """

    data: Data
    tokenizer: "PreTrainedTokenizerBase"
    test: Examples | None = None
    seed: int = 0

    def rows(self, task: Task) -> list[Json]:
        """Return all rows of the file of a task, its limit not yet applied."""
        # all rows: the shots of MBPP are among them, and a limit could cut them off
        return [
            row
            for item in self._sources(task)
            for row in files.load(item.path, item.split or "test", limit=item.limit)
        ]

    def questions(self, task: ShotsTask, formatter: Formatter | None = None) -> list[Question]:
        """Return the items of a task, each after its shots.

        Args:
            task: its items are those of `data`, or of the config's `data.test`; its shots come
                from `shots_from`, or the config's `data.train`.
            formatter: of rows; by default that of the training data.

        Raises:
            UserError: there are no data, a row does not fit, or there are too few shots.
        """
        # The limit of data.test does not apply to the file of a task.
        data = self.data if task.data is None else self.data.model_copy(update={"test_limit": None})
        pool = self._shot_pool(task)
        questions: list[Question] = []
        for item in self._sources(task):
            settings = source.settings_of(item, data, "test")
            if task.limit is not None:
                # The limit is passed on: of a hub dataset no more rows are downloaded.
                left = task.limit - len(questions)
                settings = settings.model_copy(update={"limit": min(settings.limit or left, left)})
            _, rows = source.read_table(item, settings, "test")
            format_rows = formatter or self._training_formatter(rows, settings, item.path)
            for row in rows:
                number = len(questions)
                shots = self._shots(task, pool, row, number)
                # Numbered through all sources, as the items of a task are.
                questions.append(make_question(task, format_rows, row, shots, number))
            if len(questions) == task.limit:
                break
        return questions

    def prompts(self, task: ShotsTask, formatter: Formatter | None = None) -> list[Prompt]:
        """Return the items of a task as tokens that a model continues.

        Without a formatter and shots the tokens are those that the model was trained to continue.

        Raises:
            UserError: see `questions`.
        """
        # The same tokens as in training, by the same code: a prompt that is tokenized as one text
        # may differ in the tokens around the borders of the template.
        if formatter is None and not task.shots:
            examples = self._examples(task)
            rows = range(min(task.limit or len(examples), len(examples)))
            numbers = examples.source_numbers
            texts = [row for row in rows if examples.sources[numbers[row]].format == "text"]
            if texts:
                raise UserError(
                    f"evaluation task {task.name}: its data have texts"
                    f" ({examples.place(texts[0])}), which ask nothing; give the task its own data"
                )
            return [
                Prompt(
                    int(examples.ids[row]),
                    examples.prompts[row],
                    examples.prompt(row).tolist(),
                    examples.responses[row],
                )
                for row in rows
            ]
        return [
            Prompt(question.id, question.prompt, self._tokens(question.context), question.reference)
            for question in self.questions(task, formatter)
        ]

    def instruction_tokens(self, row: JsonRow) -> list[int]:
        """Return the tokens of an instruction in the template of the config.

        Args:
            row: with the column `instruction` and perhaps `input`.

        Raises:
            UserError: the row has no instruction.
        """
        if not isinstance(row.get("instruction"), str):
            raise UserError(
                "a file of instructions needs the column instruction, its columns are "
                f"{', '.join(row)}"
            )
        # AlpacaEval's instructions have the Alpaca template unless the config says otherwise.
        record = Record.single_turn(
            row["instruction"], alpaca_input=formats.optional_string(row, "input")
        )
        template = chat.resolve_template(self.data.template, "alpaca", [record], self.tokenizer)
        return chat.prompt_tokens(record, template, self.tokenizer).tolist()

    def _sources(self, task: Task) -> tuple[DataSource, ...]:
        sources = task.data or self.data.test
        if sources is None:
            raise _no_data(task)
        return list_sources(sources)

    def _examples(self, task: Task) -> Examples:
        data, examples = self.data, self.test
        # The limit of data.test does not apply to the file of a task.
        if task.data is not None:
            data = data.model_copy(update={"test": task.data, "test_limit": None})
        # loaded once per run where possible: all models share the tokenized test examples
        if task.data is not None or examples is None:
            examples = source.load_examples(data, self.tokenizer, "test", seed=self.seed)
        if examples is None:
            raise _no_data(task)
        return examples

    def _tokens(self, context: str | Sequence[Message]) -> list[int]:
        if isinstance(context, str):
            return encode(self.tokenizer, context)
        # The empty answer marks where generation starts; the chat template adds its header.
        record = Record(messages=(*context, {"role": "assistant", "content": ""}))
        return chat.prompt_tokens(record, "chat", self.tokenizer).tolist()

    def _training_formatter(self, rows: Sequence[JsonRow], settings: Data, path: str) -> Formatter:
        # One format and template for all rows of a source, from the first: rows that differ in
        # their columns are an error.
        form = formats.detect(rows, path) if settings.format == "auto" else settings.format

        def record(row: JsonRow) -> Record:
            return formats.normalize([row], form, path)[0]

        template = chat.resolve_template(settings.template, form, [record(rows[0])], self.tokenizer)
        if template == "chat":
            return Formatter(
                lambda row: record(row).prompt,
                lambda row: record(row).response,
                lambda row: record(row).response,
                chat=True,
            )
        return Formatter(
            lambda row: chat.render(record(row), template)[0],
            lambda row: chat.render(record(row), template)[1],
            lambda row: record(row).response,
        )

    def _shot_pool(self, task: ShotsTask) -> list[Json]:
        if not task.shots:
            return []
        # the default of data.train is a toy
        if task.shots_from is None and "train" not in self.data.model_fields_set:
            raise UserError(
                f"evaluation task {task.name} has shots = {task.shots} and no source of them; give"
                " shots_from or data.train"
            )
        sources = list_sources(task.shots_from or self.data.train)
        # Shots are written as the items are, so they must be of one kind, and only the user knows
        # of which.
        if len(sources) > 1:
            raise UserError(
                f"evaluation task {task.name}: data.train has {len(sources)} sources; give"
                " shots_from, the source of the shots"
            )
        item = sources[0]
        # One more than needed, because a row is never its own shot.
        limit = task.shots + 1 if task.shots_order == "first" else None
        settings = source.settings_of(item, self.data, "train").model_copy(update={"limit": limit})
        _, rows = source.read_table(item, settings, "train")
        if len(rows) < task.shots:
            raise UserError(
                f"evaluation task {task.name}: {item.path} has {len(rows)} rows, fewer than shots ="
                f" {task.shots}; lower it"
            )
        return rows

    def _shots(
        self, task: ShotsTask, pool: Sequence[JsonRow], row: JsonRow, number: int
    ) -> Sequence[JsonRow]:
        # Items and shots may be of one file. A row among its own shots would give its answer away.
        shots = [shot for shot in pool if shot != row]
        if len(shots) < task.shots:
            raise UserError(
                f"evaluation task {task.name}: too few shots are left for item {number}, which is "
                "one of them; lower shots"
            )
        if task.shots_order == "first":
            return shots[: task.shots]
        # The stream is named by the item, so its shots do not depend on `limit`.
        key = stream_key_bits(self.seed, "shots", task.name, number)
        order = np.random.default_rng(key).permutation(len(shots))
        return [shots[i] for i in order[: task.shots]]


def _no_data(task: Task) -> UserError:
    return UserError(
        f"evaluation task {task.name} has no data; set data.test or the task's own data"
    )
