"""Command lines, keys, links and generated pages of the documentation against the code."""

import pathlib
import re
import shlex
import tomllib

import pytest
import typer
import yaml

import jax_ordermerge
from jax_ordermerge.cli import app
from jax_ordermerge.config.reference import list_keys
from tests import make_reference_pages

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
GROUP = typer.main.get_command(app)
KEYS = {key.path.replace("[]", ""): key for key in list_keys()}
# Their dotted names are also those of Python's modules.
OF_CODE = ("docs/architecture.md", "docs/reference/python.md")
TENSORS = ("model.language_model.layers", "model.layers")


def typed(program: str) -> list[tuple[str, str]]:
    """Return `(page, line)` of each command line of a program in a block of a page."""
    lines = []
    for page, text in TEXTS.items():
        fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        indented = re.findall(r"^ {4,}(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
        block = "\n".join(fenced).replace("\\\n", " ").splitlines()
        for line in (*indented, *block):
            for part in re.split(r" && | \| |; ", line):
                if part.strip().startswith(f"{program} "):
                    lines.append((page, part.strip()))
    return lines


def words_of(line: str) -> list[str]:
    """Return the arguments of a line without its comment."""
    return shlex.split(re.split(r"\s#", line)[0])[1:]


LINES = typed("ordermerge")


def test_there_are_command_lines():
    assert len(LINES) > 60
    assert {page for page, _ in LINES} >= {"README.md", "docs/pods.md", "docs/howto/serving.md"}


@pytest.mark.parametrize(
    ("page", "line"), LINES, ids=[f"{page}-{line}"[:90] for page, line in LINES]
)
def test_command_lines_parse(page, line):
    """By the parser of the command line itself: commands, options, types, what is required."""
    name, *arguments = words_of(line)
    if name in ("--version", "--help"):
        return
    command = GROUP.commands[name]
    command.make_context(name, arguments)


@pytest.mark.parametrize("page", TEXTS)
def test_commands_and_options_in_sentences_exist(page):
    for text in re.findall(r"`ordermerge ([^`\n]*)`", TEXTS[page]):
        name, *words = text.replace("\\|", "|").split()
        if not name.isupper():
            assert name in GROUP.commands, text
            known = {o for p in GROUP.commands[name].params for o in (*p.opts, *p.secondary_opts)}
            options = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}
            assert options <= known, text


@pytest.mark.parametrize("page", [page for page in TEXTS if page not in OF_CODE])
def test_keys_on_pages_exist(page):
    """Keys after `--set`, and dotted keys in code, are in the schema."""
    text = TEXTS[page]
    named = re.findall(r"--set '?([a-z_.]+)=", text)
    sections = "|".join({path.split(".")[0] for path in KEYS if "." in path})
    named += re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:=[^`]*)?`", text)
    files = (".json", ".yaml", ".yml", ".jsonl", ".npz")
    assert not {key for key in named if key not in KEYS and not key.endswith(files)} - {*TENSORS}


def test_extras_on_pages_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    text = "\n".join(TEXTS.values())
    named = re.findall(r"(?:jax_ordermerge|\"\.|install -e \.)\[([a-z0-9,-]+)\]", text)
    assert {extra for names in named for extra in names.split(",")} <= set(extras)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and MkDocs make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
    folder = (ROOT / page).parent
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    wrong = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith(("http", "mailto:")) or target == "./":
            continue
        file = folder / target if target else ROOT / page
        if not file.exists():
            wrong.append(target)
        elif anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            if anchor not in {slug(heading) for heading in headings}:
                wrong.append(f"{target}#{anchor}")
    assert not wrong


def test_generated_pages_are_current():
    for name, text in make_reference_pages.pages().items():
        page = make_reference_pages.FOLDER / name
        assert page.read_text() == text, "run: python tests/make_reference_pages.py"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {page.removeprefix("docs/") for page in TEXTS if page.startswith("docs/")}
    assert {page for page in pages if f": {page}\n" not in navigation} == set()


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == jax_ordermerge.__version__
