"""Strictness of the schema, and the texts of its errors."""

import pathlib
import subprocess
import sys

import pytest
import yaml

from jax_ordermerge.config import (
    check_inputs,
    fixed_settings,
    load_config,
    make_config,
    to_dict,
)
from jax_ordermerge.config.section import load_yaml
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods import table

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
CONFIGS = sorted(
    file for folder in (".", "paper", "small") for file in (FOLDER / folder).glob("*.yaml")
)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        # pydantic takes True as 1
        ({"seed": True}, "seed = True: expected a number"),
        ({"training": {"epochs": True}}, "training.epochs = True: expected a number"),
        ({"data": {"buckets": [True, 64]}}, "data.buckets = [True, 64]: expected a number"),
        ({"mesh": {"dcn": {"data": True}}}, "mesh.dcn.data = True: expected a number"),
        ({"training": {"optimizer": {"beta1": False}}}, "optimizer.beta1 = False: expected"),
        ({"merge": {"methods": [{"seed": False}]}}, "merge.methods.0.seed = False: expected"),
        ({"trainig": {}}, "unknown key trainig (did you mean 'training'?)"),
        (
            {"training": {"learning_rat": 1}},
            "unknown key training.learning_rat (did you mean 'learning_rate'?)",
        ),
        (
            {"merge": {"methods": [{"metod": "average"}]}},
            "unknown key merge.methods.0.metod (did you mean 'method'?)",
        ),
        (
            {"training": {"batch": "many"}},
            "training.batch = 'many': input should be a valid integer",
        ),
        ({"training": {"batch": 0}}, "training.batch = 0: input should be greater than 0"),
        (
            {"population": {"level": "token"}},
            "population.level = 'token': input should be 'sample', 'batch'",
        ),
        ({"mesh": {"order": 3}}, "population.members = 4 is not a multiple of mesh.order = 3"),
        (
            {"training": {"batch": 10, "microbatch": 4}},
            "training.batch = 10 is not a multiple of training.microbatch = 4",
        ),
        (
            {"training": {"optimizer": "adam"}},
            "training.optimizer = 'adam': unknown optimizer (did you mean 'adamw'?)",
        ),
        (
            {"training": {"optimizer": {"kind": "adan"}}},
            "training.optimizer.kind = 'adan': unknown optimizer (did you mean 'adamw'?)",
        ),
        (
            {"training": {"schedule": "polynomial"}},
            "training.schedule = 'polynomial': unknown schedule (known: cosine, linear, wsd, ",
        ),
        (
            {"training": {"optimizer": {"kind": "lion", "epsilon": 1e-8}}},
            "unknown key training.optimizer.epsilon (kind lion has: beta1, beta2)",
        ),
        (
            {"training": {"optimizer": {"momentum": 0.9}}},
            "unknown key training.optimizer.momentum (kind adamw has: beta1, beta2, epsilon)",
        ),
        (
            {"training": {"optimizer": {"kind": "sgd", "momentum": 1}}},
            "training.optimizer.momentum = 1: input should be less than 1",
        ),
        (
            {"training": {"schedule": {"decay": 0.1}}},
            "unknown key training.schedule.decay (kind cosine has: no settings)",
        ),
        (
            {"training": {"moments": {"kind": "float32", "rounding": "nearest"}}},
            "unknown key training.moments.rounding (kind float32 has: no settings)",
        ),
        (
            {"training": {"mixing": {"every": 4}}},
            "training.mixing.kind is missing: wash or papa",
        ),
        ({"training": {"ema": 1}}, "training.ema = 1: input should be less than 1"),
        ({"data": {"buckets": [1024]}}, "data.max_length = 512; set data.buckets=[], or"),
        (
            {"merge": {"methods": [{"method": "ties"}, {"method": "ties"}]}},
            "the name ties is used twice",
        ),
        (
            {"merge": {"methods": [{"method": "ties", "weights": [1]}]}},
            "ties has 1 weights for population.members = 4",
        ),
        (
            {"data": {"packing": "packs", "buckets": [64]}},
            "data.buckets pad rows of one example, data.packing = packs fills them",
        ),
        (
            {"data": {"packing": "bins"}, "population": {"level": "batch"}},
            "data.packing = bins composes new ones; give packs",
        ),
        (
            {"data": {"packing": "bins"}, "population": {"replicates": 2}},
            "populations would depend on each other (population.replicates = 2); give packs",
        ),
        (
            {"population": {"members": 2, "replicates": 3}, "mesh": {"order": 4}},
            "population.members = 2 times replicates = 3 is not a multiple of mesh.order = 4",
        ),
        (
            {"population": {"replicates": 2}, "training": {"mixing": "papa"}},
            "set replicates to 1, or remove mixing",
        ),
        (
            {"merge": {"methods": [{"method": "ties", "weights": [1] * 8}]}}
            | {"population": {"replicates": 2}},
            "ties has 8 weights for population.members = 4",
        ),
        (
            {"population": {"vary": "dropout"}},
            "population.vary = dropout: there is no dropout in training",
        ),
        (
            {"population": {"vary": "init"}},
            "population.vary = init: without lora members start from the base",
        ),
        (
            {"lora": {"fused": True}, "training": {"optimizer_memory": "host"}},
            "one member after another",
        ),
        (
            {"training": {"ema": 0.9, "optimizer_memory": "host"}, "samples": {"every": 5}},
            "set training.optimizer_memory to device",
        ),
        (
            {"population": {"vary": "all", "level": "same"}, "lora": {}},
            "population.level = same gives all members one order",
        ),
        (
            {"population": {"vary": "init", "level": "balanced"}, "lora": {}},
            "population.level = balanced relates the orders of members",
        ),
        (
            {"objective": {"kind": "dpo"}, "data": {"format": "messages"}},
            "dpo learns from preference pairs, not data.format = messages",
        ),
        (
            {"objective": {"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1}},
            "objective: label_smoothing goes with loss = sigmoid",
        ),
        (
            {"objective": {"kind": "sft", "beta": 0.1}},
            "unknown key objective.beta (kind sft has: no settings)",
        ),
        (
            {"objective": {"kind": "dpo"}, "evaluation": {"tasks": [{"name": "preferences"}]}},
            "the name preferences is taken",
        ),
        ({"training": 3}, "training = 3: expected a mapping of settings"),
        ({"training": {"optimizer": 3}}, "training.optimizer = 3: expected a mapping of settings"),
        (
            {"merge": {"methods": ["average"]}},
            "merge.methods.0 = 'average': expected a mapping of settings with method",
        ),
        ({"merge": {"methods": "ties"}}, "merge.methods = 'ties': expected a list, e.g. [a, b]"),
        ({"data": {"columns": 3}}, "data.columns = 3: expected a mapping, e.g. {key: value}"),
        (
            {"training": {"learning_rate": float("inf")}},
            "training.learning_rate = inf: input should be a finite number",
        ),
        ({"distributed": {"index": 3}}, "index would be ignored: without coordinator"),
        ({"distributed": {"processes": 2}}, "processes would be ignored: without coordinator"),
    ],
)
def test_bad_values_are_one_line(raw, message):
    with pytest.raises(UserError) as caught:
        make_config(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_only_process_may_state_its_number():
    distributed = make_config({"distributed": {"processes": 1, "index": 0}}).distributed
    assert (distributed.processes, distributed.index) == (1, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epochs"], "expected section.key=value"),
        (["training.epochs=[1"], "the value is not valid YAML"),
        (["seed.epochs=1"], "seed"),
        (["training.epoch=1"], "unknown key training.epoch (did you mean 'epochs'?)"),
        (["data.format=auto #2"], "YAML ignores '#2' as a comment; put the value between quotes"),
        (["data.format=#2"], "YAML ignores '#2' as a comment"),
        (["data.buckets=[32, 64] # short"], "YAML ignores '# short' as a comment"),
    ],
)
def test_bad_overrides(tmp_path, overrides, message):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    assert message in str(caught.value)


def test_overrides_win_and_merge_into_sections(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training: {epochs: 5, batch: 8}\n")
    config = load_config(
        file, ["training.epochs=7", "data.buckets=[32, 64]", "training.learning_rate=1e-5"]
    )
    assert (config.training.epochs, config.training.batch, config.training.learning_rate) == (
        7,
        8,
        1e-5,
    )
    assert config.data.buckets == (32, 64)


def test_a_number_sign_that_is_no_comment_belongs_to_the_value(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\n")
    config = load_config(file, ['output="run #2"', "name=run#2", "data.columns={prompt: 'a # b'}"])
    assert (config.output, config.name) == ("run #2", "run#2")
    assert config.data.columns == {"prompt": "a # b"}


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"c\.yaml cannot be read: .*; expected a text file"):
        load_config(file)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words"])
def test_files_that_are_no_config(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(file)


def test_missing_file():
    with pytest.raises(UserError, match=r"config file nowhere\.yaml not found"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: str(f.relative_to(FOLDER)))
def test_committed_configs_are_valid_short_and_say_how_to_run_them(file):
    text = file.read_text()
    config = load_config(file)
    assert config.name == file.stem
    assert len(text.splitlines()) <= 45
    assert f"ordermerge run configs/{file.relative_to(FOLDER)}" in text.split("name:")[0]
    for spec in config.merge.methods:
        table.check_parameters(spec.method, spec.parameters)


# as published: batch, learning rate, schedule, warm-up, epochs, tokens of the longest example
PUBLISHED = {
    "alpaca": (128, 2e-5, "cosine", 0.03, 3, 512),
    "gsm8k": (128, 2e-5, "cosine", 0.03, 3, 512),
    "gsm8k_rft": (128, 2e-5, "cosine", 0.03, 3, 512),
    "code": (256, 2e-5, "cosine", 0.03, 3, 512),
    "math": (128, 2e-5, "cosine", 10, 3, 2048),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_configs_have_the_published_settings(name):
    config = load_config(FOLDER / f"llama2_7b_{name}.yaml")
    training = config.training
    assert PUBLISHED[name] == (
        training.batch,
        training.learning_rate,
        training.schedule.kind,
        training.warmup,
        training.epochs,
        config.data.max_length,
    )
    assert (config.model.base, config.model.compute_dtype, training.weight_decay) == (
        "meta-llama/Llama-2-7b-hf",
        "bfloat16",
        0,
    )
    assert (config.population.members, config.merge.dtype, config.data.validation_examples) == (
        4,
        "bfloat16",
        256,
    )
    assert sorted(spec.seed for spec in config.merge.methods if spec.method == "selection") == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    "file", sorted((CONFIGS[0].parent / "benchmarks").glob("*.yaml")), ids=lambda file: file.stem
)
def test_committed_benchmarks_are_valid_and_say_how_to_run_them(file):
    config = load_config(file)
    assert config.evaluation.tasks
    assert make_config(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert (
        f"ordermerge evaluate MODEL --config configs/benchmarks/{file.name} --out results"
        in file.read_text().split("evaluation:")[0]
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_resolved_config_reads_back(optimizer):
    config = make_config(
        {"training": {"optimizer": optimizer, "schedule": "wsd", "moments": "bfloat16"}}
    )
    assert make_config(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_a_bare_name_means_the_defaults_of_the_choice():
    lion = make_config({"training": {"optimizer": "lion"}}).training.optimizer
    assert lion.model_dump() == {"kind": "lion", "beta1": 0.9, "beta2": 0.99}
    training = make_config({"training": {"schedule": "wsd", "moments": "bfloat16"}}).training
    assert (training.schedule.decay, training.moments.rounding) == (0.1, "stochastic")
    assert make_config({"objective": "dpo"}).objective.beta == 0.1


def test_settings_without_a_kind_are_those_of_the_default():
    adamw = make_config({"training": {"optimizer": {"beta1": 0.8}}}).training.optimizer
    assert (adamw.kind, adamw.beta1, adamw.beta2) == ("adamw", 0.8, 0.999)


@pytest.mark.parametrize("text", ["{}", "training: {optimizer: lion}", "training: {mixing: null}"])
def test_overrides_of_a_choice(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    changed = load_config(file, ["training.optimizer.beta1=0.8", "training.mixing=papa"]).training
    assert changed.optimizer.kind == ("lion" if "lion" in text else "adamw")
    assert (changed.optimizer.beta1, changed.mixing.rate) == (0.8, 0.01)
    assert load_config(file, ["training.optimizer=sgd"]).training.optimizer.momentum == 0.9
    with pytest.raises(UserError, match=r"unknown key training.optimizer.epsilon \(kind lion has"):
        load_config(file, ["training.optimizer=lion", "training.optimizer.epsilon=1"])


def test_several_seeds_of_a_merge_are_several_merges_also_when_read_back():
    methods = [
        {"method": "average"},
        {"method": "selection", "name": "drawn", "seeds": [0, 7]},
        {"method": "ties", "seeds": [1]},
    ]
    config = make_config({"merge": {"methods": methods}})
    assert [(spec.name, spec.seed) for spec in config.merge.methods] == [
        (None, None),
        ("drawn-seed0", 0),
        ("drawn-seed7", 7),
        ("ties-seed1", 1),
    ]
    assert make_config(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    with pytest.raises(UserError, match=r"selection has both seed = 1 and seeds = \[2\]; give one"):
        make_config({"merge": {"methods": [{"method": "selection", "seed": 1, "seeds": [2]}]}})
    with pytest.raises(UserError, match="the name selection-seed2 is used twice"):
        make_config(
            {
                "merge": {
                    "methods": [
                        {"method": "selection", "seeds": [2]},
                        {"method": "selection", "seed": 2},
                    ]
                }
            }
        )


def test_held_out_examples_come_from_one_place():
    with pytest.raises(
        UserError,
        match=r"data.test_examples = 5 sets examples aside from train, data.test = a.json is a",
    ):
        make_config({"data": {"test": "a.json", "test_examples": 5}})


def test_what_may_change_when_a_run_continues():
    free = {
        "output": "elsewhere",
        "mesh": {"fsdp": 2},
        "distributed": {"timeout": 5},
        "samples": {"every": 3},
        "tracking": {"tensorboard": True},
        "compilation_cache": "cache",
        "training": {"log_every": 1, "checkpoint_every": 5, "keep_checkpoints": 9, "spike": 8.0},
    }
    assert fixed_settings(make_config(free)) == fixed_settings(make_config({}))
    for fixed in (
        {"seed": 1},
        {"training": {"epochs": 1}},
        {"training": {"optimizer": {"beta1": 0.8}}},
        {"population": {"members": 2}},
        {"evaluation": {"tasks": [{"name": "sums", "kind": "number"}]}},
    ):
        assert fixed_settings(make_config(fixed)) != fixed_settings(make_config({}))


def test_the_name_of_a_merge_does_not_depend_on_the_seed_of_the_run():
    methods = [{"method": "average"}, {"method": "selection", "seed": 3}]
    names = [make_config({"seed": seed, "merge": {"methods": methods}}) for seed in (0, 3)]
    assert [config.merge_names for config in names] == [["average", "selection-seed3"]] * 2


def test_reading_a_config_does_not_import_jax():
    code = (
        "import sys; from jax_ordermerge.config import make_config\n"
        "training, tasks = {'optimizer': 'muon'}, [{'name': 'a'}]\n"
        "make_config({'evaluation': {'tasks': tasks}, 'training': training})\n"
        "sys.exit('jax' in sys.modules or 'optax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nname: a\nseed: 2\n", "the key seed is given twice, in lines 1 and 3"),
        (
            "training:\n  epochs: 1\n  batch: 4\n\n  epochs: 2\n",
            "the key epochs is given twice, in lines 2 and 5",
        ),
        (
            "merge:\n  methods:\n  - {method: ties, method: average}\n",
            "the key method is given twice, in lines 3 and 3",
        ),
        ("training: {}\n'training': {}\n", "the key training is given twice, in lines 1 and 2"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_its_lines(tmp_path, text, message):
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert str(error.value) == f"{file}: {message}; remove one"
    with pytest.raises(UserError, match=r"training=\{batch: 1, batch: 2\}: the key batch is"):
        load_config(None, ["training={batch: 1, batch: 2}"])


def test_a_key_that_a_merge_key_brings_may_be_replaced():
    text = "{common: &common {epochs: 1, batch: 4}, training: {<<: *common, epochs: 2}}"
    assert load_yaml(text, "text")["training"] == {"epochs": 2, "batch": 4}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "model.base is missing; give a Hugging Face directory"),
        ({"model": {"compute_dtype": "float32"}}, "model.base is missing"),
        (
            {"model": {"base": "x"}, "data": {"test": "t.jsonl"}},
            "data.train is missing; give a file",
        ),
    ],
)
def test_a_config_has_to_name_its_base_and_its_examples(raw, message):
    with pytest.raises(UserError, match=message):
        check_inputs(make_config(raw))


def test_a_resolved_config_names_everything():
    check_inputs(make_config({"model": {"base": "x"}, "data": {"train": "generated:quickstart"}}))
    check_inputs(make_config(to_dict(make_config({}))))


@pytest.mark.parametrize("file", sorted((FOLDER / "paper").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_configs_of_the_paper_choose_nothing_on_test(file):
    data = load_config(str(file)).data
    assert data.test is not None
    assert data.validation_examples > 0
