"""Synthetic data: arithmetic word problems, and texts to pretrain a base model for them.

- `quickstart`: word problems of two steps. The answer shows the steps and ends in `#### number`, as
  in GSM8K.
- `quickstart_pretrain`: the skills behind them in another form (sums, who has what, what a verb
  does to an amount, copying, counting, sorting).
- `quickstart_told`: stories with the sums that follow, so that only the task itself is left to
  learn.
- `quickstart_preferences`: the problems with a right answer and one whose last sum is slightly
  wrong.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

import numpy as np

from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.rng import stream_key_bits

Item = TypeVar("Item")
Record = dict[str, str]

_NAMES = (
    "Ann Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kate Leo Mary Noah Olga Paul Rosa Sam "
    "Tina Tom Uma Vera Will Zoe"
)
_THINGS = (
    "apples books boxes cards coins cups eggs hats keys lemons maps nuts pears pens plums "
    "rings roses shells stamps stones toys"
)
NAMES: Final = tuple(_NAMES.split())
THINGS: Final = tuple(_THINGS.split())
GAINS: Final = ("buys", "finds", "gets", "makes", "wins")
LOSSES: Final = ("drops", "gives away", "lends", "loses", "sells")
# The largest amount. Each number up to it is one token, and its sums occur in the pretraining
# texts.
LARGEST: Final = 60


class Draws:
    """Uniform integers from the raw bits of PCG64.

    numpy promises that raw bits never change, but not that distributions do not.

    Example:
        >>> draws = Draws(0, "example")
        >>> [draws.below(10) for _ in range(5)]
        [3, 2, 1, 8, 9]
    """

    def __init__(self, seed: int, *names: str | int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(stream_key_bits(seed, *names).tolist()))

    def below(self, n: int) -> int:
        """Return an integer of `[0, n)`; the bias is below n / 2^64."""
        return (int(self._bits.random_raw()) * n) >> 64

    def between(self, low: int, high: int) -> int:
        """Return an integer of `[low, high]`."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[Item]) -> Item:
        """Return one item."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Return `count` different items in random order."""
        remaining = list(items)
        return [remaining.pop(self.below(len(remaining))) for _ in range(count)]


# ------------------------------------------------------------------ word problems


def _change(draws: Draws, amount: int) -> tuple[str, str, int]:
    """Return (verb phrase, step of the solution, new amount) of one gain or loss."""
    # Within the range whatever is drawn: nothing below 1 and nothing above `LARGEST`, so every
    # number is one token and no problem has to be thrown away.
    if amount < 4 or (amount <= LARGEST - 2 and draws.below(2)):
        by = draws.between(2, min(30, LARGEST - amount))
        return f"{draws.pick(GAINS)} {by} more", f"{amount} + {by} = {amount + by}", amount + by
    by = draws.between(2, min(30, amount - 1))
    return f"{draws.pick(LOSSES)} {by}", f"{amount} - {by} = {amount - by}", amount - by


def _changes(draws: Draws) -> Record:
    (name,), items, start = draws.sample(NAMES, 1), draws.pick(THINGS), draws.between(2, 40)
    first, step, amount = _change(draws, start)
    second, last, amount = _change(draws, amount)
    question = (
        f"{name} has {start} {items}. {name} {first} and then {second}."
        f" How many {items} does {name} have?"
    )
    return {"question": question, "answer": f"{step}, {last}. #### {amount}"}


def _bystander(draws: Draws) -> Record:
    name, bystander = draws.sample(NAMES, 2)
    items, start = draws.pick(THINGS), draws.between(2, 40)
    facts = [f"{name} has {start} {items}.", f"{bystander} has {draws.between(2, 40)} {items}."]
    first, step, amount = _change(draws, start)
    second, last, amount = _change(draws, amount)
    # In random order: else the first number of a problem would always be the one that counts.
    story = " ".join(draws.sample(facts, 2))
    question = f"{story} {name} {first} and {second}. How many {items} does {name} have?"
    return {"question": question, "answer": f"{step}, {last}. #### {amount}"}


def _two_people(draws: Draws) -> Record:
    first, second = draws.sample(NAMES, 2)
    # At most 28: then two more than `a` still leave the sum within `LARGEST`.
    items, a = draws.pick(THINGS), draws.between(4, 28)
    if draws.below(2):
        by = draws.between(2, min(20, LARGEST - 2 * a))
        word, sign, b = "more", "+", a + by
    else:
        by = draws.between(2, a - 1)
        word, sign, b = "fewer", "-", a - by
    question = (
        f"{first} has {a} {items}. {second} has {by} {word} than {first}."
        f" How many {items} do {first} and {second} have?"
    )
    return {
        "question": question,
        "answer": f"{a} {sign} {by} = {b}, {a} + {b} = {a + b}. #### {a + b}",
    }


PROBLEMS: Final = (_changes, _bystander, _two_people)


def _is_test(record: Record) -> bool:
    # Split by the solution, not by the question: no training problem has the numbers of a test
    # problem in other words.
    return int(stream_key_bits(0, "synthetic", "split", record["answer"])[0]) < 2**29


def _problem(draws: Draws, split: str) -> Record:
    # Rejection: a problem of the wrong split is drawn again, so both splits have one distribution
    # up to the solutions that the other has.
    while True:
        record = draws.pick(PROBLEMS)(draws)
        if _is_test(record) == (split == "test"):
            return record


# ------------------------------------------------------------------ what the base model reads


def _equation(draws: Draws) -> str:
    if draws.below(2):
        a = draws.between(1, LARGEST - 1)
        # One operand is at most 30, as in the steps of the problems.
        b = draws.between(1, min(30, LARGEST - a))
        if draws.below(2) and b > 1:
            a, b = b, a
        return f"{a} + {b} = {a + b}"
    a = draws.between(2, LARGEST)
    b = draws.between(1, min(30, a - 1))
    return f"{a} - {b} = {a - b}"


def _sums(draws: Draws) -> str:
    return f"Sums: {', '.join(_equation(draws) for _ in range(6))}."


def _holdings(draws: Draws) -> str:
    people, items = draws.sample(NAMES, 3), draws.sample(THINGS, 3)
    amounts = [str(n) for n in draws.sample(range(2, LARGEST + 1), 3)]
    facts = [f"{p} has {n} {t}." for p, n, t in zip(people, amounts, items, strict=True)]
    selected = draws.sample(range(3), 2)
    if draws.below(2):
        return f"{' '.join(facts)} Again: {' '.join(facts[i] for i in selected)}"
    questions = [f"Who has {amounts[i]} {items[i]}? {people[i]}." for i in selected]
    return f"{' '.join(facts)} {' '.join(questions)}"


def _verbs(draws: Draws) -> str:
    parts = []
    for name in draws.sample(NAMES, 2):
        start, items = draws.between(4, 40), draws.pick(THINGS)
        phrase, _, amount = _change(draws, start)
        word = "more" if amount > start else "fewer"
        parts.append(
            f"{name} has {start} {items} and then {phrase}."
            f" Now {abs(amount - start)} {word} than {start}."
        )
    return " ".join(parts)


def _copies(draws: Draws) -> str:
    words = " ".join(draws.sample((*NAMES, *THINGS, *map(str, range(2, LARGEST + 1))), 12))
    return f"Copy: {words}. Again: {words}."


def _lists(draws: Draws) -> str:
    numbers = draws.sample(range(LARGEST + 1), 6)
    start, step = draws.between(0, 30), draws.between(1, 3)
    if draws.below(2):
        return f"Count: {' '.join(str(start + step * i) for i in range(10))}."
    return f"Sort: {' '.join(map(str, numbers))}. Again: {' '.join(map(str, sorted(numbers)))}."


# Kinds are drawn uniformly: a kind that is listed twice is twice as frequent.
TEXTS: Final = (_sums, _sums, _sums, _holdings, _holdings, _holdings, _copies, _verbs, _lists)


def _text(draws: Draws, split: str) -> Record:
    return {"text": draws.pick(TEXTS)(draws)}


def _story(draws: Draws, split: str) -> Record:
    """A problem as a story: its facts and the sums that follow, without question and answer."""
    problem = _problem(draws, split)
    facts, steps = problem["question"].split(" How many")[0], problem["answer"].split(" ####")[0]
    return {"text": f"{facts} Sums: {steps}"}


def _preference(draws: Draws, split: str) -> Record:
    """A problem with its answer, and with the same answer except for a wrong last sum."""
    problem = _problem(draws, split)
    steps, amount = problem["answer"].split(". #### ")
    result = int(amount)
    wrong = draws.pick(
        # Close to the right one: only by computing it can a model prefer the right answer.
        [n for n in range(max(1, result - 3), min(LARGEST, result + 3) + 1) if n != result]
    )
    rejected = f"{steps.removesuffix(amount)}{wrong}. #### {wrong}"
    return {"prompt": problem["question"], "chosen": problem["answer"], "rejected": rejected}


# ------------------------------------------------------------------ the table


class Dataset(NamedTuple):
    """A maker of records and how many there are of each split."""

    make: Callable[[Draws, str], Record]
    sizes: dict[str, int]


DATASETS: Final = {
    "quickstart": Dataset(_problem, {"train": 1536, "test": 400}),
    "quickstart_preferences": Dataset(_preference, {"train": 2048, "test": 400}),
    "quickstart_pretrain": Dataset(_text, {"train": 128_000, "test": 1_000}),
    "quickstart_told": Dataset(_story, {"train": 32_000, "test": 400}),
}


def generated(name: str, split: str = "train") -> list[Record]:
    """Return the records of a generated dataset; always the same ones.

    Args:
        name: a key of `DATASETS`.
        split: `train` or `test`. No question or solution of the test split of `quickstart` is in
            its train split.

    Returns:
        Records with the strings `question` and `answer`, or `prompt`, `chosen` and `rejected`, or
        `text`.

    Raises:
        UserError: there is no such dataset or split.

    Example:
        >>> record = generated("quickstart", "test")[0]
        >>> record["question"]
        'Uma has 27 stones. Dora has 26 fewer than Uma. How many stones do Uma and Dora have?'
        >>> record["answer"]
        '27 - 26 = 1, 27 + 1 = 28. #### 28'
    """
    if name not in DATASETS:
        raise UserError(f"generated:{name} does not exist{did_you_mean(name, DATASETS)}")
    make, sizes = DATASETS[name]
    if split not in sizes:
        raise UserError(f"generated:{name} has no split '{split}'{did_you_mean(split, sizes)}")
    # Seed 0 and not that of the run: a data set is a file that is not stored.
    draws = Draws(0, "synthetic", name, split)
    records: dict[tuple[str, ...], Record] = {}
    # Duplicates are dropped by their key, in the order of their first draw.
    while len(records) < sizes[split]:
        record = make(draws, split)
        records[tuple(record.values())] = record
    return list(records.values())
