"""A run with adapters: members are read as dense models, and exported as adapters on request."""

import json

import numpy as np
import pytest

from jax_ordermerge import arch
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import generation
from jax_ordermerge.experiment import pipeline, waves
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.merge.sources.references import open_model
from jax_ordermerge.merge.sources.storage import read
from jax_ordermerge.train import members
from tests.commands.test_cli import call
from tests.experiment import tiny

LORA = {"rank": 3, "alpha": 6, "targets": ["q", "v", "down_proj"]}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora")
    config = tiny.make_config(
        path,
        model={"base": str(folder / "base"), "compute_dtype": "float32"},
        training={"learning_rate": 3e-2, "epochs": 1},
        population={"members": 4, "wave": 2},
        lora=LORA,
        samples={"every": 3, "max_new_tokens": 4},
    )
    messages = []
    return pipeline.run(read_config(config), log=messages.append), messages


def assert_same_tensors(a, b):
    ours, theirs = Reader(a), Reader(b)
    assert sorted(ours.names) == sorted(theirs.names)
    for name in ours.names:
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


@pytest.mark.slow
def test_every_stage_works_on_adapters(run):
    directory, messages = run
    assert (
        "  lora: 624 parameters per member are trained, 4,944 of the base are shared in float32"
        in messages
    )
    models = json.loads((directory / "evaluations.json").read_text())["models"]
    assert [model["name"] for model in models] == [
        "base",
        *(f"member_{m}" for m in range(4)),
        "average",
        "selection",
    ]
    with np.load(directory / "losses" / "final.npz") as final:
        losses = dict(zip(final["names"], final["losses"].mean(-1), strict=True))
    assert all(losses[f"member_{m}"] < losses["base"] for m in range(4))
    assert len({losses[f"member_{m}"] for m in range(4)}) == 4
    assert (directory / "report.html").is_file()


def test_answers_while_training_are_those_of_dense_members(run):
    directory, _ = run
    last = json.loads((directory / "metrics" / "samples.jsonl").read_text().splitlines()[-1])
    ctx = open_run(read_config(directory), lambda line: None)
    validation = ctx.splits["validation"]
    for number in last["members"]:
        dense = members.restore_member(
            ctx.training, ctx.model, ctx.mesh, waves.member_layout(ctx.layout, number), number
        )
        generate = generation.make_generator(
            ctx.model, dense, ctx.tokenizer, batch=4, dtype="float32"
        )
        assert last["texts"][number] == generate(
            [validation.prompt(row).tolist() for row in range(len(validation))], 4
        )


def test_merges_of_the_run_are_those_of_its_members_and_of_its_adapters(run, folder, tmp_path):
    directory, _ = run
    for number in range(4):
        assert (
            call(
                "convert",
                directory,
                tmp_path / f"adapter{number}",
                "--to",
                "peft",
                "--member",
                number,
            )
            == 0
        )
        assert call("convert", directory, tmp_path / f"member{number}", "--member", number) == 0
    kinds = {
        "members": [f"{directory}/member_{m}" for m in range(4)],
        "adapters": [f"{folder / 'base'}+{tmp_path}/adapter{m}" for m in range(4)],
        "exported": [tmp_path / f"member{m}" for m in range(4)],
    }
    for kind, models in kinds.items():
        out = tmp_path / kind
        chosen = ["--method", "selection", "--param", "resample=exhaustive", "--dtype", "bfloat16"]
        assert call("merge", *models, "--base", folder / "base", "--out", out, *chosen) == 0
        assert_same_tensors(out, directory / "merged" / "selection")


def test_an_exported_adapter_is_described_as_peft_does(run, folder, tmp_path):
    directory, _ = run
    assert (
        call(
            "convert",
            directory,
            tmp_path / "adapter",
            "--to",
            "peft",
            "--member",
            1,
            "--dtype",
            "bfloat16",
        )
        == 0
    )
    peft_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (peft_config["peft_type"], peft_config["r"], peft_config["lora_alpha"]) == ("LORA", 3, 6)
    assert peft_config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert peft_config["base_model_name_or_path"] == str(folder / "base")
    reader = Reader(tmp_path / "adapter" / "adapter_model.safetensors")
    assert reader.info("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight") == (
        "bfloat16",
        (3, 32),
    )
    assert len(reader.names) == 2 * 2 * 3
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: base\n" in card
    assert "base_model_relation: adapter\n" in card
    assert (
        call("convert", directory, tmp_path / "adapter", "--to", "peft", "--member", 1) == 2
    )  # it is there


def test_the_average_of_the_run_as_one_adapter(run, folder, tmp_path, capsys):
    """Four members of rank 3: rank 12, with the numbers of the average of dense members."""
    directory, _ = run
    assert call("convert", f"{directory}/average", tmp_path / "joined", "--to", "peft") == 0
    assert "rank 12 is not a --max-lora-rank of vLLM; start it with --max-lora-rank 16" in (
        capsys.readouterr().out
    )
    joined = open_model(f"{folder / 'base'}+{tmp_path}/joined", dtype="float32")
    dense = [open_model(f"{directory}/member_{m}") for m in range(4)]
    for name, _, _ in arch.hf_tensors(joined.config):
        expected = np.mean([read(member, name).astype(np.float64) for member in dense], axis=0)
        np.testing.assert_allclose(read(joined, name), expected, rtol=1e-6, atol=1e-7)
    assert call("convert", f"{directory}/selection", tmp_path / "no", "--to", "peft") == 2
    assert "selection is no weighted sum of the adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["BASE", "OUT", "--to", "peft", "--member", 0],
            "--member goes with a run directory",
        ),
        (["BASE", "OUT", "--to", "peft"], "--to peft goes with a member of a run, RUN/member_0"),
        (["RUN", "OUT", "--to", "peft"], "--to peft goes with a member of a run, RUN/member_0"),
        (["RUN", "OUT"], "is a run; name one of its members"),
        (["RUN", "OUT", "--to", "peft", "--member", 4], "--member 4: the run has members 0 to 3"),
        (
            ["RUN", "OUT", "--to", "peft", "--member", 0, "--ignore-config-keys", "x"],
            "--ignore-config-keys goes with an HF directory",
        ),
        (["RUN/member_0", "OUT", "--to", "peft", "--rank", 4], "--base and --rank go together"),
        (
            ["BASE", "OUT", "--to", "hf", "--base", "BASE", "--rank", 4],
            "--base and --rank go with --to peft",
        ),
        (
            ["RUN", "OUT", "--to", "lora", "--member", 0],
            "--to lora: expected hf, orbax, peft or gguf",
        ),
    ],
)
def test_what_cannot_be_exported(run, folder, tmp_path, capsys, arguments, message):
    names = {"BASE": folder / "base", "RUN": run[0], "OUT": tmp_path / "out"}
    assert call("convert", *(names.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_targets_are_checked_before_anything_is_written(folder, tmp_path, capsys):
    config = tiny.make_config(
        tmp_path, model={"base": str(folder / "base")}, lora={"targets": ["qkv"]}
    )
    assert call("run", config) == 2
    assert "lora.targets: qkv is not a matrix of this model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_members_that_differ_in_their_initialization(folder, tmp_path):
    config = read_config(
        tiny.make_config(
            tmp_path,
            model={"base": str(folder / "base"), "compute_dtype": "float32"},
            training={"learning_rate": 3e-2, "epochs": 1},
            population={"members": 2, "wave": 1, "vary": "init"},
            lora=LORA,
            merge={"methods": [{"method": "average"}], "controls": "none"},
            evaluation={"batch": 8, "tasks": []},
        )
    )
    directory = pipeline.run(config, log=lambda text: None)
    orders = [(directory / "orders" / f"member_{m}.npz").read_bytes() for m in range(2)]
    assert orders[0] == orders[1]
    with np.load(directory / "losses" / "final.npz") as final:
        losses = dict(zip(final["names"], final["losses"], strict=True))
    members = [losses[f"member_{m}"].astype(float) for m in range(2)]
    assert members[0].tolist() != members[1].tolist()
    spread = json.loads((directory / "analysis.json").read_text())["spread"]
    np.testing.assert_allclose(spread["sd"], np.std([m.mean() for m in members], ddof=1))
    variances = [np.var([a, b], ddof=1) for a, b in zip(*members, strict=True)]
    np.testing.assert_allclose(spread["item_sd"], np.sqrt(np.mean(variances)))
    report = (directory / "report.md").read_text()
    assert "members (differ in initialization)" in report
    assert "in the same order, from another initialization" in report
    # another value is another training
    with pytest.raises(UserError, match=r"population\.vary: init -> all"):
        pipeline.run(
            config.model_copy(
                update={"population": config.population.model_copy(update={"vary": "all"})}
            )
        )
