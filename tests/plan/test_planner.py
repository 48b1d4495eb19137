"""Whole plans: against the program that a run really executes, and as the command line prints them."""

import json
import pathlib
import sys

import pytest
import yaml
from typer.testing import CliRunner

from jax_ordermerge.cli import app
from jax_ordermerge.config import load_config, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.plan import planner
from jax_ordermerge.train import step as steps


def plan(config, topology, **more):
    return planner.make(
        make_config(config), topology, architecture="llama-2-7b", analytic_only=True, **more
    )


@pytest.mark.slow
def test_memory_and_flops_are_those_of_the_program_that_a_run_executes(tmp_path, monkeypatch):
    # one layer, one member a group, one microbatch: XLA counts the body of a loop once, and here each runs once
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
    executed = []
    compile_step = steps.compile_step
    monkeypatch.setattr(
        steps, "compile_step", lambda *given: executed.append(compile_step(*given)) or executed[-1]
    )
    pipeline.run(load_config(file), through="train", log=lambda text: None)
    monkeypatch.undo()
    memory = executed[0].memory_analysis()
    found = planner.make(load_config(file), "cpu:4", look_further=False)
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    assert found["source"] == "compiled"
    assert found["given"]["memory"]["total"] == pytest.approx(total, rel=0.05)
    kinds = ("parameters", "optimizer", "base", "batch")
    assert sum(found["given"]["memory"][kind] for kind in kinds) == pytest.approx(
        memory.argument_size_in_bytes, rel=0.05
    )
    assert found["given"]["flops"]["executed_a_device"] == pytest.approx(
        executed[0].cost_analysis()["flops"], rel=0.05
    )
    assert {"losses", "merge", "generation"} == set(found["programs"])
    assert found["given"]["fits"] is None


def test_what_fits_and_what_does_not():
    sections = {
        "population": {"members": 4},
        "data": {"max_length": 512},
        "training": {"batch": 128},
        "model": {"remat": "full"},
        "mesh": {"order": 4, "fsdp": -1},
    }
    fits = plan(sections, "v5p:4x4x2", examples=7473)
    assert fits["given"]["fits"] is True
    assert fits["work"]["steps"] == 3 * 59
    assert 0.2 < fits["given"]["mfu"] < 0.65
    large = plan(sections, "h100:8", examples=7473)
    assert large["given"]["fits"] is False
    assert large["recommended"]["fits"] is True
    assert large["recommended"]["changes"]
    # parameters and two moments of 4 members, float32; two counters
    assert large["experiment"]["checkpoint_bytes"] == pytest.approx(
        4 * 12 * large["model"]["parameters"], rel=1e-6
    )
    json.dumps(large, allow_nan=False)
    nothing = plan(sections | {"mesh": {"order": 1}}, "a100:1")
    assert nothing["given"]["fits"] is False
    assert nothing["candidates"]
    assert all("lora.rank" in one["changes"] for one in nothing["candidates"])
    assert any("another training" in note for note in nothing["notes"])
    assert nothing["experiment"]["hours"]["training"] is None


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"base": "embedded:quickstart"},
                "data": {"max_length": 128},
                "training": {"batch": 32},
            }
        )
    )
    done = run(str(file), "--topology", "v5e:2x2", "--analytic", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["source"] == "analytic"
    assert found["given"]["fits"] is True
    assert (
        found["experiment"]["hours"]["training"] > 0
    )  # the base and its task come with the package
    text = run(str(file), "--topology", "v5e:2x2", "--analytic", "--no-search").stdout
    assert "as configured, analytic" in text
    assert "It fits" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5q:4x4"], "there is no device v5q"),
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
def test_the_large_configs_are_planned_on_paper(name):
    config = load_config(pathlib.Path(__file__).parents[2] / "configs" / f"llama2_7b_{name}.yaml")
    made = planner.make(
        config,
        "v5p:4x4x2",
        architecture="llama-2-7b",
        examples=10_000,
        tests=500,
        analytic_only=True,
        look_further=False,
    )
    assert made["given"]["fits"] is True
    assert made["work"]["steps"] == 3 * -(
        -(10_000 - config.data.validation_examples - config.data.test_examples)
        // config.training.batch
    )
