"""A path is taken as it is written: no argument or key that is a path goes through YAML."""

import os
import pathlib

import pytest
import yaml

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.commands.evaluate import is_model, model_config
from jax_ordermerge.config import load_config, make_config, to_dict
from jax_ordermerge.data.listing import list_files
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.merge.recipe import schema
from jax_ordermerge.merge.sources.references import split_name

NAMES = [
    *("run #2", "x #1/out", "2026-11-29", "007", "1.10", "yes", "no", "~", "null", "true", "1e5"),
    *("[x]", "{a}", "*x", "&x", "!x", "%x", "@x", "`x`", "a: b", "- x", "?", "'x'", '"x"', "|"),
    *("0x10", "1_000", "12:30", ".inf", "=", "<<", "😀", "a\nb", " x ", "#", "$HOME", "a\\nb"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_run_directory_is_the_one_that_was_given(place, name):
    run = pathlib.Path(name)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(make_config({"seed": 5}))))
    config = read_config(name, ["training.epochs=7"])
    assert (config.directory.absolute(), config.seed) == (place / name, 5)
    assert config.training.epochs == 7


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_the_one_that_was_given(place, name):
    (place / name).mkdir(parents=True)
    (place / name / "config.json").touch()  # `~` would be the home directory, which is no model
    assert model_config(name, None, ["evaluation.batch=8"], ["key"]).model.base == name


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_a_config_written_by_yaml(place, name):
    raw = {"output": name, "model": {"base": name}, "data": {"train": [name], "test": name}}
    (place / "c.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(place / "c.yaml")
    assert config.location == config.model.base == config.data.test == name
    assert config.data.train == (name,)


@pytest.mark.parametrize("name", ["2026-11-29", "007", "1.10", "yes", "1e5", "0x10", "=", "12:30"])
def test_paths_without_quotes_are_texts(place, name):
    (place / "c.yaml").write_text(
        f"name: {name}\noutput: {name}\nmodel: {{base: {name}}}\n"
        f"data: {{train: [{name}, {{path: {name}, name: other}}], test: {name}}}\n"
        f"evaluation: {{tasks: [{{name: {name}, data: {name}}}]}}\ntracking: {{wandb: {name}}}\n"
    )
    config = load_config(place / "c.yaml")
    assert config.name == config.output == config.model.base == config.data.test == name
    assert [getattr(source, "path", source) for source in config.data.train] == [name, name]
    assert (config.evaluation.tasks[0].name, config.evaluation.tasks[0].data) == (name, name)
    assert config.tracking.wandb == name
    recipe = place / "r.yml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {name}\nmodels: [{{model: {name}}}]\n"
        "parameters: {weight: 1}\n"
    )
    assert schema.load(recipe)[0]["models"][0]["model"] == name


@pytest.mark.parametrize("name", [name for name in NAMES if name[0] not in "'\"~"])
def test_paths_of_set_are_texts(name):
    given = {"null": None}.get(name, name)
    if given is not None:
        assert load_config(None, [f"output={name}"]).output == name
        assert load_config(None, [f"name={name}"]).name == name
    assert load_config(None, [f"compilation_cache={name}"]).compilation_cache == given


def test_values_of_set_may_be_yaml():
    config = load_config(
        None,
        [
            'output="run #2"',
            "data.train=[a.jsonl, {path: 007, weight: 2}]",
            "data.test=null",
            "compilation_cache=~",
        ],
    )
    assert config.output == "run #2"
    assert config.data.train[0] == "a.jsonl"
    assert (config.data.train[1].path, config.data.train[1].weight) == ("007", 2)
    assert config.data.test is config.compilation_cache is None


def test_what_would_be_ignored_beside_an_argument_is_refused(place):
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="--set output would be ignored: run is a run directory"):
        read_config("run", ["output=elsewhere"])
    assert read_config("run/config.yaml", ["output=elsewhere"]).output == "elsewhere"
    with pytest.raises(UserError, match=r"--set model\.base=b would be ignored: the model is a"):
        model_config("a", None, ["model.base=b"])


def test_a_name_that_stands_for_the_experiment_is_refused(place):
    (place / "{name}").mkdir()
    (place / "{name}" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="stands for the name of the experiment"):
        read_config("{name}")


def test_home_is_expanded_where_nothing_has_the_name(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    assert make_config({"output": "~/run"}).directory == place / "home" / "run"
    assert remote.expand("~/run") == place / "home" / "run"
    assert remote.expand("~nobody-at-all/run") == pathlib.Path("~nobody-at-all/run")
    (place / "~" / "run").mkdir(parents=True)
    (place / "~" / "run" / "config.yaml").write_text("seed: 1\n")
    assert remote.expand("~/run") == pathlib.Path("~/run")
    assert read_config("~/run").directory == place / "~" / "run"


def test_directories_named_like_configs(place):
    for name in ("run.yaml", "model.yml"):
        (place / name).mkdir()
    (place / "run.yaml" / "config.yaml").write_text("seed: 1\n")
    (place / "model.yml" / "config.json").write_text("{}")
    assert not is_model(pathlib.Path("run.yaml"))
    assert is_model(pathlib.Path("model.yml"))
    assert read_config("run.yaml").location == "run.yaml"


def test_globs_below_directories_with_the_characters_of_globs(place):
    for name in ("[ab] 1", "a 1"):
        (place / name).mkdir()
        for file in ("x.jsonl", "y.jsonl", "[z].jsonl"):
            (place / name / file).write_text('{"text": "t"}\n')
    listed = {
        path: [str(file) for _, file in list_files(path).files]
        for path in ("[ab] 1/*.jsonl", "[ab] 1/[z].jsonl", "[ab] 1", "[a] 1/[xy].jsonl")
    }
    assert listed["[ab] 1/*.jsonl"] == [f"[ab] 1/{n}.jsonl" for n in ("[z]", "x", "y")]
    assert listed["[ab] 1"] == listed["[ab] 1/*.jsonl"]
    assert listed["[ab] 1/[z].jsonl"] == ["[ab] 1/[z].jsonl"]
    # a pattern where nothing has the name
    assert listed["[a] 1/[xy].jsonl"] == ["a 1/x.jsonl", "a 1/y.jsonl"]


def test_a_plus_sign_of_a_directory_does_not_split(place):
    for name in ("a+b", "c+d/e", "f"):
        (place / name).mkdir(parents=True)
    (place / "a+b" / "config.yaml").write_text("seed: 1\n")
    assert split_name("a+b") == ("a+b", None)
    assert split_name("a+b/member_1") == ("a+b/member_1", None)
    assert split_name("a+b/member_1+c+d/e") == ("a+b/member_1", "c+d/e")
    assert split_name("c+d/e+f") == ("c+d/e", "f")
    assert split_name("f+c+d/e") == ("f", "c+d/e")
    # the adapter is one of the hub
    assert split_name("a+b+owner/adapter") == ("a+b", "owner/adapter")
    for name in ("x+y+z", "+x", "x+"):
        with pytest.raises(UserError, match=r"expected MODEL or MODEL\+ADAPTER"):
            split_name(name)


def test_the_longest_names_do_not_fail(place):
    assert not os.path.lexists(remote.expand("x" * 300))
    assert split_name("x" * 300 + "+y") == ("x" * 300, "y")
