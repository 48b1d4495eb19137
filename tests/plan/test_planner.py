"""Plans compared with the program that a run executes, and as the command line prints them."""

import dataclasses
import json
import pathlib
import sys

import pytest
import yaml
from typer.testing import CliRunner

from jax_ordermerge.cli import app
from jax_ordermerge.config import load_config, make_config
from jax_ordermerge.data import source
from jax_ordermerge.data.tokenizers import load_tokenizer
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.plan import devices, planner
from jax_ordermerge.plan.formatting import as_json, describe_verdict
from jax_ordermerge.plan.inputs import read_inputs
from jax_ordermerge.plan.results import ProgramPlan
from jax_ordermerge.train import step as steps


def plan(sections, topology, **options):
    spec = plan_spec(make_config(sections))
    options = {"analytic_only": True} | options
    return planner.plan_experiment(spec, topology, architecture="llama-2-7b", **options)


@pytest.mark.slow
def test_memory_and_flops_are_those_of_the_program_that_a_run_executes(tmp_path, monkeypatch):
    # One layer, one member per group, one microbatch: XLA counts the body of a loop once, and here
    # each loop runs once.
    sys.path.insert(0, "tests/experiment")
    from tiny import make_base, make_config

    make_base(
        tmp_path / "base",
        num_layers=1,
        hidden_size=128,
        intermediate_size=352,
        num_heads=2,
        num_kv_heads=2,
    )
    file = make_config(
        tmp_path,
        training={"epochs": 1, "batch": 16},
        mesh={"order": 2, "fsdp": 2},
        merge={"methods": [{"method": "average"}]},
    )
    programs = []
    compile_step = steps.compile_step
    monkeypatch.setattr(
        steps,
        "compile_step",
        lambda *arguments, **named: (
            programs.append(compile_step(*arguments, **named)) or programs[-1]
        ),
    )
    pipeline.run(load_config(file), through="train", log=lambda text: None)
    monkeypatch.undo()
    executed = programs[0].memory_analysis()
    plan = planner.plan_experiment(plan_spec(load_config(file)), "cpu:4", find_better=False)
    total = (
        executed.argument_size_in_bytes
        + executed.temp_size_in_bytes
        + executed.output_size_in_bytes
        - executed.alias_size_in_bytes
    )
    assert plan.configured.source == "compiled"
    memory = plan.configured.step.memory
    assert memory.total == pytest.approx(total, rel=0.05)
    arguments = memory.parameters + memory.optimizer + memory.base + memory.batch
    assert arguments == pytest.approx(executed.argument_size_in_bytes, rel=0.05)
    assert plan.configured.step.flops == pytest.approx(
        programs[0].cost_analysis()["flops"], rel=0.05
    )
    assert {"losses", "merge", "generation"} == set(plan.programs)
    assert plan.configured.fits is None


def test_settings_that_fit_and_settings_that_do_not():
    sections = {
        "population": {"members": 4},
        "data": {"max_length": 512},
        "training": {"batch": 128},
        "model": {"remat": "full"},
        "mesh": {"order": 4, "fsdp": -1},
    }
    fits = plan(sections, "v5p:4x4x2", examples=7473)
    assert fits.configured.fits is True
    assert fits.work.steps == 3 * 59
    assert 0.2 < fits.configured.mfu < 0.65
    large = plan(sections, "h100:8", examples=7473)
    assert large.configured.fits is False
    assert large.recommended.fits is True
    assert large.recommended.changes
    # parameters and two moments of 4 members, float32; two counters
    assert large.experiment.checkpoint_bytes == pytest.approx(4 * 12 * large.parameters, rel=1e-6)
    nothing = plan(sections | {"mesh": {"order": 1}}, "a100:1")
    assert nothing.configured.fits is False
    assert nothing.candidates
    assert all("lora.rank" in option.changes for option in nothing.candidates)
    assert any("another training" in note for note in nothing.notes)
    assert nothing.experiment.hours["training"] is None


def test_a_compiler_for_gpus_that_does_not_start_is_one_note(monkeypatch):
    def broken(*_arguments, **_description):
        raise RuntimeError("Unable to load CUDA.\n  a traceback\n  of many lines")

    monkeypatch.setattr(devices, "has_compiler", lambda topology: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", broken)
    monkeypatch.setenv("XLA_FLAGS", "")
    settings = {"examples": 7473, "find_better": False, "analytic_only": False}
    done = plan({"training": {"batch": 128}}, "h100:8", **settings)
    assert done.configured.source == "analytic"
    (note,) = [note for note in done.notes if "CUDA" in note]
    assert "\n" not in note
    assert note.startswith("cannot compile for h100:8: Unable to load CUDA.; install")
    assert note.endswith(": all figures are estimates")


def test_memory_of_the_host_of_absent_gpus_is_an_estimate(monkeypatch):
    monkeypatch.setattr(devices, "has_compiler", lambda topology: True)
    monkeypatch.setattr(devices, "topology_devices", lambda topology: [])
    sections = {"training": {"batch": 128, "optimizer_memory": "host"}}
    done = plan(sections, "h100:8", examples=7473, find_better=False, analytic_only=False)
    assert done.configured.source == "analytic"
    (note,) = [note for note in done.notes if "memory of the host" in note]
    assert note.endswith("training.optimizer_memory = host takes it: all figures are estimates")


def test_ironwood_is_planned_by_devices_of_half_a_chip():
    done = plan({"training": {"batch": 128}}, "tpu7x:2x2x1", examples=7473, find_better=False)
    assert done.topology.size == 8
    # half of the 192 GiB of a chip, by Google's page
    assert done.topology.device.memory == 96 * 2**30


def test_saves_that_take_longer_than_what_lies_between_them():
    sections = {
        "population": {"members": 4},
        "training": {"batch": 128, "checkpoint_every": 2},
        "mesh": {"order": 4, "fsdp": -1},
    }

    def planned(**training):
        changed = sections | {"training": sections["training"] | training}
        done = plan(changed, "v5p:4x4x2", examples=7473, find_better=False)
        return done.experiment, [note for note in done.notes if "to save" in note]

    often, notes = planned()
    # 12 bytes per parameter and member, at 200 MB per second
    assert often.checkpoint_seconds == pytest.approx(often.checkpoint_bytes / 200e6)
    assert often.checkpoint_seconds == pytest.approx(4 * 12 * 6.738e9 / 200e6, rel=1e-3)
    assert often.saves_too_often
    assert "a checkpoint takes 1,617 s to save" in notes[0]
    enough = 4 * 12 * 6_738_415_616 / often.checkpoint_interval / 1e6
    stated = int(notes[0].rsplit("training.checkpoint_bandwidth=", 1)[1].rstrip(")"))
    assert enough <= stated < enough + 1
    assert not planned(checkpoint_bandwidth=stated)[0].saves_too_often
    fast, notes = planned(checkpoint_bandwidth=1e6)
    assert (fast.saves_too_often, notes) == (False, [])
    assert fast.checkpoint_interval == often.checkpoint_interval
    # by time only at steps that are logged, which may be further apart
    timed, _ = planned(checkpoint_every=1000, checkpoint_minutes=0.01, log_every=10)
    assert timed.checkpoint_interval == pytest.approx(10 / 2 * often.checkpoint_interval)
    # by default at the end of each epoch, of 59 steps
    epochs, _ = planned(checkpoint_every=None)
    assert epochs.checkpoint_interval == pytest.approx(59 / 2 * often.checkpoint_interval)
    # by time, where that is more often
    minutely, notes = planned(checkpoint_every=1000, checkpoint_minutes=1)
    assert (minutely.checkpoint_interval, len(notes)) == (60, 1)
    assert planned(checkpoint_minutes=1000)[0].checkpoint_interval == often.checkpoint_interval


def test_adapters_are_not_proposed_for_a_random_base():
    sections = {"population": {"members": 4}, "model": {"init": "random"}}
    nothing = plan(sections, "a100:1")
    assert not nothing.candidates
    assert "no settings fit by the estimate: take more devices" in nothing.notes


def test_the_keys_of_the_json_document():
    """Programs read them: a field of a plan may be renamed, a key may not."""
    sections = {"training": {"batch": 64}, "mesh": {"order": 4, "fsdp": -1}}
    document = json.loads(as_json(plan(sections, "h100:8", examples=1000)))
    assert " ".join(document) == (
        "topology model work source given recommended candidates programs experiment assumed notes"
    )
    option = document["given"]
    assert " ".join(option) == (
        "settings changes members_at_once memory fits flops moved_bytes traffic_bytes seconds"
        " tokens_per_second mfu training_hours population_step_seconds source"
    )
    assert list(option["flops"]) == ["model", "executed_a_device"]
    assert list(option["seconds"]) == ["products", "memory", "exchanges", "step"]
    assert list(option["memory"])[-2:] == ["total", "limit"]


def make_program(fits, **options):
    return ProgramPlan(bytes=2**30, fits=fits, **options)


@pytest.mark.parametrize(
    ("topology", "programs", "expected"),
    [
        ("v5p:4x4x2", {}, "It fits, and no settings that were tried are much better."),
        ("a100:1", {}, "It does not fit."),
        ("cpu:8", {}, "The memory of these devices is not known."),
        (
            "cpu:8",
            {"losses": make_program(False, fitting={"analysis.batch": 32})},
            "The memory of these devices is not known.\n"
            "losses does not fit; it does with --set analysis.batch=32.",
        ),
        (
            "cpu:8",
            {"merge": make_program(False), "generation": make_program(True)},
            "The memory of these devices is not known.\nmerge does not fit: merge the exported"
            " members as files (ordermerge merge MODEL...).",
        ),
    ],
)
def test_the_verdict(topology, programs, expected):
    configured = plan({}, topology, find_better=False).configured
    assert describe_verdict(configured, None, programs) == expected


def test_the_verdict_names_better_settings():
    configured = plan({}, "a100:1", find_better=False).configured
    better = dataclasses.replace(configured, changes={"model.remat": "dots"}, source="compiled")
    expected = "It does not fit. Better (compiled): --set model.remat=dots"
    assert describe_verdict(configured, better, {}) == expected


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"base": "embedded:quickstart"},
                "data": {"train": "generated:quickstart", "max_length": 128},
                "training": {"batch": 32},
            }
        )
    )
    done = run(str(file), "--topology", "v5e:2x2", "--analytic", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["source"] == "analytic"
    assert document["given"]["fits"] is True
    # the base and its task come with the package
    assert document["experiment"]["hours"]["training"] > 0
    text = run(str(file), "--topology", "v5e:2x2", "--analytic", "--no-search").stdout
    assert "as configured, analytic" in text
    assert "It fits" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5q:4x4"], "unknown device v5q"),
        (["--architecture", "llama-2-7c"], "did you mean 'llama-2-7b'"),
        (
            ["--set", "mesh.order=3", "--set", "population.members=3"],
            "4 devices cannot be divided by 3",
        ),
        (
            ["--set", "mesh.order=-1", "--set", "mesh.fsdp=1", "--set", "population.members=6"],
            "is not a multiple of the order axis",
        ),
        (["--set", "data.max_length=8192"], "is above the 4096 positions of llama-2-7b"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    file = tmp_path / "small.yaml"
    file.write_text("{}")
    done = run(
        str(file), "--analytic", "--topology", "v5e:2x2", "--architecture", "llama-2-7b", *arguments
    )
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "gsm8k_rft", "code", "math"])
def test_the_large_configs_fit_by_the_estimate(name):
    config = load_config(pathlib.Path(__file__).parents[2] / "configs" / f"llama2_7b_{name}.yaml")
    plan = planner.plan_experiment(
        plan_spec(config),
        "v5p:4x4x2",
        architecture="llama-2-7b",
        examples=10_000,
        tests=500,
        analytic_only=True,
        find_better=False,
    )
    assert plan.configured.fits is True
    examples = 10_000 - config.data.validation_examples - config.data.test_examples
    assert plan.work.steps == 3 * -(-examples // config.training.batch)


def test_inputs_are_the_examples_of_the_run_with_several_sources(tmp_path):
    from tests.experiment import tiny

    tiny.make_base(tmp_path / "base")
    file = tiny.make_config(tmp_path)
    train = [f"{tmp_path}/train.jsonl", {"path": f"{tmp_path}/test.jsonl", "weight": 1.5}]
    changes = [f"data.train={json.dumps(train)}", "data.test=null", "data.test_examples=3"]
    config = load_config(file, [*changes, "evaluation.tasks=[]"])
    inputs = read_inputs(plan_spec(config))
    splits = source.load_splits(config.data, load_tokenizer(tmp_path / "base"), seed=config.seed)
    assert inputs.train.digest == splits["train"].digest
    assert inputs.train_count > 64 - 7
    assert (inputs.test_count, inputs.notes) == (3, ())
