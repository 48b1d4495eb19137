"""Our numbers against those of lm-evaluation-harness with its own Hugging Face model.

Checkpoint and items are the same, and responses are compared one by one.
"""

import importlib.util
import json
import math
import pathlib

import numpy as np
import pytest
import yaml

from jax_ordermerge.commands import evaluate
from jax_ordermerge.config import Data, make_config, make_task
from jax_ordermerge.data import synthetic
from jax_ordermerge.data.prompt_format import to_jinja
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import adapter, harness

QUICKSTART = pathlib.Path(evaluate.__file__).parents[1] / "assets" / "quickstart"
MISSING = [
    name for name in ("lm_eval", "torch", "accelerate") if importlib.util.find_spec(name) is None
]
needs_harness = pytest.mark.skipif(
    bool(MISSING),
    reason=f"not installed: {', '.join(MISSING)} (pip install 'jax_ordermerge[eval,parity]')",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

PROMPT, RESPONSE = "Question: {{question}}\nAnswer:", " {{answer}}"
STOP, MAX_NEW_TOKENS = ["Question:", "\n\n"], 40
SEVERAL_WINDOWS = "Once upon a time,  there was a girl.\n\nShe liked to play outside.\n" * 12
TEXTS = [
    "Ann has 12 apples. Ann buys 3 more and then gives away 5. How many apples does Ann have?",
    SEVERAL_WINDOWS,
    "Ünïcödé, tabs\tand 😀 signs",
    " begins with a space, and ends with one ",
]


def quickstart_rows():
    return [dict(row) for row in synthetic.generated("quickstart", "test")][:24]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tasks(folder, rows, shots):
    """Write data and tasks of the harness: GSM8K's, a choice among four, a cloze, and texts."""
    random = np.random.default_rng(0)
    choice_rows = []
    for row in rows:
        right = row["answer"].split("####")[1].strip()
        options = [right, "7", "no apples at all", "some"]
        order = random.permutation(4).tolist()
        choices = {"text": [options[i] for i in order], "label": list("ABCD")}
        choice_rows.append(
            {"question": row["question"], "choices": choices, "answerKey": "ABCD"[order.index(0)]}
        )
    files = {
        "shots": write(folder / "shots.jsonl", shots),
        "items": write(folder / "items.jsonl", rows),
        "choices": write(folder / "choices.jsonl", choice_rows),
        "texts": write(folder / "texts.jsonl", [{"text": text} for text in TEXTS]),
    }

    def task(name, test, **settings):
        # The splits of one dataset must have the same columns.
        data = {"test": files[test]} | (
            {"train": files["shots"]} if "fewshot_split" in settings else {}
        )
        raw = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data},
            "test_split": "test",
        } | settings
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))

    few = {
        "training_split": "train",
        "fewshot_split": "train",
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n"},
    }
    strict = [
        {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
        {"function": "take_first"},
    ]
    flexible = [
        {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
        {"function": "take_first"},
    ]
    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    asked = {
        "output_type": "generate_until",
        "doc_to_text": PROMPT,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": STOP,
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": MAX_NEW_TOKENS,
        },
        "filter_list": [
            {"name": "strict-match", "filter": strict},
            {"name": "flexible-extract", "filter": flexible},
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": ignored,
            }
        ],
    }
    task("local_problems", "items", **asked)
    task("local_problems_shots", "items", **asked, **few)
    mean = {"aggregation": "mean", "higher_is_better": True}
    task(
        "local_choices",
        "choices",
        output_type="multiple_choice",
        doc_to_text=PROMPT,
        doc_to_target="{{choices.label.index(answerKey)}}",
        doc_to_choice="{{choices.text}}",
        metric_list=[{"metric": name, **mean} for name in ("acc", "acc_norm", "acc_bytes")],
    )
    task(
        "local_cloze",
        "choices",
        output_type="loglikelihood",
        doc_to_text="{{question}} ",
        doc_to_target="{{choices.text[0]}}",
        metric_list=[{"metric": "acc", **mean}],
    )
    task(
        "local_texts",
        "texts",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    )
    return files


NAMES = ["local_problems", "local_problems_shots", "local_choices", "local_cloze", "local_texts"]


def load(directory, **mesh):
    sizes = {"order": 1, "data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | mesh
    raw = {
        "model": {"base": str(directory), "compute_dtype": "float32"},
        "mesh": sizes,
        "evaluation": {"batch": 8},
    }
    return evaluate.load_model(make_config(raw))


def harness_results(directory, folder):
    """Results of the harness with its own model."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=8)
    return evaluator.simple_evaluate(
        model, tasks=adapter._load_tasks(NAMES, folder), bootstrap_iters=0
    )


@pytest.fixture(scope="module", params=["quickstart", "stories260K"])
def case(request, tmp_path_factory):
    """Directory of a model, folder of tasks, their files, and results of the harness's model."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "quickstart":
        directory, rows = QUICKSTART, quickstart_rows()
    else:
        shared = request.getfixturevalue("shared_data")
        directory = shared / "models" / "stories260K"
        lines = (shared / "gsm8k" / "test.jsonl").read_text().splitlines()
        # The model has 512 positions: one shot and 40 new tokens have to fit.
        rows = sorted(
            map(json.loads, lines), key=lambda row: len(row["question"]) + len(row["answer"])
        )[:40]
    files = write_tasks(folder, rows[2:], rows[:2])
    return directory, folder, files, harness_results(directory, folder)


def samples(results, name):
    """Return the responses of a task by item: texts, or log-probabilities and greediness."""
    rows = sorted(results["samples"][name], key=lambda row: row["doc_id"])
    # There is a row per filter, all with the same responses.
    unique = {row["doc_id"]: row["resps"] for row in rows}
    return [unique[number] for number in sorted(unique)]


def as_sum(metric, value):
    """Return the logarithm of a perplexity, of up to 1e36 here: exp would magnify every error."""
    return math.log(value) if "perplexity" in metric else value


def assert_same(ours, expected):
    for name in NAMES[:2]:
        assert samples(ours, name) == samples(expected, name)
    for name in NAMES[2:4]:
        first, second = (np.array(samples(x, name), object) for x in (ours, expected))
        assert first.shape == second.shape
        logprobs = first[..., 0].astype(float), second[..., 0].astype(float)
        np.testing.assert_allclose(*logprobs, atol=1e-4)
        np.testing.assert_array_equal(first[..., 1].astype(str), second[..., 1].astype(str))
    logprobs = (np.array(samples(x, "local_texts"), float) for x in (ours, expected))
    np.testing.assert_allclose(*logprobs, rtol=1e-5, atol=1e-4)
    for name in NAMES:
        for metric, value in expected["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                actual = as_sum(metric, ours["results"][name][metric])
                assert actual == pytest.approx(as_sum(metric, value), rel=1e-6), (name, metric)


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_the_harness_sees_the_same_model(case, mesh):
    directory, folder, _, expected = case
    results, table = adapter.run(load(directory, **mesh), NAMES, include=folder)
    assert_same(results, expected)
    assert all(name in table for name in NAMES)
    # A model that always gives one answer would prove little.
    assert len({str(row) for row in samples(results, "local_problems")}) > 5


@needs_harness
@pytest.mark.slow
def test_our_own_tasks_give_the_same_numbers(case):
    directory, _, files, expected = case
    model = load(directory)

    def run(**settings):
        return harness.run(make_task(name="own", **settings), model, Data(), seed=0)

    for name, shots in (("local_problems", 0), ("local_problems_shots", 1)):
        asked = {
            "data": files["items"],
            "prompt": PROMPT,
            "response": RESPONSE,
            "stop": STOP,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        few = {"shots": shots, "shots_from": files["shots"]} if shots else {}
        summary, items, _ = run(kind="gsm8k", **asked, **few)
        assert [[[item["answer"]]] for item in items] == samples(expected, name)
        for ours, correct, key in (
            ("accuracy", "correct", "strict-match"),
            ("flexible", "correct_flexible", "flexible-extract"),
        ):
            assert summary[ours] == expected["results"][name][f"exact_match,{key}"]
            scored = {
                row["doc_id"]: row["exact_match"]
                for row in expected["samples"][name]
                if row["filter"] == key
            }
            assert {item["id"]: float(item[correct]) for item in items} == scored

    columns = {
        "prompt": PROMPT,
        "choices": "{{choices.text}}",
        "answer": "{{choices.label.index(answerKey)}}",
    }
    summary, items, _ = run(kind="multiple_choice", data=files["choices"], **columns)
    logprobs = np.array(samples(expected, "local_choices"), object)[..., 0].reshape(len(items), 4)
    np.testing.assert_allclose([item["logps"] for item in items], logprobs.astype(float), atol=1e-4)
    result = expected["results"]["local_choices"]
    for ours, name in (("accuracy", "acc"), ("acc_norm", "acc_norm"), ("acc_bytes", "acc_bytes")):
        assert summary[ours] == pytest.approx(result[f"{name},none"], abs=1e-12)

    summary, items, _ = run(kind="perplexity", data=files["texts"])
    logprobs = np.array(samples(expected, "local_texts"), float).reshape(-1)
    np.testing.assert_allclose([item["logp"] for item in items], logprobs, rtol=1e-5, atol=1e-4)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        value = expected["results"]["local_texts"][f"{name},none"]
        assert as_sum(name, summary[name]) == pytest.approx(as_sum(name, value), rel=1e-6)


@needs_harness
@pytest.mark.slow
def test_tasks_that_the_harness_cannot_run_are_refused(tmp_path):
    model = load(QUICKSTART)
    with pytest.raises(UserError, match="--harness nothing_of_that_name cannot be loaded"):
        adapter.run(model, ["nothing_of_that_name"])
    # Its data are on the hub.
    with pytest.raises(UserError, match="--harness arc_easy cannot be loaded"):
        adapter.run(model, ["arc_easy"])
    with pytest.raises(UserError, match="no such directory"):
        adapter.run(model, ["local"], include=tmp_path / "absent")
    with pytest.raises(UserError, match="--chat needs a chat template"):
        adapter.run(model, ["local"], chat=True)
    write_tasks(tmp_path, quickstart_rows()[:3], quickstart_rows()[:1])
    raw = yaml.safe_load((tmp_path / "local_problems.yaml").read_text())
    raw["generation_kwargs"]["max_gen_toks"] = 256
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(raw | {"task": "long"}))
    with pytest.raises(UserError, match="task long asks for 256 new tokens, the model holds 256"):
        adapter.run(model, ["long"], include=tmp_path)
    # the template of a model that was trained on one question and one answer takes no shots
    model.tokenizer.chat_template = to_jinja("gsm8k", model.tokenizer)
    with pytest.raises(UserError, match="--chat: the chat template refuses the roles user, assist"):
        adapter.run(model, ["local_problems"], include=tmp_path, chat=True, shots=1)
    raw["generation_kwargs"] = {"until": [], "repetition_penalty": 1.2, "max_gen_toks": 8}
    (tmp_path / "penalty.yaml").write_text(yaml.safe_dump(raw | {"task": "penalty"}))
    with pytest.raises(
        UserError, match=r"generation_kwargs.repetition_penalty, which is not offered"
    ):
        adapter.run(model, ["penalty"], include=tmp_path)


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax_ordermerge\[eval\]'"):
        adapter.check()


def test_requests_are_named_by_item():
    class Request:
        def __init__(self, task_name, doc_id):
            self.task_name, self.doc_id = task_name, doc_id

    assert adapter._request_names(
        [Request("a", 0), Request("a", 1), Request("a", 0), Request("b", 0)]
    ) == [
        "a/0/0",
        "a/1/0",
        "a/0/1",
        "b/0/0",
    ]
