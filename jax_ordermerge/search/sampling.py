"""Candidates out of a space: all points of a grid, random draws, or what an optimizer asks for next. Everything seeded."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jax_ordermerge.config.merge import Entry, Range, Search
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits
from jax_ordermerge.search.candidates import Candidate

ROUNDS = 8  # in which an optimizer's budget is asked for: it learns between them
Pick = Callable[[str, Any], Any]  # (name, range or choices) -> value


class Sampler(Protocol):
    """Gives candidates batch by batch."""

    def ask(self) -> list[Candidate]:
        """Return the next batch, nothing where there is no more."""

    def tell(self, values: Sequence[float]) -> None:
        """Take the losses of the last batch."""


def sampler(space: Search, members: int, seed: int) -> Sampler:
    """Return the sampler that a space names.

    Args:
        space: what to try, and how.
        members: number of members, for their weights.
        seed: of all draws.

    Raises:
        UserError: the grid is larger than the budget, the sampler cannot take the space, or its library is not installed.

    Example:
        >>> line = Search(
        ...     methods=(
        ...         {
        ...             "method": "task_arithmetic",
        ...             "parameters": {"scale": {"low": 1, "high": 2, "steps": 3}},
        ...         },
        ...     )
        ... )
        >>> [one.parameters["scale"] for one in sampler(line, members=2, seed=0).ask()]
        [1.0, 1.5, 2.0]
    """
    if space.sampler == "grid":
        return _Once(_grid(space, seed))
    if space.sampler == "random":
        return _Once(_random(space, members, seed))
    return _Optuna(space, members, seed)


def firsts(space: Search, members: int, seed: int) -> list[Candidate]:
    """Return one candidate of every entry of a space: with the lowest numbers and the first choices.

    Example:
        >>> [
        ...     one.name
        ...     for one in firsts(
        ...         Search(methods=({"method": "ties", "parameters": {"density": [0.2, 0.5]}},)),
        ...         2,
        ...         0,
        ...     )
        ... ]
        ['ties density=0.2']
    """

    def pick(_: str, knob: Any) -> Any:
        return knob.low if isinstance(knob, Range) else knob[0]

    return [_candidate(entry, pick, members, seed) for entry in space.methods]


class _Once:
    """All candidates in one batch."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self._left = [candidates]

    def ask(self) -> list[Candidate]:
        return self._left.pop() if self._left else []

    def tell(self, values: Sequence[float]) -> None:
        """Nothing is learned."""


def _candidate(entry: Entry, pick: Pick, members: int, seed: int) -> Candidate:
    """Make a candidate of an entry, every open value chosen by `pick`."""

    def of(name: str, knob: Any) -> Any:
        return pick(name, knob) if isinstance(knob, (Range, tuple)) else knob

    own = of("seed", entry.seed)
    return Candidate(
        entry.method,
        {name: of(name, knob) for name, knob in entry.parameters.items()},
        None if entry.weights == "equal" else _weights(entry, pick, members),
        seed if own is None else int(own),
        float(of("scale", entry.scale)),
        {group: float(of(f"lambda({group})", knob)) for group, knob in entry.groups.items()},
    )


def _weights(entry: Entry, pick: Pick, members: int) -> tuple[float, ...]:
    if entry.weights != "simplex":
        return tuple(pick("weights", entry.weights))
    # -log of uniform numbers, divided by their sum, are spread evenly over the simplex
    drawn = np.array(
        [
            -np.log(1 - pick(f"weight {member}", Range(low=0.0, high=1.0 - 1e-6)))
            for member in range(members)
        ]
    )
    shares = (drawn + 1e-9) / (drawn + 1e-9).sum()
    return tuple(float(f"{share:.9g}") for share in shares)


def _grid(space: Search, seed: int) -> list[Candidate]:
    found = list(itertools.islice(_points(space, seed), space.budget + 1))
    if len(found) > space.budget:
        raise UserError(
            f"the grid has more candidates than the budget of {space.budget}; raise budget, lower steps, or set sampler: random"
        )
    return found


def _points(space: Search, seed: int) -> Iterator[Candidate]:
    for entry in space.methods:
        if entry.weights == "simplex":
            raise UserError(
                f"{entry.method}: weights: simplex cannot be put on a grid; give a list of choices, or sampler: random"
            )
        open_: dict[str, Sequence[Any]] = {}

        def note(name: str, knob: Any, open_: dict[str, Sequence[Any]] = open_) -> Any:
            open_[name] = knob.values() if isinstance(knob, Range) else knob
            return open_[name][0]

        _candidate(entry, note, 0, seed)
        for values in itertools.product(*open_.values()):
            yield _candidate(entry, _from(dict(zip(open_, values, strict=True))), 0, seed)


def _from(chosen: Mapping[str, Any]) -> Pick:
    return lambda name, _: chosen[name]


def _random(space: Search, members: int, seed: int) -> list[Candidate]:
    generator = np.random.default_rng(stream_key_bits(seed, "search", "random"))

    def pick(_: str, knob: Any) -> Any:
        return (
            knob.at(generator.random())
            if isinstance(knob, Range)
            else knob[generator.integers(len(knob))]
        )

    entries = generator.integers(0, len(space.methods), space.budget)
    return [_candidate(space.methods[number], pick, members, seed) for number in entries]


class _Optuna:
    """What one of Optuna's samplers asks for, in `ROUNDS` batches; it is told the losses of a batch before the next."""

    def __init__(self, space: Search, members: int, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                f"sampler {space.sampler} needs the extra search: pip install 'jax_ordermerge[search]', or use grid or random"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        number = int(stream_key_bits(seed, "search", space.sampler)[0])
        if space.sampler == "tpe":
            chosen: Any = optuna.samplers.TPESampler(
                seed=number, n_startup_trials=max(8, space.budget // 8), constant_liar=True
            )
        else:
            _check_numeric(space)
            chosen = optuna.samplers.CmaEsSampler(seed=number, warn_independent_sampling=False)
        self._study = optuna.create_study(sampler=chosen)
        self._space, self._members, self._seed = space, members, seed
        self._left, self._open = space.budget, list[Any]()

    def ask(self) -> list[Candidate]:
        size = min(self._left, max(1, -(-self._space.budget // ROUNDS)))
        self._left -= size
        self._open = [self._study.ask() for _ in range(size)]
        return [self._one(trial) for trial in self._open]

    def tell(self, values: Sequence[float]) -> None:
        for trial, value in zip(self._open, values, strict=True):
            self._study.tell(trial, value)

    def _one(self, trial: Any) -> Candidate:
        entries = self._space.methods
        number = (
            trial.suggest_categorical("entry", list(range(len(entries)))) if len(entries) > 1 else 0
        )

        def pick(name: str, knob: Any) -> Any:
            name = f"{number}: {name}"
            if isinstance(knob, Range):
                return float(f"{trial.suggest_float(name, knob.low, knob.high, log=knob.log):.9g}")
            return knob[trial.suggest_categorical(name, list(range(len(knob))))]

        return _candidate(entries[number], pick, self._members, self._seed)


def _check_numeric(space: Search) -> None:
    if len(space.methods) != 1:
        raise UserError(
            f"sampler cma-es varies the numbers of one method, the space has {len(space.methods)}; use tpe, or leave one"
        )
    numbers = 0

    def pick(name: str, knob: Any) -> Any:
        nonlocal numbers
        if not isinstance(knob, Range):
            raise UserError(
                f"sampler cma-es varies numbers, {name} is a list of choices; give a range, or use tpe"
            )
        numbers += 1
        return knob.low

    _candidate(space.methods[0], pick, 2, 0)
    if numbers < 2:
        raise UserError(
            f"sampler cma-es needs two numbers or more to vary, the space has {numbers}; use tpe or grid"
        )
