"""The configs of the package: found by name, described by their headers, commented for editing."""

import json
import pathlib

import pytest
import yaml

from jax_ordermerge.commands import configs as command
from jax_ordermerge.config import comments, load_config, shipped, to_dict
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.run_config import read_config

CONFIGS = shipped.list_configs()
EXPERIMENTS = [config for config in CONFIGS if config.command.startswith("ordermerge run")]


def test_every_file_that_is_a_config_is_listed():
    files = {
        path
        for path in shipped.directory().rglob("*.yaml")
        if path.parent.name != "hypotheses"  # what is asked about runs
    }
    assert {config.path for config in CONFIGS} == files
    assert CONFIGS[0].name == "quickstart"


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda config: config.name)
def test_headers_say_where_a_config_runs_how_long_and_what_comes_out(config):
    assert config.hardware
    assert config.time
    assert config.expect
    assert f"ordermerge run configs/{config.name}.yaml" in config.command


def test_a_header_whose_field_goes_on_in_the_next_line():
    expected = next(config.expect for config in CONFIGS if config.name == "quickstart_dpo")
    assert expected.endswith("in about 62 % of the held-out pairs")


@pytest.mark.parametrize("target", ["quickstart", "configs/quickstart.yaml"])
def test_a_name_goes_for_its_file_where_there_is_no_clone(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_config(shipped.directory() / "quickstart.yaml")
    assert load_config(target) == read_config(target) == expected
    # what the user has under this name goes first
    path = tmp_path / target
    path.parent.mkdir(exist_ok=True)
    path.write_text("seed: 7")
    assert read_config(target).seed == 7


@pytest.mark.parametrize("target", ["quikstart", "../configs/quickstart.yaml", "quickstart.yaml"])
def test_what_is_no_name_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"not found.*did you mean 'quickstart'"):
        read_config(target)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_comments_change_no_setting(config):
    text = config.path.read_text()
    annotated = comments.annotate(text)
    assert yaml.safe_load(annotated) == yaml.safe_load(text)
    without = [line for line in annotated.splitlines() if not line.lstrip().startswith("#")]
    assert without == [line for line in text.splitlines() if not line.lstrip().startswith("#")]


def test_comments_come_from_the_schema_of_the_kind():
    text = "objective:\n  kind: dpo\n  beta: 0.1\n"
    lines = comments.annotate(text).splitlines()
    before = lines[lines.index("  beta: 0.1") - 1]
    assert before.startswith("  # strength of the pull")


def test_a_copy_to_edit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = command.write_config("quickstart", pathlib.Path("my try.yaml"))
    text = path.read_text()
    assert "ordermerge run 'my try.yaml'" in text
    assert "# tokens per example" in text
    expected = to_dict(load_config("quickstart")) | {"name": "my try"}
    assert to_dict(load_config(path)) == expected
    with pytest.raises(UserError, match=r"my try\.yaml exists; give another file"):
        command.write_config("quickstart", path)
    assert command.write_config("smollm2/problems", None) == pathlib.Path("problems.yaml")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        command.write_config("quickstrat", None)


def test_the_table_has_all_configs():
    text = command.list_configs(as_json=False)
    assert not [config.name for config in CONFIGS if config.name not in text]
    rows = json.loads(command.list_configs(as_json=True))
    assert [row["name"] for row in rows] == [config.name for config in CONFIGS]
    assert rows[0]["hardware"] == "two CPU cores"


def test_keys_of_tasks_and_of_mixing_have_comments():
    text = "training:\n  mixing:\n    kind: papa\n    rate: 0.1\n"
    text += "evaluation:\n  tasks:\n    - name: a\n      kind: gsm8k\n      max_new_tokens: 3\n"
    annotated = comments.annotate(text)
    assert "# how far members move" in annotated
    assert "# largest number of tokens of an answer" in annotated
