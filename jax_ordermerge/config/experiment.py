"""The one schema of every YAML file and flag. Strict: unknown keys and wrong types are errors that name the nearest key."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jax_ordermerge.config.evaluation import Evaluation
from jax_ordermerge.config.merge import AUTO, Merge, Search, merge_name
from jax_ordermerge.config.mixing import Mixing
from jax_ordermerge.config.samples import Samples
from jax_ordermerge.config.section import Section, override, parse
from jax_ordermerge.errors import UserError

PREFERENCES = "preferences"  # the name under which held-out pairs are evaluated
AxisSize = Annotated[int, Field(ge=-1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Model(Section):
    """The base model and how it is computed."""

    base: str = Field(
        "embedded:quickstart",
        description="HF directory (also gs:// and s3://), hub name, or embedded:NAME",
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: take only config and tokenizer of the base"
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of matmuls; masters stay float32"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        "auto",
        description="kernel of training: auto is splash on TPU, cudnn on GPU where it is right (not for packed rows), else xla",
    )
    remat: Literal["none", "full", "dots"] = Field(
        "dots",
        description="recomputed in the backward pass: all but products (dots, often fastest), whole layers (full, least memory)",
    )
    ignore_config_keys: tuple[str, ...] = Field(
        (), description="unknown config.json keys to pass over"
    )


class Mesh(Section):
    """Sizes of the mesh axes; -1 is all remaining devices."""

    order: AxisSize = Field(
        1, description="device groups that train different members at the same time"
    )
    data: AxisSize = Field(1, description="divides the batch alone")
    fsdp: AxisSize = Field(-1, description="divides parameters and the batch")
    sequence: AxisSize = Field(
        1, description="divides the positions of long inputs (context parallel)"
    )
    tensor: AxisSize = Field(1, description="divides heads and mlp")
    dcn: dict[Literal["order", "data", "fsdp", "sequence", "tensor"], AxisSize] = Field(
        default_factory=dict,
        description="parts of axes on different TPU slices, such as {order: 2}; by default order takes all slices",
    )

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return self.model_dump(exclude={"dcn"})


class Distributed(Section):
    """Start of several processes."""

    coordinator: str | None = Field(
        None, description="host:port of process 0, or auto on TPU pods and SLURM"
    )
    processes: PositiveInt | None = None
    index: NonNegativeInt | None = None
    timeout: PositiveInt = Field(300, description="seconds to wait for the peers")
    heartbeat_timeout: PositiveInt = Field(
        100,
        description="seconds after which a silent process ends the others; at once where a connection breaks",
    )


class Data(Section):
    """Training, validation and test examples."""

    train: str = Field(
        "generated:quickstart",
        description="json, jsonl, parquet or csv file (also gs:// and s3://), hub dataset, or generated:NAME",
    )
    test: str | None = Field(None, description="held-out examples, never trained on")
    validation_examples: NonNegativeInt = Field(
        0,
        description="examples set aside from train by seed, to choose the best member, or the best checkpoint of each, on",
    )
    test_examples: NonNegativeInt = Field(
        0,
        description="examples set aside from train by seed and held out, in place of a file of their own (test)",
    )
    format: Literal[
        "auto",
        "messages",
        "prompt_completion",
        "text",
        "sharegpt",
        "alpaca",
        "question_answer",
        "preference",
    ] = "auto"
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="other names that columns of the format have in files: {question: problem, answer: solution}",
    )
    template: Literal["auto", "plain", "alpaca", "gsm8k", "chat"] = Field(
        "auto", description="how prompt and response become text"
    )
    max_length: PositiveInt = Field(512, description="tokens an example")
    too_long: Literal["drop", "truncate"] = "drop"
    limit: PositiveInt | None = Field(
        None,
        description="use only the first so many training examples: rows of the file, windows of texts",
    )
    test_limit: PositiveInt | None = Field(
        None, description="use only the first so many test examples"
    )
    packing: Literal["none", "packs", "bins"] = Field(
        "none",
        description="examples side by side in rows of max_length. packs: packed once, and packs are ordered; bins: each order is packed",
    )
    buckets: tuple[PositiveInt, ...] = Field(
        (), description="padded lengths below max_length; () pads to the longest example"
    )


class Population(Section):
    """The members and their orders."""

    members: PositiveInt = Field(4, description="how many times the base is fine-tuned")
    wave: PositiveInt | None = Field(
        None,
        description="members trained at the same time; by default as many as the memory of the devices holds",
    )
    level: Literal["sample", "batch", "balanced", "same", "reverse"] = Field(
        "sample", description="what the orders permute"
    )
    reshuffle: Literal["each_epoch", "never"] = "each_epoch"


class Objective(Section):
    """What the members minimize: the loss of the responses (sft), or that of preference pairs against the base (dpo)."""

    kind: Literal["sft", "dpo"] = "sft"
    beta: PositiveFloat = Field(
        0.1, description="dpo: how near members are held to the base; tau of ipo"
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid", description="dpo: -log sigmoid of the margin, or the square of its distance"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0,
        description="dpo with loss sigmoid: share of pairs whose preference is taken to be the other way round",
    )


# What a choice brings with it: settings that the other choices do not have, and their defaults.
_OWN_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "optimizer": {
        "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
        "adafactor": {
            "epsilon": 1e-30,
            "decay_rate": 0.8,
            "min_dim_size_to_factor": 128,
            "scale_parameter": True,
        },
        "lion": {"beta1": 0.9, "beta2": 0.99},
        "sgd": {"momentum": 0.9, "nesterov": False},
        "muon": {"momentum": 0.95, "nesterov": True, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    },
    "schedule": {"cosine": {}, "linear": {}, "wsd": {"decay": 0.1}, "constant": {}},
    "moments_dtype": {"float32": {}, "bfloat16": {"moments_rounding": "stochastic"}},
}


class Training(Section):
    """Optimization of every member. A setting that the chosen optimizer, schedule or dtype does not have is null, and refused if given."""

    epochs: PositiveInt = 3
    batch: PositiveInt = Field(32, description="examples, or packed rows, an optimizer step")
    microbatch: PositiveInt | None = Field(
        None,
        description="examples, or packed rows, a forward pass; smaller than batch accumulates gradients",
    )
    optimizer: Literal["adamw", "adafactor", "lion", "sgd", "muon"] = Field(
        "adamw",
        description="muon: for the matrices of the layers, and Adam for embeddings, head, norms and biases",
    )
    learning_rate: PositiveFloat = Field(
        2e-5, description="at its peak; each optimizer has a scale of its own"
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then linear over the last steps"
    )
    warmup: NonNegativeFloat = Field(
        0.03, description="fraction of all steps if below 1, else steps"
    )
    decay: PositiveFloat | None = Field(
        None, description="wsd (0.1): the last steps, a fraction of all if below 1, else steps"
    )
    final_fraction: NonNegativeFloat = Field(
        0.0, description="learning rate at the end, as a fraction of its peak"
    )
    weight_decay: NonNegativeFloat = Field(
        0.0, description="times the learning rate; of sgd it is added to the gradient, as in torch"
    )
    decay_on: Literal["matrices", "hidden", "all"] = Field(
        "matrices",
        description="matrices: all but norms and biases; hidden: nor embeddings and head; all: every tensor",
    )
    beta1: Fraction | None = Field(
        None, description="adamw, lion (0.9), muon where it is Adam (0.9)"
    )
    beta2: Fraction | None = Field(
        None, description="adamw (0.999), lion (0.99), muon where it is Adam (0.999)"
    )
    epsilon: PositiveFloat | None = Field(
        None, description="adamw, muon (1e-8), adafactor (1e-30, of the squared gradient)"
    )
    momentum: Fraction | None = Field(None, description="sgd (0.9), muon (0.95)")
    nesterov: bool | None = Field(None, description="sgd (false), muon (true)")
    decay_rate: Fraction | None = Field(
        None, description="adafactor (0.8): beta2 of step t is 1 - t^-decay_rate"
    )
    min_dim_size_to_factor: PositiveInt | None = Field(
        None,
        description="adafactor (128): matrices with a smaller side keep the second moment of every element",
    )
    scale_parameter: bool | None = Field(
        None,
        description="adafactor (true): the learning rate is relative to the RMS of each tensor",
    )
    moments_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="in which the optimizer's state is kept"
    )
    moments_rounding: Literal["stochastic", "nearest"] | None = Field(
        None,
        description="bfloat16 (stochastic): nearest loses the small changes that a beta2 of 0.999 makes",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, bias-corrected; the averages are then the members that are"
        " analyzed, merged and exported",
    )
    clip_norm: PositiveFloat | None = Field(
        1.0, description="global gradient norm; null does not clip"
    )
    mixing: Mixing | None = Field(
        None, description="null: members know nothing of each other; kind: wash or papa"
    )
    checkpoint_every: PositiveInt | None = Field(
        None, description="steps; null saves at the end of each epoch"
    )
    keep_checkpoints: PositiveInt = Field(2, description="how many of the latest are kept")
    checkpoint: Literal["last", "best"] = Field(
        "last",
        description="which weights of each member are analyzed, merged and exported: the last, or those of its own lowest validation loss"
        " (needs data.validation_examples, and memory for one more copy of what is trained)",
    )
    validate_every: PositiveInt | None = Field(
        None,
        description="steps between validation losses; null is each epoch's end with checkpoint best, else never",
    )
    log_every: PositiveInt = 10
    spike: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="stop where a member's loss is above so many times its median of the last 50 steps; null does not",
    )

    @property
    def validates(self) -> bool:
        """Whether validation losses are measured while training."""
        return self.checkpoint == "best" or self.validate_every is not None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _own_settings(cls, given: Any) -> Any:
        """Fill in the settings of the choices made, and refuse those of others."""
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        for choice, options in _OWN_SETTINGS.items():
            chosen = given.get(choice, cls.model_fields[choice].default)
            own = options.get(chosen) if isinstance(chosen, str) else None
            if own is None:
                continue  # the type of the choice itself says what is wrong
            for name in dict.fromkeys(
                name for settings in options.values() for name in settings if name not in own
            ):
                if given.get(name) is not None:
                    raise ValueError(
                        f"training.{name} = {given[name]!r} is not a setting of training.{choice} = {chosen}"
                        f" (it has: {', '.join(own) or 'none of its own'}); remove it"
                    )
            filled |= {name: default for name, default in own.items() if given.get(name) is None}
        return filled


class Lora(Section):
    """Low-rank adapters in place of full fine-tuning: W + alpha / rank B A with W frozen, and held once for all members.

    Dropout is not offered: a member must see in its order what the others see in theirs, and nothing else may differ.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = Field(16.0, description="the change is scaled by alpha / rank")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    targets: tuple[str, ...] = Field(
        ("all-linear",),
        description="q, k, v, o, gate, up, down or their Hugging Face names (q_proj); all-linear is all of them",
    )
    base_dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="in which the frozen base is held while training; null is model.compute_dtype",
    )

    @pydantic.field_validator("targets", mode="before")
    @classmethod
    def _one_name(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


class Analysis(Section):
    """Statistics of the position effect."""

    batch: PositiveInt = Field(64, description="examples a forward pass")
    bins: PositiveInt = 10
    bootstrap: PositiveInt = 1000
    permutations: PositiveInt = 1000


class Tracking(Section):
    """Metrics shown elsewhere too, one run a member, grouped; `metrics/train.jsonl` is always written."""

    tensorboard: bool = Field(
        False, description="event files in tracking/ of the run directory (extra: tensorboard)"
    )
    wandb: str | None = Field(
        None, description="project on Weights & Biases (extra: wandb); null does not use it"
    )


class Config(Section):
    """A whole experiment. Everything random in it follows from `seed` by name."""

    name: str = "experiment"
    output: str = Field(
        "runs/{name}",
        description="run directory, or its address: gs:// or s3://; {name} is replaced",
    )
    seed: int = 0
    model: Model = Model()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
    data: Data = Data()
    population: Population = Population()
    objective: Objective = Objective()
    training: Training = Training()
    samples: Samples = Samples()
    lora: Lora | None = Field(None, description="null trains all parameters")
    analysis: Analysis = Analysis()
    merge: Merge = Merge()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    compilation_cache: str | None = Field(
        None,
        description="directory in which compiled programs are kept for the next start; null compiles at every start",
    )

    @property
    def location(self) -> str:
        """The run directory as it was named: a path, or an address in a bucket."""
        return self.output.replace("{name}", self.name)

    @property
    def directory(self) -> Path:
        """The run directory, where it is on a disk."""
        return Path(self.location)

    @property
    def merge_names(self) -> list[str]:
        """The names of the merges that are exported, in their order."""
        chosen = [] if self.merge.auto is None else [AUTO]
        return [merge_name(spec, self.seed) for spec in self.merge.methods] + chosen

    @property
    def base_dtype(self) -> str:
        """The dtype in which a training holds the base: float32 where members start as copies of it."""
        return "float32" if self.lora is None else self.lora.base_dtype or self.model.compute_dtype

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.mesh.order > 0 and self.population.members % self.mesh.order:
            raise ValueError(
                f"population.members = {self.population.members} is not a multiple of mesh.order = {self.mesh.order}; change one of them"
            )
        if self.training.microbatch and self.training.batch % self.training.microbatch:
            raise ValueError(
                f"training.batch = {self.training.batch} is not a multiple of training.microbatch = {self.training.microbatch}"
            )
        if self.training.mixing and (self.population.wave or self.population.members) < max(
            self.population.members, 2
        ):
            raise ValueError(
                f"training.mixing needs two members or more, all of them trained at once; population has members ="
                f" {self.population.members}, wave = {self.population.wave}: change them or remove mixing"
            )
        if self.training.validates and not self.data.validation_examples:
            raise ValueError(
                "training.checkpoint = best and training.validate_every measure validation losses: set data.validation_examples"
            )
        if self.merge.auto is not None and not self.data.validation_examples:
            raise ValueError(
                "merge.auto chooses a merge on validation examples: set data.validation_examples"
            )
        if self.lora and self.model.init == "random":
            raise ValueError(
                "lora changes a trained base a little; model.init = random has none, set it to pretrained or lora to null"
            )
        if self.data.test and self.data.test_examples:
            raise ValueError(
                f"data.test_examples = {self.data.test_examples} sets examples aside from train, data.test = {self.data.test}"
                " is a file of them; give one of the two"
            )
        too_long = [b for b in self.data.buckets if b > self.data.max_length]
        if too_long:
            raise ValueError(
                f"data.buckets {too_long} are above data.max_length = {self.data.max_length}"
            )
        if self.data.packing != "none" and self.data.buckets:
            raise ValueError(
                f"data.buckets pad rows of one example, data.packing = {self.data.packing} fills them; give one of the two"
            )
        if self.data.packing == "bins" and self.population.level == "batch":
            raise ValueError(
                "population.level = batch permutes batches composed once, data.packing = bins composes anew; give packs"
            )
        if self.data.packing != "none" and self.model.attention == "cudnn":
            raise ValueError(
                f"model.attention = cudnn mixes packed documents (data.packing = {self.data.packing}); give auto or xla"
            )
        if self.objective.kind == "dpo" and self.data.format not in ("auto", "preference"):
            raise ValueError(
                f"objective.kind = dpo learns from preference pairs, not data.format = {self.data.format}; set it to auto"
            )
        if self.objective.loss == "ipo" and self.objective.label_smoothing:
            raise ValueError(
                "objective.label_smoothing goes with objective.loss = sigmoid; set it to 0 or the loss to sigmoid"
            )
        if self.objective.kind == "dpo" and any(
            task.name == PREFERENCES for task in self.evaluation.tasks
        ):
            raise ValueError(
                f"evaluation.tasks: the name {PREFERENCES} is taken by the held-out pairs of dpo; choose another"
            )
        if self.objective.kind == "dpo" and self.data.packing != "none":
            raise ValueError(
                f"data.packing = {self.data.packing} does not take preference pairs (objective.kind = dpo); set it to none"
            )
        names = self.merge_names
        twice = sorted({name for name in names if names.count(name) > 1})
        reserved = [
            name for name in names if name == "base" or name.startswith("member_") or "/" in name
        ]
        if reserved:
            raise ValueError(
                f"merge.methods: the name {reserved[0]} is taken by a model or holds a slash; choose another"
            )
        if twice:
            raise ValueError(
                f"merge.methods: the name {twice[0]} is used twice; give each its own name"
            )
        for spec in self.merge.methods:
            if spec.weights is not None and len(spec.weights) != self.population.members:
                raise ValueError(
                    f"merge.methods: {spec.method} has {len(spec.weights)} weights for population.members = {self.population.members}"
                )
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of differences from the defaults and apply `--set` overrides.

    Args:
        path: the YAML file; None is the defaults.
        overrides: `"section.key=value"` with a YAML value, applied in order.

    Raises:
        UserError: one line that names the key, what was given and what was expected.
    """
    raw = {} if path is None else _read_yaml(Path(path), "config", "training:")
    for item in overrides:
        override(raw, item)
    return make_config(raw, str(path or "config"))


def make_config(raw: Mapping[str, Any], where: str = "config") -> Config:
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


def read_search(file: Path | None, configured: Search | None, changes: Mapping[str, Any]) -> Search:
    """Return what a search tries and how: of a YAML file, else of the config, else the default, with some settings changed.

    Raises:
        UserError: the file is absent or not valid.

    Example:
        >>> read_search(None, None, {"budget": 10}).budget
        10
    """
    raw = {} if configured is None else configured.model_dump(mode="json")
    if file is not None:
        raw = _read_yaml(file, "space", "methods:")
    return parse(Search, raw | dict(changes), "search" if file is None else str(file))


def to_dict(config: Config) -> dict[str, Any]:
    """Return the resolved config as plain YAML-able data, every default written out.

    Example:
        >>> make_config(to_dict(Config())) == Config()
        True
    """
    return config.model_dump(mode="json")


def _read_yaml(file: Path, what: str, expected: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{what} file {file} not found")
    try:
        raw = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected sections such as '{expected}', got {type(raw).__name__}")
    return raw
