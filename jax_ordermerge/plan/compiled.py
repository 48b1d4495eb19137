"""The programs of a run, compiled for devices that may be absent, and what they require.

Memory is the compiler's own plan, and collectives are read from the compiled program. FLOPs are not
read from it: XLA's cost analysis counts the body of a loop once, however often the loop runs, and
layers, members and microbatches are loops here. `analytic` counts them from the tensor table.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.evaluate import decode, scoring
from jax_ordermerge.merge import population
from jax_ordermerge.merge.methods.table import METHODS
from jax_ordermerge.model import kernels
from jax_ordermerge.plan.analytic import bytes_per_device
from jax_ordermerge.plan.collectives import Collectives, read_collectives
from jax_ordermerge.plan.spec import PlanSpec
from jax_ordermerge.train import batches
from jax_ordermerge.train.programs import Programs
from jax_ordermerge.train.spec import TrainingSpec

# XLA has no field for it: the size is in the text of the error, such as "Used 20.1G of 15.75G".
_USED = re.compile(r"Used ([\d.]+)([KMGT])i?B? of")


@dataclasses.dataclass(frozen=True)
class Requirements:
    """Memory and collectives of a compiled program.

    Attributes:
        arguments: bytes per device of the inputs. Those of a training step are the state, which it
            updates in place, the batch, and `shared`.
        temporaries: bytes per device that live only while the program runs, and its results.
        collectives: see `collectives.read_collectives`.
        seconds: time of the compilation.
        shared: bytes per device that all members share, such as the frozen base of adapters.
        growth: bytes per device that each member of a device group adds to `temporaries`; 0 where
            members run one after another.
    """

    arguments: int
    temporaries: int
    collectives: Collectives
    seconds: float
    shared: int = 0
    growth: int = 0

    @property
    def bytes(self) -> int:
        """Bytes per device in all."""
        return self.arguments + self.temporaries


class TooLarge(Exception):
    """The compiler refused a program that does not fit the memory.

    Attributes:
        bytes: bytes per device that the program would use; None if the compiler does not say.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        used = _USED.search(message)
        # binary units, whatever the suffix: XLA prints powers of 1024
        self.bytes = int(float(used[1]) * 1024 ** " KMGT".index(used[2])) if used else None


def step_requirements(
    spec: TrainingSpec, model: ModelConfig, mesh: Mesh, examples: Examples | None = None
) -> Requirements:
    """Compile the training step of the first wave.

    Args:
        spec: settings; no file that they name is read.
        model: architecture.
        mesh: devices of this process, or of `devices.topology_devices`.
        examples: training examples; by default a batch of the longest that the settings allow.

    Raises:
        TooLarge: the compiler says that the step does not fit.
    """
    # The plan decides the padded lengths, and so the branches of the program. Only shapes of the
    # examples matter: their values never reach the compiler.
    plan = batches.make_plan(spec, examples or longest_examples(spec), spec.first_wave, mesh=mesh)
    programs = Programs(model, plan, mesh)
    needs = _compile(programs.compile_step, mesh)
    # the best weights of each member lie in memory beside the step, which does not take them
    best = bytes_per_device(programs.state.params) if spec.training.checkpoint == "best" else 0
    shared = bytes_per_device(programs.frozen)
    return dataclasses.replace(needs, arguments=needs.arguments + best, shared=shared)


def longest_examples(spec: TrainingSpec) -> Examples:
    """Return one batch of artificial examples, each as long as the settings allow."""
    # the longest rows need most memory: a step that fits them fits all
    size, length = spec.training.batch, spec.data.max_length
    offsets = np.arange(size + 1) * length
    # ones and not random: only shapes reach the compiler
    tokens = Ragged(np.ones(size * length, np.int32), offsets)
    response = Ragged(np.ones(size * length, np.bool_), offsets)
    examples = Examples(tokens, response, np.arange(size))
    # two sequences per pair, and the log-probabilities of the base, which a run measures first
    if spec.objective.kind == "dpo":
        reference = np.zeros((size, 2), np.float32)
        examples = dataclasses.replace(examples, rejected=examples, reference=reference)
    return examples


def losses_requirements(
    spec: PlanSpec, model: ModelConfig, mesh: Mesh, length: int
) -> Requirements:
    """Compile the program that measures the losses of one model on rows of `length` tokens."""
    dtype = spec.model.compute_dtype
    program = functools.partial(
        scoring.compile_losses,
        model,
        mesh,
        batch=spec.analysis.batch,
        length=length,
        params_dtype=spec.merge_dtype,
        dtype=dtype,
        kernel=kernels.choose(spec.model.attention, model, mesh, dtype=dtype),
    )
    return _compile(program, mesh)


def generation_requirements(
    spec: PlanSpec, model: ModelConfig, mesh: Mesh, prompt: int, new: int
) -> Requirements:
    """Compile the program that continues prompts of `prompt` tokens by up to `new` tokens."""
    program = functools.partial(
        decode.compile_generation,
        model,
        mesh,
        batch=spec.evaluation.batch,
        prompt=prompt,
        max_new_tokens=new,
        params_dtype=spec.merge_dtype,
        dtype=spec.model.compute_dtype,
    )
    # The loop of generation ends when all rows have ended, so its trip count is not in the text; at
    # most it runs once per new token.
    return _compile(program, mesh, rounds=new)


def merge_requirements(spec: PlanSpec, model: ModelConfig, mesh: Mesh) -> Requirements:
    """Compile the merges of a spec.

    A merge runs tensor by tensor, so only the largest tensor is compiled. All members, the base and
    the merged model lie in memory beside it. Collectives are those of that one tensor, by the
    method that sends most.
    """
    # compiled on shapes: no member exists yet
    dtype, members = spec.merge_dtype, spec.population.members
    merges = [_compile(program, mesh) for program in _merge_programs(spec, model, mesh)]
    population_bytes, model_bytes = (
        bytes_per_device(params)
        for params in (
            convert.abstract_params(model, mesh, members=members, dtype=dtype),
            convert.abstract_params(model, mesh, dtype=dtype),
        )
    )
    return Requirements(
        arguments=population_bytes + model_bytes,
        # the merged model grows while members and base are still there
        temporaries=model_bytes + max((needs.temporaries for needs in merges), default=0),
        collectives=max(
            (needs.collectives for needs in merges),
            key=lambda collectives: sum(size for _, size in collectives.values()),
            default={},
        ),
        seconds=sum(needs.seconds for needs in merges),
    )


def _merge_programs(
    spec: PlanSpec, model: ModelConfig, mesh: Mesh
) -> Iterator[Callable[[], jax.stages.Compiled]]:
    """Yield functions that compile the merges, one per different program: seeds do not matter."""
    # a list and no set: parameters are dicts, which cannot be hashed
    seen: list[tuple[object, ...]] = []
    for entry in spec.merge.methods:
        method, weights, parameters = entry.method, entry.weights, entry.parameters
        if (method, weights, parameters) in seen:
            continue
        seen.append((method, weights, parameters))
        members = spec.population.members
        if METHODS[method].needs == "fisher":
            # the Fisher information is merged like further members, to which weights do not apply
            members, weights = 2 * members, None
        yield functools.partial(
            population.compile_merge,
            model,
            mesh,
            members=members,
            method=method,
            weights=weights,
            parameters=parameters,
            dtype=spec.merge_dtype,
        )


def _compile(program: Callable[[], Any], mesh: Mesh, rounds: int = 1) -> Requirements:
    # A refusal for lack of memory is a result of the plan. Any other error of the compiler is a
    # defect and is raised as it is.
    start = time.monotonic()
    try:
        compiled = program()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(str(error)) from error
    seconds = time.monotonic() - start
    # of one device: the compiler plans a single program that all devices execute
    memory = compiled.memory_analysis()
    # outputs that alias a donated input take no memory of their own
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Requirements(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + outputs,
        read_collectives(compiled.as_text(), mesh, rounds=rounds),
        seconds,
    )
