"""Sections on the base model and on what computes it: mesh and processes."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

from jax_ordermerge.config.section import Section

AxisSize = Annotated[int, Field(ge=-1)]


class Model(Section):
    """The base model and how it is computed."""

    base: str = Field(
        "embedded:quickstart",
        description="HF directory or GGUF file (also gs://, s3://), hub name, embedded:NAME",
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: take only config and tokenizer of the base"
    )
    # Masters in float32: bfloat16 keeps 8 bits, and an update below |w| / 512 would be lost.
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of matmuls; trained parameters stay in float32"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        "auto",
        description="kernel of training. auto: splash on TPU, cudnn on GPU where it is correct"
        " (not for packed rows), else xla",
        json_schema_extra={"with": "cudnn: GPU; splash: TPU"},
    )
    # Not `none` by default: keeping everything costs memory, and in the benchmark on CPU it was not
    # faster (benchmarks/RESULTS.md).
    remat: Literal["none", "full", "dots", "offload"] = Field(
        "dots",
        description="what the backward pass recomputes. dots: all but matmuls, often the fastest;"
        " full: whole layers, from their inputs; offload: as full, and the inputs wait in the"
        " memory of the host, the least memory of the device",
    )
    # The options themselves are in `train.compiler_options`, with their sources.
    compiler_preset: Literal["async_collectives", "no_windowed_einsum"] | None = Field(
        None,
        description="compiler options for a kind of devices. async_collectives: members in one"
        " group on GPU; no_windowed_einsum: TPU",
        examples=["no_windowed_einsum"],
        json_schema_extra={"with": "GPU, or TPU"},
    )
    compiler_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="options of XLA for the training step, e.g."
        " {xla_gpu_memory_limit_slop_factor: 200}; one that the compiler does not accept is"
        " refused",
        examples=[{"xla_gpu_memory_limit_slop_factor": 200}],
        json_schema_extra={"with": "the compiler of these devices"},
    )
    # A list and no switch: an unknown key may change the mathematics, so each is a decision.
    ignore_config_keys: tuple[str, ...] = Field(
        (), description="unknown config.json keys to ignore", examples=[["my_note"]]
    )


class Mesh(Section):
    """Sizes of the mesh axes; -1 is all remaining devices."""

    order: AxisSize = Field(
        1,
        description="device groups that train different members at the same time",
        json_schema_extra={"unit": "devices", "with": "population.members, which it divides"},
    )
    data: AxisSize = Field(
        1,
        description="divides the batch alone",
        json_schema_extra={"unit": "devices", "with": "training.batch, which it divides"},
    )
    # The remaining devices by default, so that the defaults run on any number of them.
    fsdp: AxisSize = Field(
        -1,
        description="divides parameters and the batch",
        json_schema_extra={"unit": "devices", "with": "training.batch, which it divides"},
    )
    sequence: AxisSize = Field(
        1,
        description="divides the positions of long inputs (context parallel)",
        json_schema_extra={"unit": "devices", "with": "data.max_length"},
    )
    tensor: AxisSize = Field(
        1,
        description="divides heads and mlp",
        json_schema_extra={"unit": "devices", "with": "heads of the model, which it divides"},
    )
    # Nothing crosses `order` while members train, so it is the axis for the slow network.
    dcn: dict[Literal["order", "data", "fsdp", "sequence", "tensor"], AxisSize] = Field(
        default_factory=dict,
        description="how axes are divided over TPU slices or GPU nodes, e.g. {order: 2}; by default"
        " order takes them, then data, then fsdp",
        examples=[{"order": 2}],
        json_schema_extra={"with": "several slices or nodes"},
    )

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return self.model_dump(exclude={"dcn"})


class Distributed(Section):
    """Start of several processes."""

    coordinator: str | None = Field(
        None,
        description="host:port of process 0, or auto on TPU pods and SLURM",
        examples=["10.0.0.2:8476"],
        json_schema_extra={"with": "distributed.processes and distributed.index, unless auto"},
    )
    processes: PositiveInt | None = Field(
        None,
        description="number of processes of the run",
        examples=[2],
        json_schema_extra={"unit": "processes", "with": "distributed.coordinator"},
    )
    index: NonNegativeInt | None = Field(
        None,
        description="number of this process, from 0",
        examples=[0],
        json_schema_extra={"with": "distributed.coordinator"},
    )
    # Both times are the defaults of `jax.distributed.initialize`.
    timeout: PositiveInt = Field(
        300, description="seconds to wait for the peers", json_schema_extra={"unit": "seconds"}
    )
    heartbeat_timeout: PositiveInt = Field(
        100,
        description="seconds after which a silent process ends the others; a broken connection"
        " ends them at once",
        json_schema_extra={"unit": "seconds"},
    )

    @pydantic.model_validator(mode="after")
    def _started(self) -> "Distributed":
        # `processes: 1` and `index: 0` only state what happens without a coordinator.
        defaults = {"processes": 1, "index": 0}
        ignored = [
            key for key, value in defaults.items() if getattr(self, key) not in (None, value)
        ]
        if ignored and self.coordinator is None:
            raise ValueError(
                f"{ignored[0]} would be ignored: without coordinator one process runs alone; give"
                " coordinator: HOST:PORT, or auto"
            )
        return self
