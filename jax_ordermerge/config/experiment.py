"""The schema of an experiment, and how it is read from YAML and `--set` overrides."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pydantic
import yaml
from pydantic import Field, PositiveInt

from jax_ordermerge.config import shipped
from jax_ordermerge.config.data import Data
from jax_ordermerge.config.evaluation import PREFERENCES, Evaluation
from jax_ordermerge.config.merge import AUTO, Merge, Search, checkpoints_merged, merge_name
from jax_ordermerge.config.model import Distributed, Mesh, Model
from jax_ordermerge.config.names import name_problem
from jax_ordermerge.config.population import Objective, Population, Sft
from jax_ordermerge.config.section import (
    FREE_TO_CHANGE,
    Section,
    load_yaml,
    override,
    parse,
    set_value,
)
from jax_ordermerge.config.training import Lora, Samples, Tracking, Training
from jax_ordermerge.errors import UserError, similar_path
from jax_ordermerge.json_types import Json, JsonRow


class Analysis(Section):
    """Statistics of the position effect."""

    # a matter of memory and time, as the mesh is
    batch: Annotated[PositiveInt, FREE_TO_CHANGE] = Field(
        64, description="examples per forward pass", json_schema_extra={"unit": "examples"}
    )
    bins: PositiveInt = Field(
        10,
        description="bins of the position in the pictures of the report",
        json_schema_extra={"unit": "bins"},
    )
    bootstrap: PositiveInt = Field(
        1000,
        description="resamples of the intervals of single members and merges",
        json_schema_extra={"unit": "resamples"},
    )
    permutations: PositiveInt = Field(
        1000,
        description="permutations of the tests of single members",
        json_schema_extra={"unit": "permutations"},
    )


class Config(Section):
    """An experiment. Everything random in it follows from `seed`."""

    name: str = Field(
        "experiment",
        description="name of the experiment, in paths and reports",
        json_schema_extra={"with": "output"},
    )
    # Free to change, because a run directory may be moved or copied before it continues.
    output: Annotated[str, FREE_TO_CHANGE] = Field(
        "runs/{name}",
        description="run directory, or its address: gs:// or s3://; {name} is replaced",
    )
    seed: int = Field(
        0, description="everything random follows from it: orders, splits, draws, initialization"
    )
    model: Model = Model()
    mesh: Annotated[Mesh, FREE_TO_CHANGE] = Mesh()
    distributed: Annotated[Distributed, FREE_TO_CHANGE] = Distributed()
    data: Data = Data()
    population: Population = Population()
    objective: Objective = Field(
        Sft(),
        description="what is minimized: sft (responses) or dpo (preference pairs)",
        json_schema_extra={"with": "dpo: data with chosen and rejected"},
    )
    # A factory, because the default optimizer is looked up in its registry. The registry is
    # filled when it is first read, not when this module is imported.
    training: Training = Field(default_factory=Training)
    samples: Annotated[Samples, FREE_TO_CHANGE] = Samples()
    lora: Lora | None = Field(
        None,
        description="null trains all parameters",
        examples=[{"rank": 16}],
        json_schema_extra={"with": "model.init = pretrained"},
    )
    analysis: Analysis = Analysis()
    merge: Merge = Merge()
    evaluation: Evaluation = Evaluation()
    tracking: Annotated[Tracking, FREE_TO_CHANGE] = Tracking()
    compilation_cache: Annotated[str | None, FREE_TO_CHANGE] = Field(
        None,
        description="directory that keeps compiled programs for the next start; null is that of"
        " JAX_COMPILATION_CACHE_DIR, by default in the user's cache; off compiles at every start",
        examples=["~/.cache/ordermerge-programs"],
    )

    @property
    def location(self) -> str:
        """The run directory as the config names it: a path, or an address in a bucket."""
        # `replace` and not `format`: other braces in a path stay as they are
        text = self.output.replace("{name}", self.name)
        return os.path.expanduser(text) if text.startswith("~/") else text

    @property
    def directory(self) -> Path:
        """The run directory, where it is on a disk."""
        return Path(self.location)

    @property
    def merge_names(self) -> list[str]:
        """The names of the exported merges, in their order."""
        searched = [] if self.merge.auto is None else [AUTO]
        return [merge_name(spec) for spec in self.merge.methods] + searched

    @property
    def base_dtype(self) -> str:
        """The dtype of the base in training: float32 where members start as copies of it."""
        return "float32" if self.lora is None else self.lora.base_dtype or self.model.compute_dtype

    def with_export_dtype(self, dtype: str | None) -> "Config":
        """Return this config with a dtype for members and merges, unless it names one."""
        if self.merge.dtype is not None:
            return self
        merge = self.merge.model_copy(update={"dtype": dtype})
        return self.model_copy(update={"merge": merge})

    # What involves several sections is checked here: a section does not know the others.
    # "after": the sections are valid by then, so conflicts may compute with their values.
    @pydantic.model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        for conflicts in (_training_conflicts, _data_conflicts, _merge_conflicts):
            # The first conflict only: an error is one line, and later ones often follow from it.
            for conflict in conflicts(self):
                raise ValueError(conflict)
        return self


def _training_conflicts(config: Config) -> Iterator[str]:
    population, training = config.population, config.training
    # -1 depends on the number of devices; `Population.check_groups` decides when it is known.
    if config.mesh.order > 0 and population.total % config.mesh.order:
        times = f" times replicates = {population.replicates}" if population.replicates > 1 else ""
        yield (
            f"population.members = {population.members}{times} is not a multiple of mesh.order ="
            f" {config.mesh.order}; change one of them"
        )
    if training.microbatch and training.batch % training.microbatch:
        yield (
            f"training.batch = {training.batch} is not a multiple of training.microbatch ="
            f" {training.microbatch}"
        )
    # members of different waves are never in memory together, so they cannot be mixed
    trained_at_once = population.wave or population.members
    if training.mixing and trained_at_once < max(population.members, 2):
        yield (
            "training.mixing needs two or more members, all trained at once; population has"
            f" members = {population.members}, wave = {population.wave}: change them or remove"
            " mixing"
        )
    if training.mixing and population.replicates > 1:
        yield (
            "training.mixing lets all members act on each other, and populations are independent"
            f" (population.replicates = {population.replicates}); set replicates to 1, or remove"
            " mixing"
        )
    if population.vary != "order" and config.lora is None:
        yield (
            f"population.vary = {population.vary}: without lora members start from the base, and"
            " nothing is drawn; set lora, or vary to order"
        )
    if population.vary == "all" and population.level == "same":
        yield (
            "population.level = same gives all members one order, population.vary = all orders of"
            " their own; set vary to init, or another level"
        )
    if population.vary == "init" and population.level in ("balanced", "reverse"):
        yield (
            f"population.level = {population.level} relates the orders of members, and with"
            " population.vary = init they have one order; set the level to sample"
        )
    if training.validates and not config.data.validation_examples:
        yield (
            "training.checkpoint = best and training.validate_every measure validation losses:"
            " set data.validation_examples"
        )
    if config.lora and config.model.init == "random":
        yield (
            "lora adapts a pretrained base, model.init = random has none; set it to pretrained, or"
            " lora to null"
        )
    fused = config.lora is not None and config.lora.fused
    if fused and config.training.optimizer_memory == "host":
        yield (
            "training.optimizer_memory = host moves the state of one member after another, and"
            " lora.fused updates all at once; set training.optimizer_memory to device, or lora.fused"
            " to false"
        )
    # The averages are in the state of the optimizer, and programs cannot compute with host arrays.
    averages_are_read = training.validates or config.samples.every is not None
    if training.ema and training.optimizer_memory == "host" and averages_are_read:
        yield (
            f"training.ema = {training.ema} keeps averages in the state of the optimizer, and"
            " validation losses and samples read them on the device; set training.optimizer_memory"
            " to device"
        )


def _data_conflicts(config: Config) -> Iterator[str]:
    data = config.data
    if data.test and data.test_examples:
        yield (
            f"data.test_examples = {data.test_examples} sets examples aside from train, data.test ="
            f" {data.test} is a file of them; give one of the two"
        )
    too_long = [length for length in data.buckets if length > data.max_length]
    if too_long:
        fitting = [length for length in data.buckets if length <= data.max_length]
        yield (
            f"data.buckets {too_long} are above data.max_length = {data.max_length}; set"
            f" data.buckets={fitting}, or a larger max_length"
        )
    if data.packing != "none" and data.buckets:
        yield (
            f"data.buckets pad rows of one example, data.packing = {data.packing} fills them; give"
            " one of the two"
        )
    if data.packing == "bins" and config.population.level == "batch":
        yield (
            "population.level = batch permutes fixed batches, data.packing = bins composes new"
            " ones; give packs"
        )
    # The number of steps follows from the orders of all members that one program trains, so the
    # members of a population would depend on the others.
    if data.packing == "bins" and config.population.replicates > 1:
        yield (
            "data.packing = bins packs each order by itself, and all members take as many steps as"
            " the longest: populations would depend on each other (population.replicates ="
            f" {config.population.replicates}); give packs"
        )
    if config.objective.kind == "dpo":
        if data.format not in ("auto", "preference"):
            yield (
                "objective.kind = dpo learns from preference pairs, not data.format ="
                f" {data.format}; set it to auto"
            )
        if any(task.name == PREFERENCES for task in config.evaluation.tasks):
            yield (
                f"evaluation.tasks: the name {PREFERENCES} is taken by the held-out pairs of dpo;"
                " choose another"
            )
        if data.packing != "none":
            yield (
                f"data.packing = {data.packing} does not take preference pairs (objective.kind ="
                " dpo); set it to none"
            )


def _merge_conflicts(config: Config) -> Iterator[str]:
    # The test split is no substitute: a merge chosen on it could not be tested any more.
    if config.merge.auto is not None and not config.data.validation_examples:
        yield "merge.auto chooses a merge on validation examples: set data.validation_examples"
    # merges, members and the base are directories and columns side by side, so names must differ
    names = config.merge_names
    for name in names:
        problem = name_problem(name)
        if problem is None and (name == "base" or name.startswith("member_")):
            problem = "is taken by a model"
        if problem:
            yield f"merge.methods: the name {name} {problem}; choose another"
    for name in sorted(names):
        if names.count(name) > 1:
            yield f"merge.methods: the name {name} is used twice; give each a different name"
    averaged = [x for x in config.merge.methods if x.checkpoints is not None]
    for spec in averaged:
        if spec.method == "fisher":
            yield (
                "merge.methods: fisher measures the information of the last weights; an average of"
                " checkpoints has none: leave checkpoints out"
            )
    if checkpoints_merged(config.merge) > 1 and config.training.checkpoint == "best":
        yield (
            "training.checkpoint = best keeps one checkpoint of each member, and merge averages the"
            " last ones (checkpoints); set it to last"
        )
    for spec in config.merge.methods:
        if spec.weights is not None and len(spec.weights) != config.population.members:
            yield (
                f"merge.methods: {spec.method} has {len(spec.weights)} weights for"
                f" population.members = {config.population.members}"
            )


# What a config has to name although the schema has a default. The defaults are a toy, and nobody
# who forgot the base of an experiment wants to see results of the toy.
_NAMED = {
    "model.base": "a Hugging Face directory, a GGUF file, a hub name, or embedded:quickstart, the"
    " toy of this package",
    "data.train": "a file, a hub dataset, or generated:quickstart, the toy of this package",
}


def check_inputs(config: Config, keys: Collection[str] = tuple(_NAMED)) -> None:
    """Check that a config names its base and its training examples.

    Args:
        config: as it was read; a resolved config names everything.
        keys: what it has to name.

    Raises:
        UserError: it does not, so that a default would be used without a word.

    Example:
        >>> check_inputs(Config())
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: model.base is missing; give a Hugging Face directory, a
            GGUF file, a hub name, or embedded:quickstart, the toy of this package
    """
    for key in keys:
        section, name = key.split(".")
        if name not in getattr(config, section).model_fields_set:
            raise UserError(f"{key} is missing; give {_NAMED[key]}")


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, object] | None = None,
) -> Config:
    """Read a YAML file of differences from the defaults and apply `--set` overrides.

    Args:
        path: the YAML file, or the name of a config of the package; None is the defaults.
        overrides: `"section.key=value"` with a YAML value, applied in order.
        values: by dotted key, applied last. They are no YAML: a path of the command line is taken
            as it is written.

    Raises:
        UserError: one line that names the key, what was given and what was expected.

    Returns:
        The config, with every default filled in.

    Example:
        >>> load_config(None, ["population.members=2"]).population.members
        2
        >>> load_config(None, ["population.member=2"])
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: config: unknown key population.member
            (did you mean 'members'?)
    """
    raw = {} if path is None else read_yaml(shipped.find(path) or Path(path))
    # Before validation: a file may be complete only with its overrides, and conflicts are those of
    # the final values.
    for item in overrides:
        override(raw, item)
    for key, value in (values or {}).items():
        set_value(raw, key, value, key)
    return make_config(raw, str(path or "config"))


def make_config(raw: JsonRow, where: str = "config") -> Config:
    """Validate a nested dict of differences from the defaults.

    Example:
        >>> make_config({"training": {"epochs": 2}}).training.epochs
        2
        >>> make_config({"training": {"epoch": 2}})
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: config: unknown key training.epoch (did you mean 'epochs'?)
    """
    return parse(Config, raw, where)


def read_search(file: Path | None, configured: Search | None, changes: JsonRow) -> Search:
    """Return the settings of a search.

    Args:
        file: a YAML file, or None for the settings of the config.
        configured: `merge.auto` of the config; None is the defaults.
        changes: settings that replace those of the file or config.

    Raises:
        UserError: the file is absent or not valid.

    Example:
        >>> read_search(None, None, {"budget": 10}).budget
        10
    """
    raw = {} if configured is None else configured.model_dump(mode="json")
    # a file replaces the settings of the config; it does not extend them
    if file is not None:
        raw = read_yaml(file, "space", "methods:")
    return parse(Search, raw | dict(changes), "search" if file is None else str(file))


def to_dict(config: Config) -> Json:
    """Return the resolved config as plain YAML-able data, every default written out.

    Example:
        >>> make_config(to_dict(Config())) == Config()
        True
    """
    # "json" turns tuples into lists: YAML has no tuples
    return config.model_dump(mode="json")


def read_yaml(file: Path, what: str = "config", expected: str = "training:") -> Json:
    """Return the sections of a YAML file as plain data, not validated; an empty file has none.

    Args:
        file: its path.
        what: what it is, for error messages.
        expected: the start of a section, for error messages.

    Raises:
        UserError: the file is absent, not valid YAML, or holds something else than sections.
    """
    if not file.is_file():
        near = similar_path(file) or (shipped.suggest(file) if what == "config" else "")
        names = ", or a name that ordermerge configs lists" if what == "config" else ""
        raise UserError(f"{what} file {file} not found{near}; give an existing YAML file{names}")
    try:
        # The safe loader: a config may come from others, and the full loader would build any object
        # that it names. An empty file is None, and a valid config of defaults.
        raw = load_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}; expected a text file of YAML") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        kind = "a list" if isinstance(raw, list) else "text"
        hint = "; a file of examples is given as data.train" if what == "config" else ""
        raise UserError(f"{file}: expected sections such as '{expected}', got {kind}{hint}")
    return raw
