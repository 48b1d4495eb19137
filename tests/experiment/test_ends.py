"""Responses end where they were trained to: in the run, in what it exports, in transformers.

The base is like Qwen2.5: its end of sequence is `<|endoftext|>`, and the template of the instruct
models ends turns with `<|im_end|>`.
"""

import json
import pathlib

import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.experiment import pipeline
from tests.experiment import tiny

SPECIAL = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
WORDS = [*SPECIAL, "user", "assistant", "system", *"abcdefgh", "plus", "is", "?", "."]
EOS, END = WORDS.index("<|endoftext|>"), WORDS.index("<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(directory: pathlib.Path, chat_template: str = CHATML) -> pathlib.Path:
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([tokenizers.AddedToken(word, special=True) for word in SPECIAL])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
    ids = {"bos_token_id": None, "eos_token_ids": (EOS,), "pad_token_id": 0}
    return tiny.make_base(directory, tokenizer=fast, vocab_size=len(WORDS), **ids)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    make_base(folder / "base")
    training = {"epochs": 8, "learning_rate": 3e-2, "checkpoint_every": 100}
    task = {"name": "swap", "max_new_tokens": 8}
    tiny.make_config(
        folder,
        data={"template": "chat"},
        training=training,
        evaluation={"batch": 32, "tasks": [task]},
        merge={"methods": [{"method": "average"}]},
        samples={"every": 1000, "max_new_tokens": 8},
    )
    return folder


@pytest.fixture(scope="module")
def run(chat_folder):
    return pipeline.run(load_config(chat_folder / "tiny.yaml"), through="evaluate", log=print)


def read(path):
    return json.loads(path.read_text())


def test_answers_stop_at_the_end_of_the_turn(run):
    assert read(run / "data.json")["train"]["ends"] == [END]
    for name in ("member_0", "member_1", "average"):
        (items,) = read(run / "evaluations" / f"{name}.json")["tasks"].values()
        # three words each: the mark of the end is not written, and nothing after it
        assert {len(item["answer"].split()) for item in items} == {3}, name
        assert {item["answer"].split()[-1] for item in items} == {"."}


@pytest.mark.parametrize("name", ["average"])
def test_exports_name_the_end_of_the_turn_and_that_of_the_base(run, name):
    for file in ("config.json", "generation_config.json"):
        assert read(run / "merged" / name / file)["eos_token_id"] == [END, EOS]


def test_transformers_stops_there_too(run):
    torch = pytest.importorskip("torch")
    import transformers

    directory = run / "merged" / "average"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a plus h is ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    answer = new[inputs["input_ids"].shape[1] :].tolist()
    assert answer.index(END) == len(answer) - 1 == 3
