"""Hypotheses about runs, written down before them: what is compared, how, in which order."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from jax_ordermerge.config.experiment import read_yaml
from jax_ordermerge.config.section import Section, parse

Setting = str | int | float | bool | None

Test = Literal["less", "greater", "two-sided", "equivalent"]


class Part(Section):
    """A quantity and its test: a slope by position, or a measure of a model less its rival's."""

    slope: PositiveInt | None = Field(
        None, description="epoch of the slope of the final loss by position"
    )
    measure: str = Field("loss", description="loss, or the name of a task (share of right answers)")
    model: str | None = Field(
        None, description="merge or control, mean_member or best_member (chosen on validation)"
    )
    rival: str | None = Field(None, description="like model; none for the measure itself")
    at: Literal["one", "own"] = Field(
        "one", description="each side at lambda 1, or at the lambda of its lowest validation loss"
    )
    test: Test
    margin: PositiveFloat | Literal["half"] | None = Field(
        None,
        description="of equivalence, in units of the quantity; half: half of the second run of a"
        " pair",
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Part":
        # a slope is that of the members, so it has no model
        if (self.slope is None) == (self.model is None):
            raise ValueError("expected either slope or model")
        if self.slope is not None and (self.rival is not None or self.at == "own"):
            raise ValueError(f"slope = {self.slope}: expected no rival and no at = own")
        if self.measure != "loss" and (self.slope is not None or self.at == "own"):
            raise ValueError(
                f"measure = {self.measure!r}: slopes and lambdas are known of the loss alone"
            )
        # no difference is shown to be 0: equivalence is within a margin, stated before the runs
        if self.test == "equivalent" and self.margin is None:
            raise ValueError("test = 'equivalent': expected a margin")
        # a claim with a direction does not test equivalence: nothing would read its margin
        if self.test in ("less", "greater") and self.margin is not None:
            raise ValueError(f"margin with test = {self.test!r}: expected two-sided or equivalent")
        return self

    @property
    def stated_margin(self) -> float | None:
        """The margin as a number; None where there is none, or where a pair of runs gives it."""
        return None if self.margin == "half" else self.margin

    @property
    def label(self) -> str:
        """Name of the quantity in tables."""
        if self.slope is not None:
            return f"slope by position, epoch {self.slope}"
        rival = f" less {self.rival}" if self.rival else ""
        lengths = ", each at its own lambda" if rival else ", at its own lambda"
        return f"{self.measure}: {self.model}{rival}{lengths if self.at == 'own' else ''}"


class Hypothesis(Section):
    """A claim, the runs that it is about, and the tests that decide it."""

    name: str
    claim: str
    # a pair compares two runs: the quantity in the first less that in the second
    runs: tuple[str | tuple[str, str], ...] = Field(min_length=1)
    decide: Literal["mean", "each", "told"] = Field(
        description="mean: the mean over the runs decides; each: every run; told: nothing does"
    )
    parts: tuple[Part, ...] = Field((), description="all of them must hold")
    secondary: tuple[Part, ...] = Field(
        (), alias="told", description="shown beside, without a decision"
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Hypothesis":
        # parts that decide nothing would look like tests
        if (self.decide == "told") == bool(self.parts):
            raise ValueError(
                f"{self.name}: expected parts to decide by, or decide: told with parts under told"
            )
        pairs = {isinstance(run, tuple) for run in self.runs}
        # the mean over runs would mix a quantity with differences of it
        if len(pairs) > 1:
            raise ValueError(f"{self.name}: runs: expected names, or pairs of names, and not both")
        for part in (*self.parts, *self.secondary):
            if part.margin == "half" and pairs == {False}:
                raise ValueError(f"{self.name}: margin = half: expected pairs of runs")
        return self


class Hypotheses(Section):
    """The hypotheses of one page, tested in their order until one fails."""

    title: str
    # from one half on, a claim and its opposite could both be significant
    level: float = Field(0.05, gt=0, lt=0.5, description="of each test")
    settings: dict[str, Setting] = Field(
        {}, description="what the configs of all runs have, by dotted key"
    )
    runs: dict[str, dict[str, Setting]] = Field(
        description="name of each run, and what its config has beside the settings of all"
    )
    hypotheses: tuple[Hypothesis, ...] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Hypotheses":
        names = [hypothesis.name for hypothesis in self.hypotheses]
        # rows of the CSV, and the note about the one that failed, refer to hypotheses by name
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"hypotheses: {', '.join(repeated)} is there twice")
        named = {
            name
            for hypothesis in self.hypotheses
            for run in hypothesis.runs
            for name in ([run] if isinstance(run, str) else run)
        }
        if unknown := sorted(named - set(self.runs)):
            raise ValueError(f"hypotheses: {', '.join(unknown)}: expected names among runs")
        return self


@dataclass(frozen=True)
class Plan:
    """Hypotheses and the digest of their file.

    Attributes:
        hypotheses: the contents.
        digest: SHA-256 of the bytes of the file, in hex.
        file: its name.
    """

    hypotheses: Hypotheses
    digest: str
    file: str


def read_hypotheses(file: str | Path) -> Plan:
    """Read a file of hypotheses.

    Raises:
        UserError: no such file, or one that is not a valid list of hypotheses.
    """
    path = Path(file)
    raw = read_yaml(path, "hypotheses", "hypotheses:")
    # of the bytes: anyone can compare it with sha256sum, and a changed comment shows as well
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Plan(parse(Hypotheses, raw, str(file)), digest, path.name)
