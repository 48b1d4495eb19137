"""What the members are asked while they are trained: a section of the config."""

from pydantic import Field, PositiveInt

from jax_ordermerge.config.section import Section


class Samples(Section):
    """Answers to fixed prompts while training, greedy, in metrics/samples.jsonl. Training sees none of it: no order, no random choice."""

    every: PositiveInt | None = Field(
        None, description="steps between answers, and after the last one; null asks nothing"
    )
    prompts: tuple[str, ...] = Field(
        (),
        description="in the template of the data; by default those of the first examples of validation, else test",
    )
    count: PositiveInt = Field(
        4, description="how many examples are asked where no prompts are given"
    )
    max_new_tokens: PositiveInt = 64
