"""Generated data: always the same, splits disjoint, answers right, each word one token."""

import collections
import hashlib
import importlib.resources
import json
import pathlib
import re
import runpy

import numpy as np
import pytest

from jax_ordermerge.data.synthetic import (
    DATASETS,
    GAINS,
    LARGEST,
    LOSSES,
    NAMES,
    PROBLEMS,
    THINGS,
    Draws,
    generated,
)
from jax_ordermerge.errors import UserError

ASSETS = importlib.resources.files("jax_ordermerge") / "assets" / "quickstart"


@pytest.fixture(scope="module")
def train():
    return generated("quickstart", "train")


@pytest.fixture(scope="module")
def test():
    return generated("quickstart", "test")


@pytest.fixture(scope="module")
def texts():
    return generated("quickstart_pretrain", "test")


def digest(records):
    return hashlib.blake2b(json.dumps(records).encode(), digest_size=8).hexdigest()


def test_the_same_on_every_machine(train, test, texts):
    assert (digest(train), digest(test), digest(texts)) == (
        "e2cea976f0498b02",
        "fd0545485ea69418",
        "22450024bbba7a9c",
    )


def test_sizes_and_no_repetition(train, test, texts):
    sizes = DATASETS["quickstart"].sizes
    assert (len(train), len(test)) == (sizes["train"], sizes["test"])
    for records in (train, test, texts):
        assert len({json.dumps(record) for record in records}) == len(records)


def test_splits_share_neither_question_nor_solution(train, test):
    for key in ("question", "answer"):
        assert not {record[key] for record in train} & {record[key] for record in test}


def test_pretraining_never_shows_the_task(texts):
    # Neither the form of a problem nor the marker of an answer: the base lacks the task, not the
    # skills.
    for record in texts:
        assert not re.search(r"####|How many|Question|Answer", record["text"])


def test_stories_hold_no_question_and_nothing_of_the_test_split(test):
    stories = [record["text"] for record in generated("quickstart_told", "train")]
    solutions = {text.split(" Sums: ")[1] for text in stories}
    assert not solutions & {record["answer"].split(" ####")[0] for record in test}
    assert not [text for text in stories if re.search(r"####|How many|Question|Answer", text)]


def solve(question):
    """Answer a problem from its words alone, by rules that know nothing of the generator's."""
    asked = re.search(r"How many \w+ (?:does (\w+)|do (\w+) and (\w+)) have\?", question)
    story = question[: asked.start()]
    amounts = {
        name: int(n)
        for name, n in re.findall(r"(\w+) has (\d+) (?!more than|fewer than)\w+\.", story)
    }
    for name, n, word, than in re.findall(r"(\w+) has (\d+) (more|fewer) than (\w+)\.", story):
        amounts[name] = amounts[than] + (int(n) if word == "more" else -int(n))
    if asked[2]:
        return amounts[asked[2]] + amounts[asked[3]]
    changes = re.findall(rf"({'|'.join(GAINS + LOSSES)}) (\d+)", story)
    assert len(changes) == 2
    return amounts[asked[1]] + sum(int(n) if verb in GAINS else -int(n) for verb, n in changes)


def test_answers_are_right_and_steps_add_up(train, test):
    for record in train + test:
        steps, final = record["answer"].split(". #### ")
        for left, right in (step.split(" = ") for step in steps.split(", ")):
            a, sign, b = left.split()
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(right)
        assert solve(record["question"]) == int(final) == int(steps.split()[-1])
        assert all(0 <= int(n) <= LARGEST for n in re.findall(r"\d+", record["answer"]))


def test_preferences_are_for_the_right_answer_and_the_wrong_one_is_near(test):
    train, held_out = (generated("quickstart_preferences", split) for split in ("train", "test"))
    assert (len(train), len(held_out)) == (2048, 400)
    assert digest(train) == "4c5b6e55db0bf993"
    for record in train + held_out:
        right, wrong = (re.findall(r"\d+", record[key]) for key in ("chosen", "rejected"))
        assert solve(record["prompt"]) == int(right[-1])
        assert right[:-2] == wrong[:-2]
        assert right[-2:] == [right[-1]] * 2
        assert wrong[-2:] == [wrong[-1]] * 2
        assert 1 <= abs(int(right[-1]) - int(wrong[-1])) <= 3
        assert 1 <= int(wrong[-1]) <= LARGEST
    assert not {record["chosen"] for record in train} & {record["chosen"] for record in held_out}
    assert not {record["chosen"] for record in train} & {record["answer"] for record in test}


def test_every_kind_is_as_frequent_as_the_others(train):
    kinds = collections.Counter(
        (" than " in r["question"], r["question"].count(" has ")) for r in train
    )
    assert len(kinds) == len(PROBLEMS)
    assert min(kinds.values()) > 0.8 * len(train) / len(PROBLEMS)


def test_no_answer_is_worth_guessing(train):
    answers = collections.Counter(record["answer"].split()[-1] for record in train)
    assert answers.most_common(1)[0][1] < 0.05 * len(train)


def test_draws_are_uniform_and_named():
    draws = Draws(0, "uniform")
    counts = np.bincount([draws.below(7) for _ in range(7000)], minlength=7)
    assert (
        (counts - 1000) ** 2 / 1000
    ).sum() < 22.5  # chi-squared, 6 degrees of freedom, p = 0.001
    assert sorted(draws.sample(range(5), 5)) == [0, 1, 2, 3, 4]
    assert {draws.between(2, 4) for _ in range(100)} == {2, 3, 4}
    first = [Draws(0, "a").below(2**30), Draws(0, "b").below(2**30), Draws(1, "a").below(2**30)]
    assert len(set(first)) == 3
    assert first[0] == Draws(0, "a").below(2**30)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("quickstat", "train", "did you mean 'quickstart'"),
        ("quickstart", "tset", "did you mean 'test'"),
    ],
)
def test_unknown_names_are_told(name, split, message):
    with pytest.raises(UserError, match=message):
        generated(name, split)


# ------------------------------------------------------------------ the shipped base


@pytest.fixture(scope="module")
def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(str(ASSETS))


def test_every_word_is_one_token(tokenizer, train, test, texts):
    space = tokenizer.convert_tokens_to_ids("Ġ")
    # In the prompt templates an answer follows a space, so that its first number is one token.
    problems = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in train + test]
    for text in problems + [r["text"] for r in texts]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert space not in ids
        assert len(ids) == len(re.findall(r" ?\w+| ?#+|[^\w\s]| [^\w\s]|\n", text)), text
        assert tokenizer.decode(ids) == text


def test_any_text_comes_back(tokenizer):
    for text in (
        "Zürich, 数 and 1234567?!",
        " two  spaces\tand a tab\r\n",
        " ".join(NAMES + THINGS),
        "(a) [b] {c} .x ,y don't",
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.slow
def test_the_recipe_gives_the_shipped_tokenizer():
    recipe = (
        pathlib.Path(__file__).parents[2] / "examples" / "quickstart_base" / "make_tokenizer.py"
    )
    tokenizer = runpy.run_path(str(recipe))["make_tokenizer"]()
    assert json.loads(tokenizer.to_str()) == json.loads((ASSETS / "tokenizer.json").read_text())


def test_config_and_tokenizer_agree(tokenizer):
    config = json.loads((ASSETS / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    for name in ("bos", "eos", "pad"):
        assert config[f"{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")
    assert tokenizer("a").input_ids[0] == config["bos_token_id"]


def test_the_base_is_small(tokenizer):
    assert (ASSETS / "model.safetensors").stat().st_size <= 4_000_000
