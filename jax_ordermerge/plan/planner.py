"""The plan of an experiment: its training step, better settings, the other programs, all hours."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import parameter_count
from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import Topology, find, parse
from jax_ordermerge.mesh_shape import mesh_shape
from jax_ordermerge.plan import analytic, compiled, devices, search
from jax_ordermerge.plan.analytic import Workload
from jax_ordermerge.plan.compiled import Requirements
from jax_ordermerge.plan.formatting import describe_saves, format_changes
from jax_ordermerge.plan.inputs import Inputs, measure_workload, read_inputs
from jax_ordermerge.plan.results import (
    ExperimentPlan,
    OptionPlan,
    Plan,
    ProgramPlan,
    Settings,
    list_changes,
)
from jax_ordermerge.plan.spec import PlanSpec
from jax_ordermerge.plan.stages import plan_stages
from jax_ordermerge.train import compiler_options

_WORTHWHILE = 0.9  # fraction of the time below which other settings are recommended
_COMPILED = 3  # candidates to compile, at most: each takes up to minutes
_LISTED = 5  # candidates to list
_HALVINGS = 4  # of a batch to find one that fits

Log = Callable[[str], None]


def plan_experiment(
    spec: PlanSpec,
    topology: str | None = None,
    *,
    slices: int = 1,
    architecture: str | None = None,
    examples: int | None = None,
    tests: int | None = None,
    analytic_only: bool = False,
    find_better: bool = True,
    log: Log = lambda message: None,
) -> Plan:
    """Plan an experiment for devices that may be absent.

    Args:
        spec: settings; the mesh is laid over the devices.
        topology: see `hardware.parse`; None is the devices of this process.
        slices: number of TPU slices.
        architecture: see `inputs.read_inputs`, as `examples` and `tests`.
        examples: number of training examples.
        tests: number of test examples.
        analytic_only: estimate even if a compiler is installed.
        find_better: search for better settings.
        log: receives a line before each compilation, which may take minutes.

    Raises:
        UserError: the topology, the architecture or the settings are not valid.
    """
    target = present_topology(spec) if topology is None else parse(topology, slices)
    if not target.present and target.device is not None:
        # the devices are only compiled for: without this jax would look for others, and take them
        jax.config.update("jax_platforms", "cpu")
    inputs = read_inputs(spec, architecture, examples, tests)
    spec = _with_base_dtype(spec, inputs)
    # what a run would refuse on these devices
    spec.data.check_length(inputs.model.context_length, inputs.model_name)
    spec.population.check_groups(analytic.mesh_layout(spec, target).sizes["order"])
    compiler_options.check_preset(spec.model, target.platform)
    notes = list(inputs.notes)
    compiles = not analytic_only and _can_compile(spec, target, notes)
    # the workload does not depend on the settings that the search changes
    planner = _Planner(target, inputs, measure_workload(spec, inputs), compiles, log)
    if compiles:
        compiler_options.check(spec.model, planner.mesh(spec))
    elif spec.model.compiler_preset or spec.model.compiler_options:
        notes.append("compiler options are not checked, since nothing is compiled")
    configured = planner.plan_step(spec, {})
    # options are ranked by time, which takes a data sheet
    candidates = planner.search(spec, notes) if find_better and target.device else []
    recommended = planner.recommend(configured, candidates)
    # hours and programs of settings that do not fit would help nobody
    best = recommended or configured
    experiment = plan_stages(best.spec, inputs, target, best)
    if experiment.saves_too_often:
        notes.append(describe_saves(experiment))
    return Plan(
        topology=target,
        model_name=inputs.model_name,
        parameters=parameter_count(inputs.model),
        work=planner.work,
        configured=configured,
        recommended=recommended,
        # by the estimate, even if one of them was compiled: figures of one list must compare
        candidates=tuple(candidates[:_LISTED]),
        programs=planner.plan_programs(best.spec) if compiles else {},
        experiment=experiment,
        assumptions=analytic.assumptions(target, fused=spec.is_fused),
        notes=tuple(notes),
    )


def _with_base_dtype(spec: PlanSpec, inputs: Inputs) -> PlanSpec:
    """Return settings that export in the dtype of the base, as a run does where none is named."""
    if spec.merge.dtype is not None or inputs.base_dtype is None:
        return spec
    return spec.change(merge={"dtype": inputs.base_dtype})


def _can_compile(spec: PlanSpec, target: Topology, notes: list[str]) -> bool:
    """Return whether a compiler can be asked; note why not, or what its program differs in."""
    if not devices.has_compiler(target):
        notes.append(
            f"no compiler for {target.name} is installed (pip install"
            f' "jax_ordermerge[{devices.compiler_extra(target)}]"): all figures are estimates'
        )
        return False
    if target.device is None or target.present or target.tpu:
        return True
    try:
        devices.topology_devices(target)
    except UserError as error:
        # any number of GPUs exists, so it is the installation that is at fault
        notes.append(f"{error}: all figures are estimates")
        return False
    if spec.training.optimizer_memory == "host":
        # jax 0.11.2: their devices have no kinds of memory, so arrays lose theirs
        notes.append(
            "the compiler knows no memory of the host beside GPUs that are not here, as"
            " training.optimizer_memory = host takes it: all figures are estimates"
        )
        return False
    notes.append(
        "attention is compiled as plain XLA; cuDNN, which `run` uses where possible, needs less"
        " memory"
    )
    return True


def estimate(
    spec: PlanSpec, inputs: Inputs, topology: Topology
) -> tuple[OptionPlan, ExperimentPlan]:
    """Estimate the training step and the stages of an experiment as configured, by formulas alone.

    Raises:
        UserError: the mesh does not fit the devices, or the members do not fit the mesh.
    """
    spec = _with_base_dtype(spec, inputs)
    spec.population.check_groups(analytic.mesh_layout(spec, topology).sizes["order"])
    planner = _Planner(
        topology, inputs, measure_workload(spec, inputs), compiles=False, log=lambda message: None
    )
    option = planner.plan_step(spec, {})
    return option, plan_stages(spec, inputs, topology, option)


def plan_training_step(
    spec: PlanSpec, topology: Topology, architecture: str, log: Log = lambda message: None
) -> OptionPlan:
    """Plan the training step alone, as configured, by the compiler.

    Args:
        spec: settings; data files are not read: rows are of `data.max_length`.
        topology: see `plan_experiment`, as `architecture` and `log`.

    Raises:
        UserError: see `plan_experiment`.
    """
    inputs = read_inputs(spec, architecture, spec.training.batch, None)
    work = measure_workload(spec, inputs)
    return _Planner(topology, inputs, work, compiles=True, log=log).plan_step(spec, {})


def present_topology(spec: PlanSpec) -> Topology:
    """Return the devices of all processes that the mesh takes."""
    meshes.provide_cpu_devices(spec.mesh.sizes.values())
    present = jax.devices()
    slices = meshes.slice_sizes(present)
    sizes = mesh_shape(spec.mesh.sizes, slices, spec.mesh.dcn).sizes
    device = find(present[0].device_kind)
    used = math.prod(sizes.values())
    return Topology(
        device,
        (used // len(slices),),
        len(slices),
        present=device is not None,
        offered=meshes.offered_memory(present),
    )


# compiles a program for settings and a mesh
_Compile = Callable[[PlanSpec, Mesh], Requirements]


@dataclasses.dataclass(frozen=True)
class _Planner:
    """What does not change with the settings that are tried."""

    topology: Topology
    inputs: Inputs
    work: Workload
    compiles: bool
    log: Log

    def plan_step(self, spec: PlanSpec, changes: Settings) -> OptionPlan:
        """Plan the training step, by the compiler if there is one."""
        estimate = analytic.estimate_step(spec, self.inputs.model, self.topology, self.work)
        # The estimate comes first, since its times stay: a compiler gives memory and traffic only.
        option = OptionPlan(spec, changes, self.topology, self.work, estimate)
        if not self.compiles:
            return option
        settings = f" with {format_changes(changes)}" if changes else ""
        self.log(f"compiling the training step for {self.topology.name}{settings}")
        memory = estimate.memory
        if spec.training.optimizer_memory == "host":
            # no argument: the state of the member that is updated is among the temporaries
            memory = dataclasses.replace(
                memory, optimizer=0.0, temporaries=memory.temporaries + memory.optimizer
            )
        # XLA reports one number for all arguments: the state is exact, so the batch is the rest
        state = memory.parameters + memory.optimizer + memory.base
        option = dataclasses.replace(option, source="compiled")
        try:
            needs = compiled.step_requirements(
                self.compilable(spec), self.inputs.model, self.mesh(spec), self.inputs.train
            )
        except compiled.TooLarge as error:
            # the compiler names the total at most, so the excess counts as temporaries
            temporaries = memory.temporaries
            if error.bytes is not None:
                temporaries = max(error.bytes - (state + memory.batch), 0.0)
            memory = dataclasses.replace(memory, temporaries=temporaries)
            step = dataclasses.replace(estimate, memory=memory)
            return dataclasses.replace(option, step=step, refused=True)
        traffic: dict[str, float] = {}
        # the time of a collective depends on the links it uses, not on its kind
        for (_, axes), (_, size) in needs.collectives.items():
            traffic[" ".join(axes)] = traffic.get(" ".join(axes), 0.0) + size
        compiled_memory = dataclasses.replace(
            memory, batch=needs.arguments - state, temporaries=float(needs.temporaries)
        )
        step = dataclasses.replace(estimate, memory=compiled_memory, traffic=traffic)
        return dataclasses.replace(
            option,
            step=analytic.with_times(step, spec, self.topology),
            requirements=needs,
            analytic_bytes=memory.total,
        )

    def compilable(self, spec: PlanSpec) -> PlanSpec:
        """Return settings whose attention can be compiled here.

        cuDNN chooses its kernels by asking the library, which is absent with the GPU.
        """
        if self.topology.present or self.topology.tpu or self.topology.device is None:
            return spec
        # plain XLA needs more memory, so the plan errs on the safe side
        return spec.change(model={"attention": "xla"})

    def mesh(self, spec: PlanSpec) -> Mesh:
        """Return the mesh over the devices, or over their descriptions."""
        targets = devices.topology_devices(self.topology)
        return meshes.make_mesh(**spec.mesh.model_dump(), devices=targets)

    # ---------------------------------------------------------------------------- recommendations

    def search(self, spec: PlanSpec, notes: list[str]) -> list[OptionPlan]:
        """Return settings that fit by the estimate, best first; with adapters if none else do."""
        options = self._search(spec)
        if options:
            return options
        # adapters need a trained base, and one training with adapters may be what does not fit
        if spec.lora is not None or spec.model.init == "random":
            notes.append("no settings fit by the estimate: take more devices")
            return []
        options = self._search(spec.with_adapters())
        # Adapters are offered and never recommended silently: they change what is learned.
        adapters = "adapters (lora), which are another training, would"
        notes.append(
            "full fine-tuning fits with no settings by the estimate; "
            + (adapters if options else "not even adapters (lora) would: take more devices")
        )
        return [
            dataclasses.replace(option, changes=list_changes(spec, option.spec, self.topology))
            for option in options
        ]

    def _search(self, spec: PlanSpec) -> list[OptionPlan]:
        return search.search(spec, self.inputs.model, self.topology, self.work)

    def recommend(
        self, configured: OptionPlan, candidates: Sequence[OptionPlan]
    ) -> OptionPlan | None:
        """Return the first candidate that is worth the change, by the compiler if there is one."""
        limit = math.inf
        # settings that do not fit have no time to beat
        if configured.fits:
            limit = _WORTHWHILE * configured.population_step_seconds
        # The estimate ranks, the compiler decides: it may refuse what the estimate accepts, so some
        # candidates are tried, but not all, since each compilation takes up to minutes.
        faster = [o for o in candidates if o.changes and o.population_step_seconds < limit]
        for candidate in faster[:_COMPILED]:
            option = self.plan_step(candidate.spec, candidate.changes)
            if option.fits and option.population_step_seconds < limit:
                return option
        return None

    # ------------------------------------------------------------------------------ other programs

    def plan_programs(self, spec: PlanSpec) -> dict[str, ProgramPlan]:
        """Compile the other programs of a run."""
        model, length, prompt = self.inputs.model, self.work.length, self.inputs.prompt_length(spec)
        # the longest answers need the largest cache, so one program stands for all tasks
        new = max((task.new_tokens for task in spec.evaluation.tasks), default=0)

        def losses(spec: PlanSpec, mesh: Mesh) -> Requirements:
            return compiled.losses_requirements(spec, model, mesh, length)

        def merge(spec: PlanSpec, mesh: Mesh) -> Requirements:
            return compiled.merge_requirements(spec, model, mesh)

        def generation(spec: PlanSpec, mesh: Mesh) -> Requirements:
            return compiled.generation_requirements(spec, model, mesh, prompt, new)

        programs = {
            "losses": self._plan_program("losses", losses, spec, "analysis"),
            "merge": self._plan_program("merge", merge, spec, None),
        }
        if new:
            programs["generation"] = self._plan_program(
                "generation", generation, spec, "evaluation"
            )
        return programs

    def _plan_program(
        self, name: str, compile_program: _Compile, spec: PlanSpec, section: str | None
    ) -> ProgramPlan:
        """Compile a program; if it does not fit, again with smaller batches of its section."""
        self.log(f"compiling {name}")
        program = self._compile(compile_program, spec)
        if program.fits is not False or section is None:
            return program
        # The batches of analysis and evaluation change no result, so a smaller one may be proposed.
        batch = getattr(spec, section).batch
        for _ in range(_HALVINGS):
            if batch == 1:
                break
            batch //= 2
            self.log(f"compiling {name} with {section}.batch={batch}")
            smaller = self._compile(compile_program, spec.change(**{section: {"batch": batch}}))
            if smaller.fits:
                return dataclasses.replace(program, fitting={f"{section}.batch": batch})
        return program

    def _compile(self, compile_program: _Compile, spec: PlanSpec) -> ProgramPlan:
        limit = self.topology.memory_limit
        try:
            needs = compile_program(self.compilable(spec), self.mesh(spec))
        except compiled.TooLarge as error:
            return ProgramPlan(error.bytes, fits=False)
        # no limit is known for CPUs: the answer is None and not True
        fits = None if limit is None else needs.bytes <= limit
        return ProgramPlan(needs.bytes, fits, needs)
