"""Exports name their base and run, hold no path of this machine, and have the dtype of the base."""

import re
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import yaml
from huggingface_hub.utils import validate_repo_id

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.experiment.run_config import read_config
from tests.commands.test_cli import call
from tests.experiment import tiny

SECTIONS = {
    "training": {"epochs": 1, "checkpoint_every": 100},
    "evaluation": {"tasks": []},
    "merge": {"dtype": None, "methods": [{"method": "average"}]},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def exports(request, tmp_path_factory):
    """The dtype of a base; a run on it, its members and their merge by name; the logs of the run."""
    folder = tmp_path_factory.mktemp("user")
    tiny.make_base(folder / "exact")
    base = folder / "models" / "SmolTest-1M"
    assert call("convert", folder / "exact", base, "--dtype", request.param) == 0
    config = tiny.make_config(folder, **SECTIONS, model={"base": str(base)})
    logs = [[], []]
    for log in logs:
        pipeline.run(read_config(config, ["data.test=null"]), through="merge", log=log.append)
    run = folder / "run"
    made = {"merged": run / "merged" / "average"}
    for name, command in {
        "member": ["convert", run, folder / "member", "--member", 1],
        "exact member": ["convert", run, folder / "em", "--member", 1, "--dtype", "float32"],
        "by name": ["merge", run / "member_0", run / "member_1", "--out", folder / "by_name"],
        "exact": ["merge", run / "member_0", "--out", folder / "one", "--dtype", "float32"],
    }.items():
        assert call(*command) == 0, name
        made[name] = Path(command[2] if command[0] == "convert" else folder / command[-1])
    made["by name"], made["exact"] = folder / "by_name", folder / "one"
    recipe = folder / "recipe.yml"
    models = [{"model": f"{run}/member_{i}"} for i in range(2)]
    raw = {"merge_method": "linear", "models": models, "base_model": str(base)}
    recipe.write_text(yaml.safe_dump(raw | {"parameters": {"weight": 1}}))
    assert call("merge", recipe, folder / "recipe") == 0
    return request.param, folder, made | {"recipe": folder / "recipe"}, logs


def dtypes_of(directory):
    reader = Reader(directory)
    return {reader.info(name).dtype.name for name in reader.names}


def test_exports_have_the_dtype_of_the_base_unless_told(exports):
    dtype, folder, made, _ = exports
    for name in ("merged", "member", "by name", "recipe"):
        assert dtypes_of(made[name]) == {dtype}, name
    for name in ("exact member", "exact"):
        assert dtypes_of(made[name]) == {"float32"}, name
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert config["merge"]["dtype"] == dtype


def test_a_member_is_rounded_once_from_float32(exports):
    dtype, _, made, _ = exports
    exact, member = Reader(made["exact member"]), Reader(made["member"])
    target = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for name in exact.names:
        assert member.read(name).tobytes() == exact.read(name).astype(target).tobytes()
    # and the average is that of what is exported, whether of the population or by name
    for name in exact.names:
        assert Reader(made["merged"]).read(name).tobytes() == (
            Reader(made["by name"]).read(name).tobytes()
        )


def test_the_rounding_is_told_once(exports):
    dtype, _, _, (first, second) = exports
    told = [line for line in first if "merge.dtype" in line]
    assert len(told) == (dtype == "bfloat16")
    assert not any("merge.dtype" in line for line in second)


CARDS = {
    # name of the export -> base_model, its relation, what the text names
    "merged": ("SmolTest-1M", "merge", ["run/member_0", "run/member_1", "level `sample`, 1 epoch"]),
    "member": ("SmolTest-1M", "finetune", ["# run/member_1", "member 1", "SmolTest-1M"]),
    "by name": (["SmolTest-1M"], "merge", ["run/member_0", "run/member_1", "average"]),
    "recipe": (["SmolTest-1M"], "merge", ["run/member_0", "base_model: SmolTest-1M"]),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_names_base_and_members(exports, name):
    _, folder, made, _ = exports
    base, relation, texts = CARDS[name]
    card = huggingface_hub.ModelCard.load(made[name] / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (base, relation)
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert ("merge" in data["tags"]) == (relation == "merge")
    for model in [base] if isinstance(base, str) else base:
        validate_repo_id(model)
    for text in texts:
        assert text in card.text
    # what is uploaded with the tensors
    for file in made[name].iterdir():
        if file.suffix != ".safetensors":
            assert str(folder) not in file.read_text(), file.name


def test_a_base_of_two_dtypes_needs_a_choice(tmp_path, capsys):
    base = tiny.make_base(tmp_path / "base")
    reader = Reader(base)
    tensors = {name: reader.read(name) for name in reader.names}
    narrow = {n: t.astype(ml_dtypes.bfloat16) if "norm" in n else t for n, t in tensors.items()}
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    safetensors_numpy.save_file(narrow, base / "model.safetensors")
    config = tiny.make_config(tmp_path, **SECTIONS)
    assert call("train", config) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert re.search(r"stored in bfloat16 .* and float32 .*choose one .* with merge\.dtype", line)
    assert not (tmp_path / "run").exists()
