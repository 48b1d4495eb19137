"""The command line: bad input is one line and exit code 2, with nothing written; small commands."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jax_ordermerge import cli
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.experiment.run_config import read_config
from tests.experiment import tiny


def call(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ordermerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


def edit_json(file, **change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the tiny folder that a test may spoil; its config points into the copy."""
    shutil.copytree(folder / "base", tmp_path / "base")
    tiny.make_config(tmp_path)
    return tmp_path


def truncate(copy):
    file = copy / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(copy):
    base = copy / "base"
    names = Reader(base).names
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    index["weight_map"][names[-1]] = "model-00002-of-00002.safetensors"
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def write_rows(copy, *rows):
    (copy / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


BAD = {
    "config file absent": (lambda c: (c / "tiny.yaml").unlink(), [], "tiny.yaml not found"),
    "data file absent": (None, ["data.train=nowhere.jsonl"], "nowhere.jsonl not found"),
    "base absent": (None, ["model.base=./nowhere"], "model directory ./nowhere not found"),
    "unknown key": (
        None,
        ["training.learning_rat=1"],
        "unknown key training.learning_rat (did you mean 'learning_rate'?)",
    ),
    "wrong type": (
        None,
        ["training.batch=many"],
        "training.batch = 'many': input should be a valid integer",
    ),
    "unknown method": (None, ["merge.methods=[{method: avrage}]"], "avrage"),
    "unknown parameter": (
        None,
        ["merge.methods=[{method: selection, parameters: {resampel: 1}}]"],
        "did you mean 'resample'",
    ),
    "truncated weights": (truncate, [], "model.safetensors"),
    "absent shard": (lose_a_shard, [], "model-00002-of-00002.safetensors"),
    "wrong shape": (
        lambda c: edit_json(c / "base" / "config.json", intermediate_size=48),
        [],
        "has shape (32, 16), config.json asks for (48, 16)",
    ),
    "unsupported rope": (
        lambda c: edit_json(
            c / "base" / "config.json",
            rope_parameters=None,
            rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        ),
        [],
        "base/config.json: rope_scaling: rope type 'dynamic' is not supported",
    ),
    "missing column": (
        lambda c: write_rows(c, {"prompt": "a", "text_": "b"}),
        ["data.format=prompt_completion"],
        "completion",
    ),
    "no response": (
        lambda c: write_rows(
            c, {"prompt": "a", "completion": "b ."}, {"prompt": "a", "completion": ""}
        ),
        [],
        "row",
    ),
    "order does not divide": (
        None,
        ["mesh.order=3"],
        "population.members = 2 is not a multiple of mesh.order = 3",
    ),
    "too many devices": (None, ["mesh.fsdp=64"], "8 are present"),
    "context too short": (
        None,
        ["data.max_length=64"],
        "data.max_length = 64 is above the 32 positions",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(copy, capsys, case):
    spoil, overrides, expected = BAD[case]
    if spoil:
        spoil(copy)
    before = sorted(path for path in copy.rglob("*"))
    code = call(
        "run", copy / "tiny.yaml", *(part for override in overrides for part in ("--set", override))
    )
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert expected in error
    assert sorted(path for path in copy.rglob("*")) == before


def test_members_of_different_architectures(folder, tmp_path, capsys):
    wider = tiny.make_base(tmp_path / "other", intermediate_size=48)
    code = call("merge", folder / "base", wider, "--method", "average", "--out", tmp_path / "out")
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert "\n" not in error
    assert "intermediate_size" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["merge", "A", "B"], "needs a directory to write"),
        (["merge", "A", "B", "--out", "O", "--weights", "1,x"], "--weights 1,x: expected numbers"),
        (["merge", "A", "B", "--out", "O", "--param", "density"], "expected KEY=VALUE"),
        (["merge", "A", "B", "--out", "O", "--param", "density=[1"], "value is not valid YAML"),
        (["merge", "A", "B", "--out", "O", "--dtype", "int4"], "--dtype int4: expected one of"),
        (["convert", "A", "B", "--to", "onnx"], "--to onnx: expected hf, orbax, peft or gguf"),
        (["report", "."], "is not a run directory"),
    ],
)
def test_bad_arguments(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert "\n" not in error


def test_help_is_quick_and_names_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "jax_ordermerge", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in (
        "run",
        "train",
        "merge",
        "analyze",
        "evaluate",
        "generate",
        "convert",
        "report",
    ):
        assert f"\n  {command} " in done.stdout
    code = """
import sys
sys.argv = ["ordermerge", "--help"]
try:
    import jax_ordermerge.cli
    jax_ordermerge.cli.main()
except SystemExit:
    pass
print(sorted({"jax", "flax", "transformers", "numpy"} & set(sys.modules)))
"""
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.endswith("[]\n")


def test_convert_there_and_back_and_one_member(folder, tmp_path):
    assert call("convert", folder / "base", tmp_path / "orbax", "--to", "orbax") == 0
    assert call("convert", tmp_path / "orbax", tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
        folder / "base" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (
        folder / "base" / "tokenizer.json"
    ).read_bytes()


def test_merging_files_equals_the_merge_of_the_run(folder, tmp_path):
    config = tiny.make_config(
        tmp_path,
        model={"base": str(folder / "base"), "compute_dtype": "float32"},
        output=str(tmp_path / "run"),
    )
    pipeline.run(read_config(config), through="merge", log=lambda line: None)
    members = [tmp_path / f"member{m}" for m in range(2)]
    for number, member in enumerate(members):
        assert call("convert", tmp_path / "run", member, "--member", number) == 0
    arguments = [
        "merge",
        *members,
        "--base",
        folder / "base",
        "--out",
        tmp_path / "merged",
        "--method",
        "selection",
        "--param",
        "resample=exhaustive",
    ]
    assert call(*arguments) == 0
    ours, theirs = Reader(tmp_path / "merged"), Reader(tmp_path / "run" / "merged" / "selection")
    assert sorted(ours.names) == sorted(theirs.names)
    for name in ours.names:
        assert np.array_equal(ours.read(name).view(np.uint16), theirs.read(name).view(np.uint16)), (
            name
        )
    assert call(*arguments) == 2  # the target is not empty


def test_generate(folder, capsys):
    assert (
        call(
            "generate",
            folder / "base",
            "--prompt",
            "a plus b is ?",
            "--prompt",
            "c",
            "--max-new-tokens",
            3,
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_generate_draws_by_seed(folder, capsys):
    def drawn(*options):
        assert (
            call(
                "generate",
                folder / "base",
                *["--prompt", "a plus b is ?"] * 2,
                "--max-new-tokens",
                6,
                *options,
            )
            == 0
        )
        return capsys.readouterr().out

    options = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.99)
    assert drawn(*options, "--seed", 1) == drawn(*options, "--seed", 1)
    assert len({drawn(*options, "--seed", seed) for seed in (1, 2)} | {drawn()}) == 3
    assert call("generate", folder / "base", "--prompt", "a", "--top-k", 5) == 2
    assert "give a temperature above 0" in capsys.readouterr().err
