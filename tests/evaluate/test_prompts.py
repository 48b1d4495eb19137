"""Templates and shots over files on disk, and their errors."""

import json

import pytest

from jax_ordermerge.config import Data, make_config, make_task
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import encode
from jax_ordermerge.evaluate.inputs import TaskInputs

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers
    import transformers

    letters = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<s>": 0, "</s>": 1} | {chr(n): n for n in range(2, 256)}, [])
    )
    letters.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


def decode(tokens):
    return "".join(
        "<s>" if token == 0 else "</s>" if token == 1 else chr(token) for token in tokens
    )


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    train = write(
        "train.jsonl", [{"question": f"q{n}?", "answer": f"w{n}\n#### {n}"} for n in range(6)]
    )
    return {
        "train": train,
        "test": write(
            "test.jsonl", [{"question": f"t{n}?", "answer": f"v{n}\n#### {n}"} for n in range(4)]
        ),
    }


def make_prompts(task, data, tokenizer, seed=0):
    prompts = TaskInputs(data, tokenizer, seed=seed).prompts(task, task.formatter)
    return [decode(prompt.tokens) for prompt in prompts], prompts


def references(prompts):
    return [prompt.reference for prompt in prompts]


def test_shots_in_the_template_of_the_training_data(files, tokenizer):
    texts, prompts = make_prompts(
        make_task(name="t", kind="gsm8k", shots=2), Data(**files), tokenizer
    )
    shots = "Question: q0?\nAnswer: w0\n#### 0\n\nQuestion: q1?\nAnswer: w1\n#### 1\n\n"
    assert texts == [f"<s>{shots}Question: t{n}?\nAnswer:" for n in range(4)]
    assert references(prompts) == [f"v{n}\n#### {n}" for n in range(4)]
    assert [prompt.prompt for prompt in prompts] == [f"Question: t{n}?\nAnswer:" for n in range(4)]
    assert [prompt.id for prompt in prompts] == [0, 1, 2, 3]


def test_test_data_of_several_sources(files, tokenizer, tmp_path):
    named = [{"problem": f"p{n}?", "answer": f"u{n}\n#### {n}"} for n in range(3)]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    (tmp_path / "d/a.tsv").write_text("problem\tanswer\na?\tu #### 9\n")
    test = [
        {"path": files["test"], "limit": 2},
        {"path": f"{tmp_path}/d", "columns": {"question": "problem"}, "template": "alpaca"},
    ]
    data = make_config({"data": {"train": files["train"], "test": test}}).data
    task = make_task(name="t", kind="gsm8k", shots=1)
    texts, prompts = make_prompts(task, data, tokenizer)
    assert [prompt.id for prompt in prompts] == list(range(6))
    assert [text[-20:] for text in texts[:2]] == [f"uestion: t{n}?\nAnswer:"[-20:] for n in (0, 1)]
    asked = [text.split("### Instruction:\n")[-1].split("?")[0] for text in texts[2:]]
    assert asked == ["a", "p0", "p1", "p2"]
    # the same items without shots, by the tokenized examples
    texts, plain = make_prompts(make_task(name="t", kind="gsm8k"), data, tokenizer)
    assert references(plain) == references(prompts)
    assert [prompt.id for prompt in plain] == [0, 1, 2, 3, 4, 5]
    for limit in (1, 2, 4):
        limited = task.model_copy(update={"limit": limit})
        assert references(make_prompts(limited, data, tokenizer)[1]) == references(plain)[:limit]
    several = data.model_copy(update={"train": (files["train"], f"{tmp_path}/d")})
    with pytest.raises(UserError, match=r"task t: data.train has 2 sources; give shots_from"):
        make_prompts(task, several, tokenizer)
    given = task.model_copy(update={"shots_from": files["train"], "data": f"{tmp_path}/d/*.jsonl"})
    renamed = several.model_copy(update={"columns": {"question": "problem"}})
    assert len(make_prompts(given, renamed, tokenizer)[1]) == 3


def test_texts_ask_nothing(files, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time.")
    task = make_task(name="t", kind="gsm8k")
    for test in (f"{tmp_path}/a.txt", [files["test"], f"{tmp_path}/a.txt"]):
        data = make_config({"data": {"train": files["train"], "test": test}}).data
        with pytest.raises(UserError, match=r"task t: its data have texts .*, which ask nothing"):
            make_prompts(task, data, tokenizer)
    limited = task.model_copy(update={"limit": 4})
    assert len(make_prompts(limited, data, tokenizer)[1]) == 4


def test_templates_of_the_task(files, tokenizer):
    task = make_task(
        name="t",
        kind="gsm8k",
        data=files["train"],
        limit=1,
        shots=1,
        shots_from=files["test"],
        shots_between="|",
        description="Solve.\n",
        prompt="{{question|upper}}=",
        response=" {{answer.split('####')[0].strip()}}",
    )
    texts, prompts = make_prompts(task, Data(), tokenizer)
    assert texts == ["<s>Solve.\nT0?= v0|Q0?="]
    assert references(prompts) == ["w0"]
    task = task.model_copy(update={"reference": "{{answer}} "})
    assert references(make_prompts(task, Data(), tokenizer)[1]) == ["w0\n#### 0"]


def test_shots_as_turns_of_a_chat(files, tokenizer):
    task = make_task(name="t", kind="gsm8k", shots=1, limit=1, description="Be brief.")
    texts, _ = make_prompts(task, Data(**files, template="chat"), tokenizer)
    assert texts == ["[system]Be brief.[user]q0?[assistant]w0\n#### 0</s>[user]t0?[assistant]"]


def test_drawn_shots_depend_on_seed_and_item_alone(files, tokenizer):
    def drawn(seed, limit=None):
        task = make_task(name="t", kind="gsm8k", shots=3, shots_order="random", limit=limit)
        return make_prompts(task, Data(**files), tokenizer, seed)[0]

    assert drawn(0) == drawn(0)
    assert drawn(0, limit=2) == drawn(0)[:2]
    assert drawn(0) != drawn(1)
    assert len({text.split("Question: t")[0] for text in drawn(0)}) > 1


def test_an_item_is_never_its_own_shot(files, tokenizer):
    task = make_task(name="t", kind="gsm8k", data=files["train"], shots=2)
    texts, _ = make_prompts(task, Data(**files), tokenizer)
    assert [text.count("Question: q0?") for text in texts] == [1] * 6
    assert "Question: q2?" in texts[0]  # in place of itself


@pytest.mark.parametrize("order", ["first", "random"])
def test_too_few_shots(files, tokenizer, order):
    with pytest.raises(UserError, match="too few shots are left for item 0"):
        make_prompts(
            make_task(name="t", kind="gsm8k", data=files["train"], shots=6, shots_order=order),
            Data(**files),
            tokenizer,
        )
    task = make_task(name="t", kind="gsm8k", shots=7, shots_order=order)
    with pytest.raises(UserError, match="has 6 rows, fewer than shots = 7"):
        make_prompts(task, Data(**files), tokenizer)


def test_one_beginning_of_sequence(tokenizer):
    assert decode(encode(tokenizer, "ab")) == "<s>ab"
    assert decode(encode(tokenizer, "<s>ab")) == "<s>ab"


def test_choices_after_shots(files, tokenizer):
    task = make_task(
        name="t",
        kind="multiple_choice",
        data=files["test"],
        shots=1,
        shots_from=files["train"],
        limit=1,
        prompt="{{question}}",
        choices="{{[question, answer]}}",
        answer="{{1}}",
        delimiter="->",
    )
    (question,) = TaskInputs(Data(), tokenizer).questions(task, task.formatter)
    assert question.context == "q0?->w0\n#### 0\n\nt0?"
    assert question.reference == "v0\n#### 0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": "{{option}}"}, "'option' is undefined"),
        ({"choices": "{{question}}"}, "expected a list of at least two choices"),
        (
            {"choices": "{{[1, 2]}}", "answer": "{{2}}"},
            "expected one of the choices or its number from 0",
        ),
        (
            {"choices": "{{[1, 2]}}", "answer": "{{question}}"},
            "expected one of the choices or its number from 0",
        ),
        ({"choices": "{{[1, 2]}}", "answer": "{{1}}", "prompt": "{{ question"}, "template"),
        (
            {
                "choices": "{{[1, 2]}}",
                "answer": "{{1}}",
                "prompt": "{{ question.__class__.__mro__ }}",
            },
            "unsafe",
        ),
    ],
)
def test_templates_that_do_not_fit(files, tokenizer, settings, message):
    task = make_task(name="t", kind="multiple_choice", data=files["test"], **settings)
    with pytest.raises(UserError, match=message):
        TaskInputs(Data(), tokenizer).questions(task, task.formatter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "multiple_choice"}, "needs its file or hub dataset"),
        (
            {"kind": "perplexity", "data": "x", "shots": 2},
            "unknown key task.shots .kind perplexity has: name, data, limit, text",
        ),
        (
            {"kind": "gsm8k", "choices": "{{x}}"},
            "unknown key task.choices .kind gsm8k has: name, data, limit, ",
        ),
        ({"kind": "gsm8k", "shots_from": "x"}, "shots_from needs shots above 0"),
        ({"kind": "gsm8k", "prompt": "{{x}}"}, "prompt and response go together"),
        (
            {"kind": "multiple_choice", "data": "x", "stop": ["a"]},
            "unknown key task.stop .kind multiple_choice has",
        ),
        ({"kind": "number", "reference": "{{x}}"}, "reference goes with a task that has a prompt"),
        ({"kind": "math", "samples": 3}, "unknown key task.samples .kind math has"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(name="t", **settings)


def test_instructions(tokenizer):
    data = Data(template="chat")
    inputs = TaskInputs(data, tokenizer)
    tokens = inputs.instruction_tokens({"instruction": "Greet.", "input": "Ann"})
    assert "Greet." in decode(tokens)
    assert decode(tokens).endswith("[assistant]")
    default = TaskInputs(Data(), tokenizer).instruction_tokens({"instruction": "Greet."})
    assert decode(default).endswith("### Response:")
    with pytest.raises(UserError, match="needs the column instruction, its columns are text"):
        inputs.instruction_tokens({"text": "x"})
