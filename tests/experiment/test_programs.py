"""HumanEval and MBPP in a run, on a model that learned a right and a wrong program of each."""

import json

import pytest
import yaml

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import load_config
from jax_ordermerge.evaluate.tasks import programs
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.model import llama

pytestmark = pytest.mark.slow

HUMANEVAL = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(x):\n    """{text}"""\n',
        "entry_point": name,
        "canonical_solution": f"    return {value}\n",
        "test": f"def check(candidate):\n    assert candidate(3) == {expected}\n",
    }
    for number, (name, text, value, expected) in enumerate(
        [("double", "Twice x.", "2 * x", 6), ("next", "After x.", "x + 1", 4)]
    )
]
MBPP = [
    {
        "task_id": 11 + number,
        "text": text,
        "code": f"def {name}(x): return {value}",
        "test_list": [f"assert {name}(3) == {expected}"],
    }
    for number, (name, text, value, expected) in enumerate(
        [("sq", "Square.", "x * x", 9), ("neg", "Negate.", "-x", -3)]
    )
]


def byte_base(directory):
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]
        )
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory.with_name("tokenizer"))
    config = ModelConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=256,
        bos_token_id=fast.bos_token_id,
        eos_token_ids=(fast.eos_token_id,),
    )
    convert.export(
        llama.init_params(config, 0),
        config,
        directory,
        dtype="float32",
        source=directory.with_name("tokenizer"),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs")
    byte_base(path / "base")
    for name, rows in (("humaneval", HUMANEVAL), ("mbpp", MBPP)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # of each file the first problem is learned with its solution, the second with one that fails
    ours = [*programs.humaneval(HUMANEVAL), *programs.mbpp(MBPP)]
    answers = [
        ours[0].reference,
        "    return 0\n",
        ours[2].reference + "\n[DONE]\n",
        "def neg(x): return x\n[DONE]\n",
    ]
    lessons = [
        {"prompt": problem.prompt, "completion": answer}
        for problem, answer in zip(ours, answers, strict=True)
    ]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lessons))
    raw = {
        "name": "programs",
        "output": str(path / "run"),
        "model": {"base": str(path / "base"), "compute_dtype": "float32"},
        "mesh": {"order": 1, "fsdp": 1},
        "data": {"train": str(path / "train.jsonl"), "max_length": 256, "template": "plain"},
        "population": {"members": 2},
        "training": {
            "epochs": 120,
            "batch": 2,
            "learning_rate": 3e-3,
            "schedule": "constant",
            "log_every": 60,
            "checkpoint_every": 500,
        },
        "analysis": {"bootstrap": 10, "permutations": 9},
        "merge": {"dtype": "float32", "methods": [{"method": "average"}]},
        "evaluation": {
            "tasks": [
                {
                    "name": kind,
                    "kind": kind,
                    "data": str(path / f"{kind}.jsonl"),
                    "max_new_tokens": 48,
                }
                for kind in ("humaneval", "mbpp")
            ]
        },
    }
    (path / "programs.yaml").write_text(yaml.safe_dump(raw))
    return pipeline.run(load_config(path / "programs.yaml"), log=lambda line: None)


def test_the_right_program_passes_and_the_wrong_one_fails(run):
    models = {
        model["name"]: model["tasks"]
        for model in json.loads((run / "evaluations.json").read_text())["models"]
    }
    for name in ("member_0", "member_1"):
        tasks = json.loads((run / "evaluations" / f"{name}.json").read_text())["tasks"]
        for kind in ("humaneval", "mbpp"):
            right, wrong = tasks[kind]
            assert right["correct"], right
            assert not wrong["correct"]
            assert wrong["detail"] != right["detail"]
            assert (
                models[name][kind]["accuracy"],
                models[name][kind]["pass@1"],
                models[name][kind]["n"],
            ) == (0.5, 0.5, 2)
            assert models[name][kind]["isolation"]
    for kind in ("humaneval", "mbpp"):
        assert models["base"][kind]["accuracy"] == 0


def test_the_report_shows_the_programs(run):
    text = (run / "report.md").read_text()
    assert "humaneval, %" in text
    assert "return 2 \\* x" in text
