"""The layout of a run directory: the only module in which paths inside one are spelled.

Every package that reads or writes a run goes through `RunLayout`, and through the readers and
writers below it. A file is written beside its name and renamed when it is complete, so a reader
never sees half of one. With several processes all of them call a writer and process 0 writes.
"""

import dataclasses
import functools
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonValue

CONFIG = "config.yaml"  # what makes a directory a run directory
# Of results of a search. Those before 2 have no members at other lambdas: what such a search calls
# better may be longer, and no merge.
SEARCH_VERSION = 2
_MEMBER = re.compile(r"member_(\d+)")
_CHECKPOINT = re.compile(r"member_(\d+)@(\d+)")


def member_name(member: int) -> str:
    """Return the name of a member, as in `RUN/member_3`.

    Example:
        >>> member_name(3), member_number("member_3"), member_number("average")
        ('member_3', 3, None)
    """
    return f"member_{member}"


def member_number(name: str) -> int | None:
    """Return the number of a member from its name, or None where the name is of something else."""
    # fullmatch: `member_3.npz` names an order, not a member
    match = _MEMBER.fullmatch(name)
    return int(match[1]) if match else None


def member_checkpoint(name: str) -> tuple[int, int] | None:
    """Return member and step from the name of a checkpoint of a member, or None of another name.

    Example:
        >>> member_checkpoint("member_3@200"), member_checkpoint("member_3")
        ((3, 200), None)
    """
    match = _CHECKPOINT.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """Paths inside a run directory. A wave has the same layout below `wave(n)`.

    Example:
        >>> layout = RunLayout(Path("runs/a"))
        >>> str(layout.merged("average")), str(layout.wave(1).training_log)
        ('runs/a/merged/average', 'runs/a/waves/1/metrics/train.jsonl')
    """

    root: Path

    @property
    def is_run(self) -> bool:
        """Whether the directory was written by a run."""
        # It is the first file that a run writes, and every later command starts from it.
        return self.config.is_file()

    # ------------------------------------------------------------------ inputs and training

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / CONFIG

    @property
    def stages(self) -> Path:
        """The settings that the results of each stage rest on."""
        return self.root / "stages.json"

    @property
    def lock(self) -> Path:
        """Who is writing the run, while someone is."""
        return self.root / "writer.lock"

    @property
    def data(self) -> Path:
        """Files, digests and counts of the examples."""
        return self.root / "data.json"

    @property
    def orders(self) -> Path:
        """Directory of the orders that the members were trained in."""
        return self.root / "orders"

    def member_order(self, member: int) -> Path:
        """`epoch_{e}`: int64[steps, batch] sample ids of one member."""
        return self.orders / f"{member_name(member)}.npz"

    def member_orders(self) -> list[Path]:
        """Orders of all members."""
        # `glob` follows the directory of the file system, whose order differs between machines.
        return sorted(self.orders.glob("member_*.npz"))

    @property
    def order_digests(self) -> Path:
        """Digests of the orders by member and epoch."""
        return self.orders / "digests.json"

    @property
    def training_log(self) -> Path:
        """One line of metrics per logging interval."""
        return self.root / "metrics" / "train.jsonl"

    @property
    def generated_samples(self) -> Path:
        """Answers to fixed prompts while training."""
        return self.root / "metrics" / "samples.jsonl"

    @property
    def training_state(self) -> Path:
        """Totals of the finished training: written last, so it marks a complete training."""
        return self.root / "metrics" / "state.json"

    @property
    def tracking(self) -> Path:
        """Directory of TensorBoard and W&B."""
        return self.root / "tracking"

    def tracker_runs(self, tracker: str) -> Path:
        """Identities of the runs of a tracker, e.g. `"wandb"`, in which a training goes on."""
        return self.tracking / f"{tracker}.json"

    def reference_logprobs(self, split: str) -> Path:
        """Log-probabilities of preference pairs under the base."""
        return self.root / "reference" / f"{split}.npz"

    @property
    def checkpoints(self) -> Path:
        """Directory of the Orbax checkpoints."""
        return self.root / "checkpoints"

    @property
    def waves(self) -> Path:
        """Members of each wave, where the population was trained in waves."""
        return self.root / "waves.json"

    def wave(self, number: int) -> "RunLayout":
        """Layout of the training of one wave."""
        # The same layout as a run, so that training, resuming and restoring need no case for waves.
        return RunLayout(self.root / "waves" / str(number))

    def population(self, number: int) -> "RunLayout":
        """Layout of the results of one population; those of population 0 are those of the run."""
        return RunLayout(self.root / "populations" / str(number)) if number else self

    def wave_checkpoints(self) -> list[Path]:
        """Checkpoint directories of all waves that have one."""
        # A member is in one wave, so the order decides nothing but which error comes first.
        return sorted((self.root / "waves").glob("*/checkpoints"))

    # ------------------------------------------------------------------ losses, merges, evaluation

    @property
    def training_losses(self) -> Path:
        """Losses [M, epochs, n] at the step where each sample was seen."""
        return self.root / "losses" / "train.npz"

    @property
    def final_losses(self) -> Path:
        """Mean response loss of every training sample under base, members and merges."""
        return self.root / "losses" / "final.npz"

    @property
    def control_losses(self) -> Path:
        """Losses of the controls by example."""
        return self.root / "losses" / "controls.npz"

    @property
    def analysis(self) -> Path:
        """Statistics of the position effect."""
        return self.root / "analysis.json"

    @property
    def merges(self) -> Path:
        """Methods, seeds and diagnostics of the merges."""
        return self.root / "merge.json"

    def merged(self, name: str) -> Path:
        """Hugging Face directory of one merge."""
        return self.root / "merged" / name

    def is_merged(self, name: str) -> bool:
        """Whether a merge was exported completely."""
        return (self.merged(name) / "config.json").is_file()

    @property
    def evaluations(self) -> Path:
        """Summary of every model on held-out data."""
        return self.root / "evaluations.json"

    def evaluation(self, model: str) -> Path:
        """Results of one model by item."""
        return self.root / "evaluations" / f"{model}.json"

    def outputs(self, task: str, model: str) -> Path:
        """Answers of one model for a judge."""
        return self.root / "outputs" / task / f"{model}.json"

    @property
    def controls(self) -> Path:
        """Losses of the controls and their paired differences."""
        return self.root / "controls.json"

    @property
    def subset_answers(self) -> Path:
        """Which items the merges of subsets of the members answer rightly, by task and merge."""
        return self.root / "evaluations" / "subsets" / "answers.json"

    @property
    def single(self) -> "RunLayout":
        """Layout of the single run among the controls, which costs as much as the population."""
        # A run directory of its own: the control is trained and restored by the code of any run.
        return RunLayout(self.root / "single")

    @property
    def search(self) -> "SearchLayout":
        """Results of the search for a merge; `ordermerge search --out` puts them elsewhere."""
        return SearchLayout(self.root / "search")

    # ------------------------------------------------------------------ report

    @property
    def contrasts(self) -> Path:
        """Differences of the merges to their rivals, of each population and over populations."""
        return self.root / "contrasts.csv"

    @property
    def report_html(self) -> Path:
        """The report as one HTML page."""
        return self.root / "report.html"

    @property
    def report_markdown(self) -> Path:
        """The report in Markdown."""
        return self.root / "report.md"


@dataclasses.dataclass(frozen=True)
class SearchLayout:
    """Paths inside the directory of a search.

    Example:
        >>> str(SearchLayout(Path("out")).results)
        'out/results.json'
    """

    root: Path

    @property
    def cache(self) -> Path:
        """One line per measurement, so that an interrupted search continues."""
        return self.root / "journal.jsonl"

    @property
    def results(self) -> Path:
        """Candidates, winner and claim."""
        return self.root / "results.json"

    @property
    def winner(self) -> Path:
        """Hugging Face directory of the winner."""
        return self.root / "winner"

    @property
    def page(self) -> Path:
        """The results as one HTML page."""
        return self.root / "search.html"

    @property
    def markdown(self) -> Path:
        """The results in Markdown."""
        return self.root / "search.md"


# ---------------------------------------------------------------------- reading and writing


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it when complete. Only process 0 writes."""
    import jax  # a reader of run directories does not need it

    # All processes hold the same content; two writers of one file would race.
    if jax.process_index() == 0:
        atomic.replace(path, content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON; see `write_bytes`. NaN and infinities are refused: JSON has no sign for them.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_json(file, {"x": 1})
        >>> file.read_text(), read_json(file), read_json(file.with_name("b.json"))
        ('{\\n "x": 1\\n}', {'x': 1}, None)
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


# Results whose keys change between versions -> the stage that writes them. Totals of the training
# are not among them: their readers take any keys, since a training is not done again for a page.
_WRITTEN_BY = {
    "analysis.json": "analyze",
    "merge.json": "merge",
    "evaluations.json": "evaluate",
    "controls.json": "evaluate",
}


class _Result(dict[str, JsonValue]):
    """An object in the result of a stage: a key that is missing is an error of one line."""

    def __init__(self, content: Json, path: Path) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> JsonValue:
        raise _unreadable(self._path, f"has no {key}")


def _unreadable(path: Path, reason: str) -> UserError:
    """Return the error about the result of a stage that this version cannot read."""
    stage = _WRITTEN_BY.get(path.name, "evaluate")
    # the summary is what says that the stage is complete
    summary = "evaluations.json"
    is_part = stage == "evaluate" and path.name != summary
    return UserError(
        f"{path} {reason}: another version wrote it, or it was edited; remove it"
        f"{f' and {summary} of the run' if is_part else ''}, and ordermerge {stage} RUN"
        " writes it again"
    )


def read_json(path: Path) -> JsonValue:
    """Return the parsed file, or None where it is absent.

    In the result of a stage, reading a key that is missing is a `UserError` that names the stage.

    Raises:
        UserError: it is not valid JSON, or the result of a stage is no object.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "analysis.json"
        >>> write_json(file, {"design": {}})
        >>> read_json(file)["design"]["epochs"]
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: .../analysis.json has no epochs: another version wrote it,
        or it was edited; remove it, and ordermerge analyze RUN writes it again
    """
    if not path.is_file():
        return None
    is_result = path.name in _WRITTEN_BY or path.parent.name == "evaluations"
    hook = functools.partial(_Result, path=path) if is_result else None
    try:
        content = json.loads(path.read_text(), object_hook=hook)
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); restore it, or remove it and run its stage again"
        ) from error
    # the hook sees objects only: a list in place of one has no keys to miss
    if is_result and not isinstance(content, dict):
        raise _unreadable(path, "holds no JSON object")
    return content


def read_search(search: SearchLayout) -> Json | None:
    """Return the results of a search, or None where there are none.

    Raises:
        UserError: they are not valid JSON, or of another version.
    """
    results: Json | None = read_json(search.results)
    if results is not None and results.get("version") != SEARCH_VERSION:
        raise UserError(
            f"{search.results} is of a search of version {results.get('version', 1)}, which this"
            f" one ({SEARCH_VERSION}) does not continue: its merges had no rival of another length;"
            " search again into another directory with ordermerge search RUN --out DIRECTORY, or"
            " make the run again with --set output=DIRECTORY"
        )
    return results


def write_jsonl(path: Path, rows: Iterable[Json]) -> None:
    """Write one line of JSON per row; see `write_bytes`."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: Json) -> None:
    """Append one line of JSON. A killed process may leave half a line; see `read_jsonl`."""
    import jax

    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Appending cannot rename, unlike the writers above: a long log would be copied for each
        # line.
        with path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[Json]:
    """Return the rows of a file, [] where it is absent. A last line without its end is left out.

    Raises:
        UserError: a line is not valid JSON.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> append_jsonl(file, {"step": 1})
        >>> _ = file.write_text(file.read_text() + '{"step": ')
        >>> read_jsonl(file), is_cut_off(file)
        ([{'step': 1}], True)
    """
    # Lines end in "\n" only when they are complete, so an unfinished last line is told from a whole
    # one without parsing it. Not `splitlines`, which also ends lines at characters inside of texts.
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is not valid JSON ({error}); remove this line, the others"
                " are good"
            ) from error
    return rows


def is_cut_off(path: Path) -> bool:
    """Whether the last line of a file has no end: the process or machine that wrote it was lost."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, io.SEEK_END)
        return file.read() != b"\n"


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed npz file; see `write_bytes`.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.npz"
        >>> write_npz(file, {"x": np.arange(2)})
        >>> read_npz(file)["x"].tolist()
        [0, 1]
    """
    # In memory first: `savez` writes a path piece by piece, and a reader must never see a part.
    buffer = io.BytesIO()
    # the stubs of numpy take any keyword for allow_pickle
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by name.

    Raises:
        UserError: it is damaged, or holds something else than numbers.
    """
    with path.open("rb") as file:
        try:
            # `dict` reads the arrays: those of an open npz are loaded lazily, from a file that is
            # closed here.
            with np.load(file) as arrays:
                return dict(arrays)
        # a wrong byte may ask for a cipher, a shape or a place beyond the end of the file: what is
        # raised then has no common type
        except Exception as error:
            raise UserError(
                f"{path} is damaged ({error}); restore it, or remove it and run its stage again"
            ) from error
