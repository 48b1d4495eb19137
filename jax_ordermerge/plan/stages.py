"""Analytic hours of each stage of an experiment, and the bytes that it writes."""

import math

from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.hardware import Device, Topology, parse
from jax_ordermerge.mesh_shape import AXES
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.inputs import Inputs, padded_tokens
from jax_ordermerge.plan.results import ExperimentPlan, OptionPlan
from jax_ordermerge.plan.spec import PlanSpec
from jax_ordermerge.train import flops


def plan_stages(
    spec: PlanSpec, inputs: Inputs, topology: Topology, training: OptionPlan
) -> ExperimentPlan:
    """Plan the stages of an experiment.

    Args:
        spec: settings.
        inputs: model and data.
        topology: devices.
        training: the plan of the training step.
    """
    model, replicates = inputs.model, spec.population.replicates
    merges = len(spec.merge.methods) * replicates
    models = 1 + spec.population.total + merges  # the base, the members, the merges
    # without tasks and test examples there is no evaluation, which takes no time anywhere
    evaluates = bool(spec.data.test is not None or spec.evaluation.tasks)
    # None is "not known", which is not the same as no time: a total needs all of them
    hours = {"training": training.training_hours, "merges": None, "analysis": None}
    hours["evaluation"] = None if evaluates else 0.0
    if topology.device is not None:
        times = _StageTimes(spec, inputs, topology, topology.device)
        train = padded_tokens(inputs.train, inputs.train_count, spec)
        hours["merges"] = merges * times.merge() / 3600
        if train is not None:
            # Losses of all training samples under every model: forward passes, as many as there are
            # models.
            hours["analysis"] = models * times.forward(*train) / 3600
        evaluation = times.evaluation() if evaluates else 0.0
        if evaluation is not None:
            hours["evaluation"] = models * evaluation / 3600
    saved = _checkpoint_bytes(spec, model)
    # a wave saves its own members
    together = round(saved * training.members / spec.population.total)
    exported = merges if spec.merge.export == "all" else len(spec.merge.methods)
    return ExperimentPlan(
        hours=hours,
        models=models,
        checkpoint_bytes=saved,
        checkpoints_kept=max(spec.training.keep_checkpoints, spec.checkpoints_merged),
        save_bytes=together,
        checkpoint_seconds=together / spec.training.checkpoint_bytes_per_second,
        checkpoint_interval=_checkpoint_interval(spec, training),
        merged_bytes=exported * spec.merge_bytes * parameter_count(model),
    )


def _checkpoint_bytes(spec: PlanSpec, model: ModelConfig) -> int:
    """Return the bytes of parameters and optimizer of all members, those of all waves together."""
    # on a single device nothing is replicated: bytes per device are bytes in all
    sizes = dict.fromkeys(AXES, 1)
    spec = spec.change(mesh={**sizes, "dcn": {}}, population={"wave": None})
    state = analytic.state_bytes(spec, model, analytic.abstract_mesh(spec, parse("cpu:1")))
    # the frozen base of adapters is not saved: it is read again from its files
    return state["parameters"] + state["optimizer"]


def _checkpoint_interval(spec: PlanSpec, training: OptionPlan) -> float | None:
    """Return the seconds of training between two checkpoints."""
    steps, minutes = spec.training.checkpoint_every, spec.training.checkpoint_minutes
    if steps is None and training.work.steps is not None:
        # as a training does without the setting: at the end of each epoch
        steps = math.ceil(training.work.steps / spec.training.epochs)
    seconds = training.step.seconds
    if seconds is None:
        return None
    intervals = [] if steps is None else [steps * seconds]
    if minutes is not None:
        # at the next step that is logged, and not within the interval of logging
        intervals.append(max(60 * minutes, spec.training.log_every * seconds))
    return min(intervals, default=None)


class _StageTimes:
    """Seconds of each stage after the training, for one model."""

    def __init__(self, spec: PlanSpec, inputs: Inputs, topology: Topology, device: Device) -> None:
        self.spec, self.inputs, self.model, self.topology = spec, inputs, inputs.model, topology
        self.sizes = analytic.mesh_layout(spec, topology).sizes
        self.shards = self.sizes["fsdp"] * self.sizes["tensor"]
        self.parameters = parameter_count(inputs.model)
        self.bandwidth = analytic.MEMORY_EFFICIENCY * device.bandwidth
        self.matmul_flops = analytic.matmul_flops(spec, topology)

    def merge(self) -> float:
        """Return the seconds of one merge in device memory.

        Members and base are read, the result is written, and members cross `order` once.
        """
        # a merge is bound by memory or links: its arithmetic is a few operations per element
        models = self.spec.population.members + 2
        size = models * self.spec.merge_bytes * self.parameters / self.shards
        crossing = 0.0
        if self.sizes["order"] > 1:
            speed = analytic.link_speed("order", self.spec, self.topology)
            crossing = size / (analytic.LINK_EFFICIENCY * speed)
        return max(size / self.bandwidth, crossing)

    def forward(self, tokens: int, length: int) -> float:
        """Return the seconds of a forward pass over `tokens` tokens in rows of `length`."""
        # examples are independent, so all devices work on them; the head and padding are included
        speed = self.topology.size * self.matmul_flops
        return flops.forward_flops(self.model, tokens, length) / speed

    def token(self, positions: int) -> float:
        """Return the seconds of one generated token for each row of `evaluation.batch`.

        Generation is bound by memory: every token reads all weights and the cache of `positions`
        positions. Rows are not divided over devices, weights are, over `fsdp` and `tensor`.
        """
        model, rows, item = self.model, self.spec.evaluation.batch, self.spec.compute_bytes
        cached = rows * positions * 2 * model.num_layers * model.num_kv_heads * model.head_dim
        read = item * self.parameters / self.shards + cached * item / self.sizes["tensor"]
        matmuls = 2 * self.parameters * rows / self.shards
        # the slower of memory and matmuls: small batches wait for memory, large ones for matmuls
        return max(read / self.bandwidth, matmuls / self.matmul_flops)

    def evaluation(self) -> float | None:
        """Return the seconds of the losses and of all tasks; None without the number of examples.

        Every answer counts with all tokens that its task allows.
        """
        spec, count = self.spec, self.inputs.test_count
        evaluation = spec.evaluation
        test = padded_tokens(self.inputs.test, count, spec)
        if test is None or count is None:
            return None
        seconds = self.forward(*test) if evaluation.loss else 0.0
        prompt = self.inputs.prompt_length(spec)
        # prompts are read by the devices of one group alone: the other groups compute the same
        groups = self.topology.size // self.shards
        for task in evaluation.tasks:
            # answers usually end early; how early is not known before there are models
            items = min(task.limit or count, count)
            batches = math.ceil(items / evaluation.batch)
            seconds += (
                batches * task.new_tokens * self.token(prompt + task.new_tokens)
                + self.forward(items * prompt, prompt) * groups
            )
        return seconds
