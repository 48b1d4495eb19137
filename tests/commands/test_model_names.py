"""Every command that takes a model takes every name of one."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_ordermerge.config import load_config
from jax_ordermerge.experiment import pipeline
from tests.commands.test_cli import call
from tests.experiment import tiny

ASKED = {"name": "swap", "prompt": "{{prompt}}", "response": " {{completion}}", "shots": 0}
TEXTS = {"name": "texts", "kind": "perplexity", "text": "{{prompt}} {{completion}}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run `run` with two members and a merge, and what it was made from."""
    folder = tmp_path_factory.mktemp("names")
    tiny.make_base(folder / "base")
    data = str(folder / "test.jsonl")
    tasks = [
        {**ASKED, "data": data, "max_new_tokens": 4, "stop": ["."]},
        {**TEXTS, "data": data},
    ]
    tiny.make_config(
        folder,
        output=str(folder / "run"),
        training={"epochs": 1, "learning_rate": 3e-2},
        evaluation={"batch": 32, "tasks": tasks},
        merge={"methods": [{"method": "linear"}], "dtype": "bfloat16"},
    )
    # the mesh of the run: on another one sums are added in another order
    settings = {"mesh": {"order": 1, "fsdp": 1}, "evaluation": {"batch": 32, "tasks": tasks}}
    (folder / "tasks.yaml").write_text(json.dumps(settings))
    pipeline.run(load_config(folder / "tiny.yaml"), through="evaluate", log=print)
    return folder


def read(path):
    return json.loads(path.read_text())


def test_a_member_by_name_is_the_member_by_number(folder, tmp_path):
    member = f"{folder}/run/member_1"
    assert call("convert", member, tmp_path / "named") == 0
    assert call("convert", folder / "run", tmp_path / "numbered", "--member", 1) == 0
    first, second = tmp_path / "named", tmp_path / "numbered"
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in set(names) - {"README.md"}:  # its title is the name of the directory
        assert (first / name).read_bytes() == (second / name).read_bytes()
    # a member is kept in float32 and exported in the dtype of the run
    assert read(first / "config.json")["dtype"] == "bfloat16"
    assert call("convert", member, tmp_path / "exact", "--dtype", "float32") == 0
    assert call("diff", tmp_path / "exact", member) == 0
    assert call("convert", member, tmp_path / "orbax", "--to", "orbax") == 0
    assert call("convert", tmp_path / "orbax", tmp_path / "back") == 0
    assert call("diff", first, tmp_path / "back") == 0
    assert call("diff", first, tmp_path / "orbax") == 0


@pytest.mark.parametrize("name", ["member_0", "average", "merged/average"])
def test_commands_take_members_and_merges(folder, tmp_path, capsys, name):
    model = f"{folder}/run/{name}"
    assert call("inspect", model, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 20
    assert call("diff", model, model) == 0
    assert call("convert", model, tmp_path / "out") == 0
    merge = ["merge", model, folder / "base", "--method", "linear", "--dtype", "bfloat16"]
    assert call(*merge, "--out", tmp_path / "m") == 0
    assert read(tmp_path / "m" / "merge.json")["recipe"]["merge_method"] == "average"
    capsys.readouterr()
    arguments = ["--prompt", "a plus b is ?", "--max-new-tokens", 3]
    assert call("generate", model, *arguments) == 0
    assert capsys.readouterr().out.strip()
    assert_results_are_those_of_the_run(folder, tmp_path, model, name.removeprefix("merged/"))


def assert_results_are_those_of_the_run(folder, tmp_path, model, name):
    tasks = ["--config", folder / "tasks.yaml", "--set", "model.compute_dtype=float32"]
    assert call("evaluate", model, *tasks, "--out", tmp_path / "results") == 0
    models = read(folder / "run" / "evaluations.json")["models"]
    expected = {row["name"]: {**row["tasks"], **row["texts"]} for row in models}
    assert read(tmp_path / "results" / "results.json")["tasks"] == expected[name]
    assert expected[name] != expected["base"]
    record = read(folder / "run" / "evaluations" / f"{name}.json")
    items = {**record["tasks"], **record["texts"]}
    for task in ("swap", "texts"):
        assert read(tmp_path / "results" / f"{task}.json") == items[task]


def test_orbax_directories_are_evaluated(folder, tmp_path):
    assert call("convert", f"{folder}/run/average", tmp_path / "orbax", "--to", "orbax") == 0
    assert_results_are_those_of_the_run(folder, tmp_path, tmp_path / "orbax", "average")


def test_mergekits_name_in_a_config_is_ours(folder):
    assert "method: average" in (folder / "run" / "config.yaml").read_text()
    merges = read(folder / "run" / "merge.json")["merges"]
    assert [(merge["name"], merge["method"]) for merge in merges] == [("average", "average")]


@pytest.mark.parametrize("command", ["convert", "inspect", "diff", "generate", "evaluate"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("member_2", "has the members 0, 1"),
        ("avrage", "the run has the merges average, and members such as"),
        ("../run", "is a run; name one of its members"),
    ],
)
def test_names_that_a_run_has_not(folder, tmp_path, capsys, command, name, message):
    model = f"{folder}/run/{name}"
    if (command, name) == ("evaluate", "../run"):
        return  # a run is what it evaluates
    arguments = {
        "convert": [model, tmp_path / "out"],
        "inspect": [model],
        "diff": [folder / "base", model],
        "generate": [model, "--prompt", "a"],
        "evaluate": [model, "--config", folder / "tasks.yaml"],
    }[command]
    assert call(command, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_hub_name_in_the_directory_of_a_run_is_one(folder, monkeypatch, capsys):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append(name)
        return str(folder / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(folder / "run")
    assert call("diff", "gpt2", folder / "base") == 0
    assert asked == ["gpt2"]
    assert call("diff", "member_0", f"{folder}/run/member_0") == 0
    assert call("diff", "average", "merged/average") == 0


@pytest.mark.parametrize("name", ["run/member_1", "run/average", "base+adapter"])
def test_relative_names_are_not_those_of_a_hub(folder, tmp_path, monkeypatch, name):
    import huggingface_hub

    def download(name, **options):
        raise AssertionError(f"{name} was downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(folder)
    write_adapter(folder)
    for command in (["inspect", name], ["convert", name, tmp_path / "out"]):
        assert call(*command) == 0
    assert call("evaluate", name, "--config", "tasks.yaml", "--out", tmp_path / "named") == 0
    options = ["--config", "tasks.yaml", "--out", tmp_path / "converted"]
    assert call("evaluate", tmp_path / "out", *options) == 0
    for task in ("swap", "texts"):
        path = f"{task}.json"
        assert read(tmp_path / "named" / path) == read(tmp_path / "converted" / path)


def test_data_of_tasks_are_checked_before_weights_are_downloaded(
    folder, tmp_path, monkeypatch, capsys
):
    import huggingface_hub

    patterns = []

    def download(name, allow_patterns, **options):
        patterns.extend(allow_patterns)
        return str(folder / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    task = {**TEXTS, "data": str(tmp_path / "absent.jsonl")}
    (tmp_path / "tasks.yaml").write_text(json.dumps({"evaluation": {"tasks": [task]}}))
    assert call("evaluate", "org/model", "--config", tmp_path / "tasks.yaml") == 2
    assert "absent.jsonl" in capsys.readouterr().err
    assert patterns
    assert "*.safetensors" not in patterns


def write_adapter(folder):
    """Write a LoRA adapter of one matrix of the base in the format of PEFT."""
    directory = folder / "adapter"
    if directory.exists():
        return
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    generator = np.random.default_rng(0)
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    shapes = {"A": (2, 16), "B": (16, 2)}
    tensors = {
        name.format(part): generator.normal(size=shape).astype(np.float32)
        for part, shape in shapes.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")
