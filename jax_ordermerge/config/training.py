"""Sections on training: schedule, optimizer, mixing, adapters, what is logged.

The optimizers are registered by the modules of `jax_ordermerge.train.optimizers`, one module for
each. They bring their settings with them.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
)

from jax_ordermerge.config.section import FREE_TO_CHANGE, Section, one_of, registered
from jax_ordermerge.registry import Registry

if TYPE_CHECKING:
    import optax

Fraction = Annotated[float, Field(ge=0, lt=1)]  # of a running mean: 1 would never change it
Share = Annotated[float, Field(gt=0, le=1)]


# --------------------------------------------------------------------------------------- schedule


class Cosine(Section):
    """Half a cosine from the peak to the end."""

    kind: Literal["cosine"] = "cosine"


class Linear(Section):
    """A straight line from the peak to the end."""

    kind: Literal["linear"] = "linear"


class Wsd(Section):
    """Constant, then linear over the last steps (warmup-stable-decay)."""

    kind: Literal["wsd"] = "wsd"
    decay: PositiveFloat = Field(
        0.1,
        description="length of the decay: a fraction of all steps if below 1, else steps",
        json_schema_extra={"unit": "share of all steps, or steps"},
    )


class Constant(Section):
    """The peak until the end."""

    kind: Literal["constant"] = "constant"


Schedule = Annotated[
    Cosine | Linear | Wsd | Constant,
    Field(discriminator="kind"),
    one_of(Cosine, Linear, Wsd, Constant, noun="schedule", default="cosine"),
]

# -------------------------------------------------------------------------------------- optimizer


class OptimizerSettings(Section):
    """Base class for the settings of an optimizer."""

    # No literal: the name is the key in the registry, and one class may serve several names.
    kind: str


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer: its settings, and how the direction of an update is computed.

    Attributes:
        settings: the section that a config writes for it.
        direction: `(settings, table) -> optax.GradientTransformation`, where `table` declares
            the trainable tensors (`arch.TensorSpec`). Clipping, weight decay, schedule and the
            dtype of the moments are added to it.
        decoupled_decay: whether weight decay is added to the update (as in AdamW). Otherwise it
            is added to the gradient, as the gradient of a penalty.
        elementwise: whether the update of an element reads no other element of its tensor. Then
            tensors may be reshaped for it.
    """

    settings: type[OptimizerSettings]
    # A string, since importing optax imports jax, which a reader of configs does not need.
    direction: Callable[..., "optax.GradientTransformation"]
    decoupled_decay: bool = True
    elementwise: bool = False


OPTIMIZERS = Registry[Optimizer]("optimizer", "jax_ordermerge.train.optimizers")


# A factory: the registry is filled when it is first read, not when this module is imported.
def _adamw() -> OptimizerSettings:
    return OPTIMIZERS["adamw"].settings(kind="adamw")


AnyOptimizer = Annotated[
    SerializeAsAny[OptimizerSettings],
    registered(OPTIMIZERS, noun="optimizer", default="adamw"),
]


class Float32Moments(Section):
    """Optimizer state in float32."""

    kind: Literal["float32"] = "float32"


class Bfloat16Moments(Section):
    """Optimizer state in bfloat16, which halves its memory."""

    kind: Literal["bfloat16"] = "bfloat16"
    # bfloat16 neighbours are 0.4 to 0.8 % apart, while beta2 = 0.999 moves by 0.1 % of the gap.
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic",
        description="nearest loses the small changes that a beta2 of 0.999 makes",
    )


Moments = Annotated[
    Float32Moments | Bfloat16Moments,
    Field(discriminator="kind"),
    one_of(Float32Moments, Bfloat16Moments, noun="dtype of moments", default="float32"),
]

# ----------------------------------------------------------------------------------------- mixing


class Wash(Section):
    """Members that swap a few of their parameters."""

    kind: Literal["wash"] = "wash"
    every: PositiveInt = Field(
        1, description="steps from one mixing to the next", json_schema_extra={"unit": "steps"}
    )
    fraction: Share = Field(
        0.001,
        description="share of the elements that are swapped each time",
        json_schema_extra={"unit": "share"},
    )
    depth: Literal["constant", "decreasing"] = Field(
        "decreasing",
        description="the same fraction in every layer, or one that falls from the embedding to 0"
        " at the head",
    )


class Papa(Section):
    """Members that are drawn to their mean."""

    kind: Literal["papa"] = "papa"
    every: PositiveInt = Field(
        10, description="steps from one mixing to the next", json_schema_extra={"unit": "steps"}
    )
    # 1 - alpha of the paper (https://arxiv.org/abs/2304.03094); 1 is its PAPA-all.
    rate: Share = Field(
        0.01,
        description="how far members move to the mean each time; 1 is all of the way",
        json_schema_extra={"unit": "share"},
    )


Mixing = Annotated[Wash | Papa, Field(discriminator="kind"), one_of(Wash, Papa, noun="mixing")]

# --------------------------------------------------------------------------------------- sections


class Training(Section):
    """Optimization of every member."""

    # Epochs, learning rate, schedule, warm-up and weight decay are the published recipe of Alpaca
    # for Llama-7B, which GSM8K and code recipes share.
    epochs: PositiveInt = Field(
        3,
        description="how often each member sees every training example",
        json_schema_extra={"unit": "epochs"},
    )
    batch: PositiveInt = Field(
        32,
        description="examples, or packed rows, per optimizer step",
        json_schema_extra={"unit": "examples", "with": "mesh.data and mesh.fsdp, which divide it"},
    )
    # A matter of memory only: the sum over microbatches is the gradient of the batch.
    microbatch: PositiveInt | None = Field(
        None,
        description="examples, or packed rows, per forward pass; below batch it accumulates"
        " gradients",
        examples=[8],
        json_schema_extra={"unit": "examples", "with": "training.batch, which it divides"},
    )
    optimizer: AnyOptimizer = Field(
        default_factory=_adamw,
        description="direction of the updates",
        json_schema_extra={"with": "training.learning_rate"},
    )
    learning_rate: PositiveFloat = Field(
        2e-5,
        description="at its peak; optimizers need different magnitudes",
        json_schema_extra={"unit": "per step", "with": "training.optimizer"},
    )
    schedule: Schedule = Field(Cosine(), description="learning rate after the warm-up")
    # Published recipes give either form: 3 % of the steps, or 10 steps. One key takes both.
    warmup: NonNegativeFloat = Field(
        0.03,
        description="length of the warm-up: a fraction of all steps if below 1, else steps",
        json_schema_extra={"unit": "share of all steps, or steps"},
    )
    final_fraction: NonNegativeFloat = Field(
        0.0,
        description="learning rate at the end, as a fraction of its peak",
        json_schema_extra={"unit": "share", "with": "training.schedule"},
    )
    weight_decay: NonNegativeFloat = Field(
        0.0,
        description="times the learning rate; for sgd it is added to the gradient, as in torch",
        json_schema_extra={"unit": "per step", "with": "training.decay_on"},
    )
    decay_on: Literal["matrices", "hidden", "all"] = Field(
        "matrices",
        description="matrices: all but norms and biases; hidden: also not embeddings and head;"
        " all: every tensor",
    )
    moments: Moments = Field(Float32Moments(), description="dtype of the optimizer state")
    # Where it lives changes no bits, so it may change when a run continues.
    optimizer_memory: Annotated[Literal["device", "host"], FREE_TO_CHANGE] = Field(
        "device",
        description="where the optimizer state lives between updates. host: in the memory of the"
        " host; a device holds that of the member that it updates. The same bits, and two transfers"
        " per update",
    )
    # Bias-corrected: a short training would otherwise average in its initial weights.
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, bias-corrected; the"
        " averages are then analyzed, merged and exported as the members",
        examples=[0.999],
        json_schema_extra={"unit": "per step"},
    )
    clip_norm: PositiveFloat | None = Field(
        1.0,
        description="largest global gradient norm; null does not clip",
        json_schema_extra={"unit": "norm of the gradient"},
    )
    # Off by default: a mixed member has learned from other orders than its own.
    mixing: Mixing | None = Field(
        None,
        description="null: members train independently",
        examples=["wash"],
        json_schema_extra={"with": "two members or more, all at once; not population.replicates"},
    )
    # How often to save changes no result, so it may change when a run continues.
    checkpoint_every: Annotated[PositiveInt | None, FREE_TO_CHANGE] = Field(
        None,
        description="steps between checkpoints; null saves at the end of each epoch",
        examples=[100],
        json_schema_extra={"unit": "steps"},
    )
    # In minutes, because that is what a machine that is taken away costs.
    checkpoint_minutes: Annotated[PositiveFloat | None, FREE_TO_CHANGE] = Field(
        None,
        description="saves also where the last checkpoint is older, at the next step that is"
        " logged; for machines that may be taken away. null does not",
        examples=[10],
        json_schema_extra={"unit": "minutes"},
    )
    keep_checkpoints: Annotated[PositiveInt, FREE_TO_CHANGE] = Field(
        2,
        description="how many of the latest checkpoints are kept",
        json_schema_extra={"unit": "checkpoints"},
    )
    # Of a network share of a few TiB. A local disk is faster, and then nothing depends on it.
    checkpoint_bandwidth: Annotated[PositiveFloat, FREE_TO_CHANGE] = Field(
        200,
        description="MB per second, of all processes together, at which the storage takes a"
        " checkpoint: plans count with it, and a save that takes three times as long has failed"
        " (20 minutes at least)",
        json_schema_extra={"unit": "MB per second"},
    )
    # Not free to change: it decides which weights are merged.
    checkpoint: Literal["last", "best"] = Field(
        "last",
        description="weights of each member that are analyzed, merged and exported: the last, or"
        " those with its lowest validation loss (needs data.validation_examples, and memory for"
        " one more copy of the trained parameters)",
        json_schema_extra={"with": "best: data.validation_examples"},
    )
    validate_every: PositiveInt | None = Field(
        None,
        description="steps between validation losses; null is the end of each epoch with"
        " checkpoint: best, else never",
        examples=[50],
        json_schema_extra={"unit": "steps", "with": "data.validation_examples"},
    )
    log_every: Annotated[PositiveInt, FREE_TO_CHANGE] = Field(
        10,
        description="steps between lines of metrics/train.jsonl",
        json_schema_extra={"unit": "steps"},
    )
    # A median, because a mean would rise with the spikes that it should find.
    spike: Annotated[float | None, Field(gt=1), FREE_TO_CHANGE] = Field(
        None,
        description="stop where a member's loss exceeds its median of the last 50 steps by this"
        " factor; null does not",
        examples=[4],
        json_schema_extra={"unit": "times the median"},
    )

    @property
    def checkpoint_bytes_per_second(self) -> float:
        """`checkpoint_bandwidth` in bytes."""
        return 1e6 * self.checkpoint_bandwidth

    @property
    def validates(self) -> bool:
        """Whether validation losses are measured while training."""
        return self.checkpoint == "best" or self.validate_every is not None


class Lora(Section):
    """Low-rank adapters instead of full fine-tuning: W + alpha / rank B A.

    W is frozen, and one copy serves all members. There is no dropout: the order of the data, or
    with `population.vary` the initialization of A, is all that differs between members.
    """

    rank: PositiveInt = Field(
        8, description="rank of B A", json_schema_extra={"unit": "dimensions"}
    )
    alpha: PositiveFloat = Field(
        16.0,
        description="the change is scaled by alpha / rank",
        json_schema_extra={"unit": "factor"},
    )
    # rsLoRA (https://arxiv.org/abs/2312.03732): alpha / rank shrinks updates of high ranks.
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    targets: tuple[str, ...] = Field(
        ("all-linear",),
        description="q, k, v, o, gate, up, down (of Phi qkv, o, gate_up, down) or their Hugging"
        " Face names (q_proj); all-linear is all of them",
    )
    # A frozen base is only read: it needs no float32 masters.
    base_dtype: Literal["float32", "bfloat16", "int8", "int4", "nf4"] | None = Field(
        None,
        description="dtype of the frozen base in training; null is model.compute_dtype. int8, int4"
        " and nf4 quantize the matrices of the layers; members are merged from the base as it was."
        " 4 bits cost SmolLM2-135M 0.25 nats per token and more",
        examples=["int8"],
        json_schema_extra={"with": "int8, int4 and nf4: extra quant"},
    )
    base_block: Annotated[int, Field(ge=2, multiple_of=2)] | None = Field(
        None,
        description="inputs of a quantized matrix that share a scale of 4 bytes; fewer are more"
        " exact. null is 64",
        examples=[32],
        json_schema_extra={"unit": "inputs", "with": "lora.base_dtype: int8, int4 or nf4"},
    )
    fused: bool = Field(
        False,
        description="train the members of a device group as one program, which multiplies with the"
        " base once for all of them; equal to the members alone up to rounding, not bit for bit",
    )

    # "before": pydantic takes no string for a tuple
    @pydantic.field_validator("targets", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _block_is_of_a_quantized_base(self) -> "Lora":
        if self.base_block is not None and not self.quantizes:
            raise ValueError(
                f"lora.base_block = {self.base_block} is of a quantized base, and lora.base_dtype ="
                f" {self.base_dtype}: set it to int8, int4 or nf4, or remove lora.base_block"
            )
        return self

    @property
    def quantizes(self) -> bool:
        """Whether the base is quantized."""
        return self.base_dtype not in (None, "float32", "bfloat16")

    @property
    def block(self) -> int:
        """`base_block`, or its default: that of QLoRA."""
        return self.base_block or 64


class Samples(Section):
    """Greedy answers to fixed prompts while training, in metrics/samples.jsonl.

    They change nothing in the training: no order and no random choice depends on them.
    """

    every: PositiveInt | None = Field(
        None,
        description="steps between answers, and after the last step; null asks nothing",
        examples=[50],
        json_schema_extra={"unit": "steps"},
    )
    prompts: tuple[str, ...] = Field(
        (),
        description="in the template of the data; by default the first validation examples, else"
        " the first test examples",
        examples=[["How many legs has a spider?"]],
        json_schema_extra={"with": "samples.every"},
    )
    count: PositiveInt = Field(
        4,
        description="number of examples where no prompts are given",
        json_schema_extra={"unit": "examples", "with": "samples.every, without samples.prompts"},
    )
    max_new_tokens: PositiveInt = Field(
        64,
        description="largest number of tokens of an answer",
        json_schema_extra={"unit": "tokens", "with": "samples.every"},
    )


class Tracking(Section):
    """Trackers of metrics, one run per member; `metrics/train.jsonl` is always written."""

    # Trackers hold nothing that is not in the log, so a run without them loses no data.
    tensorboard: bool = Field(
        False, description="event files in tracking/ of the run directory (extra: tensorboard)"
    )
    wandb: str | None = Field(
        None,
        description="project on Weights & Biases (extra: wandb); null does not use it",
        examples=["my-project"],
        json_schema_extra={"with": "extra wandb"},
    )
    trackio: str | None = Field(
        None,
        description="project of trackio on this machine (extra: trackio), or where TRACKIO_SPACE_ID"
        " and TRACKIO_SERVER_URL say; null does not use it",
        examples=["my-project"],
        json_schema_extra={"with": "extra trackio"},
    )
