"""Prompts of `ordermerge generate` from a file, stop texts, and completions as JSON Lines."""

import json

import pytest

from jax_ordermerge.commands import generate
from tests.commands.test_cli import call

ROWS = [{"id": 7, "prompt": "a plus b is ?"}, {"id": 8, "prompt": "h\u2028plus"}]


@pytest.fixture
def asked(monkeypatch):
    """The prompts that a model was asked; it answers each with `PROMPT. more`."""
    prompts = []

    def complete(model, texts, **options):
        prompts.extend(texts)
        return [f"{text}. more" for text in texts]

    monkeypatch.setattr(generate, "complete", complete)
    return prompts


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_prompts_of_a_file(name, mark, asked, tmp_path, capsys):
    texts = {
        "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
        "rows.json": json.dumps(ROWS),
        "rows.csv": 'id,prompt\n7,a plus b is ?\n8,"h\u2028plus"\n',
        "rows.txt": "a plus b is ?\r\n\nh\u2028plus\n",
    }
    (tmp_path / name).write_text(mark + texts[name], newline="", encoding="utf-8")
    assert call("generate", "model", "--prompts", tmp_path / name, "--json", "--stop", ". m") == 0
    assert asked == [row["prompt"] for row in ROWS]
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [(row["prompt"], row["completion"]) for row in rows] == [(p, p) for p in asked]
    assert name == "rows.txt" or [int(row["id"]) for row in rows] == [7, 8]


def test_stops_cut_at_the_first_of_them(asked, capsys):
    stops = ["--stop", "more", "--stop", "plus", "--stop", "."]
    assert call("generate", "model", "--prompt", "a", "--prompt", "a plus b", *stops) == 0
    assert capsys.readouterr().out == "a\na \n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither is given"),
        (["--prompt", "a", "--prompts", "{rows}"], "both are given"),
        (["--prompts", "{rows}"], "row 1 has no text in the column prompt, its columns are text"),
        (["--prompts", "{null}"], "row 0 has no text in the column prompt"),
        (["--prompts", "{done}"], "row 0 has a column completion already"),
        (["--prompts", "{empty}"], "holds no line of text"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
    ],
)
def test_prompts_that_are_refused(arguments, message, asked, tmp_path, capsys):
    files = {
        "{rows}": ("rows.jsonl", '{"prompt": "a"}\n{"text": "b"}\n'),
        "{null}": ("null.jsonl", '{"prompt": null}\n'),
        "{done}": ("done.jsonl", '{"prompt": "a", "completion": "b"}\n'),
        "{empty}": ("empty.txt", "\n \n"),
    }
    for name, text in files.values():
        (tmp_path / name).write_text(text)
    paths = {key: tmp_path / name for key, (name, _) in files.items()}
    assert call("generate", "model", *[paths.get(a, a) for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not asked


def test_a_model_completes_the_prompts_of_a_file(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a plus b is ?\nc\n")
    options = ["--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 3]
    assert call("generate", folder / "base", *options) == 0
    texts = capsys.readouterr().out.splitlines()
    assert call("generate", folder / "base", *options, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["completion"] for row in rows] == texts
