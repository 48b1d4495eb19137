"""A run directory becomes a page that parses, loads nothing, and says what the numbers say."""

import functools
import html.parser
import json
import operator
import re
import xml.etree.ElementTree as ET

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jax_ordermerge.analysis import imbalance
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.config import Config, to_dict
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import diagnostics
from jax_ordermerge.report import run_report
from jax_ordermerge.report.chapters import models as chapter

MEMBERS = ["member_0", "member_1", "member_2"]
NAMES = ["base", *MEMBERS, "average", "selection"]
VOID = {"meta", "br", "link", "img", "hr"}


class Page(html.parser.HTMLParser):
    """Checks nesting and gathers tags, ids, texts and references."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False))


def evaluation(directory, names=NAMES, count=120):
    """Write items: the average is better than the members by 0.05, selection is like a member."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(2, 0.5, count)
    models = []
    for number, name in enumerate(names):
        kind = "base" if name == "base" else "member" if name.startswith("member") else "merge"
        shift = {"base": 3.0, "average": -0.05}.get(name, 0.0)
        losses = difficulty + shift + rng.normal(0, 0.02, count)
        correct = rng.random(count) < {"base": 0.0, "average": 0.9}.get(name, 0.45)
        items = [
            {
                "id": i,
                "prompt": f"<b>what</b> | is {i}?",
                "reference": str(i),
                "answer": f"{name} says *{i}*",
                "correct": bool(c),
            }
            for i, c in enumerate(correct)
        ]
        dump(
            directory / "evaluations" / f"{name}.json",
            {"losses": losses.tolist(), "ids": list(range(count)), "tasks": {"sums": items}},
        )
        models.append(
            {
                "name": name,
                "kind": kind,
                "loss": losses.mean(),
                "loss_se": losses.std() / 11,
                "perplexity": np.exp(losses.mean()),
                "validation_loss": 2.0 - 0.1 * (number == 2) if kind == "member" else None,
                "tokens": 4321,
                "tasks": {"sums": {"accuracy": correct.mean(), "se": 0.045, "n": count}},
            }
        )
    dump(directory / "evaluations.json", {"models": models, "split": "test"})
    return models


def training(directory, members=3):
    config = Config.model_validate(
        {"name": "trial", "population": {"members": members}, "evaluation": {"bootstrap": 200}}
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    dump(
        directory / "data.json",
        {"train": {"source": "x.jsonl", "digest": "d1g3st", "counts": {"used": 200, "dropped": 3}}},
    )
    dump(directory / "orders" / "digests.json", {"member_0": "0rd3r"})
    lines = [
        {
            "step": s,
            "epoch": s / 10,
            "learning_rate": 1e-3 * (1 - s / 30),
            "loss": [(2 + 0.1 * member) / s for member in range(members)],
            "grad_norm": [1] * members,
            "tokens_per_second": 5.0,
            "seconds": s,
        }
        for s in range(1, 30)
    ]
    (directory / "metrics").mkdir()
    (directory / "metrics" / "train.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    state = {
        "seconds": 12.5,
        "tokens": 99,
        "device": "cpu",
        "devices": 8,
        "compilations": 1,
        "versions": {"jax": "0.10"},
        "parameters": 7,
        "fused_members": 3,
    }
    dump(directory / "metrics" / "state.json", state)


def analysis(directory, members=3, names=NAMES[4:], count=200, epochs=2):
    rng = np.random.default_rng(1)
    x = np.stack(
        [[rng.permutation(count) / (count - 1) for _ in range(epochs)] for _ in range(members)]
    )
    losses = rng.normal(2, 0.4, count) - 0.2 * x[:, 0] + rng.normal(0, 0.05, (members, count))
    merged = {
        name: losses.mean(axis=0) + rng.normal(0, 0.01 * number, count)
        for number, name in enumerate(names, start=1)
    }
    document = asdict(
        imbalance.analyze(losses, x, merged, warmup_fraction=0.03, bootstrap=50, permutations=49)
    )
    dump(directory / "analysis.json", document)
    return document


def merges(directory, names=NAMES[4:], members=3):
    total = {
        "cosines": [
            [1 if i == j else 1 - 0.1 * (i + j) for j in range(members)] for i in range(members)
        ],
        "unchanged": [0.31 + 0.01 * member for member in range(members)],
        "unchanged_by_all": 0.123,
        "norm_ratio": 0.876,
        "lambda_eff": 1.234,
    }
    rows = [
        {
            "name": n,
            "method": n,
            "seed": 4,
            "weights": None,
            "parameters": {"resample": 2},
            "diagnostics": {"total": total, "tensors": {}},
        }
        for n in names
    ]
    dump(directory / "merge.json", {"merges": rows, "dtype": "bfloat16"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    training(directory)
    models, statistics = evaluation(directory), analysis(directory)
    merges(directory)
    page = run_report.write(directory)
    return directory, page.read_text(), (directory / "report.md").read_text(), models, statistics


def test_the_page_is_one_whole_file(run):
    directory, text, _, _, _ = run
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert all(
        reference[1:] in page.ids for reference in page.references if reference.startswith("#")
    )
    # the only addresses are the names of xml vocabularies, which nothing fetches
    assert set(re.findall(r"https?://[^\"'\s<>)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.tags.count("svg") == len(list((directory / "report").glob("*.svg"))) > 7


def test_the_page_says_what_the_numbers_say(run):
    _, text, markdown, models, statistics = run
    slope = statistics["fixed_effects"]["coefficients"][0]
    assert slope["estimate"] < -0.15
    for page in (text, markdown):
        for model in models:
            assert f"{model['loss']:.4f}" in page
            assert f"{100 * model['tasks']['sums']['accuracy']:.1f}" in page
        assert f"{slope['estimate']:+.4f}" in page
        assert "samples seen early end with the higher loss, clearly" in page
        assert "member_1 (best by loss on validation)" in page
        for detail in (
            "31.0 32.0 33.0",
            "12.3",
            "0.876",
            "1.234",
            "d1g3st",
            "0rd3r",
            "12.5 s",
            "3 members at a time in one program (lora.fused)",
            "resample=2",
            "dropped 3",
            "4321",
        ):
            assert detail in page


def test_the_verdicts_follow_the_planted_differences(run):
    _, _, markdown, models, _ = run
    mean = np.mean([model["loss"] for model in models[1:4]])
    (line,) = [
        line for line in markdown.splitlines() if line.startswith("- average, held-out loss")
    ]
    assert f"clearly better ({models[4]['loss'] - mean:+.4f}" in line
    assert "the best member by loss (member_1, chosen on validation)" in line
    (line,) = [line for line in markdown.splitlines() if line.startswith("- average, sums")]
    assert line.count("clearly better") == 2
    (line,) = [
        line for line in markdown.splitlines() if line.startswith("- selection, held-out loss")
    ]
    assert line.count("not distinguishable") == 2
    assert "10 comparisons" in markdown


def test_the_markdown_shows_the_same_pictures(run):
    directory, text, markdown, _, _ = run
    files = re.findall(r"\]\((report/[\w.-]+\.svg)\)", markdown)
    assert len(files) == len(set(files)) == text.count("<svg")
    for file in files:
        svg = (directory / file).read_text()
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert svg.strip() in text


def test_what_models_wrote_is_text_and_not_markup(run):
    _, text, markdown, _, _ = run
    assert "&lt;b&gt;what&lt;/b&gt; | is" in text
    assert "<b>" not in text
    assert "&lt;b&gt;what&lt;/b&gt; \\| is" in markdown
    assert "average says \\*" in markdown


def test_items_on_which_members_and_merges_differ_come_first(run):
    directory, _, markdown, _, _ = run
    shown = [int(key) for key in re.findall(r"### sums, item (\d+)", markdown)]
    assert len(shown) == chapter.ITEMS_SHOWN
    right = [
        [
            row["correct"]
            for row in json.loads((directory / "evaluations" / f"{n}.json").read_text())["tasks"][
                "sums"
            ]
        ]
        for n in NAMES
    ]
    # of three members and two merges; the base, which is always wrong, counts for nothing
    apart = np.abs(np.mean(right[1:4], axis=0) - np.mean(right[4:], axis=0))
    assert shown == np.argsort(-apart, kind="stable")[: len(shown)].tolist()


def test_diagnostics_of_a_merge_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text("name: vectors\n")
    for members, shown in (
        (jnp.array([[1.0, 0.0], [1.0, 1.0]]), "mean cosine of 0.707"),
        (jnp.zeros((2, 2)), "task vectors are zero"),
    ):
        moments = diagnostics.total(diagnostics.moments(members, jnp.zeros(2), members[0]))
        row = {"name": "first", "method": "average", "seed": 0, "weights": None, "parameters": {}}
        dump(
            tmp_path / "merge.json",
            {
                "merges": [row | {"diagnostics": diagnostics.report([("a", moments, 2)])}],
                "dtype": "float32",
            },
        )
        assert shown in run_report.write(tmp_path).with_suffix(".md").read_text()


def test_twice_gives_the_same_bytes(run):
    directory, text, markdown, _, _ = run
    run_report.write(directory)
    assert (directory / "report.html").read_text() == text
    assert (directory / "report.md").read_text() == markdown
    assert not list(directory.rglob("*.partial"))


def test_absent_stages_are_named(tmp_path):
    (tmp_path / "config.yaml").write_text("name: early\n")
    text = run_report.write(tmp_path).read_text()
    for file in (
        "evaluations.json",
        "metrics/train.jsonl",
        "analysis.json",
        "merge.json",
        "metrics/state.json",
        "data.json",
    ):
        assert f"{file} is missing" in text
    assert "Nothing yet" in text


def test_an_analysis_of_an_earlier_version_makes_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: earlier\n")
    document = analysis(tmp_path)
    for key in ("omnibus", "explained", "by_base_loss"):
        document.pop(key, None)
    del document["design"]["unit"], document["design"]["units"]
    del document["pooled"]["trajectory"]
    for gap in document["pooled"]["early_late"]:
        del gap["share_left"], gap["expected"]
    for fit in (document["fixed_effects"], document["fixed_effects_warmup"]):
        del fit["step_correlation"]
        for row in fit["coefficients"]:
            del row["percent"]
    for merge in document["merged"].values():
        for gap in merge["early_late"]:
            del gap["expected"], gap["excess"]
    dump(tmp_path / "analysis.json", document)
    markdown = run_report.write(tmp_path).with_suffix(".md").read_text()
    assert "– (the analysis was made by an earlier version)" in markdown
    assert "After merging: the gap is largest in epoch 1" in markdown
    assert "plain average of the losses" not in markdown


def test_data_of_before_there_were_mixtures_make_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: earlier\n")
    source = {"data": "a.jsonl", "format": "question_answer", "template": "gsm8k"}
    data = {"source": "a.jsonl", "sources": source, "digest": "edbb", "examples": 200}
    dump(tmp_path / "data.json", {"train": data})
    assert "200 examples" in run_report.write(tmp_path).with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("stage", "file", "keys", "remedy"),
    [
        (analysis, "analysis.json", ("design",), "remove it, and ordermerge analyze RUN"),
        (analysis, "analysis.json", ("pooled", "early_late"), "ordermerge analyze RUN"),
        (analysis, "analysis.json", ("pooled", "early_late", 0, "estimate"), "ordermerge analyze"),
        (merges, "merge.json", ("merges",), "remove it, and ordermerge merge RUN"),
        (evaluation, "evaluations.json", ("models",), "remove it, and ordermerge evaluate RUN"),
        (
            evaluation,
            "evaluations/average.json",
            ("ids",),
            "remove it and evaluations.json of the run, and ordermerge evaluate RUN",
        ),
    ],
)
def test_a_result_without_a_key_names_the_stage_to_do_again(tmp_path, stage, file, keys, remedy):
    (tmp_path / "config.yaml").write_text("name: earlier\n")
    stage(tmp_path)
    document = json.loads((tmp_path / file).read_text())
    *outer, key = keys
    del functools.reduce(operator.getitem, outer, document)[key]
    dump(tmp_path / file, document)
    with pytest.raises(UserError, match=re.escape(f"{file} has no {key}")) as error:
        run_report.write(tmp_path)
    assert remedy in str(error.value)


@pytest.mark.parametrize("stage", [training, analysis, merges, evaluation])
def test_each_stage_alone_makes_a_page(tmp_path, stage):
    (tmp_path / "config.yaml").write_text("name: part\n")
    stage(tmp_path)
    page = Page()
    page.feed(run_report.write(tmp_path).read_text())
    assert page.open == []
    assert "svg" in page.tags


def test_one_member_without_validation_or_items(tmp_path):
    (tmp_path / "config.yaml").write_text("name: one\n")
    statistics = analysis(tmp_path, members=1)
    assert "reason" in statistics["fixed_effects"]
    model = {
        "kind": "member",
        "loss": 2.0,
        "loss_se": 0.1,
        "perplexity": 7.4,
        "validation_loss": None,
        "tokens": 5,
        "tasks": {},
    }
    dump(
        tmp_path / "evaluations.json",
        {
            "models": [
                {"name": "member_0", **model},
                {"name": "average", **model, "kind": "merge"},
            ],
            "split": "test",
        },
    )
    text = run_report.write(tmp_path).read_text()
    assert "one member only" in text
    assert "member_0 (best by loss on test)" in text
    assert not re.search(
        r"\b(nan|inf|None)\b", text.partition("What was found")[2].partition("Provenance")[0]
    )


def test_a_merge_on_other_items_is_not_compared(tmp_path):
    (tmp_path / "config.yaml").write_text("name: other\n")
    evaluation(tmp_path)
    file = tmp_path / "evaluations" / "average.json"
    changed = json.loads(file.read_text())
    changed["ids"] = changed["ids"][::-1]
    changed["tasks"] = {}
    file.write_text(json.dumps(changed))
    markdown = run_report.write(tmp_path).with_suffix(".md").read_text()
    assert "- average, held-out loss" not in markdown
    assert "- selection, held-out loss" in markdown


def test_no_run_and_broken_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        run_report.write(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "analysis.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"analysis\.json is not valid JSON"):
        run_report.write(tmp_path)
    (tmp_path / "analysis.json").unlink()
    for name, stage in (("analysis", "analyze"), ("merge", "merge"), ("evaluations", "evaluate")):
        (tmp_path / f"{name}.json").write_text("[]")
        expected = rf"{name}\.json holds no JSON object: .* ordermerge {stage} RUN writes it again"
        with pytest.raises(UserError, match=expected):
            run_report.write(tmp_path)
        (tmp_path / f"{name}.json").unlink()
    assert not (tmp_path / "report.html").exists()
