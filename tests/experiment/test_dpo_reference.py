"""Preference pairs in a run: their reference is measured once, and every stage uses it."""

import json
import shutil

import numpy as np
import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import dpo_reference, losses, pipeline
from jax_ordermerge.train import loop
from tests.experiment import tiny
from tests.experiment.run_directory import interrupted

QUIET = {"log": lambda line: None}


def make_config(folder, **sections):
    """The tiny task with pairs: words in reverse order are preferred to words in order."""
    file = tiny.make_config(
        folder,
        **({"objective": {"kind": "dpo"}, "evaluation": {"batch": 8, "tasks": []}} | sections),
    )
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        pairs = [
            {
                "prompt": r["prompt"],
                "chosen": r["completion"],
                "rejected": f"{r['prompt'][0]} {r['prompt'][7]} .",
            }
            for r in rows
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(pair) + "\n" for pair in pairs if pair["chosen"] != pair["rejected"])
        )
    return file


@pytest.fixture
def pairs():
    def side(token):
        rows, masks = [[1, 2, token]] * 3, [[False, False, True]] * 3
        return Examples(
            Ragged.of(rows, np.int32),
            Ragged.of(masks, np.bool_),
            np.arange(3),
            ["p"] * 3,
            [str(token)] * 3,
        )

    return Examples(**(vars(side(5)) | {"rejected": side(6)}))


def test_a_reference_is_measured_once(pairs, tmp_path):
    calls = []

    def measured():
        calls.append(1)
        return np.arange(6, dtype=np.float32).reshape(3, 2)

    file = tmp_path / "reference" / "train.npz"
    for _ in range(2):
        examples = dpo_reference.with_reference(pairs, file, "base", measured)
        np.testing.assert_array_equal(examples.reference, [[0, 1], [2, 3], [4, 5]])
    assert len(calls) == 1
    for of, examples in (("another base", pairs), ("base", pairs.take(np.array([0, 1])))):
        with pytest.raises(
            UserError,
            match="was measured on other pairs or with another base; restore them, or choose another",
        ):
            dpo_reference.with_reference(examples, file, of, measured)


def test_choices(pairs):
    reference = np.array([[-1.0, -1.0], [-1.0, -1.0], [-2.0, -1.0]], np.float32)
    with_logps = Examples(**(vars(pairs) | {"reference": reference}))
    # rewards: the chosen one is higher, the rejected one is higher, the chosen one has gained more
    summary, items = dpo_reference.choices(
        with_logps, np.array([[0.5, 1.5], [2.0, 1.0], [1.5, 1.0]])
    )
    assert summary == {"accuracy": 2 / 3, "se": pytest.approx((2 / 27) ** 0.5), "n": 3}
    assert [(item["answer"], item["correct"]) for item in items] == [
        ("5", True),
        ("6", False),
        ("5", True),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["objective.kind=sft"],
            "holds preference pairs, objective.kind = sft learns responses; set it to dpo",
        ),
        (
            ["data.train={folder}/plain.jsonl"],
            "row 0 has no column 'chosen' (format preference); it has 'prompt', 'completion'",
        ),
    ],
)
def test_data_and_objective_must_agree(tmp_path, change, message):
    tiny.make_base(tmp_path / "base")
    file = make_config(tmp_path)
    (tmp_path / "plain.jsonl").write_text('{"prompt": "a", "completion": "b ."}\n')
    with pytest.raises(UserError) as caught:
        pipeline.run(load_config(file, [text.format(folder=tmp_path) for text in change]), **QUIET)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_run_interrupted_and_called_again(tmp_path, monkeypatch, loss):
    tiny.make_base(tmp_path / "base")
    sections = {
        "objective": {"kind": "dpo", "loss": loss, "beta": 0.5},
        "training": {
            "epochs": 8,
            "batch": 8,
            "learning_rate": 2e-2,
            "log_every": 2,
            "checkpoint_every": 4,
        },
        "merge": {"dtype": "float32", "methods": [{"method": "average"}]},
        "data": {
            "test": str(tmp_path / "train.jsonl"),
            "validation_examples": 0,
            "allow_overlap": True,  # what was learned is what the test asks for
        },
    }
    file = make_config(tmp_path, **sections)
    directory = pipeline.run(load_config(file), **QUIET)
    with (
        np.load(directory / "reference" / "train.npz") as saved,
        np.load(directory / "losses" / "final.npz") as final,
    ):
        assert saved["logps"].shape == (len(final["ids"]), 2)
        final_losses = dict(zip(final["names"].tolist(), final["losses"], strict=True))
    # the base is the reference; in float32 it is measured as it was then
    np.testing.assert_allclose(
        final_losses["base"], np.log(2) if loss == "sigmoid" else 1.0, rtol=1e-6
    )
    assert final_losses["member_0"].mean() < 0.9 * final_losses["base"].mean()
    models = {
        model["name"]: model
        for model in json.loads((directory / "evaluations.json").read_text())["models"]
    }
    assert "preferences" not in models["base"]["tasks"]
    right = models["member_0"]["tasks"]["preferences"]["accuracy"]
    assert right > 0.7
    if loss == "sigmoid":  # a pair is right where its loss is below that of no preference
        assert right == pytest.approx((final_losses["member_0"] < np.log(2)).mean())
    assert models["average"]["perplexity"] is None
    assert "nats per pair" in (directory / "report.md").read_text()

    shutil.copytree(directory, tmp_path / "first")
    shutil.rmtree(directory)
    with interrupted(loop.Display, "metrics", 4):
        pipeline.run(load_config(file), **QUIET)
    with monkeypatch.context() as patch:
        measure = losses.sequence_losses
        patch.setattr(
            losses,
            "sequence_losses",
            lambda *args, **options: pytest.fail("the reference was measured again"),
        )
        pipeline.run(load_config(file), through="train", **QUIET)
        patch.setattr(losses, "sequence_losses", measure)
    pipeline.run(load_config(file), **QUIET)
    for part in (
        "reference/train.npz",
        "merged/average/model.safetensors",
        "analysis.json",
        "evaluations.json",
    ):
        assert (directory / part).read_bytes() == (tmp_path / "first" / part).read_bytes(), part

    shutil.rmtree(tmp_path / "base")
    tiny.make_base(tmp_path / "base", seed=1)
    (directory / "analysis.json").unlink()
    with pytest.raises(
        UserError, match=r"the base \S+ changed since the training of \S+ began; restore its files"
    ):
        pipeline.run(load_config(file), **QUIET)
