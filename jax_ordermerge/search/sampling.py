"""Samplers: a grid, random draws, or Optuna's proposals, as candidates of a search space."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from jax_ordermerge.config.merge import Entry, Range, Search
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits
from jax_ordermerge.search.candidates import Candidate

if TYPE_CHECKING:
    import optuna

ROUNDS = 8  # batches of an Optuna sampler, which learns from the losses of one before the next
Value: TypeAlias = Any  # of a hyperparameter: a number, string, bool or None
Domain: TypeAlias = Range | tuple[Value, ...]  # a range, or choices
# Chooses the value of a hyperparameter: (name, domain) -> value.
Choose: TypeAlias = Callable[[str, Domain], Value]


class Sampler(Protocol):
    """Proposes candidates batch by batch."""

    def ask(self) -> list[Candidate]:
        """Return the next batch, an empty one at the end."""

    def tell(self, losses: Sequence[float]) -> None:
        """Take the losses of the last batch."""


def make_sampler(space: Search, members: int, seed: int) -> Sampler:
    """Return the sampler that a search space names.

    Args:
        space: what to try, and how.
        members: number of members, for their weights.
        seed: of all draws.

    Raises:
        UserError: the grid is larger than the budget, the sampler does not support the space, or
            its library is not installed.

    Example:
        >>> scales = {"low": 1, "high": 2, "steps": 3}
        >>> entry = {"method": "task_arithmetic", "parameters": {"scale": scales}}
        >>> sampler = make_sampler(Search(methods=(entry,)), members=2, seed=0)
        >>> [candidate.parameters["scale"] for candidate in sampler.ask()]
        [1.0, 1.5, 2.0]
    """
    if space.sampler == "grid":
        return _SingleBatch(_grid(space, seed))
    if space.sampler == "random":
        return _SingleBatch(_draw(space, members, seed))
    return _OptunaSampler(space, members, seed)


def extreme_candidates(space: Search, members: int, seed: int) -> list[Candidate]:
    """Return candidates that have every choice and both ends of every range of a space.

    Each of these values stands beside the first ones of the same entry.

    Example:
        >>> parameters = {"density": {"low": 0.2, "high": 0.5}, "normalize": [True, False]}
        >>> space = Search(methods=({"method": "ties", "parameters": parameters},))
        >>> for candidate in extreme_candidates(space, members=2, seed=0):
        ...     print(candidate.name)
        ties density=0.2 normalize=True
        ties density=0.5 normalize=True
        ties density=0.2 normalize=False
    """
    candidates = []
    for entry in space.methods:
        values = {
            name: (domain.low, domain.high) if isinstance(domain, Range) else domain
            for name, domain in _domains(entry, members).items()
        }
        first = {name: options[0] for name, options in values.items()}
        points = [first]
        for name, options in values.items():
            # weights on the simplex are right wherever they lie
            if not name.startswith("weight "):
                points += [{**first, name: option} for option in options[1:]]
        for point in points:
            choose = functools.partial(_read, point)
            candidates.append(_candidate(entry, choose, members, seed))
    return candidates


class _SingleBatch:
    """A sampler that proposes all candidates at once."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self._batches = [candidates]

    def ask(self) -> list[Candidate]:
        return self._batches.pop() if self._batches else []

    def tell(self, losses: Sequence[float]) -> None:
        """Ignore the losses: there is no next batch."""


def _candidate(entry: Entry, choose: Choose, members: int, seed: int) -> Candidate:
    """Return a candidate of an entry, with each open value chosen by `choose`."""

    def value(name: str, setting: Value) -> Value:
        return choose(name, setting) if isinstance(setting, (Range, tuple)) else setting

    entry_seed = value("seed", entry.seed)
    return Candidate(
        entry.method,
        {name: value(name, setting) for name, setting in entry.parameters.items()},
        None if entry.weights == "equal" else _weights(entry, choose, members),
        seed if entry_seed is None else int(entry_seed),
        # a method may have a parameter of this name, which is another range
        float(value("lambda" if "scale" in entry.parameters else "scale", entry.scale)),
        {group: float(value(f"lambda({group})", scale)) for group, scale in entry.groups.items()},
        None if entry.checkpoints is None else entry.checkpoints.model_dump(),
    )


def _weights(entry: Entry, choose: Choose, members: int) -> tuple[float, ...]:
    if not isinstance(entry.weights, str):
        return tuple(choose("weights", entry.weights))
    # Exponential variables divided by their sum are uniform on the simplex. Uniform variables
    # divided by their sum would favor its middle.
    uniform = Range(low=0.0, high=1.0 - 1e-6)
    drawn = np.array([-np.log(1 - choose(f"weight {i}", uniform)) for i in range(members)])
    shares = (drawn + 1e-9) / (drawn + 1e-9).sum()
    # Nine digits, as `Range.at` gives them: they can be typed into a config again.
    return tuple(float(f"{share:.9g}") for share in shares)


def _grid(space: Search, seed: int) -> list[Candidate]:
    # One more than the budget is enough to see that the grid is too large.
    candidates = list(itertools.islice(_grid_points(space, seed), space.budget + 1))
    if len(candidates) > space.budget:
        raise UserError(
            f"the grid has more candidates than the budget of {space.budget}; raise budget, "
            "lower steps, or set sampler: random"
        )
    return candidates


def _grid_points(space: Search, seed: int) -> Iterator[Candidate]:
    for entry in space.methods:
        if entry.weights == "simplex":
            raise UserError(
                f"{entry.method}: weights: simplex cannot be put on a grid; give a list of "
                "choices, or sampler: random"
            )
        domains = _domains(entry, members=0)
        axes = [x.values() if isinstance(x, Range) else x for x in domains.values()]
        for point in itertools.product(*axes):
            choose = functools.partial(_read, dict(zip(domains, point, strict=True)))
            yield _candidate(entry, choose, 0, seed)


def _read(point: Mapping[str, Value], name: str, _: Domain) -> Value:
    return point[name]


def _domains(entry: Entry, members: int) -> dict[str, Domain]:
    """Return what is open in an entry, by name, in the order that `_candidate` asks for it."""
    domains: dict[str, Domain] = {}

    def record(name: str, domain: Domain) -> Value:
        domains[name] = domain
        return domain.low if isinstance(domain, Range) else domain[0]

    _candidate(entry, record, members, 0)
    return domains


def _draw(space: Search, members: int, seed: int) -> list[Candidate]:
    generator = np.random.default_rng(stream_key_bits(seed, "search", "random"))

    def choose(_: str, domain: Domain) -> Value:
        if isinstance(domain, Range):
            return domain.at(generator.random())
        return domain[generator.integers(len(domain))]

    # Entries have equal shares of the budget, however many values they have open.
    entries = generator.integers(0, len(space.methods), space.budget)
    return [_candidate(space.methods[entry], choose, members, seed) for entry in entries]


class _OptunaSampler:
    """One of Optuna's samplers, asked in `ROUNDS` batches of equal size."""

    def __init__(self, space: Search, members: int, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                f"sampler {space.sampler} needs the extra search: pip install "
                "'jax_ordermerge[search]', or use grid or random"
            ) from error
        # A line per trial would drown the progress of the search.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        key = int(stream_key_bits(seed, "search", space.sampler)[0])
        sampler: optuna.samplers.BaseSampler
        if space.sampler == "tpe":
            # constant_liar: a batch is asked for before the losses of its first trials are known.
            sampler = optuna.samplers.TPESampler(
                seed=key, n_startup_trials=max(8, space.budget // 8), constant_liar=True
            )
        else:
            _check_numeric(space)
            sampler = optuna.samplers.CmaEsSampler(seed=key, warn_independent_sampling=False)
        self._study = optuna.create_study(sampler=sampler)
        self._space, self._members, self._seed = space, members, seed
        self._budget, self._trials = space.budget, list["optuna.Trial"]()

    def ask(self) -> list[Candidate]:
        # In batches, because successive halving needs candidates to compare.
        size = min(self._budget, max(1, -(-self._space.budget // ROUNDS)))
        self._budget -= size
        self._trials = [self._study.ask() for _ in range(size)]
        return [self._propose(trial) for trial in self._trials]

    def tell(self, losses: Sequence[float]) -> None:
        for trial, loss in zip(self._trials, losses, strict=True):
            # Optuna refuses infinite losses of a trial. A very large one ranks last as well.
            self._study.tell(trial, loss if math.isfinite(loss) else 1e30)

    def _propose(self, trial: "optuna.Trial") -> Candidate:
        entries = self._space.methods
        numbers = list(range(len(entries)))
        number = trial.suggest_categorical("entry", numbers) if len(entries) > 1 else 0

        def choose(name: str, domain: Domain) -> Value:
            # Prefixed: the same name in two entries is another hyperparameter.
            name = f"{number}: {name}"
            if isinstance(domain, Range):
                value = trial.suggest_float(name, domain.low, domain.high, log=domain.log)
                return float(f"{value:.9g}")
            # Optuna takes only plain values as choices, so it chooses their index.
            return domain[trial.suggest_categorical(name, list(range(len(domain))))]

        return _candidate(entries[number], choose, self._members, self._seed)


def _check_numeric(space: Search) -> None:
    if len(space.methods) != 1:
        raise UserError(
            "sampler cma-es varies the numbers of one method, the space has "
            f"{len(space.methods)}; use tpe, or leave one"
        )
    domains = _domains(space.methods[0], members=2)
    for name, domain in domains.items():
        if not isinstance(domain, Range):
            raise UserError(
                f"sampler cma-es varies numbers, {name} is a list of choices; give a range, "
                "or use tpe"
            )
    if len(domains) < 2:
        raise UserError(
            "sampler cma-es needs two numbers or more to vary, the space has "
            f"{len(domains)}; use tpe or grid"
        )
