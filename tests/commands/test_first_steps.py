"""What a new user types first: a config for their data, and what a run ends with on the screen."""

import json
import shlex

import pytest
import yaml

from jax_ordermerge import console
from jax_ordermerge.commands import configs, init, outcome
from jax_ordermerge.config import load_config
from jax_ordermerge.layout import RunLayout, read_json, write_json
from tests.commands.test_cli import call


def write_sums(path, count):
    rows = [
        {"question": f"What is {i % 20} plus {i // 20}?{' Think.' * (i % 6)}", "answer": f"{i} {i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_request(tmp_path, count=200, **options):
    data = write_sums(tmp_path / "sums.jsonl", count)
    return init.Request("embedded:quickstart", str(data), **options)


@pytest.mark.parametrize("hardware", ["cpu:1", "h100:8", "v5e:2x2"])
def test_a_config_for_a_model_data_and_devices(tmp_path, hardware):
    out = tmp_path / "mine.yaml"
    request = make_request(tmp_path, hardware=hardware)
    assert init.write_config(request, out) == f"4 orders of 160 examples on {hardware}"
    text, config = out.read_text(), load_config(out)
    assert config.name == "mine"
    assert config.data.validation_examples == config.data.test_examples == 20
    devices = {"cpu:1": -1, "h100:8": 8, "v5e:2x2": 4}[hardware]
    mesh = config.mesh
    assert mesh.order * mesh.fsdp * mesh.tensor == devices
    is_cpu = hardware == "cpu:1"
    assert config.model.compute_dtype == ("float32" if is_cpu else "bfloat16")
    # padding is over 30 % of such rows: CPUs pad to fewer tokens, accelerators pack
    assert bool(config.data.buckets) == is_cpu
    assert config.data.packing == ("none" if is_cpu else "packs")
    lines = text.splitlines()
    for key in ("max_length", "compute_dtype", "batch", "learning_rate", "validation_examples"):
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f"  {key}:"))
        assert lines[number - 1].lstrip().startswith("#"), f"no reason for {key}"
    # but for those that name files, which have long names here
    assert all(len(line) <= 100 for line in lines if str(tmp_path) not in line)


def test_what_is_given_is_not_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'"wie viel ist {n} + 1?","{n + 1}"\n' for n in range(40))
    (tmp_path / "faq.csv").write_text("frage,antwort\n" + rows)
    given = ["data.columns={prompt: frage, completion: antwort}", "training.optimizer=lion"]
    given += ["training.batch=2", "training.optimizer.beta1=0.8"]
    options = [part for item in given for part in ("--set", item)]
    assert call("init", "--model", "embedded:quickstart", "--data", "faq.csv", *options) == 0
    config = load_config("experiment.yaml")
    assert config.data.columns == {"prompt": "frage", "completion": "antwort"}
    assert config.training.batch == 2
    assert config.training.optimizer.kind == "lion"
    assert config.training.optimizer.beta1 == 0.8
    text = (tmp_path / "experiment.yaml").read_text()
    assert shlex.join(options) in text.splitlines()[0]
    assert "steps per epoch" not in text  # the reason for a batch that was not chosen


def test_examples_that_are_there_twice_are_named(tmp_path):
    request = make_request(tmp_path, 400)  # one question is there once in each 400
    path = tmp_path / "sums.jsonl"
    path.write_text(path.read_text() * 2)
    init.write_config(request, tmp_path / "mine.yaml")
    assert load_config(tmp_path / "mine.yaml").data.allow_overlap
    assert "# the data hold examples twice (" in (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "embedded:quickstart"], "--model would be ignored: it goes with"),
        (["quickstart", "a.yaml", "b.yaml"], "init needs the name of a config"),
        (["--model", "nowhere/x/y", "--data", "sums.jsonl"], "nowhere/x/y"),
        (["--model", "embedded:quickstart", "--data", "none.jsonl"], "none.jsonl not found"),
        (["--model", "embedded:quickstart", "--data", "few.jsonl"], "expected at least 16"),
        (["--model", "m", "--data", "d", "--hardware", "h1:8"], "h1"),
        (["--model", "m", "--data", "d", "mine"], "ends in .yaml"),
        (["--model", "m", "--data", "d", "old.yaml"], "old.yaml exists"),
    ],
)
def test_bad_input_of_init(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "few.jsonl", 3)
    (tmp_path / "old.yaml").touch()
    before = sorted(tmp_path.iterdir())
    assert call("init", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert "\n" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_init_of_a_shipped_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("init", "quickstart") == 0
    assert "next: ordermerge run quickstart.yaml" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "quickstart.yaml").read_text())["name"] == "quickstart"


def test_a_copy_names_its_own_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("init", "smollm2_chat_lora", "chat.yaml") == 0
    text = (tmp_path / "chat.yaml").read_text()
    assert "ordermerge convert runs/chat/average ADAPTER" in text
    assert "runs/smollm2_chat_lora" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "faq.yml"], "(did you mean 'faq.yaml'?)"),
        (["run", "quickstat"], "(did you mean 'quickstart'?)"),
        (["data", "faq.yaml"], "(did you mean 'train.jsonl'?); give an existing file"),
        (["generate", "quickstart", "--prompt", "a"], "(did you mean 'embedded:quickstart'?)"),
        (
            ["evaluate", "embedded:quickstart", "--config", "benchmark/choices"],
            "'benchmarks/choices'?)",
        ),
    ],
)
def test_names_that_are_nearly_right(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "faq.yaml").write_text(
        "model: {base: embedded:quickstart}\ndata: {train: trian.jsonl}\n"
    )
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert "\n" not in error


def test_names_of_configs_are_not_folded():
    assert "llama2_7b_gsm8k_rft" in configs.list_configs(as_json=False, width=100)


def make_run(tmp_path):
    def model(name, kind, loss, right):
        task = {"accuracy": right, "se": 0.02, "n": 100}
        return {"name": name, "kind": kind, "loss": loss, "tasks": {"problems": task}}

    models = [
        model("base", "base", 7.0, 0.0),
        model("member_0", "member", 0.3, 0.5),
        model("member_1", "member", 0.2, 0.6),
        model("average", "merge", 0.25, 0.7),
        model("ties", "merge", 0.1, 0.8),
    ]
    run = RunLayout(tmp_path / "run")
    write_json(run.evaluations, {"split": "test", "models": models})
    return run


def test_a_run_ends_with_five_lines_and_the_next_command(tmp_path, capsys):
    run = make_run(tmp_path)
    run.merged("average").mkdir(parents=True)
    (run.merged("average") / "config.json").touch()
    config = load_config(None, [f"output={run.root}"])
    outcome.print_outcome(config, run, as_json=False)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()[1:]]
    assert lines[-1] == [
        "next:",
        "ordermerge",
        "generate",
        f"{run.root}/average",
        "--prompt",
        "'YOUR",
        "PROMPT'",
    ]
    assert [line[-5:] for line in lines[2:7] if "mean" not in line] == [
        ["7.0000", "0.0", "%", "+-", "2.0"],
        ["0.2000", "60.0", "%", "+-", "2.0"],
        ["0.2500", "70.0", "%", "+-", "2.0"],
        ["0.1000", "80.0", "%", "+-", "2.0"],
    ]
    assert lines[3] == ["2", "members,", "mean", "0.2500", "55.0", "%"]
    assert lines[4][:4] == ["lowest", "loss,", "members:", "member_1"]
    assert lines[6][:5] == ["lowest", "loss,", "2", "merges:", "ties"]
    outcome.print_outcome(config, run, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"run": str(run.root), "models": read_json(run.evaluations)["models"]}


def test_quiet_prints_no_messages(capsys):
    console.print_message("shown")
    console.set_quiet(True)
    console.print_message("hidden")
    console.print_note("hidden")
    console.progress_console().print("hidden")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("shown\n", "")


def test_a_bar_on_a_terminal(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "TERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    assert list(console.track("abc", 3, "evaluate", "models", file=file)) == ["a", "b", "c"]
    assert "evaluate" in file.getvalue()
    assert "3/3" in file.getvalue()
    # one bar at a time
    inside = Terminal()
    for _ in console.track("ab", 2, "merge", "merges", file=file):
        list(console.track("abc", 3, "search", "candidates", file=inside))
    assert not inside.getvalue()
    list(console.track("abc", 3, "search", "candidates", transient=True, file=inside))
    assert "3/3" in inside.getvalue()
