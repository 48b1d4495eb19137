"""`ordermerge data`: what would be trained, read without a device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from transformers import PreTrainedTokenizerFast

from jax_ordermerge.commands import data as command
from jax_ordermerge.config import load_config
from jax_ordermerge.data.order import order_indices
from jax_ordermerge.data.preview import BRACKETS
from jax_ordermerge.errors import UserError
from tests import preloaded
from tests.data.conftest import byte_tokenizer, chatml  # noqa: F401  (fixtures)

ROOT = pathlib.Path(__file__).parents[2]
ROWS = [{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(30)]


@pytest.fixture
def base(tmp_path, byte_tokenizer, chatml):  # noqa: F811
    """A directory that holds a tokenizer and nothing else."""
    byte_tokenizer(chat_template=chatml).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(base, tmp_path):
    """config(**data): a config with these settings of the data."""

    def make(*overrides, **data):
        data = {"train": write(tmp_path / "a.jsonl", ROWS), "max_length": 60} | data
        raw = {"name": "small", "model": {"base": str(base)}, "data": data}
        raw["population"] = {"members": 3}
        raw["training"] = {"batch": 8, "epochs": 2}
        raw["output"] = str(tmp_path / "run")
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(raw))
        return load_config(path, overrides)

    return make


def describe(config, **selection):
    return command.describe(command.load(config), command.Selection(**selection), BRACKETS)


def test_counts_and_rows_of_each_source(config, tmp_path):
    talks = [
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
            "id": n,
        }
        for n in range(4)
    ]
    long = {"question": "q" * 60, "answer": "a"}
    empty = {"question": "q", "answer": ""}
    text = describe(
        config(
            train=[
                {"path": write(tmp_path / "b.jsonl", [*ROWS[:9], long, empty]), "name": "sums"},
                {"path": write(tmp_path / "c.jsonl", talks), "weight": 2},
            ],
            bad_rows="drop",
            validation_examples=2,
        ),
        rows=1,
    )
    lines = text.splitlines()
    assert lines[0] == f"small: base {tmp_path}/base, max_length 60"
    assert "  sums: " in text
    assert "11 rows read, 9 examples used, 1 dropped too long, 1 dropped bad rows" in text
    assert "bad rows: has no response (column 'answer' is empty): 1 row, the first 10" in text
    assert "format question_answer, template gsm8k" in text
    assert "4 rows read, 4 examples used, none dropped" in text
    assert "format messages, template chat, weight 2" in text
    assert "columns that nothing reads: id" in text
    assert "validation: 2 examples" in text
    shown = [line for line in lines if line.startswith("-- ")]
    assert len(shown) == 2
    assert f" of {tmp_path}/b.jsonl, " in shown[0]
    assert f" of {tmp_path}/c.jsonl, " in shown[1]
    assert "Question: " in text
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yo<|im_end|>]]" in text


def test_steps_are_those_of_the_training(config):
    # 28 of 30 rows in steps of 8
    assert "training: 3 members, each 2 epochs of 4 steps of 8 rows: 8 steps" in describe(
        config(validation_examples=2)
    )
    # nine examples of 28 tokens, two in a row of 60: five rows in steps of two
    packed = describe(config("training.batch=2", packing="packs", limit=9))
    assert "3 steps of 2 rows (packing packs): 6 steps" in packed


def test_what_a_member_sees_first(config):
    settings = config(validation_examples=2)
    train = command.load(settings).splits["train"]
    rows = order_indices(
        level="sample", examples=28, batch=8, seed=settings.seed, member=2, members=3, epoch=0
    )
    text = describe(settings, member=2, rows=2)
    for step in range(3):
        ids = " ".join(str(train.ids[row]) for row in rows[step])
        assert f"step {step + 1}: {train.lengths[rows[step]].sum()} tokens, ids {ids}\n" in text
    first, second = (train.ids[row] for row in rows[0, :2])
    shown = [line for line in text.splitlines() if line.startswith("-- ")]
    assert [line.split(":")[0] for line in shown] == [
        f"-- train, id {first}",
        f"-- train, id {second}",
    ]
    assert f"Question: {first} + 1?\nAnswer:[[ {first + 1}</s>]]" in text
    with pytest.raises(UserError, match="--order 3: members are 0 to 2"):
        describe(settings, member=3)
    with pytest.raises(UserError, match="leave out --row and --split"):
        describe(settings, member=0, row=1)


def test_one_row_by_id(config):
    settings = config(validation_examples=2)
    loaded = command.load(settings)
    (held_out, _) = loaded.splits["validation"].ids
    text = describe(settings, row=int(held_out))
    assert (
        text.strip().splitlines()[0].startswith(f"-- validation, id {held_out}: row {held_out} of ")
    )
    assert f"[[ {held_out + 1}</s>]]" in text
    assert "training:" not in text
    with pytest.raises(UserError, match=r"--row 99: no example of any split has this id"):
        describe(settings, row=99)
    with pytest.raises(UserError, match="no example of train has this id"):
        describe(settings, row=int(held_out), split="train")
    with pytest.raises(UserError, match="--split test: the config has train, validation"):
        describe(settings, split="test")


def test_one_split(config, tmp_path):
    settings = config(test=write(tmp_path / "t.jsonl", [{"question": "9?", "answer": "10"}]))
    text = describe(settings, split="test")
    assert "train: " not in text
    assert "Question: 9?\nAnswer:[[ 10</s>]]" in text


def test_json(config):
    loaded = command.load(config(validation_examples=2))
    text = command.describe_json(loaded, command.Selection(rows=1, member=1))
    described = json.loads(text)
    assert described["training"]["steps_per_epoch"] == 4
    assert described["splits"]["train"]["examples"] == 28
    assert described["splits"]["train"]["digest"] == loaded.splits["train"].digest
    assert sum(part["examples"] for part in described["splits"]["train"]["lengths"]) == 28
    assert [len(ids) for ids in described["order"]] == [8, 8, 8]
    (example,) = described["examples"]
    learned = "".join(part["text"] for part in example["sequences"][0] if part["learned"])
    assert learned == f" {example['id'] + 1}</s>"
    assert example["learned"] == len(learned) - len("</s>") + 1


def test_windows_of_texts_and_pairs(config, tmp_path):
    text = describe(
        config(train=write(tmp_path / "x.jsonl", [{"text": "abc " * 20}]), max_length=32)
    )
    assert "-- train, id 0: window 0 of " in text
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    text = describe(config("objective.kind=dpo", train=pairs))
    assert "1 preference pairs" in text
    assert "rejected:\n<s>a[[c</s>]]" in text


def test_what_a_run_refuses_is_shown_and_refused(config, tmp_path):
    loaded = command.load(config(test=write(tmp_path / "t.jsonl", ROWS[:3])))
    assert "note: 3 of 3 test examples are train examples too" in command.describe(
        loaded, command.Selection(), BRACKETS
    )
    with pytest.raises(UserError, match=r"data\.allow_overlap"):
        command.check(loaded)
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match="holds preference pairs"):
        command.check(command.load(config(train=pairs)))


def test_the_date_of_a_run_is_in_its_prompts(config, base, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(base)
    settings = config(template="chat")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").write_text('{"train": {"date": "2024-07-06"}}')
    assert "2024-07-06<|im_start|>" in describe(settings)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


def test_the_command_uses_neither_jax_nor_torch(tmp_path):
    program = (
        "import sys; from jax_ordermerge.cli import main\n"
        "sys.argv[1:] = ['data', 'configs/quickstart.yaml', '--rows', '1']\n"
        "try: main()\n"
        "except SystemExit as ended: print('exit', ended.code)\n"
        "print(sorted({'jax', 'torch', 'flax', 'orbax', 'datasets'} & set(sys.modules)))"
    )
    done = run("-c", program, ORDERMERGE_EXAMPLE_CACHE=str(tmp_path))
    *_, code, modules = done.stdout.splitlines()
    assert (code, modules, done.stderr) == ("exit 0", "[]", "")
    assert "Answer:[[ 15 + 14 = 29, 15 + 29 = 44. #### 44</s>]]" in done.stdout
    assert "\x1b" not in done.stdout
    assert len(list(tmp_path.iterdir())) == 2  # train and test are kept


def test_errors_are_one_line(config, tmp_path):
    config()
    path = tmp_path / "config.yaml"
    for options, message in (
        (["--set", "model.base=./nowhere"], "model directory ./nowhere not found"),
        (["--set", f"model.base={tmp_path}"], "has no tokenizer (tokenizer.json"),
        (["--row", "77"], "--row 77: no example"),
        (["--set", "data.train=nowhere.jsonl"], "nowhere.jsonl not found"),
    ):
        done = preloaded.run(["data", path, *options], cwd=ROOT)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "run").exists()
