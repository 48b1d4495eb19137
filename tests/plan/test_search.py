"""The search for better settings, by the estimate."""

from jax_ordermerge.arch import ARCHITECTURES
from jax_ordermerge.config import make_config
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.hardware import MEMORY_FRACTION, parse
from jax_ordermerge.plan import analytic, search
from jax_ordermerge.plan.analytic import Workload
from jax_ordermerge.plan.results import OptionPlan, list_settings
from jax_ordermerge.train import flops

MODEL = ARCHITECTURES["llama-2-7b"]
SECTIONS = {
    "model": {"remat": "full"},
    "population": {"members": 4},
    "data": {"max_length": 512},
    "training": {"batch": 64},
    "mesh": {"order": 4, "fsdp": -1},
}
SPEC = plan_spec(make_config(SECTIONS))
WORK = Workload(64, 512, 64 * 512, flops.training_flops(MODEL, [512] * 64), 100)


def find(spec, topology):
    return search.search(spec, MODEL, parse(topology), WORK)


def test_options_are_sorted_and_the_same_each_time():
    topology = parse("v5p:2x2x4")
    options = find(SPEC, "v5p:2x2x4")
    assert options == find(SPEC, "v5p:2x2x4")
    assert len(options) > 20
    assert len({repr(option.spec) for option in options}) == len(options)
    costs = [option.population_step_seconds for option in options]
    assert all(later > 0.97 * best for later, best in zip(costs[1:], costs, strict=False))
    assert costs[0] < 1.02 * min(costs)
    for option in options:
        assert option.step.memory.total <= MEMORY_FRACTION * topology.device.memory
        changed = list_settings(SPEC, topology) | option.changes
        assert changed == list_settings(option.spec, topology)


def test_the_search_does_not_change_what_is_learned():
    fixed = {"batch", "epochs", "learning_rate", "optimizer", "schedule"}
    for option in find(SPEC, "h100:8"):
        training = option.spec.training.model_dump(include=fixed)
        assert training == SPEC.training.model_dump(include=fixed)
        assert option.spec.lora is None
        assert option.spec.population.members == 4


def test_waves_where_all_members_do_not_fit_and_adapters_where_none_does():
    options = find(SPEC, "h100:4")
    assert options
    assert all(option.spec.population.wave for option in options)
    single = SPEC.change(mesh={"order": 1})
    assert find(single, "a100:1") == []
    assert find(single.with_adapters(), "a100:1")


def test_members_that_mix_are_not_divided_into_waves():
    mixing = {"kind": "papa"}
    spec = plan_spec(make_config(SECTIONS | {"training": {"batch": 64, "mixing": mixing}}))
    options = find(spec, "v5p:2x2x4")
    assert options
    assert all(option.spec.population.wave is None for option in options)


def test_a_changed_spec_is_the_spec_of_the_changed_config():
    """The planner changes sections without validating them: the result must be a valid config."""
    for option in find(SPEC, "v5p:2x2x4")[:20]:
        sections = {
            name: getattr(option.spec, name).model_dump(mode="json")
            for name in ("mesh", "training", "model", "population")
        }
        assert make_config(SECTIONS | sections).mesh == option.spec.mesh
    lora = {"rank": 16, "alpha": 32.0}
    adapters = SPEC.with_adapters()
    expected = plan_spec(make_config(SECTIONS | {"lora": lora}))
    assert (adapters.lora, adapters.base_dtype) == (expected.lora, expected.base_dtype)


def test_options_are_compared_by_the_time_of_all_members():
    topology = parse("v5p:2x2x4")

    def option(spec):
        step = analytic.estimate_step(spec, MODEL, topology, WORK)
        return OptionPlan(spec, {}, topology, WORK, step)

    at_once = option(SPEC)
    assert at_once.population_step_seconds == at_once.step.seconds
    waves = option(SPEC.change(mesh={"order": 2, "fsdp": 8}, population={"wave": 2}))
    assert waves.population_step_seconds == 2 * waves.step.seconds
