"""`ordermerge push`, against a hub on the loopback interface."""

import json
import re

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.numpy import save_file

from jax_ordermerge.checkpoint import sidecar_files
from tests.commands import fake_hub
from tests.commands.test_cli import call

# of httpx, about how huggingface_hub 2.4 passes a file to it
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
BASE = "org/base-7b"
PRIVATE_FILES = (
    *("training_args.bin", "optimizer.pt", "notes.txt", "account.json", ".env", ".git/config"),
    *("checkpoint-5/model.safetensors", "checkpoint-5/config.json"),
)
MERGED_FILES = {
    "README.md",
    "config.json",
    "merge_config.yaml",
    "merge.json",
    "model.safetensors",
    "tokenizer.json",
    "vocab.txt",
}
SUMMARY = {
    "name": "average",
    "kind": "merge",
    "loss": 1.25,
    "loss_se": 0.03,
    "perplexity": 3.49,
    "tokens": 400,
    "tasks": {"gsm8k": {"accuracy": 0.5, "value": 0.5, "se": 0.04, "n": 120}},
    "texts": {},
}


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # its protocol is another one than HTTP; uploads fall back to LFS
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        hub.licenses[BASE] = "apache-2.0"
        yield hub


@pytest.fixture
def run(tmp_path):
    """A run with one merge, which was evaluated."""
    run = tmp_path / "run"
    merged = run / "merged" / "average"
    write_model(merged, base_model=BASE, relation="merge", tags=["merge"])
    config = {"name": "orders", "model": {"base": BASE}, "data": {"train": ["org/set", "a.jsonl"]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "evaluations.json").write_text(json.dumps({"split": "test", "models": [SUMMARY]}))
    (merged / "merge.json").write_text("{}")
    (merged / "vocab.txt").write_text("a\n")
    (merged / "merge_config.yaml").write_text("merge_method: average\n")
    for name in PRIVATE_FILES:
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("private")
    return run


def write_model(directory, files=("model.safetensors",), **card):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text(sidecar_files.model_card("Merge", "Text.", **card))
    for file in files:
        save_file({"w": np.arange(4, dtype=np.float32)}, directory / file)
    return directory


def refused(capsys, *parts):
    err = capsys.readouterr().err
    line = err[err.rindex("error: ") :].strip()
    assert "\n" not in line
    for part in parts:
        assert part in line
    assert fake_hub.TOKEN not in err


def test_a_merge_is_committed_with_card_recipe_and_results(hub, run, capsys):
    before = (run / "merged/average/README.md").read_bytes()
    options = ["--private", "--message", "First try"]
    assert call("push", run / "average", "org/merged", *options) == 0
    out, err = capsys.readouterr()
    assert out.strip() == f"{hub.url}/org/merged/commit/1"
    files = hub.repos["org/merged"]["main"]
    assert files.keys() == MERGED_FILES
    for name in MERGED_FILES - {"README.md"}:
        assert files[name] == (run / "merged/average" / name).read_bytes()
    assert (hub.private, hub.messages) == (["org/merged"], ["First try"])
    # what is no part of a model is named
    left_out = next(line for line in err.splitlines() if line.startswith("note: not uploaded"))
    assert all(name.split("/")[0] in left_out for name in PRIVATE_FILES)
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == BASE or data["base_model"] == [BASE]
    assert data["base_model_relation"] == "merge"
    assert "merge" in data["tags"]
    assert (data["license"], data["library_name"]) == ("apache-2.0", "transformers")
    assert data["datasets"] == ["org/set"]
    results = {(x.dataset_name, x.metric_type): x.metric_value for x in card.data.eval_results}
    own = "test examples of orders"
    expected = {(own, "loss"): 1.25, (own, "perplexity"): 3.49, ("gsm8k", "accuracy"): 0.5}
    assert results == expected
    assert "```yaml\nmerge_method: average\n```" in card.text
    # the directory stays as it was
    assert (run / "merged/average/README.md").read_bytes() == before
    assert fake_hub.TOKEN not in out + err


def test_an_update_replaces_the_weights_on_a_branch(hub, tmp_path, capsys):
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    model = write_model(tmp_path / "model", files)
    index = {"weight_map": {"a": files[0], "b": files[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert call("push", model, "me/model") == 0
    assert call("push", model, "me/model") == 2
    refused(capsys, "me/model exists already; commit to it with --update")
    for file in (*files, "model.safetensors.index.json"):
        (model / file).unlink()
    save_file({"w": np.zeros(3)}, model / "model.safetensors")
    assert call("push", model, "me/model", "--update", "--revision", "small") == 0
    branches = hub.repos["me/model"]
    assert not {*files, "model.safetensors.index.json"} & branches["small"].keys()
    assert "model.safetensors" in branches["small"]
    assert {*files} < branches["main"].keys()
    notes = capsys.readouterr().err
    assert f"note: {files[0]} of an earlier upload is deleted" in notes


def test_a_file_is_no_directory_of_a_model(tmp_path, capsys):
    (tmp_path / "model.gguf").touch()
    assert call("push", tmp_path / "model.gguf", "me/model", "--dry-run") == 2
    assert "model.gguf is a file; give the directory of a model" in capsys.readouterr().err


def test_a_dry_run_needs_no_network(run, capsys):
    options = ("--private", "--revision", "try", "--message", "First of three")
    assert call("push", run, "org/merged", "--dry-run", *options) == 0
    out, err = capsys.readouterr()
    expected = "to org/merged, branch try, a new private repository: First of three"
    assert out.splitlines()[0] == expected
    size = (run / "merged/average/model.safetensors").stat().st_size
    assert re.search(rf"^ *{size} bytes  model.safetensors$", out, re.MULTILINE)
    assert "base_model_relation: merge" in out
    assert "model-index:" in out
    assert f"note: the license is that which {BASE} names on the hub" in err
    assert call("push", run, "org/merged", "--dry-run", *options, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"]["model.safetensors"] == size
    assert plan["private"]
    assert plan["card"] in out


def test_an_update_leaves_nothing_that_a_loader_would_take_for_its_own(hub, tmp_path, capsys):
    model = write_model(tmp_path / "model")
    for name in ("chat_template.jinja", "adapter_config.json", "handler.py"):
        (model / name).write_text('{"base_model_name_or_path": "org/base"}')
    assert call("push", model, "me/model") == 0
    for name in ("chat_template.jinja", "adapter_config.json", "handler.py"):
        (model / name).unlink()
    assert call("push", model, "me/model", "--update") == 0
    files = hub.repos["me/model"]["main"].keys()
    # of another tokenizer and kind of model, and what the owner may have put there
    assert not {"chat_template.jinja", "adapter_config.json"} & files
    assert "handler.py" in files
    notes = capsys.readouterr().err
    assert "note: chat_template.jinja of an earlier upload is deleted" in notes
    assert "note: README.md there is replaced" in notes


def test_paths_of_this_machine_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    model = write_model(tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"_name_or_path": "/data/base"}))
    with (model / "README.md").open("a") as card:
        card.write("Trained on /home/me/letters.jsonl.")
    assert call("push", model, "org/model", "--dry-run") == 0
    notes = capsys.readouterr().err
    assert "note: config.json names /data/base, a path of this machine" in notes
    assert "note: README.md names /home/me/letters.jsonl., a path of this machine" in notes
    # as in containers
    monkeypatch.setenv("HOME", "/")
    (model / "README.md").write_text("Of https://huggingface.co/org/base.")
    assert call("push", model, "org/model", "--dry-run") == 0
    assert "README.md names" not in capsys.readouterr().err


def test_the_card_of_a_run_without_its_base_can_be_written(run, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    for base in (str(run / "lost"), "s3://none/base", "embedded:smollm2"):
        config["model"]["base"] = base
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert call("push", run, "org/merged", "--dry-run") == 0
        assert "license" not in capsys.readouterr().out


def test_a_base_without_a_name_on_the_hub_is_left_out(tmp_path, capsys):
    bases = ["SmolLM2-135M", "~/base", "org/other"]
    model = write_model(tmp_path / "two", base_model=bases, relation="merge")
    assert call("push", model, "org/merged", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "note: base_model SmolLM2-135M is no name on the hub (OWNER/NAME)" in err
    assert ModelCard(out[out.index("---") :]).data.to_dict()["base_model"] == ["org/other"]
    model = write_model(tmp_path / "one", base_model=bases[0], relation="merge")
    assert call("push", model, "org/merged", "--dry-run") == 0
    assert "base_model" not in capsys.readouterr().out


def test_a_card_of_another_program_gets_tags_and_recipe(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    (model / "README.md").write_text("# Mine\n")
    (model / "merge_config.yaml").write_text("merge_method: ties\n")
    assert call("push", model, "org/merged", "--dry-run") == 0
    out = capsys.readouterr().out
    card = ModelCard(out[out.index("---") :])
    assert card.data.to_dict() == {"tags": ["jax_ordermerge", "merge"]}
    assert card.text.startswith("# Mine\n")
    assert "```yaml\nmerge_method: ties\n```" in card.text


def test_what_the_hub_refuses_is_one_line(hub, tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "model")
    arguments = ["push", model, "org/model"]
    hub.read_only = True
    assert call(*arguments) == 2
    refused(capsys, "the token may not write to org/model")
    assert not hub.repos
    hub.read_only, hub.is_full = False, True
    assert call(*arguments) == 2
    refused(capsys, "the upload to org/model broke off: HTTP 507 (full); try again with --update")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert call(*arguments) == 2
    refused(capsys, f"{hub.url} does not accept the token")
    for token in (f"{fake_hub.TOKEN}\x01", f"{fake_hub.TOKEN}\u00e9"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert call(*arguments) == 2
        refused(capsys, "has characters that no token has")
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    assert call(*arguments, "--message", " ") == 2
    refused(capsys, "--message is empty")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert call(*arguments) == 2
    refused(capsys, "http://127.0.0.1:9 cannot be reached: ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert call(*arguments) == 2
    refused(capsys, "http://127.0.0.1:9 cannot be reached: ")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert call(*arguments) == 2
    refused(capsys, "no token for the Hugging Face hub: set HF_TOKEN")


def only_bin(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lose_a_shard(model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(model):
    (model / "model.safetensors.index.json").write_text("{}")


def local_adapter(model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (only_bin, [], "has no *.safetensors; other weights are not uploaded"),
        (lose_a_shard, [], "names model-2.safetensors, which is absent"),
        (empty_index, [], "model.safetensors.index.json has no weight_map"),
        (lambda model: (model / "vocab.txt").symlink_to("lost"), [], "vocab.txt cannot be read"),
        (lambda model: (model / "README.md").write_bytes(b"\xe9"), [], "is not UTF-8"),
        (local_adapter, [], "base_model_name_or_path is /home/me/base, a path of this machine"),
        (lambda model: (model / "config.json").unlink(), [], "is no exported model"),
        (lambda model: (model / "README.md").write_text("---\na: [\n---\n"), [], "README.md"),
        (None, ["--private", "--update"], "--private is for a new repository"),
    ],
)
def test_models_that_nobody_could_load_are_refused(tmp_path, capsys, spoil, arguments, message):
    model = write_model(tmp_path / "model")
    if spoil is not None:
        spoil(model)
    assert call("push", model, "org/model", "--dry-run", *arguments) == 2
    refused(capsys, message)


def test_runs_and_names_that_say_too_little_are_refused(run, capsys):
    assert call("push", run / "average", "org/a/b", "--dry-run") == 2
    refused(capsys, "org/a/b: expected OWNER/NAME")
    assert call("push", run / "member_0", "org/a", "--dry-run") == 2
    refused(capsys, f"export it first: ordermerge convert {run}/member_0 DIRECTORY")
    assert call("push", run / "avrage", "org/a", "--dry-run") == 2
    refused(capsys, "does not exist; the run has the merges average")
    write_model(run / "merged" / "ties")
    assert call("push", run, "org/a", "--dry-run") == 2
    refused(capsys, f"a run with 2 merges; name one: {run}/average, {run}/ties")
