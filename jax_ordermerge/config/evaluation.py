"""A task of an evaluation, as a config names it: what a model is asked, and how its answers count."""

from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from jax_ordermerge.config.section import Section

PROGRAMS: Final = ("humaneval", "mbpp")  # kinds whose answers are programs
LIKELIHOODS: Final = ("multiple_choice", "perplexity")  # kinds that generate nothing
OUTPUTS: Final = "alpaca_outputs"  # the kind whose answers are for a judge
_COLUMNS: Final = (
    *LIKELIHOODS,
    *PROGRAMS,
    OUTPUTS,
)  # kinds that read columns of their own, not data.test
_OWN: Final[dict[str, tuple[str, ...]]] = {
    "samples": PROGRAMS,
    "temperature": PROGRAMS,
    "top_k": PROGRAMS,
    "top_p": PROGRAMS,
    "choices": ("multiple_choice",),
    "answer": ("multiple_choice",),
    "delimiter": ("multiple_choice",),
}


class Task(Section):
    """One task. Texts in braces are Jinja templates over the columns of a row: `"Question: {{question}}\\nAnswer:"`."""

    name: str
    kind: Literal[
        "exact",
        "gsm8k",
        "gsm8k_flexible",
        "gsm8k_cot",
        "math",
        "number",
        "humaneval",
        "mbpp",
        "multiple_choice",
        "perplexity",
        "alpaca_outputs",
    ] = Field(
        "exact",
        description="exact: the whole answer; gsm8k: the number after ####; gsm8k_cot: after 'The answer is'; gsm8k_flexible, number: the last"
        " number; math: what is \\\\boxed; humaneval, mbpp: a program, run on the tests of its file in a sandbox; multiple_choice: the choice"
        " found likeliest; perplexity: of texts; alpaca_outputs: a file of answers for a judge",
    )
    data: str | None = Field(
        None,
        description="file or hub dataset; by default data.test. Kinds with columns of their own need it",
    )
    limit: PositiveInt | None = Field(None, description="only the first so many items")
    max_new_tokens: PositiveInt = 256
    prompt: str | None = Field(
        None,
        description="template of what is asked; by default rows are read and templated as the training data are",
    )
    response: str | None = Field(
        None,
        description="template of what follows the prompt in a shot (' {{answer}}'); of perplexity, the text ({{text}})",
    )
    reference: str | None = Field(
        None,
        description="template of the right answer; by default the response without spaces around it",
    )
    choices: str | None = Field(
        None, description="multiple_choice: the list of choices ({{choices}})"
    )
    answer: str | None = Field(
        None, description="multiple_choice: the right one, its text or number from 0 ({{answer}})"
    )
    delimiter: str = Field(" ", description="multiple_choice: between prompt and choice")
    description: str = Field("", description="stands before the shots")
    shots: NonNegativeInt = Field(0, description="solved examples before each item")
    shots_from: str | None = Field(
        None, description="file or hub dataset of the shots, by default data.train"
    )
    shots_order: Literal["first", "random"] = Field(
        "first",
        description="the first of their file, or other ones for each item, drawn by seed and number of the item",
    )
    shots_between: str = Field("\n\n", description="between shots, and before the item")
    stop: tuple[str, ...] = Field((), description="an answer ends before the first of these texts")
    samples: PositiveInt = Field(
        1, description="humaneval, mbpp: programs drawn a problem, for pass@1, 10 and 100"
    )
    temperature: NonNegativeFloat = Field(0.0, description="humaneval, mbpp: 0 is greedy")
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def new_tokens(self) -> int:
        """How many tokens a model writes for an item at most: none where it only reads."""
        return 0 if self.kind in LIKELIHOODS else self.max_new_tokens

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("kind") == "perplexity":
            return {**given, "response": given.get("response") or "{{text}}"}
        if given.get("kind") == "multiple_choice":
            own = {
                "choices": "{{choices}}",
                "answer": "{{answer}}",
                "prompt": "Question: {{question}}\nAnswer:",
            }
            return {**given, **{name: given.get(name) or text for name, text in own.items()}}
        return given

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Task":
        where, fields = "evaluation.tasks", type(self).model_fields
        given = [name for name in fields if getattr(self, name) != fields[name].default]
        for name in given:
            if self.kind not in _OWN.get(name, (self.kind,)):
                raise ValueError(
                    f"{where}: {name} goes with kind {' or '.join(_OWN[name])}, not {self.kind}; remove it"
                )
        drawn = [name for name in ("samples", "top_k", "top_p") if name in given]
        if drawn and not self.temperature:
            raise ValueError(
                f"{where}: {drawn[0]} needs programs that are drawn; give a temperature above 0"
            )
        if self.kind in _COLUMNS and self.data is None:
            raise ValueError(f"{where}: kind {self.kind} needs its file or hub dataset; give data")
        of_shots = [name for name in given if name.startswith("shots")]
        asked_otherwise = self.kind in (*PROGRAMS, "perplexity", OUTPUTS)
        if asked_otherwise and of_shots:
            raise ValueError(f"{where}: {of_shots[0]} does not go with kind {self.kind}; remove it")
        if of_shots and not self.shots:
            raise ValueError(f"{where}: {of_shots[0]} needs shots above 0; give both or neither")
        if self.kind in LIKELIHOODS and self.stop:
            raise ValueError(
                f"{where}: stop ends generated answers, kind {self.kind} has none; remove it"
            )
        if self.kind not in _COLUMNS and (self.prompt is None) != (self.response is None):
            raise ValueError(f"{where}: prompt and response go together; give both or neither")
        if self.reference is not None and (self.prompt is None or self.kind in _COLUMNS):
            raise ValueError(
                f"{where}: reference goes with a task that has a prompt and is scored by its answer; remove it"
            )
        return self
