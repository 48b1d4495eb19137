"""What a config would train on, without devices: nothing that this module imports uses jax."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jax_ordermerge import console
from jax_ordermerge.checkpoint.resolve import resolve
from jax_ordermerge.config import Config, check_inputs
from jax_ordermerge.data import dates, preview, source, tokenizers
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.preview import Marks
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.data.tokenizers import Tokenizer
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import specs, splits
from jax_ordermerge.experiment.splits import Overlap, find_overlaps
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout, read_json
from jax_ordermerge.train import orders

_STEPS = 3  # first steps of a member that are listed


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is shown of the data.

    Attributes:
        rows: examples of each source, or of the first step of a member, that are shown as text.
        row: id of the one example to show; None shows the first ones.
        split: the only split to show; None shows all.
        member: whose first steps are shown; None shows the order of the file.
    """

    rows: int = 2
    row: int | None = None
    split: str | None = None
    member: int | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The splits of a config, and what made them."""

    config: Config
    splits: Mapping[str, Examples]
    tokenizer: Tokenizer

    @functools.cached_property
    def overlaps(self) -> list[Overlap]:
        """What the splits share."""
        return find_overlaps(self.splits)


def load(config: Config) -> Loaded:
    """Tokenize the data of a config as a run does.

    Raises:
        UserError: base, data or template do not fit, as in a run.
    """
    check_inputs(config)
    # Without weights: what is trained on can be looked at where the base was not downloaded.
    tokenizer = tokenizers.load_tokenizer(resolve(config.model.base, weights=False))
    # a run that was started on another day has that day in its prompts
    record = read_json(RunLayout(config.directory).data) or {}
    started = PromptFormat.from_json(record.get("train", {})).date
    dates.pin_local_date(tokenizer, config.data.date, started)
    data = specs.data_settings(config)
    return Loaded(config, source.load_splits(data, tokenizer, seed=config.seed), tokenizer)


def check(loaded: Loaded) -> None:
    """Refuse data that a run would refuse.

    Raises:
        UserError: see `splits.check_splits` and `splits.check_same_data`.
    """
    splits.check_splits(loaded.config, loaded.splits, loaded.overlaps)
    # As a run does at its start: `ordermerge data` says beforehand what it would refuse.
    splits.check_same_data(RunLayout(loaded.config.directory), loaded.splits)


def describe(loaded: Loaded, selection: Selection, marks: Marks) -> str:
    """Return the data of a config as text.

    Raises:
        UserError: the selection does not fit the data.
    """
    chosen = _choose(loaded, selection)
    return "\n".join(_lines(loaded, chosen, selection, marks)) + "\n"


def describe_json(loaded: Loaded, selection: Selection) -> str:
    """Return what `describe` shows as JSON; segments of text say whether they are learned."""
    chosen = _choose(loaded, selection)
    records = splits.describe(loaded.splits, loaded.overlaps)
    described: Json = {
        "name": loaded.config.name,
        "base": loaded.config.model.base,
        "max_length": loaded.config.data.max_length,
        "training": _training(loaded),
        "splits": {
            name: records[name]
            | {
                "learned_tokens": preview.learned_tokens(loaded.splits[name]),
                "lengths": [
                    part._asdict() for part in preview.length_bins(loaded.splits[name].lengths)
                ],
            }
            for name in ([selection.split] if selection.split else loaded.splits)
        },
        "examples": [
            _place(loaded.splits[name], row)
            | {
                "split": name,
                "sequences": [
                    [
                        segment._asdict()
                        for segment in preview.segments(
                            part.tokens[row], part.answers[row], loaded.tokenizer
                        )
                    ]
                    for part in loaded.splits[name].parts
                ],
            }
            for name, row in chosen
        ],
    }
    if selection.member is not None:
        steps = _first_steps(loaded, selection.member)
        described["order"] = [loaded.splits["train"].ids[rows].tolist() for rows in steps]
    return console.to_json(described)


def _choose(loaded: Loaded, selection: Selection) -> list[tuple[str, int]]:
    """Return the split and the row of each example that is shown."""
    if selection.split is not None and selection.split not in loaded.splits:
        raise UserError(f"--split {selection.split}: the config has {', '.join(loaded.splits)}")
    if selection.member is not None:
        if selection.row is not None or selection.split not in (None, "train"):
            raise UserError(
                "--order shows what a member is trained on; leave out --row and --split"
            )
        first = _first_steps(loaded, selection.member)[0]
        return [("train", int(row)) for row in first[: selection.rows]]
    if selection.row is not None:
        return [_find(loaded, selection.row, selection.split)]
    # Without a split the training examples: they are what is learned.
    names = [selection.split] if selection.split else ["train"]
    return [
        (name, row)
        for name in names
        for row in preview.first_rows(loaded.splits[name], selection.rows)
    ]


def _find(loaded: Loaded, number: int, split: str | None) -> tuple[str, int]:
    for name in [split] if split else loaded.splits:
        # By id and not by place: an id stays when other rows are dropped, and logs and results name
        # it.
        rows = np.flatnonzero(loaded.splits[name].ids == number)
        if rows.size:
            return name, int(rows[0])
    where = split or "any split"
    counts = loaded.splits[split or "train"].counts
    dropped = ", ".join(_dropped(counts)) or "none were dropped"
    raise UserError(
        f"--row {number}: no example of {where} has this id, which is shown beside each"
        f" example; of the rows that were read: {dropped}"
    )


def _lines(
    loaded: Loaded, chosen: Iterable[tuple[str, int]], selection: Selection, marks: Marks
) -> Iterator[str]:
    config = loaded.config
    if selection.row is None:
        yield f"{config.name}: base {config.model.base}, max_length {config.data.max_length}"
        for name in [selection.split] if selection.split else loaded.splits:
            yield ""
            yield from _split_lines(name, loaded.splits[name])
        for overlap in loaded.overlaps:
            yield f"note: {overlap}"
        yield ""
        yield from _training_lines(loaded)
    if selection.member is not None:
        yield f"member {selection.member} sees first:"
        train = loaded.splits["train"]
        for step, rows in enumerate(_first_steps(loaded, selection.member), 1):
            ids = " ".join(map(str, train.ids[rows].tolist()))
            yield f"  step {step}: {int(train.lengths[rows].sum()):,} tokens, ids {ids}"
    for name, row in chosen:
        examples = loaded.splits[name]
        place = _place(examples, row)
        yield ""
        yield (
            f"-- {name}, id {place['id']}: {place['what']} {place['row']} of {place['file']},"
            f" {place['tokens']:,} tokens, {place['learned']:,} learned"
        )
        # an example that was asked for by its id is shown to its end
        yield preview.show_example(
            examples, row, loaded.tokenizer, marks, shorten=selection.row is None
        )


def _split_lines(name: str, examples: Examples) -> Iterator[str]:
    tokens = int(sum(part.lengths.sum() for part in examples.parts))
    learned = preview.learned_tokens(examples)
    kind = "examples" if examples.rejected is None else "preference pairs"
    yield (
        f"{name}: {len(examples):,} {kind}, {tokens:,} tokens, {learned:,} of them learned"
        f" ({learned / max(tokens, 1):.0%})"
    )
    numbers = examples.source_numbers
    for number, info in enumerate(examples.sources):
        dropped = ", ".join(_dropped(info.counts)) or "none dropped"
        weight = "" if info.weight == 1 else f", weight {info.weight:g}"
        yield (
            f"  {info.name}: {int((numbers == number).sum()):,} {kind} here;"
            f" {info.counts.get('read', 0):,} rows read, {info.counts.get('used', 0):,} examples"
            f" used, {dropped}"
        )
        yield f"    format {info.format}, template {info.template}{weight}"
        if len(info.files) > 1 or info.passed_over:
            passed_over = (
                f"; passed over: {', '.join(info.passed_over)}" if info.passed_over else ""
            )
            yield f"    {len(info.files)} files{passed_over}"
        for reason in info.bad_rows:
            yield f"    bad rows: {reason}"
        if info.ignored:
            yield f"    columns that nothing reads: {', '.join(info.ignored)}"
    lengths = examples.lengths
    # The 95th percentile beside the longest: one long document says little of the others.
    low, middle, high = np.percentile(lengths, (0, 50, 95)).astype(int).tolist()
    yield (
        f"  tokens per example: {low:,} to {examples.longest:,}, median {middle:,}, 95 % up to"
        f" {high:,}"
    )
    yield preview.show_bins(preview.length_bins(lengths))


def _dropped(counts: Mapping[str, int]) -> list[str]:
    """Return what was dropped or cut as phrases.

    Example:
        >>> _dropped({"read": 9, "dropped_too_long": 2, "truncated": 0, "used": 7})
        ['2 dropped too long']
    """
    return [
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in counts.items()
        if count and name not in ("read", "used")
    ]


def _training(loaded: Loaded) -> Json:
    """Return the numbers of steps of a training."""
    config = loaded.config
    spec = specs.training_spec(config)
    # every member has the same number of steps
    steps = orders.draw_orders(spec, loaded.splits["train"].lengths, (0,)).shape[2]
    return {
        "members": config.population.total,
        "epochs": config.training.epochs,
        "steps_per_epoch": steps,
        "steps": steps * config.training.epochs,
        "rows_per_step": config.training.batch,
        "packing": config.data.packing,
    }


def _training_lines(loaded: Loaded) -> Iterator[str]:
    training = _training(loaded)
    packing = "" if training["packing"] == "none" else f" (packing {training['packing']})"
    yield (
        f"training: {training['members']} members, each {training['epochs']} epochs of"
        f" {training['steps_per_epoch']:,} steps of {training['rows_per_step']} rows{packing}:"
        f" {training['steps']:,} steps"
    )


def _first_steps(loaded: Loaded, member: int) -> list[np.ndarray]:
    """Return the rows of the examples of the first steps of a member."""
    members = loaded.config.population.total
    if not 0 <= member < members:
        raise UserError(f"--order {member}: members are 0 to {members - 1}")
    spec = specs.training_spec(loaded.config)
    drawn = orders.draw_orders(spec, loaded.splits["train"].lengths, (member,))
    # epoch 0; padding is -1, and packed rows are flattened by the mask
    return [rows[rows >= 0] for rows in drawn[0, 0, :_STEPS]]


def _place(examples: Examples, row: int) -> Json:
    """Return where an example comes from, and how long it is."""
    info = examples.sources[examples.source_numbers[row]]
    number = int(examples.row_numbers[row])
    file = info.path
    if info.format != "text":  # the windows of texts are numbered, not their rows
        file, number = info.locate(number)
    return {
        "id": int(examples.ids[row]),
        "what": "window" if info.format == "text" else "row",
        "row": number,
        "file": file,
        "tokens": sum(len(part.tokens[row]) for part in examples.parts),
        # the first token is predicted from nothing, so it is not learned
        "learned": sum(int(part.answers[row][1:].sum()) for part in examples.parts),
    }
