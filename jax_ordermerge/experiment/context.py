"""What the stages of a run share.

`open_run` reads and checks every input before anything is written.
"""

import dataclasses
import datetime as dt
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from jax_ordermerge import config as schema
from jax_ordermerge import mesh as meshes
from jax_ordermerge import processes, program_cache, record
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import Config, check_inputs
from jax_ordermerge.data import dates, prompt_format, source, tokenizers
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.data.tokenizers import Tokenizer
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import preflight
from jax_ordermerge.experiment.specs import data_settings, training_spec
from jax_ordermerge.experiment.splits import Overlap, check_same_data, find_overlaps
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.merge.sources.references import base_dtype, read_prompt_format
from jax_ordermerge.train import compiler_options, trackers
from jax_ordermerge.train.spec import TrainingSpec

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class RunContext:
    """The config, the hardware, the base model and the data of a run.

    Attributes:
        config: the resolved config; its `output` is a directory on a disk.
        mesh: the devices.
        base_dir: directory of the base model.
        model: its architecture. Generation and exports stop at its `eos_token_ids`: those of the
            base, and the tokens that end learned responses.
        tokenizer: its tokenizer.
        date: what the chat template prints as today's, None where it prints none.
        splits: tokenized examples under `train` and, where the config asks for them, `validation`
            and `test`.
        overlaps: what the splits share.
        base_digest: of the base model, see `record.base_digest`.
        log: receives one-line messages.
        on_checkpoint: called when a checkpoint is complete, e.g. to copy it to a bucket.
        population: number of the population that a stage works on.
    """

    config: Config
    mesh: Mesh
    base_dir: Path
    model: ModelConfig
    tokenizer: Tokenizer
    date: dt.date | None
    splits: dict[str, Examples]
    overlaps: Sequence[Overlap]
    base_digest: str
    log: Log
    on_checkpoint: Callable[[], None] | None = None
    population: int = 0

    # Derived from the config, not a field of its own: a context with another `output` (a scratch
    # directory, a local copy of a bucket) then can never write into the old directory.
    @property
    def layout(self) -> RunLayout:
        """Paths of the results: of the run directory, or of another population in it."""
        return self.training_layout.population(self.population)

    @property
    def training_layout(self) -> RunLayout:
        """Paths of the training, which is one of all populations."""
        return RunLayout(self.config.directory)

    @property
    def members(self) -> range:
        """Numbers of the members of the population, counted over all populations."""
        first = self.population * self.config.population.members
        return range(first, first + self.config.population.members)

    @property
    def export_dtype(self) -> str:
        """Dtype of the members and merges that are measured and written."""
        assert self.config.merge.dtype is not None  # `load_context` replaces it
        return self.config.merge.dtype

    @functools.cached_property
    def training(self) -> TrainingSpec:
        """Settings of the training."""
        return training_spec(self.config)

    @functools.cached_property
    def prompt_format(self) -> PromptFormat:
        """How the members are asked, and how they end their responses."""
        return prompt_format.describe(
            self.splits["train"],
            self.tokenizer,
            stops=self.model.eos_token_ids,
            date=self.date,
        )


class Stage(NamedTuple):
    """A stage of a run. What it reads of the config is declared in `record.READS`.

    Attributes:
        name: as in `ordermerge NAME`.
        run: writes the output of the stage; called again, it continues.
        is_complete: whether that output is complete. It looks at files only.
        by_population: whether it is called for each population by itself.
    """

    name: str
    run: Callable[[RunContext], None]
    is_complete: Callable[[Config], bool]
    by_population: bool = False


def open_run(
    config: Config, log: Log, on_checkpoint: Callable[[], None] | None = None
) -> RunContext:
    """Return the context of a run directory: `load_context`, and its inputs are those of the run.

    Raises:
        UserError: the first input that does not fit. Nothing has been written.
    """
    recorded = read_prompt_format(RunLayout(config.directory))
    ctx = load_context(config, log, on_checkpoint, recorded.date)
    # here and not in the stages: each of them trusts that base and samples are those of the members
    _check_same_training(ctx)
    check_same_data(ctx.layout, ctx.splits)
    return ctx


def _check_same_training(ctx: RunContext) -> None:
    """Refuse a run whose checkpoints are of other settings, or whose base was exchanged."""
    run = ctx.layout
    # of stages.json the checkpoints are a second witness, which is in binary files
    for checkpoints in (run.checkpoints, *run.wave_checkpoints()):
        step = orbax.latest(checkpoints)
        stored = {} if step is None else orbax.metadata(checkpoints, step).get("settings", {})
        if changes := record.training_changes(stored, ctx.config):
            raise UserError(
                f"checkpoint {step} in {checkpoints.parent} is of another training"
                f" ({'; '.join(changes)}); restore the config, or choose another output directory"
            )
    record.refuse_other_base(run, ctx.config.model, ctx.base_digest)


def load_context(
    config: Config,
    log: Log,
    on_checkpoint: Callable[[], None] | None = None,
    recorded_date: dt.date | None = None,
) -> RunContext:
    """Start the processes, build the mesh, read model and data, and check them against each other.

    Args:
        config: a resolved config.
        log: receives one-line messages.
        on_checkpoint: see `RunContext`.
        recorded_date: what the chat template has printed as today's date so far.

    Raises:
        UserError: the first input that does not fit. Nothing has been written.
    """
    # Cheap checks come first: a typo in the config must not cost the start of a cluster. Only then
    # may the devices be touched, and from there on all processes take the same path.
    check_inputs(config)
    preflight.check_config(config)
    # only the machine that trains needs their packages
    trackers.check(config.tracking, several=config.distributed.coordinator is not None)
    start_devices(config)
    shared = schema.to_dict(config)
    # addresses and cache directories belong to a machine; everything else must agree, or the
    # processes would wait for each other in different programs
    for key in ("distributed", "compilation_cache"):
        del shared[key]
    processes.check_alike(shared)
    mesh = meshes.make_mesh(**config.mesh.model_dump())
    preflight.check_groups(config, mesh.shape["order"])
    compiler_options.check(config.model, mesh)
    base_dir = convert.resolve(config.model.base)
    model = convert.load_config(base_dir, config.model.ignore_config_keys)
    preflight.check_model(config, base_dir, model)
    preflight.check_frozen(config, model, mesh)
    if config.training.optimizer_memory == "host":
        meshes.check_host_memory(mesh, "training.optimizer_memory = host")
    if config.model.remat == "offload":
        meshes.check_host_memory(mesh, "model.remat = offload")
    config = _choose_export_dtype(config, base_dir, log)
    tokenizer = tokenizers.load_tokenizer(base_dir)
    # before anything is tokenized: the date is part of the tokens
    date = dates.pin_date(tokenizer, config.data.date, recorded_date)
    splits = source.load_splits(data_settings(config), tokenizer, seed=config.seed, shared=True)
    overlaps = find_overlaps(splits)
    preflight.check_data(config, model, tokenizer, splits, overlaps)
    # a file may differ between hosts under the same path: compare what was read
    digests = {f"data.{name}": examples.digest for name, examples in splits.items()}
    # The members are to stop where they have learned to, and where their base does.
    base_ends = model.eos_token_ids or (tokenizer.eos_token_id,)
    model = model.with_ends((*splits["train"].ends, *base_ends))
    base_digest = record.base_digest(config.model, base_dir)
    processes.check_alike({**digests, "model.base": base_digest})
    return RunContext(
        config,
        mesh,
        base_dir,
        model,
        tokenizer,
        date,
        splits,
        overlaps,
        base_digest,
        log,
        on_checkpoint,
    )


def _choose_export_dtype(config: Config, base_dir: Path, log: Log) -> Config:
    """Return the config with the dtype of the base for members and merges, where it names none."""
    if config.merge.dtype is not None:
        return config
    dtype = base_dtype(config.model, base_dir)
    if dtype != "float32":
        log(
            f"members are trained in float32 and exported in {dtype}, the dtype of the base; set"
            " merge.dtype for another one"
        )
    return config.with_export_dtype(dtype)


def start_devices(config: Config) -> None:
    """Start the processes and set what XLA reads at its start. A second call changes nothing."""
    program_cache.configure(
        config.compilation_cache, by_default=config.distributed.coordinator is None
    )
    # XLA reads the number of CPU devices when the backend starts; several processes bring their own
    if config.distributed.coordinator is None:
        meshes.provide_cpu_devices(config.mesh.sizes.values())
    processes.start_distributed(**config.distributed.model_dump())
    meshes.check_accelerator()
