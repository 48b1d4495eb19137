"""Options of the compiler reach it, and those that it does not accept are refused by name."""

import typing

import jax
import pytest

from jax_ordermerge.config import Model
from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import parse
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.plan import planner
from jax_ordermerge.plan.spec import PlanSpec
from jax_ordermerge.train import batches, compiler_options, resume
from jax_ordermerge.train.programs import Programs


@pytest.fixture
def programs(tiny_spec, tiny_model, tiny_examples):
    """Return a function from options to the programs of a tiny training."""

    def build(options):
        mesh, spec = make_mesh(), tiny_spec(model={"compiler_options": options})
        plan = batches.make_plan(spec, tiny_examples, (0,), mesh=mesh)
        return Programs(tiny_model, plan, mesh)

    return build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xla_gpu_no_such_thing": True}, "No such compile option: 'xla_gpu_no_such_thing'"),
        ({"xla_cpu_enable_fast_math": "maybe"}, "xla_cpu_enable_fast_math, 'maybe' is not a valid"),
        ({"xla_allow_excess_precision": True}, "xla_allow_excess_precision is set by the training"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        compiler_options.check(Model(compiler_options=options), make_mesh())


def test_an_option_of_the_installed_compiler_is_accepted():
    # compilers of all platforms are told options of the others, too
    options = {"xla_gpu_memory_limit_slop_factor": 200, "xla_llvm_disable_expensive_passes": True}
    compiler_options.check(Model(compiler_options=options), make_mesh())


def test_a_preset_is_for_its_devices():
    for name, preset in compiler_options.PRESETS.items():
        with pytest.raises(UserError, match=f"{name} is for {preset.platforms[0]}, the devices"):
            compiler_options.check(Model(compiler_preset=name), make_mesh())
        assert preset.source
    field = Model.model_fields["compiler_preset"].annotation
    names = {name for part in typing.get_args(field) for name in typing.get_args(part)}
    assert names == set(compiler_options.PRESETS)


def test_options_reach_the_compiler_of_the_step(programs):
    options = {"xla_gpu_no_such_thing": True}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_thing"):
        programs(options).compile_step()


def test_options_are_part_of_what_a_checkpoint_is_of(programs):
    plain, other = (
        resume.identity(programs(options))
        for options in ({}, {"xla_llvm_disable_expensive_passes": True})
    )
    assert {name for name in plain if plain[name] != other[name]} == {"config"}


def test_a_plan_refuses_them_where_it_compiles():
    spec = PlanSpec(model=Model(compiler_options={"xla_gpu_no_such_thing": True}))
    with pytest.raises(UserError, match="xla_gpu_no_such_thing"):
        planner.plan_experiment(spec, "cpu:1", architecture="llama-2-7b", find_better=False)
    plan = planner.plan_experiment(
        spec, "h100:8", architecture="llama-2-7b", find_better=False, analytic_only=True
    )
    assert plan.topology == parse("h100:8")
    assert "compiler options are not checked, since nothing is compiled" in plan.notes


@pytest.mark.parametrize(
    ("topology", "preset", "platform"),
    [("h100:8", "no_windowed_einsum", "gpu"), ("v5p:2x2x1", "async_collectives", "tpu")],
)
def test_a_plan_refuses_a_preset_of_other_devices_without_a_compiler(topology, preset, platform):
    spec = PlanSpec(model=Model(compiler_preset=preset))
    with pytest.raises(UserError, match=f"{preset} is for .*, the devices are {platform}"):
        planner.plan_experiment(
            spec, topology, architecture="llama-2-7b", find_better=False, analytic_only=True
        )
