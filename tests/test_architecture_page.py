"""docs/architecture.md and the page of dependencies against the code: layers, tables, files, names."""

import re
import tomllib

from tests.test_architecture import FILES, LAYERS, LEVELS, PACKAGE, module

ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SOURCES = {module(path): path.read_text() for path in FILES}


def rows_of_packages() -> list[tuple[str, ...]]:
    """Return the packages of each row of the picture, from the top."""
    block = re.search(r"\n\n((?:    .*\n)+)", PAGE.split("## Packages")[1])[1]
    rows = []
    for line in block.splitlines():
        names = []
        for word in line.replace(",", " ").split():
            if word not in LEVELS:
                break  # what follows says what the package is
            names.append(word)
        rows.append(tuple(names))
    return rows


def test_the_picture_of_the_layers_is_what_the_test_of_imports_holds():
    assert [set(row) for row in rows_of_packages()] == [set(row) for row in reversed(LAYERS)]


def test_the_table_of_packages_names_packages_and_no_other():
    table = PAGE.split("| package | what it is for")[1].split("\n\n")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named <= set(LEVELS)
    # these two are described by their rows in the picture
    assert set(LEVELS) - named <= {"cli", "commands"}


def test_every_registry_is_in_the_table_of_additions():
    table = PAGE.split("## To add something")[1].split("## Contracts")[0]
    registries = {}
    for path in FILES:
        for name, package in re.findall(
            r'^(\w+) = Registry\[[\w\[\], ]+\]\(\s*"[^"]*",\s*"jax_ordermerge\.([\w.]+)"',
            path.read_text(),
            re.MULTILINE,
        ):
            registries[name] = package.replace(".", "/")
    assert len(registries) >= 4
    for name, package in registries.items():
        assert f"{name}.register(" in table, name
        assert f"`{package}/`" in table, package


def test_files_that_the_page_names_exist():
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|html|css|js))?)`", PAGE))
    assert len(named) > 15
    # of a package the page often leaves out its own name
    paths = [path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*")]
    paths = [f"/{path}/" if (ROOT / path).is_dir() else f"/{path}" for path in paths]
    missing = [
        name
        for name in named
        if not (ROOT / name).exists() and not any(path.endswith(f"/{name}") for path in paths)
    ]
    assert not missing


def test_names_of_the_code_that_the_page_names_exist():
    """`engine.merge_plan` is in some module called engine."""
    missing, checked = [], 0
    for parts, name in re.findall(r"`((?:[a-z_]+\.)+)([A-Za-z_]+)(?=[`(])", PAGE):
        text = parts.removesuffix(".")
        modules = [key for key in SOURCES if key.endswith(f".{text}")]
        if not modules or name in ("json", "yaml", "py", "html", "md", "jsonl", "npz"):
            continue
        checked += 1
        pattern = re.compile(
            rf"^(?:    )*(?:async )?(?:def|class) {name}\b|\b{name}\b\s*(?::|=)|import.*\b{name}\b",
            re.MULTILINE,
        )
        # a section of the config may have the name of a module
        if not any(pattern.search(SOURCES[key]) for key in modules):
            missing.append(f"{text}.{name}")
    assert checked > 20
    assert not missing


def test_the_table_of_dependencies_is_complete():
    text = (ROOT / "docs" / "reference" / "dependencies.md").read_text()
    rows = set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rows == {re.split(r"[<>=]", name)[0] for name in project["dependencies"]}
    extras = set(project["optional-dependencies"])
    named = set(re.findall(r"`([\w-]+)`", text.split("Extras and what they are for")[1]))
    assert extras <= named
