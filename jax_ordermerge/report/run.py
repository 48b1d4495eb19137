"""The contents of a run directory, as the pages read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from jax_ordermerge import console
from jax_ordermerge.config import read_yaml
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import (
    RunLayout,
    is_cut_off,
    read_json,
    read_jsonl,
    read_npz,
    read_search,
)
from jax_ordermerge.record import refuse_edited_config
from jax_ordermerge.report import formatting
from jax_ordermerge.report.differences import Comparison, compare, over_populations
from jax_ordermerge.report.document import Paragraph


@dataclass(frozen=True)
class Run:
    """The contents of a run directory; None or empty where a stage has no output yet."""

    layout: RunLayout
    config: Json
    data: Json | None = None
    digests: Json | None = None  # of the orders, by member
    training_log: Sequence[Json] = ()
    generated_samples: Sequence[Json] = ()
    state: Json | None = None  # totals of the training
    analysis: Json | None = None
    merge: Json | None = None
    evaluations: Json | None = None  # summaries of the models
    # by item and not only summaries: differences are paired, and pairs need the same items
    items: Mapping[str, Json] = field(default_factory=dict)  # results by item of each model
    controls: Json | None = None
    populations: Sequence["Run"] = ()  # results of the populations after the first

    @property
    def name(self) -> str:
        """Name of the run: of the config, else of the directory."""
        return str(self.config.get("name", self.layout.root.name))

    @property
    def models(self) -> Sequence[Json]:
        """Summaries of the evaluated models: base, members, merges."""
        return self.evaluations["models"] if self.evaluations else []

    @property
    def members(self) -> list[Json]:
        """Summaries of the evaluated members."""
        return [model for model in self.models if model["kind"] == "member"]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that any model was evaluated on."""
        # dict.fromkeys keeps the order of the config, which a set would lose
        return list(dict.fromkeys(task for model in self.models for task in model.get("tasks", ())))

    @property
    def coefficients(self) -> Sequence[Json]:
        """Fixed-effects slopes by epoch; empty where they are undetermined."""
        return (self.analysis or {}).get("fixed_effects", {}).get("coefficients", [])

    @cached_property
    def comparison(self) -> Comparison:
        """Paired comparisons of the merges; computed once, for all pages and chapters."""
        return compare(
            self.models,
            self.items,
            merge=self.merge,
            scaled_member=self.scaled_member,
            **self.resampling,
        )

    @property
    def scaled_member(self) -> Json | None:
        """Losses by item of the best member at its own lambda; None where none was chosen."""
        lambdas = (self.controls or {}).get("lambdas")
        if lambdas is None:
            return None
        arrays = read_npz(self.layout.control_losses)
        row = arrays["names"].tolist().index(lambdas["best_member"]["control"])
        return {
            "ids": arrays["ids"].tolist(),
            "losses": arrays["losses"][row].tolist(),
            "tokens": arrays["tokens"].tolist(),
        }

    @cached_property
    def search(self) -> Json | None:
        """Results of the search for a merge.

        Raises:
            UserError: see `read_search`. Not before they are shown: a search into another directory
                may go on beside results of another version.
        """
        return read_search(self.layout.search)

    @cached_property
    def claims(self) -> Comparison:
        """What is claimed of the merges: the comparison, or over populations where there are."""
        if not self.populations:
            return self.comparison
        return over_populations([run.comparison for run in (self, *self.populations)])

    @property
    def resampling(self) -> dict[str, int]:
        """Arguments of a paired comparison: `resamples`, `seed`."""
        # the defaults of the config, for a directory with a part of one
        evaluation = self.config.get("evaluation", {})
        return {
            "resamples": evaluation.get("bootstrap", 1000),
            "seed": self.config.get("seed", 0),
        }

    @property
    def mean_cosine(self) -> float | None:
        """Mean cosine between the members' task vectors; None where no merge measured it."""
        # The cosines are of the members, the same for every merge that has diagnostics.
        for merge in (self.merge or {"merges": []})["merges"]:
            matrix = merge.get("diagnostics", {}).get("total", {}).get("cosines") or []
            if pairs := pair_cosines(matrix):
                return sum(pairs) / len(pairs)
        return None

    @property
    def test_overlaps(self) -> Json:
        """Records of data.json on test examples that are in another split, by that split."""
        return ((self.data or {}).get("test") or {}).get("overlaps", {})

    @property
    def loss_name(self) -> str:
        """Name of the loss on the test split: it is held out where it shares no example."""
        return loss_name([self])

    @property
    def loss_unit(self) -> str:
        """Unit of all losses."""
        return formatting.loss_unit(self.config.get("objective", {}))


def read_run(directory: str | Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: there is no config.yaml, it was edited and contradicts the results, or a file is
            not valid JSON.
    """
    layout = RunLayout(Path(directory))
    if not layout.is_run:
        raise UserError(
            f"{directory} is not a run directory (it has no config.yaml); "
            "give the output directory of a run"
        )
    refuse_edited_config(layout, also_repeated=True)
    state = read_json(layout.training_state)
    # of a training that goes on, a line may be half written at this moment
    if state and is_cut_off(layout.training_log):
        raise UserError(
            f"{layout.training_log} ends within a line; ordermerge train {layout.root} writes it"
            " again from the checkpoint"
        )
    # As plain data, not by the schema: a page needs few keys, and reads a part of a config, too.
    config = read_yaml(layout.config)
    replicates = config.get("population", {}).get("replicates", 1)
    further = [layout.population(number) for number in range(1, replicates)]
    return Run(
        layout=layout,
        config=config,
        data=read_json(layout.data),
        digests=read_json(layout.order_digests),
        training_log=read_jsonl(layout.training_log),
        generated_samples=read_jsonl(layout.generated_samples),
        state=state,
        populations=[Run(part, config, **_read_results(part)) for part in further],
        **_read_results(layout),
    )


def _read_results(layout: RunLayout) -> Json:
    """Return what the stages after the training have written about one population."""
    evaluations = read_json(layout.evaluations)
    # The summary names the models. Other files in the directory are of an evaluation that did
    # not end.
    names = [model["name"] for model in evaluations["models"]] if evaluations else []
    items = {name: read_json(layout.evaluation(name)) for name in names}
    return {
        "analysis": read_json(layout.analysis),
        "merge": read_json(layout.merges),
        "evaluations": evaluations,
        # a model without its items is shown, but not compared
        "items": {name: results for name, results in items.items() if results},
        "controls": read_json(layout.controls),
    }


def read_runs(directories: Sequence[str | Path]) -> list[Run]:
    """Read runs for one page about all of them.

    Raises:
        UserError: no run directory, two runs of one name, or losses of different kinds.
    """
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    # the rows of a page are named by run
    if len(set(names)) < len(names):
        raise UserError(
            f"two of the runs have the same name ({', '.join(names)}); "
            "give each config a name of its own"
        )
    units = sorted({run.loss_unit for run in runs})
    if len(units) > 1:
        # nats per token and nats per pair cannot stand in one column
        raise UserError(
            f"the losses of these runs are of different kinds ({', '.join(units)}); "
            "give runs of one objective"
        )
    return runs


def compare_models(runs: Sequence[Run], page: str) -> None:
    """Compute the comparisons of runs, which are most of the time of a page, with progress.

    Args:
        runs: for one page; their comparisons are kept.
        page: for the progress, e.g. `"results"`.
    """
    measured = [x for run in runs for x in (run, *run.populations) if x.evaluations]
    for run in console.track(measured, len(measured), page, "populations", transient=True):
        _ = run.comparison


def loss_name(runs: Sequence[Run]) -> str:
    """Return the name of the loss on the test splits of some runs, for a text about all of them."""
    overlapping = any(run.test_overlaps for run in runs)
    return "loss on overlapping test examples" if overlapping else "held-out loss"


def missing(run: Run, stage: str, file: Path) -> Paragraph:
    """Return what a chapter says where its stage has no output yet."""
    path = file.relative_to(run.layout.root)
    return Paragraph(f"The stage {stage} has no output yet: {path} is missing.")


def pair_cosines(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    """Return the cosines of all pairs from a matrix [M, M]; None, of a zero vector, is left out.

    Example:
        >>> pair_cosines([[1, 0.5, None], [0.5, 1, 0.7], [None, 0.7, 1]])
        [0.5, 0.7]
    """
    return [value for i, row in enumerate(matrix) for value in row[i + 1 :] if value is not None]


def percentages(models: Sequence[Json], task: str) -> list[float]:
    """Return the accuracies in per cent of the models that have the task."""
    return [
        100 * model["tasks"][task]["accuracy"] for model in models if task in model.get("tasks", {})
    ]
