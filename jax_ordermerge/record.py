"""The record of a run: the settings that the results of each stage rest on, in stages.json.

A run grows: a finished one may be asked for further merges, tasks or controls, and for other
statistics. What its training rests on stays as it is. The config of a run can be edited, so every
command that reads a run compares it with this record, which the stages wrote when they began.
"""

import functools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax_ordermerge import config as schema
from jax_ordermerge import layout as layouts
from jax_ordermerge.checkpoint.model_digest import model_digest
from jax_ordermerge.config import Config, Model
from jax_ordermerge.config.merge import merge_name
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonValue
from jax_ordermerge.layout import RunLayout


class Reads(NamedTuple):
    """Dotted keys of the config that a stage reads.

    Attributes:
        fixed: may not change once the stage has begun: its results would be of another experiment.
        repeated: may change; the stage is then done again, from results that stay.
        items: lists that grow. Each item is fixed under its name, items that a later config does
            not list are kept, and new ones are added.
    """

    fixed: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    items: tuple[str, ...] = ()


# Every stage that measures or shows merges lists them: a merge that is added to a finished run is
# then measured by all of these stages, and what they have measured stays.
_MERGES = ("merge.methods", "merge.auto")
_RESULTS = (*_MERGES, "merge.controls", "evaluation.tasks", "evaluation.loss")
# What is free to change (`FREE_TO_CHANGE`) is left out of these sections.
READS = {
    "train": Reads(fixed=("seed", "model", "data", "population", "objective", "training", "lora")),
    "merge": Reads(fixed=("merge.dtype",), repeated=("merge.fisher_examples",), items=_MERGES),
    "analyze": Reads(repeated=("analysis",), items=_MERGES),
    "evaluate": Reads(repeated=("evaluation.bootstrap",), items=_RESULTS),
    "report": Reads(repeated=("name", "analysis", "evaluation.bootstrap"), items=_RESULTS),
}


def settings(stage: str, config: Config) -> Json:
    """Return the part of a config that a stage reads, nested as in YAML.

    Example:
        >>> settings("analyze", Config())["analysis"]
        {'bins': 10, 'bootstrap': 1000, 'permutations': 1000}
    """
    # Nested as the config is: the record can be read through the schema again, see `_recorded`.
    plain, part = schema.fixed_settings(config), Json()
    for keys in READS[stage]:
        for key in keys:
            *sections, name = key.split(".")
            node = part
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = _get(plain, key)
    return part


def difference(old: Json, new: Json) -> list[str]:
    """Return `"key: old -> new"` for every key that differs.

    Example:
        >>> difference({"seed": 0, "model": {"init": "random"}}, {"seed": 1})
        ['model.init: random -> None', 'seed: 0 -> 1']
    """

    def leaves(node: JsonValue, prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(value, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, node

    # by leaf, so that a message names `training.epochs` and not the whole section
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def training_changes(stored: Json, config: Config) -> list[str]:
    """Return how the settings that a checkpoint holds differ from those of a config.

    Args:
        stored: `settings("train", ...)` of the training; empty where it is not known.
        config: of now.
    """
    if not stored:
        return []
    # Through the schema: a checkpoint of an earlier version has no value for a setting that came
    # later, which then was at its default.
    before = schema.make_config(stored, "the settings of the checkpoint")
    return [text for key in READS["train"].fixed for text in _difference(key, before, config)]


def base_digest(model: Model, base_dir: Path) -> str:
    """Return the digest of a base, of whose files a run reads what `model.init` says."""
    return model_digest(base_dir, with_tensors=model.init == "pretrained")


def refuse_other_base(run: RunLayout, model: Model, digest: str) -> None:
    """Refuse a base that is not the one that the members of a run were trained from.

    Args:
        run: layout of the run directory.
        model: names the base.
        digest: of its files now.

    Raises:
        UserError: it differs.
    """
    # Runs of an earlier version have no digest of their base. They cannot be checked, and are read.
    if run.stages.is_file() and Record(run).base_digest not in (None, digest):
        raise UserError(
            f"the base {model.base} changed since the training of {run.root} began;"
            " restore its files, or train in another directory with --set output=DIRECTORY"
        )


def stored_config(run: RunLayout) -> Config | None:
    """Return the config that a run directory holds, None where it holds none.

    Raises:
        UserError: it was edited and contradicts the results of the run.
    """
    if not run.is_run:
        return None
    stored = schema.load_config(run.config)
    Record(run).refuse_edited_config(stored)
    return stored


def refuse_edited_config(run: RunLayout, *, also_repeated: bool = False) -> None:
    """Refuse to read a run whose config.yaml does not say what its results rest on.

    Args:
        run: layout of the run directory.
        also_repeated: refuse settings with which a stage would be done again, too.

    Raises:
        UserError: the keys that differ, with both values.
    """
    # a directory of an earlier version has no record, and its config may not be complete
    if run.stages.is_file():
        stored = schema.load_config(run.config)
        Record(run).refuse_edited_config(stored, also_repeated=also_repeated)


def refuse_model_of_edited_run(model: str | Path) -> None:
    """Refuse a model in a run directory, RUN/member_0 or RUN/merged/NAME, as the run is refused.

    Raises:
        UserError: see `refuse_edited_config`.
    """
    # Of other names, as those of a hub, the parents hold no run. A merge of a further population is
    # RUN/populations/1/merged/NAME.
    for directory in list(Path(model).absolute().parents)[:4]:
        if RunLayout(directory).is_run:
            refuse_edited_config(RunLayout(directory))


class Record:
    """The record of a run directory. With several processes all of them make the same calls.

    Args:
        run: layout of the run directory. Where it has no stages.json, because an earlier version
            wrote it, its config is believed.

    Raises:
        UserError: stages.json is damaged, or the config of the run is not valid.
    """

    def __init__(self, run: RunLayout) -> None:
        self._run = run
        self._stages: Json = layouts.read_json(run.stages) or {}
        if not self._stages and run.is_run:
            stored = schema.load_config(run.config)
            self._stages = {
                stage: {"settings": settings(stage, stored), "complete": True} for stage in READS
            }

    @property
    def base_digest(self) -> str | None:
        """Digest of the base that the members were trained from, None where it is not known."""
        return self._stages.get("train", {}).get("base")

    # ------------------------------------------------------------------------------ comparing

    def refuse_changes(self, config: Config) -> None:
        """Refuse a config that contradicts results of the run.

        Raises:
            UserError: the keys that differ, with both values.
        """
        fixed, items = self._changes(config)
        if fixed:
            raise UserError(
                f"{self._run.root} was made with another config ({'; '.join(fixed)});"
                " restore these settings to continue it; for another run give a config file, such"
                f" as {self._run.config}, with --set output=DIRECTORY"
            )
        if items:
            raise UserError(
                f"{self._run.root} has results of other settings under the same names"
                f" ({'; '.join(items)}); give the new ones names of their own"
            )

    def refuse_edited_config(self, stored: Config, *, also_repeated: bool = False) -> None:
        """See the function `refuse_edited_config`; `stored` is what config.yaml says."""
        fixed, items = self._changes(stored)
        remedy = "restore it"
        if not (changes := fixed + items) and also_repeated:
            changes = self._repeated_changes(stored)
            remedy += f", or let ordermerge run {self._run.root} compute that"
        if changes:
            raise UserError(
                f"{self._run.config} was changed after the run had read it"
                f" ({'; '.join(changes)}); {remedy}"
            )

    def is_current(self, stage: str, config: Config) -> bool:
        """Whether a stage has ended, with exactly the settings of a config."""
        entry = self._stages.get(stage, {"complete": False})
        return entry["complete"] and settings(stage, self._recorded(stage)) == settings(
            stage, config
        )

    def extended(self, config: Config) -> tuple[Config, list[str]]:
        """Return a config that lists all results of the run, and the keys of those that it did not.

        Results of before come first, in their order.

        Raises:
            UserError: the config contradicts results of the run.
        """
        self.refuse_changes(config)
        raw, unlisted = schema.to_dict(config), list[str]()
        for key in _RESULTS:
            listed, items = _items(config, key), Json()
            for stage in self._stages:
                items |= _items(self._recorded(stage), key) if key in READS[stage].items else {}
            if added := [name for name in items if name not in listed]:
                unlisted += added
                section, name = key.split(".")
                # `items` first keeps the order of before. Values are of now; by `refuse_changes`
                # they are equal.
                values = [*(items | listed).values()]
                raw[section][name] = values if isinstance(raw[section][name], list) else values[0]
        return (schema.make_config(raw, str(self._run.config)) if unlisted else config), unlisted

    def _changes(self, config: Config) -> tuple[list[str], list[str]]:
        """Return what contradicts the record: fixed settings, and items under the same name."""
        fixed, items = dict[str, None](), dict[str, None]()  # sets that keep their order
        for stage in self._stages:
            before = self._recorded(stage)
            for key in READS[stage].fixed:
                fixed |= dict.fromkeys(_difference(key, before, config))
            for key in READS[stage].items:
                old, new = _items(before, key), _items(config, key)
                # An item on one side only contradicts nothing: it was added, or is kept unlisted.
                for name in [name for name in old if name in new]:
                    pair = (
                        _with_outer_settings(stage, before, old[name]),
                        _with_outer_settings(stage, config, new[name]),
                    )
                    items |= dict.fromkeys(difference(*({name: item} for item in pair)))
        return list(fixed), list(items)

    def _repeated_changes(self, config: Config) -> list[str]:
        changes = dict[str, None]()
        for stage in self._stages:
            for key in READS[stage].repeated:
                changes |= dict.fromkeys(_difference(key, self._recorded(stage), config))
        return list(changes)

    def _recorded(self, stage: str) -> Config:
        """Return the config that a stage has read; what it does not read has the defaults."""
        # Through the schema and not as plain data: a setting that is new in this version has its
        # default, with which the stage was done. The sections of the training are added, because
        # others are checked against them.
        raw: Json = {}
        for name in ("train", stage):
            for key, value in self._stages.get(name, {"settings": {}})["settings"].items():
                raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
        return schema.make_config(raw, str(self._run.stages))

    # ------------------------------------------------------------------------------ writing

    def begin(self, stage: str, config: Config, **facts: str) -> None:
        """Record that a stage works with a config from now on.

        Args:
            stage: name of the stage.
            config: its settings.
            **facts: what else the results rest on, such as the digest of the base.
        """
        # before the stage writes anything: results of an interrupted stage have a record, too
        entry = {"settings": settings(stage, config), **facts, "complete": False}
        self._write({**self._stages, stage: entry})

    def end(self, stage: str) -> None:
        """Record that a stage is complete."""
        self._write({**self._stages, stage: {**self._stages[stage], "complete": True}})

    def _write(self, stages: Json) -> None:
        self._stages = stages
        layouts.write_json(self._run.stages, stages)


def _get(node: JsonValue, key: str) -> JsonValue:
    return functools.reduce(operator.getitem, key.split("."), node)


def _difference(key: str, old: Config, new: Config) -> list[str]:
    return difference(*({key: _get(schema.fixed_settings(config), key)} for config in (old, new)))


def _items(config: Config, key: str) -> Json:
    """Return the items under a key that holds a list, or one item that may be absent, by name."""
    value = _get(schema.fixed_settings(config), key)
    names = {
        # Items are known by the names that results have in files and reports, not by their places.
        "merge.methods": [merge_name(spec) for spec in config.merge.methods],
        "merge.controls": config.merge.controls,
        "evaluation.tasks": [task.name for task in config.evaluation.tasks],
    }
    if key in names:
        return {f"{key}.{name}": item for name, item in zip(names[key], value, strict=True)}
    # `merge.auto` and `evaluation.loss` are one item; null or false is its absence.
    return {key: value} if value else {}


def _with_outer_settings(stage: str, config: Config, item: JsonValue) -> JsonValue:
    """Return an item with the settings outside of it that its results in a stage rest on."""
    # Only the stage that reads a setting has a record of it; to the others it has its default.
    reads = "merge.fisher_examples" in READS[stage].repeated
    if reads and isinstance(item, dict) and item.get("method") == "fisher":
        return item | {"fisher_examples": config.merge.fisher_examples}
    return item
