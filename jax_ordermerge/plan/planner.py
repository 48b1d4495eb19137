"""Makes a plan: the config as it is, compiled or estimated; settings that would serve better; what the whole experiment takes.

A plan is plain values for JSON; `text.py` prints them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.hardware import MEMORY_FRACTION, Topology, find, parse
from jax_ordermerge.plan import analytic, compiled, inputs, search
from jax_ordermerge.plan.analytic import Step, Work
from jax_ordermerge.plan.inputs import Inputs

_WASTE = 0.9  # settings that take less than this part of the time are worth changing to
_TRIED = 3  # candidates compiled at most
_SHOWN = 5  # candidates listed
_PROMPT = 0.5  # of data.max_length, where no example is at hand to say how long prompts are

_HALVED = 4  # times a batch is halved at most, to find one that fits

Log = Callable[[str], None]
_Job = Callable[[Config], compiled.Needs]


def make(
    config: Config,
    topology: str | None = None,
    *,
    slices: int = 1,
    architecture: str | None = None,
    examples: int | None = None,
    tests: int | None = None,
    analytic_only: bool = False,
    look_further: bool = True,
    log: Log = lambda message: None,
) -> dict[str, Any]:
    """Plan an experiment for devices that need not be here.

    Args:
        config: of the run; its mesh is laid over the devices.
        topology: see `hardware.parse`; None is the devices here.
        slices: TPU slices.
        architecture, examples, tests: see `inputs.read`.
        analytic_only: estimate on paper although a compiler is there.
        look_further: search for settings that serve better.
        say: is told what is being compiled, which can take minutes.

    Returns:
        `topology`, `model`, `work`, `source` (`compiled` or `analytic`), `given` and `recommended` (or None) as `_option` describes
        them, `candidates`, `programs`, `experiment`, `assumed`, `notes`.

    Raises:
        UserError: bad input.
    """
    where = _here(config) if topology is None else parse(topology, slices)
    if not where.present and where.device is not None:
        jax.config.update(
            "jax_platforms", "cpu"
        )  # these devices are only compiled for: no others are looked for
    read = inputs.read(config, architecture, examples, tests)
    model, work = read.model, inputs.work(config, read)
    notes = list(read.notes)
    _check(config, read, where)
    compiles = not analytic_only and compiled.compiler(where)
    if not compiles and not analytic_only:
        notes.append(
            f'no compiler for {where.name} is installed (pip install "jax_ordermerge[{compiled.extra(where)}]"): all is estimated'
        )
    if compiles and not where.present and where.device and not where.tpu:
        notes.append(
            "attention is compiled as plain XLA: cuDNN, which `run` takes where it may, needs less memory"
        )
    planner = _Planner(model, where, work, read, compiles, log)
    given = planner.option(config, {})
    found = planner.candidates(config, notes) if look_further and where.device else []
    recommended, chosen = planner.best(config, given, found)
    return {
        "topology": {
            "name": where.name,
            "devices": where.size,
            "device": where.device and dataclasses.asdict(where.device),
        },
        "model": {"name": read.named, "parameters": parameter_count(model)},
        "work": dataclasses.asdict(work),
        "source": given["source"],
        "given": given,
        "recommended": recommended,
        "candidates": [planner.listed(one) for one in found[:_SHOWN]],
        "programs": planner.programs(chosen),
        "experiment": planner.experiment(chosen, recommended or given),
        "assumed": list(analytic.ASSUMED),
        "notes": notes,
    }


def _check(config: Config, read: Inputs, where: Topology) -> None:
    """Refuse what a run would refuse on these devices."""
    if config.data.max_length > read.model.max_position_embeddings:
        raise UserError(
            f"data.max_length = {config.data.max_length} is above the {read.model.max_position_embeddings} positions of {read.named}"
        )
    groups = meshes.axis_sizes(config.mesh.sizes, where.size)["order"]
    for name, members in (
        ("members", config.population.members),
        ("wave", config.population.wave or groups),
    ):
        if members % groups:
            raise UserError(
                f"population.{name} = {members} is not a multiple of the order axis ({groups} device groups); change one"
            )


def _here(config: Config) -> Topology:
    meshes.provide_cpu_devices(config.mesh.sizes.values())
    devices = jax.devices()
    sizes = meshes.axis_sizes(config.mesh.sizes, len(devices))
    device = find(devices[0].device_kind)
    return Topology(device, (math.prod(sizes.values()),), present=device is not None)


@dataclasses.dataclass
class _Planner:
    """What stays the same over the settings that are tried."""

    model: ModelConfig
    topology: Topology
    work: Work
    read: Inputs
    compiles: bool
    log: Log

    # ---------------------------------------------------------------------------------------------------------------------- options

    def option(self, config: Config, changes: dict[str, Any]) -> dict[str, Any]:
        """Return what a training with these settings needs, from the compiler where there is one."""
        estimate = analytic.step(config, self.model, self.topology, self.work)
        if not self.compiles:
            return self._option(config, changes, estimate, {"source": "analytic"})
        self.log(
            f"compiling the training step for {self.topology.name}"
            + (f" with {_set(changes)}" if changes else "")
        )
        try:
            spec = training_spec(self.compilable(config))
            needs = compiled.step(spec, self.model, self.mesh(config), self.read.train)
        except compiled.TooLarge as error:
            held = estimate.memory.total - estimate.memory.temporaries
            refused = (
                estimate.memory.temporaries if error.bytes is None else max(error.bytes - held, 0.0)
            )
            memory = dataclasses.replace(estimate.memory, temporaries=refused)
            return self._option(
                config,
                changes,
                dataclasses.replace(estimate, memory=memory),
                {"source": "compiled", "refused": True},
            )
        kept = estimate.memory.parameters + estimate.memory.optimizer + estimate.memory.base
        memory = dataclasses.replace(
            estimate.memory, batch=needs.arguments - kept, temporaries=float(needs.temporaries)
        )
        traffic: dict[str, float] = {}
        for (_, axes), (_, size) in needs.exchanges.items():
            traffic[" ".join(axes)] = traffic.get(" ".join(axes), 0.0) + size
        step = analytic.timed(
            dataclasses.replace(estimate, memory=memory, traffic=traffic), config, self.topology
        )
        more = {
            "source": "compiled",
            "compiled_seconds": needs.seconds,
            "analytic_bytes": estimate.memory.total,
            "exchanges": _exchanges(needs),
        }
        return self._option(config, changes, step, more)

    def _option(
        self, config: Config, changes: dict[str, Any], step: Step, more: dict[str, Any]
    ) -> dict[str, Any]:
        device, members, seconds = self.topology.device, analytic.at_once(config), step.seconds
        option: dict[str, Any] = {
            "settings": search.settings(config, self.topology),
            "changes": changes,
            "members_at_once": members,
            "memory": dataclasses.asdict(step.memory)
            | {"total": step.memory.total, "limit": device and MEMORY_FRACTION * device.memory},
            "fits": None
            if device is None
            else step.memory.total <= MEMORY_FRACTION * device.memory and not more.get("refused"),
            "flops": {"model": members * self.work.flops, "executed_a_device": step.executed},
            "moved_bytes": step.moved,
            "traffic_bytes": dict(step.traffic),
            "seconds": None if step.times is None else {**step.times, "step": seconds},
        }
        if device is not None and seconds is not None:
            peak = analytic.peak(config, self.topology) * self.topology.size
            hours = (
                None
                if self.work.steps is None
                else search.cost(config, step) * self.work.steps / 3600
            )
            option |= {
                "tokens_per_second": members * self.work.tokens / seconds,
                "mfu": members * self.work.flops / seconds / peak,
                "training_hours": hours,
                "population_step_seconds": search.cost(config, step),
            }
        return option | more

    def compilable(self, config: Config) -> Config:
        """Return the config with attention that can be compiled here: cuDNN's kernels are found by the library, which is not."""
        if self.topology.present or self.topology.tpu or self.topology.device is None:
            return config
        return search.with_changes(config, {"model": {"attention": "xla"}})

    def mesh(self, config: Config) -> Any:
        return meshes.make_mesh(**config.mesh.model_dump(), devices=compiled.devices(self.topology))

    # --------------------------------------------------------------------------------------------------------------- recommendations

    def candidates(self, config: Config, notes: list[str]) -> list[search.Candidate]:
        """Return settings that fit by the estimate, best first; where none do, those of adapters."""
        found = search.search(config, self.model, self.topology, self.work)
        if found or config.lora is not None:
            notes += [] if found else ["no settings fit by the estimate: take more devices"]
            return found
        found = search.search(search.with_adapters(config), self.model, self.topology, self.work)
        but = (
            "adapters (lora), which are another training, would"
            if found
            else "not even adapters (lora) would: take more devices"
        )
        notes.append(f"full fine-tuning fits with no settings by the estimate; {but}")
        return [
            one._replace(changes=search.differences(config, one.config, self.topology))
            for one in found
        ]

    def best(
        self, config: Config, given: dict[str, Any], found: Sequence[search.Candidate]
    ) -> tuple[dict[str, Any] | None, Config]:
        """Return the first candidate worth changing to, checked by the compiler where there is one, and its config.

        None and the config given where that serves as well.
        """
        enough = math.inf if not given["fits"] else _WASTE * given["population_step_seconds"]
        for one in [one for one in found if one.changes and one.cost < enough][:_TRIED]:
            option = self.option(one.config, one.changes)
            if option["fits"] and option["population_step_seconds"] < enough:
                return option, one.config
        return None, config

    def listed(self, one: search.Candidate) -> dict[str, Any]:
        return self._option(one.config, one.changes, one.step, {"source": "analytic"})

    # --------------------------------------------------------------------------------------------------------------- the other stages

    def programs(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return memory and exchanges of the other programs of a run; nothing where there is no compiler."""
        if not self.compiles:
            return {}
        length, new = self.work.length, self._new_tokens(config)
        jobs: list[tuple[str, str | None, _Job]] = [
            (
                "losses",
                "analysis",
                lambda config: compiled.losses(config, self.model, self.mesh(config), length),
            ),
            ("merge", None, lambda config: compiled.merge(config, self.model, self.mesh(config))),
        ]
        if new:
            prompt = self._prompt(config)
            jobs.append(
                (
                    "generation",
                    "evaluation",
                    lambda config: compiled.generation(
                        config, self.model, self.mesh(config), prompt, new
                    ),
                )
            )
        return {name: self._program(name, section, job, config) for name, section, job in jobs}

    def _program(self, name: str, section: str | None, job: _Job, config: Config) -> dict[str, Any]:
        """Compile a program; where it does not fit, again with half the `batch` of its section, as often as that may help."""
        first: dict[str, Any] = {}
        for _ in range(_HALVED + 1):
            batch = None if section is None else getattr(config, section).batch
            self.log(f"compiling {name}" + (f" with {section}.batch={batch}" if first else ""))
            found = self._compiled(job, config)
            if not first:
                first = found
            elif found["fits"]:
                return first | {"fitting": {f"{section}.batch": batch}}
            if found["fits"] is not False or not batch or batch == 1:
                break
            config = search.with_changes(config, {str(section): {"batch": batch // 2}})
        return first

    def _compiled(self, job: _Job, config: Config) -> dict[str, Any]:
        device = self.topology.device
        try:
            needs = job(self.compilable(config))
        except compiled.TooLarge as error:
            return {"bytes": error.bytes, "fits": False}
        fits = None if device is None else needs.bytes <= MEMORY_FRACTION * device.memory
        sizes = {
            "bytes": needs.bytes,
            "arguments": needs.arguments,
            "temporaries": needs.temporaries,
        }
        return {
            **sizes,
            "fits": fits,
            "compiled_seconds": needs.seconds,
            "exchanges": _exchanges(needs),
        }

    def _new_tokens(self, config: Config) -> int:
        return max((task.new_tokens for task in config.evaluation.tasks), default=0)

    def _prompt(self, config: Config) -> int:
        test = self.read.test
        if test is None:
            return max(int(_PROMPT * config.data.max_length), 1)
        return max(len(test.prompt(row)) for row in range(len(test)))

    def experiment(self, config: Config, option: dict[str, Any]) -> dict[str, Any]:
        """Return hours by stage (None where something is not known) and the bytes that are written."""
        merges, members = len(config.merge.methods), config.population.members
        models = 1 + members + merges
        item = 4 if config.merge.dtype == "float32" else 2
        sizes = self._sizes(config)
        hours = {
            "training": option.get("training_hours"),
            "merges": _hours(merges, analytic.merge_seconds(config, self.model, self.topology)),
            "analysis": _hours(
                models,
                self._pass(config, inputs.padded(self.read.train, self.read.examples, config)),
            ),
            "evaluation": _hours(models, self._evaluation(config)),
        }
        known = [one for one in hours.values() if one is not None]
        return {
            "hours": hours | {"total": sum(known) if len(known) == len(hours) else None},
            "models": models,
            "checkpoint_bytes": sizes,
            "checkpoints_kept": config.training.keep_checkpoints,
            "merged_bytes": merges * item * parameter_count(self.model),
        }

    def _sizes(self, config: Config) -> float:
        """Return the bytes of one checkpoint, parameters and optimizer of all members; those of all waves together."""
        alone = search.with_changes(
            config, {"mesh": {**_ONE, "dcn": {}}, "population": {"wave": None}}
        )
        held = analytic.state(alone, self.model, analytic.abstract_mesh(alone, parse("cpu:1")))
        return held["parameters"] + held["optimizer"]

    def _pass(self, config: Config, padded: tuple[float, int] | None) -> float | None:
        return (
            None
            if padded is None
            else analytic.forward_seconds(config, self.model, self.topology, *padded)
        )

    def _evaluation(self, config: Config) -> float | None:
        """Return the seconds of evaluating one model: its losses, and every task to the last token of every answer."""
        if config.data.test is None and not config.evaluation.tasks:
            return 0.0
        losses = (
            self._pass(config, inputs.padded(self.read.test, self.read.tests, config))
            if config.evaluation.loss
            else 0.0
        )
        if losses is None or self.read.tests is None:
            return None
        seconds = losses
        for task in config.evaluation.tasks:
            items = min(task.limit or self.read.tests, self.read.tests)
            prompt = self._prompt(config)
            one = analytic.token_seconds(
                config, self.model, self.topology, prompt + task.new_tokens
            )
            prefill = analytic.forward_seconds(
                config, self.model, self.topology, float(items * prompt), prompt
            )
            if one is None or prefill is None:
                return None
            # prompts are read by the devices of one group alone
            seconds += math.ceil(
                items / config.evaluation.batch
            ) * task.new_tokens * one + prefill * self._groups(config)
        return seconds

    def _groups(self, config: Config) -> int:
        sizes = meshes.axis_sizes(config.mesh.sizes, self.topology.size)
        return self.topology.size // (sizes["fsdp"] * sizes["tensor"])


_ONE = {"order": 1, "data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


def _hours(count: int, seconds: float | None) -> float | None:
    return None if seconds is None else count * seconds / 3600


def _exchanges(needs: compiled.Needs) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "axes": list(axes), "operations": count, "bytes": size}
        for (kind, axes), (count, size) in needs.exchanges.items()
    ]


def _set(changes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items())
