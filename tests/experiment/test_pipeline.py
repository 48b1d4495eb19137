"""A run on a tiny model: complete, repeated, interrupted, refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml

from jax_ordermerge import tree
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode, generation, harness
from jax_ordermerge.experiment import losses, models, pipeline, stack_models
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.merge.methods.table import METHODS, Choice
from jax_ordermerge.train import loop
from tests.experiment.run_directory import digests, interrupted


@pytest.fixture(scope="module")
def run(folder):
    messages = []
    directory = pipeline.run(load_config(folder / "tiny.yaml"), log=messages.append)
    return directory, messages


def test_every_part_of_the_run_directory_is_there(run):
    directory, _ = run
    assert {path.name for path in directory.iterdir()} >= {
        "config.yaml",
        "data.json",
        "orders",
        "metrics",
        "checkpoints",
        "losses",
        "analysis.json",
        "merged",
        "merge.json",
        "evaluations",
        "evaluations.json",
        "report.html",
        "report.md",
    }
    assert not [path for path in directory.rglob("*") if "partial" in path.name]
    merged = directory / "merged" / "selection"
    assert {path.name for path in merged.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "merge_config.yaml",
    }
    names = [
        model["name"]
        for model in json.loads((directory / "evaluations.json").read_text())["models"]
    ]
    assert names == ["base", "member_0", "member_1", "average", "selection"]
    with np.load(directory / "losses" / "final.npz") as final:
        assert final["losses"].shape == (5, 40)
        assert (final["losses"][1:3].mean() < final["losses"][0].mean()).all()


def test_second_call_does_nothing(run):
    directory, _ = run
    before, messages = digests(directory), []
    pipeline.run(read_config(directory), log=messages.append)
    assert messages == [f"everything is done: {directory / 'report.html'}"]
    assert digests(directory) == before


def test_another_config_is_refused_with_the_difference(run, folder):
    directory, _ = run
    before = digests(directory)
    with pytest.raises(UserError, match=r"made with another config \(training.epochs: 2 -> 3\)"):
        pipeline.run(load_config(folder / "tiny.yaml", ["training.epochs=3"]))
    assert digests(directory) == before


def test_other_hardware_is_not_another_config(run, folder):
    messages = []
    changes = ["mesh.order=2", "training.log_every=1", "training.checkpoint_every=7"]
    pipeline.run(load_config(folder / "tiny.yaml", changes), log=messages.append)
    assert messages[0].startswith("everything is done")


@pytest.mark.parametrize("groups", [1, 2])
def test_models_answer_together_as_they_do_alone(run, folder, tmp_path, monkeypatch, groups):
    directory, _ = run
    shutil.copytree(
        directory,
        tmp_path / "run",
        ignore=shutil.ignore_patterns("evaluations*", "config.yaml", "report*"),
    )
    config = load_config(
        folder / "tiny.yaml", [f"output={tmp_path / 'run'}", f"mesh.order={groups}"]
    )
    original, sizes = decode.generate_members, []

    def counted(model, population, *args, **settings):
        sizes.append(tree.size(population))
        return original(model, population, *args, **settings)

    monkeypatch.setattr(decode, "generate_members", counted)
    # all of them are small: with the limit as it is they would be one stack
    monkeypatch.setattr(stack_models, "_SMALL_BYTES", 0)
    pipeline.run(config, through="evaluate", log=lambda line: None)
    # five models, two members: the last stands alone, but every group of devices takes part
    assert sizes == [2, 2, 1 if groups == 1 else 2]
    for file in sorted((directory / "evaluations").glob("*.json")):
        ours, theirs = (
            json.loads(path.read_text())["tasks"]
            for path in (tmp_path / "run" / "evaluations" / file.name, file)
        )
        assert ours == theirs
    if groups == 2:
        return
    ctx = open_run(config, lambda line: None)
    test = ctx.splits["test"]
    for name, params in models.load_models(ctx, ["base", "member_1", "average", "selection"]):
        generate = generation.make_generator(
            ctx.model, params, ctx.tokenizer, batch=8, dtype="float32"
        )
        answers = generate([test.prompt(row).tolist() for row in range(len(test))], 4)
        items = json.loads((tmp_path / "run" / "evaluations" / f"{name}.json").read_text())[
            "tasks"
        ]["swap"]
        assert [item["answer"] for item in items] == answers


def test_results_of_a_model_that_were_removed_are_measured_again(run, folder, tmp_path):
    directory, _ = run
    shutil.copytree(directory, tmp_path / "run")
    removed = "evaluations/member_1.json"
    (tmp_path / "run" / removed).unlink()
    messages = []
    pipeline.run(read_config(tmp_path / "run"), log=messages.append)
    assert not any(message.startswith("everything is done") for message in messages)
    for path in (removed, "evaluations.json"):
        assert (tmp_path / "run" / path).read_bytes() == (directory / path).read_bytes()


@pytest.mark.parametrize("stage", ["train", "merge", "analyze", "evaluate"])
def test_interrupted_and_called_again_ends_with_the_same_bytes(run, folder, tmp_path, stage):
    directory, _ = run
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}"])
    module, name, after = {
        "train": (loop.Display, "metrics", 2),
        "merge": (convert, "export", 2),
        "analyze": (losses, "sequence_losses", 3),
        "evaluate": (harness, "run", 3),
    }[stage]
    with interrupted(module, name, after):
        pipeline.run(config, log=lambda line: None)
    assert not pipeline.find_stage(stage).is_complete(config)
    pipeline.run(config, log=lambda line: None)
    for part in (
        "merged/average/model.safetensors",
        "merged/selection/model.safetensors",
        "analysis.json",
        "evaluations.json",
    ):
        assert (tmp_path / "run" / part).read_bytes() == (directory / part).read_bytes(), part
    ours, theirs = (
        [
            json.loads(line)["loss"]
            for line in (d / "metrics" / "train.jsonl").read_text().splitlines()
        ]
        for d in (tmp_path / "run", directory)
    )
    assert ours == theirs


def test_stages_alone_do_the_same(run, folder, tmp_path):
    directory, _ = run
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}"])
    for stage in ("train", "merge"):
        pipeline.run(config, through=stage, log=lambda line: None)
        assert pipeline.find_stage(stage).is_complete(config)
        assert not pipeline.find_stage("evaluate").is_complete(config)
    name = "merged/selection/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (directory / name).read_bytes()


def test_a_merge_without_its_diagnostics_is_not_complete(run, folder, tmp_path):
    """It was exported, and the process was killed before it was recorded."""
    directory, _ = run
    shutil.copytree(directory, tmp_path / "run")
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}"])
    stage = pipeline.find_stage("merge")
    assert stage.is_complete(config)
    path = tmp_path / "run" / "merge.json"
    merges = json.loads(path.read_text())
    path.write_text(json.dumps(merges | {"merges": merges["merges"][:-1]}))
    assert not stage.is_complete(config)


def test_a_merge_of_too_many_members_is_refused_before_training(folder, tmp_path):
    methods = "merge.methods=[{method: nearswap, parameters: {t: 0.1}}]"
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}", methods])
    with pytest.raises(UserError, match="merge method nearswap takes 1 models, 2 were given"):
        pipeline.run(config, log=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_lost_merge_is_made_again(run, folder, tmp_path):
    directory, _ = run
    shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "merged" / "average")
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}"])
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml")
        .read_text()
        .replace(str(directory), str(tmp_path / "run"))
    )
    pipeline.run(config, log=lambda line: None)
    name = "merged/average/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (directory / name).read_bytes()


def test_resolved_config_is_written(run):
    raw = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert raw["training"]["optimizer"]["beta2"] == 0.999
    assert raw["population"]["members"] == 2


def test_packed_rows_are_described_and_analyzed_by_sample(folder, tmp_path):
    overrides = [
        f"output={tmp_path / 'run'}",
        "data.packing=packs",
        "data.max_length=32",
        "merge.methods=[]",
        "training.epochs=3",
    ]
    messages = []
    directory = pipeline.run(
        load_config(folder / "tiny.yaml", overrides), through="analyze", log=messages.append
    )
    data = json.loads((directory / "data.json").read_text())["train"]
    # 40 examples of 9 tokens, three in a row of 32: 14 rows, in two steps of up to 8
    assert data["tokens"] == 360
    assert data["packing"] == {
        "kind": "packs",
        "examples": 3,
        "length": 32,
        "steps": 2,
        "rows": 8,
        "filled": 360 / (2 * 8 * 32),
    }
    assert "  packs: up to 3 examples in a row of 32 tokens, 70.3% no padding" in messages
    with (
        np.load(directory / "orders" / "member_1.npz") as orders,
        np.load(directory / "losses" / "final.npz") as final,
    ):
        assert orders["epoch_2"].shape == (2, 8, 3)
        assert sorted(orders["epoch_2"][orders["epoch_2"] >= 0]) == sorted(final["ids"])
    assert json.loads((directory / "analysis.json").read_text())


def choose_worst(losses, loss_of):
    """Choose the member of highest loss: a toy of a method that looks at validation losses."""
    worst = int(np.argmax(losses))
    return Choice((worst,), [loss_of([worst])])


@pytest.fixture
def worst_member():
    """A method that needs data, registered from outside the package."""
    passthrough = METHODS["passthrough"]
    settings = {"needs": "validation", "choose": choose_worst, "weights": "none"}
    METHODS.register("worst_member", dataclasses.replace(passthrough, **settings))
    yield
    METHODS.unregister("worst_member")


@pytest.mark.slow
def test_merges_that_look_at_data(worst_member, folder, tmp_path):
    """Fisher information from training samples, and a soup chosen on validation samples."""
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    raw["output"] = str(tmp_path / "run")
    raw["merge"] = {
        "methods": [
            {"method": name} for name in ("average", "fisher", "greedy_soup", "worst_member")
        ],
        "fisher_examples": 5,
    }
    raw["evaluation"] = {"batch": 8}
    config = tmp_path / "fisher.yaml"
    config.write_text(yaml.safe_dump(raw))
    directory = pipeline.run(load_config(config))
    merges = {
        merge["method"]: merge
        for merge in json.loads((directory / "merge.json").read_text())["merges"]
    }
    soup = merges["greedy_soup"]["parameters"]
    best = int(np.argmin(soup["validation_losses"]))
    assert soup["members"][0] == best
    assert soup["after_each"][0] == soup["validation_losses"][best]
    assert len(soup["after_each"]) == 2
    worst = merges["worst_member"]["parameters"]
    assert worst["validation_losses"] == soup["validation_losses"]
    assert worst["members"] == [int(np.argmax(worst["validation_losses"]))]
    assert worst["after_each"] == [max(worst["validation_losses"])]
    average, fisher = (
        directory / "merged" / name / "model.safetensors" for name in ("average", "fisher")
    )
    assert average.stat().st_size == fisher.stat().st_size
    assert average.read_bytes() != fisher.read_bytes()
    assert 0.5 < merges["fisher"]["diagnostics"]["total"]["norm_ratio"] < 2
    raw["data"]["validation_examples"] = 0
    config.write_text(yaml.safe_dump(raw | {"output": str(tmp_path / "other")}))
    with pytest.raises(
        UserError, match=r"greedy_soup chooses on validation data: set data\.validation_examples"
    ):
        pipeline.run(load_config(config))
