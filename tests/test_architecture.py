"""The rules of docs/architecture.md that a test can hold: layers, circles, libraries, run paths, sizes."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jax_ordermerge"
FILES = sorted(PACKAGE.rglob("*.py"))
# Imports go down this list. Packages on one line do not import each other.
LAYERS = [
    ("errors", "tree", "json_types", "user_cache", "console"),
    ("registry",),
    ("rng", "hardware", "arch", "mesh_shape", "program_cache"),
    ("fusion", "hash_rng", "mesh", "processes"),
    ("config",),
    ("analysis", "checkpoint", "model"),
    ("layout", "data"),
    ("record",),
    ("merge",),
    ("evaluate",),
    ("train",),
    ("report", "search", "plan", "launch"),
    ("experiment",),
    ("commands",),
    ("cli",),
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
# Only these may import the library (a prefix of the path inside the package).
LIBRARIES = {
    "flax": ("model/",),
    "orbax": ("checkpoint/",),
    "matplotlib": ("report/",),
    "torch": ("checkpoint/torch_files.py",),
    "transformers": ("data/", "evaluate/"),
    "datasets": ("data/", "evaluate/"),
    "tensorboardX": ("train/trackers.py",),
    "wandb": ("train/trackers.py",),
    "trackio": ("train/trackers.py",),
    "optuna": ("search/sampling.py",),
    "lm_eval": ("evaluate/",),
    "math_verify": ("evaluate/symbolic_worker.py",),
    "sympy": ("evaluate/symbolic_worker.py",),
    "gguf": ("checkpoint/gguf_metadata.py",),
    "qwix": ("model/quantization.py",),
}
WITHOUT_JAX = ("errors", "config", "arch", "hardware", "mesh_shape", "report", "launch")
# A string that spells a path inside a run directory.
RUN_PATHS = re.compile(
    r"(metrics|waves|orders|losses|merged|evaluations|outputs|reference|tracking|checkpoints)/?"
    r"|(stages|waves|merge|data|controls|analysis|evaluations|state)\.json|config\.yaml"
    r"|(train|samples|journal)\.jsonl|(final|train|controls)\.npz|(report|search)\.(html|md)"
)


def identify(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def package(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def imports(path: pathlib.Path) -> set[str]:
    """Return the modules that a file imports anywhere: at its top, in a function, for types."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in MODULES else node.module)
    return names


IMPORTS = {module(path): imports(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_imports_go_down(path):
    if package(path) in ("__init__", "__main__"):
        return
    for name in IMPORTS[module(path)]:
        root, _, inner = name.partition(".")
        target = inner.split(".")[0]
        if root == "jax_ordermerge" and target and target != package(path):
            assert LEVELS[target] < LEVELS[package(path)], f"{module(path)} imports {name}"


def test_no_module_reaches_itself():
    """Also within a package, and also by imports inside functions and for types."""
    circles = set()
    for start in IMPORTS:
        seen, stack = set(), list(IMPORTS[start] & MODULES)
        while stack:
            current = stack.pop()
            if current == start:
                circles.add(start)
            elif current not in seen:
                seen.add(current)
                stack.extend(IMPORTS[current] & MODULES)
    assert not circles


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_libraries_stay_in_their_packages(path):
    for name in IMPORTS[module(path)]:
        allowed = LIBRARIES.get(name.split(".")[0])
        assert allowed is None or identify(path).startswith(allowed), f"imports {name}"
        assert package(path) not in WITHOUT_JAX or name.split(".")[0] != "jax"


def test_the_rules_guard_something():
    """Every library named above is imported somewhere, else a rule has lost its object."""
    imported = {name.split(".")[0] for names in IMPORTS.values() for name in names}
    assert set(LIBRARIES) <= imported
    assert {package(path) for path in FILES} - {"__init__", "__main__"} == set(LEVELS)


def test_what_is_imported_is_declared_and_the_reverse():
    """Core dependencies are what the package imports; the other imports belong to an extra."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    modules = {"orbax-checkpoint": "orbax", "pyyaml": "yaml", "jax": "jax", "lm-eval": "lm_eval"}

    def imported_as(requirements: list[str]) -> set[str]:
        names = {re.split(r"[\[<>=!~ ]", requirement)[0] for requirement in requirements}
        return {modules.get(name, name.replace("-", "_")) for name in names}

    core = imported_as(project["dependencies"])
    extras = set().union(*map(imported_as, project["optional-dependencies"].values()))
    imported = {name.split(".")[0] for names in IMPORTS.values() for name in names}
    imported -= {"jax_ordermerge", *sys.stdlib_module_names}
    assert core <= imported
    assert imported <= core | extras


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_only_experiment_and_above_import_the_whole_config(path):
    # the record of a run compares whole configs: it says which stage reads which part
    if (
        package(path) in ("config", "record")
        or LEVELS.get(package(path), 99) >= LEVELS["experiment"]
    ):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in (
            "jax_ordermerge.config",
            "jax_ordermerge.config.experiment",
        ):
            assert "Config" not in {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and node.attr == "Config":
            assert not (isinstance(node.value, ast.Name) and node.value.id in ("config", "schema"))


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_only_layout_spells_paths_of_a_run(path):
    """A path is a string joined by `/`, given to `glob`, or in an f-string; keys of dicts are not."""
    if package(path) == "layout":
        return
    spelled = []
    for node in ast.walk(ast.parse(path.read_text())):
        parts: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("glob", "rglob", "joinpath", "with_name")
        ):
            parts = list(node.args)
        for part in parts:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    spelled += [x for x in leaf.value.split("/") if RUN_PATHS.fullmatch(x)]
    assert not spelled


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name} is too long"
            assert len(node.args.args) <= 7, f"{node.name} takes too many positional parameters"
