"""Responses end where they were trained to: in the run, in what it exports, in transformers.

The base is like Qwen2.5: its end of sequence is `<|endoftext|>`, and the template of the instruct
models ends turns with `<|im_end|>`.
"""

import json
import pathlib

import pytest
import yaml

from jax_ordermerge.config import load_config
from jax_ordermerge.data.tokenizers import load_tokenizer
from jax_ordermerge.experiment import pipeline
from tests.commands.test_cli import call
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


def recipe(path, models, base=None):
    method = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    listed = {"models": [{"model": str(model)} for model in models], "dtype": "float32"}
    path.write_text(yaml.safe_dump(method | listed | ({"base_model": str(base)} if base else {})))
    return path


def export_all(run, folder):
    """Export the members of a run in every way, and return the directories by name."""
    base, out = run.parent / "base", folder / "out"
    members = [run / "member_0", run / "member_1"]
    commands = {
        "member": ["convert", run, out / "member", "--member", 0],
        "orbax": ["convert", run, folder / "orbax", "--member", 0, "--to", "orbax"],
        "from orbax": ["convert", folder / "orbax", out / "from orbax"],
        "merge": ["merge", *members, "--method", "average", "--out", out / "merge"],
        "recipe": ["merge", recipe(folder / "a.yml", members), out / "recipe"],
        "recipe with base": ["merge", recipe(folder / "b.yml", members, base), out / "with base"],
        "recipe of exports": [
            "merge",
            recipe(folder / "c.yml", [out / "member", out / "merge"], base),
            out / "of exports",
        ],
    }
    for name, command in commands.items():
        assert call(*command) == 0, name
    return {path.name: path for path in out.iterdir()} | {"run": run / "merged" / "average"}


def test_exports_name_the_end_of_the_turn_and_that_of_the_base(run, tmp_path):
    exports = export_all(run, tmp_path)
    assert len(exports) == 7
    for name, directory in exports.items():
        for file in ("config.json", "generation_config.json"):
            assert read(directory / file)["eos_token_id"] == [END, EOS], name
        assert (directory / "chat_template.jinja").read_text() == CHATML
        # a merge of directories knows nothing of their training
        card = (directory / "README.md").read_text()
        assert ("## Prompt" in card) == (name not in ("from orbax", "of exports")), name


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Adapters of the same base, trained on its prompts without its chat template."""
    folder = tmp_path_factory.mktemp("plain")
    make_base(folder / "base")
    config = tiny.make_config(
        folder,
        training={"epochs": 1},
        lora={"rank": 2, "alpha": 4, "targets": ["q", "v"]},
        evaluation={"tasks": []},
        merge={"methods": [{"method": "average"}]},
    )
    messages = []
    return pipeline.run(load_config(config), through="merge", log=messages.append), messages


def test_exports_carry_the_template_that_was_trained(plain_run, tmp_path):
    run, messages = plain_run
    note = "The chat template is that of the training (template plain), in place of the one of the"
    assert any(note in message for message in messages)
    exports = export_all(run, tmp_path)
    assert call("convert", run, tmp_path / "adapter", "--member", 1, "--to", "peft") == 0
    adapted = f"{run.parent / 'base'}+{tmp_path / 'adapter'}"
    merge = ["merge", adapted, run / "member_0", "--method", "average", "--dtype", "float32"]
    assert call(*merge, "--out", tmp_path / "merged") == 0
    exports |= {"adapter": tmp_path / "adapter", "merge of adapters": tmp_path / "merged"}
    for name, directory in exports.items():
        assert read(directory / "generation_config.json")["eos_token_id"] == EOS, name
        # As in mergekit, the tokenizer of a base goes before those of directories; a note says so.
        if name != "of exports":
            tokenizer = load_tokenizer(directory)
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": "a plus h is ?"}],
                add_generation_prompt=True,
                tokenize=False,
            )
            assert asked == "a plus h is ?", name
    # an adapter is no model of its own
    assert not (tmp_path / "adapter" / "config.json").exists()


def test_transformers_stops_there_too(run):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import transformers

    directory = run / "merged" / "average"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = load_tokenizer(directory).apply_chat_template(
        [{"role": "user", "content": "a plus h is ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

    def answer(**options):
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)[0]
        return new[inputs["input_ids"].shape[1] :].tolist()

    assert answer().index(END) == len(answer()) - 1 == 3
    # the control: with the end of the base alone nothing stops it
    assert len(answer(eos_token_id=EOS)) == 8


def run_card(directory, capsys):
    """Run the Python of a model card, and return what it prints."""
    card = (directory / "README.md").read_text()
    prompt = card.split("```text\n")[1].split("\n```")[0]
    code = card.split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code.replace('"MODEL"', repr(str(directory))), {})
    return prompt, capsys.readouterr().out.rstrip("\n")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_the_card_asks_as_the_training_did(run, plain_run, tmp_path, capsys):
    pytest.importorskip("torch", reason="needs the extra parity")
    prompt, text = run_card(run / "merged" / "average", capsys)
    assert prompt == (
        "<|im_start|>user\nHow many legs do three horses have?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.split()[-1] == "."  # the question is of unknown words, but its answer ends
    prompt, _ = run_card(plain_run[0] / "merged" / "average", capsys)
    assert prompt == "How many legs do three horses have?"
    pytest.importorskip("peft", reason="needs the extra parity")
    assert call("convert", plain_run[0], tmp_path / "out", "--member", 1, "--to", "peft") == 0
    prompt, _ = run_card(tmp_path / "out", capsys)
    assert prompt == "How many legs do three horses have?"


def ask(capsys, model, *options, prompt="a plus h is ?"):
    """Return the answer, the messages and the exit code of `ordermerge generate`."""
    capsys.readouterr()
    code = call("generate", model, "--prompt", prompt, "--max-new-tokens", 8, *options)
    output = capsys.readouterr()
    return output.out.rstrip("\n"), output.err, code


def test_generate_asks_members_and_merges_as_the_evaluation_did(run, capsys):
    for name, model in (("member_1", run / "member_1"), ("average", run / "merged" / "average")):
        (items,) = read(run / "evaluations" / f"{name}.json")["tasks"].values()
        for item in items[:2]:
            answer, messages, code = ask(capsys, model, prompt=item["prompt"])
            assert (answer, code) == (item["answer"], 0)
            assert "user messages in the chat template" in messages
    # as text the prompt goes on
    raw, messages, code = ask(capsys, run / "member_1", "--raw")
    assert (messages, code) == ("", 0)
    assert raw != ask(capsys, run / "member_1")[0]


def test_generate_knows_the_template_that_was_trained(plain_run, capsys):
    """The base has a chat template of its own, and was trained on plain prompts."""
    run, _ = plain_run
    for model in (run / "member_0", run / "merged" / "average"):
        answer, messages, _ = ask(capsys, model)
        assert "user messages in the chat template" in messages
        assert answer == ask(capsys, model, "--raw")[0]
        for options, error in (
            (["--system", "a b"], "refuses the roles system, user: This model was trained on one"),
            (["--variable", "tone=mild"], "--variable tone: the chat template of the model does"),
            (["--variable", "tone"], "--variable tone: expected KEY=VALUE"),
            (["--raw", "--system", "a"], "--system goes with a chat template; --raw leaves it out"),
        ):
            _, messages, code = ask(capsys, model, *options)
            assert code == 2
            assert error in messages
    _, messages, code = ask(capsys, run)
    assert code == 2
    assert f"{run} is a run; name one of its members, as in {run}/member_0, or" in messages


def test_a_system_message_is_in_the_prompt(run, capsys):
    plain, _, _ = ask(capsys, run / "member_0")
    system, _, code = ask(capsys, run / "member_0", "--system", "h h h h h h ?")
    assert code == 0
    chatml = (
        "<|im_start|>system\nh h h h h h ?<|im_end|>\n<|im_start|>user\na plus h is ?<|im_end|>\n"
    )
    whole = chatml + "<|im_start|>assistant\n"
    assert system == ask(capsys, run / "member_0", "--raw", prompt=whole)[0]
    assert (
        plain == ask(capsys, run / "member_0", "--raw", prompt=whole[whole.index("user") - 12 :])[0]
    )
