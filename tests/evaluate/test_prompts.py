"""Templates, shots and what is refused of them, over files on disk."""

import json

import pytest

from jax_ordermerge.config import Data, make_task
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import prompts

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
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


def written(tokens):
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


def ask(task, data, tokenizer, seed=0):
    found = prompts.examples(task, data, tokenizer, seed=seed)
    return [written(found.prompt(row).tolist()) for row in range(len(found))], found


def test_shots_in_the_template_of_the_training_data(files, tokenizer):
    texts, found = ask(make_task(name="t", kind="gsm8k", shots=2), Data(**files), tokenizer)
    shown = "Question: q0?\nAnswer: w0\n#### 0\n\nQuestion: q1?\nAnswer: w1\n#### 1\n\n"
    assert texts == [f"<s>{shown}Question: t{n}?\nAnswer:" for n in range(4)]
    assert found.responses == [f"v{n}\n#### {n}" for n in range(4)]
    assert found.prompts == [f"Question: t{n}?\nAnswer:" for n in range(4)]
    assert found.ids.tolist() == [0, 1, 2, 3]


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
    texts, found = ask(task, Data(), tokenizer)
    assert texts == ["<s>Solve.\nT0?= v0|Q0?="]
    assert found.responses == ["w0"]
    assert ask(task.model_copy(update={"reference": "{{answer}} "}), Data(), tokenizer)[
        1
    ].responses == ["w0\n#### 0"]


def test_shots_as_turns_of_a_chat(files, tokenizer):
    task = make_task(name="t", kind="gsm8k", shots=1, limit=1, description="Be brief.")
    texts, _ = ask(task, Data(**files, template="chat"), tokenizer)
    assert texts == ["[system]Be brief.[user]q0?[assistant]w0\n#### 0</s>[user]t0?[assistant]"]


def test_drawn_shots_depend_on_seed_and_item_alone(files, tokenizer):
    def drawn(seed, limit=None):
        task = make_task(name="t", kind="gsm8k", shots=3, shots_order="random", limit=limit)
        return ask(task, Data(**files), tokenizer, seed)[0]

    assert drawn(0) == drawn(0)
    assert drawn(0, limit=2) == drawn(0)[:2]
    assert drawn(0) != drawn(1)
    assert len({text.split("Question: t")[0] for text in drawn(0)}) > 1


def test_an_item_is_never_its_own_shot(files, tokenizer):
    task = make_task(name="t", kind="gsm8k", data=files["train"], shots=2)
    texts, _ = ask(task, Data(**files), tokenizer)
    assert [text.count("Question: q0?") for text in texts] == [1] * 6
    assert "Question: q2?" in texts[0]  # in place of itself


@pytest.mark.parametrize("order", ["first", "random"])
def test_too_few_shots(files, tokenizer, order):
    with pytest.raises(UserError, match="too few shots are left for item 0"):
        ask(
            make_task(name="t", kind="gsm8k", data=files["train"], shots=6, shots_order=order),
            Data(**files),
            tokenizer,
        )
    with pytest.raises(UserError, match="has 6 rows, fewer than shots = 7"):
        ask(make_task(name="t", kind="gsm8k", shots=7, shots_order=order), Data(**files), tokenizer)


def test_one_beginning_of_sequence(tokenizer):
    assert written(prompts.encode(tokenizer, "ab")) == "<s>ab"
    assert written(prompts.encode(tokenizer, "<s>ab")) == "<s>ab"


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
    one = prompts.questions(task, Data(), tokenizer, seed=0)[0]
    assert one.asked == "q0?->w0\n#### 0\n\nt0?"
    assert one.reference == "v0\n#### 0"


@pytest.mark.parametrize(
    ("settings", "said"),
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
def test_templates_that_do_not_fit(files, tokenizer, settings, said):
    with pytest.raises(UserError, match=said):
        prompts.questions(
            make_task(name="t", kind="multiple_choice", data=files["test"], **settings),
            Data(),
            tokenizer,
            seed=0,
        )


@pytest.mark.parametrize(
    ("settings", "said"),
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
def test_tasks_that_cannot_be_meant(settings, said):
    with pytest.raises(ValueError, match=said):
        make_task(name="t", **settings)


def test_instructions(tokenizer):
    data = Data(template="chat")
    tokens = prompts.instruction_tokens({"instruction": "Greet.", "input": "Ann"}, data, tokenizer)
    assert "Greet." in written(tokens)
    assert written(tokens).endswith("[assistant]")
    assert written(
        prompts.instruction_tokens({"instruction": "Greet."}, Data(), tokenizer)
    ).endswith("### Response:")
    with pytest.raises(UserError, match="needs the column instruction, its columns are text"):
        prompts.instruction_tokens({"text": "x"}, data, tokenizer)
