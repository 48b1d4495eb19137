"""YAML on the pages: every block and every inline section parses in the schema of today."""

import csv
import pathlib
import re
import textwrap

import pytest
import yaml

from jax_ordermerge.config import Config, make_config, read_search
from jax_ordermerge.config.hypotheses import read_hypotheses
from jax_ordermerge.merge.recipe import schema
from tests import make_models_page

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = set(Config.model_fields)
# What a fragment needs besides itself to be a config.
CONTEXT = {
    "mixing": {"population": {"members": 2}},
    "merge": {"data": {"validation_examples": 8}},
}


def blocks(text: str) -> list[str]:
    """Return the indented and the fenced blocks of a page."""
    fenced = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    return fenced + [textwrap.dedent(block).strip("\n") for block in indented]


def fragments() -> list[tuple[str, str]]:
    """Return `(page, yaml)` of everything that begins with a section of the config."""
    examples = []
    for page in PAGES:
        if page.name == "recipes.md":  # recipes have a schema of their own
            continue
        text = page.read_text()
        for block in blocks(text):
            if "merge_method:" in block:
                continue
            # consecutive one-line sections may repeat a key: each is an example of its own
            lines = block.splitlines()
            one_line = all(re.match(r"[a-z]+: \{.*\}$", line) for line in lines)
            for example in lines if one_line else [block]:
                if re.match(r"[a-z_]+:", example) and example.split(":")[0] in SECTIONS:
                    examples.append((page.name, example))
        for example in re.findall(r"`([a-z_]+: \{[^`]*\})`", text):
            if example.split(":")[0] in SECTIONS and "..." not in example:
                examples.append((page.name, example))
    return examples


FRAGMENTS = fragments()


@pytest.mark.parametrize(("page", "text"), FRAGMENTS, ids=[page for page, _ in FRAGMENTS])
def test_sections_on_pages_are_valid(page, text):
    raw = yaml.safe_load(text)
    for key, context in CONTEXT.items():
        if key in text:
            raw = {**context, **raw}
    assert make_config(raw)


def test_there_are_sections_on_pages():
    assert len(FRAGMENTS) >= 6


def test_the_search_space_of_its_page_is_valid(tmp_path):
    page = (ROOT / "docs" / "which_merge.md").read_text()
    text = next(block for block in blocks(page) if block.startswith("methods:"))
    (tmp_path / "space.yaml").write_text(text)
    space = read_search(tmp_path / "space.yaml", None, {})
    assert [entry.method for entry in space.methods] == ["task_arithmetic", "ties", "average"]


@pytest.mark.parametrize("kind", ["adamw", "{kind: adamw, beta2: 0.95}"])
def test_optimizers_as_the_page_of_settings_writes_them(kind):
    assert f"`optimizer: {kind}`" in (ROOT / "docs" / "howto" / "settings.md").read_text()
    assert make_config({"training": {"optimizer": yaml.safe_load(kind)}})


RECIPES = [
    (page.name, part)
    for page in PAGES
    for block in blocks(page.read_text())
    for part in block.split("\n---\n")
    if "merge_method:" in part
]


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=[page for page, _ in RECIPES])
def test_recipes_on_pages_are_valid(page, text):
    raw = yaml.safe_load(text)
    raw.pop("name", None)  # of one of several recipes in a file
    recipe = schema.parse(raw, page)
    assert recipe.merge_method == raw["merge_method"]


def test_there_are_recipes_on_pages():
    assert {page for page, _ in RECIPES} >= {"recipes.md", "runs.md", "merge_anything.md"}


@pytest.mark.parametrize(
    ("page", "count"), [("docs/paper.md", 42), ("docs/which_merge.md", 9), ("README.md", 6)]
)
def test_estimates_on_pages_are_those_of_the_runs(page, count):
    """What is written by hand about the study is in the table that was computed from its runs."""
    number = r"[-+]\d\.\d{4}"
    text = " ".join((ROOT / page).read_text().split()).partition("<details>")[0]
    text = re.sub(r"^.*?## What the runs say|## Merging or length.*$", "", text)
    computed = set()
    for path in (ROOT / "docs").glob("results*_hypotheses.csv"):
        with path.open(newline="") as table:
            rows = [row for row in csv.DictReader(table) if row["population"] == "all"]
        for row in rows:
            parts = (float(row[column]) for column in ("estimate", "low", "high"))
            computed.add("{:+.4f} [{:+.4f}, {:+.4f}]".format(*parts))
    # tables that a benchmark has printed
    printed = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    cells = re.findall(rf"\| ({number}) \| (\[{number}, {number}\]) \|", printed)
    computed |= {f"{estimate} {bounds}" for estimate, bounds in cells}
    written = re.findall(rf"{number} \[{number}, {number}\]", text)
    assert len(written) >= count
    assert not [estimate for estimate in written if estimate not in computed]


@pytest.mark.parametrize(
    ("plan", "page"),
    [
        ("small.yaml", "results.md"),
        ("preferences.yaml", "results_preferences.md"),
        ("smollm2.yaml", "results_smollm2.md"),
        ("gsm8k.yaml", "results_gsm8k.md"),
    ],
)
def test_the_results_are_of_the_plan_that_is_committed(plan, page):
    digest = read_hypotheses(ROOT / "configs" / "hypotheses" / plan).digest
    assert f"SHA-256 {digest}" in (ROOT / "docs" / page).read_text()


def test_the_tables_of_models_are_those_of_the_code():
    page = make_models_page.PAGE.read_text()
    assert page.count("by tests/make_models_page.py") == page.count("<!-- end of ") == 2
    assert make_models_page.with_tables(page) == page, "run: python tests/make_models_page.py"
    # what the tables say of keys is found by trying, here by two that are known
    assert "| `smollm3` | `SmolLM3ForCausalLM` |" in page
    assert "| `mistral-7b-v0.1` 7.24, `mistral-7b-v0.3` 7.25 |" in page
