"""The layout of docs/architecture.md, held by tests: levels, who may import what, sizes."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jax_ordermerge"
LEVELS = {
    "errors": -3,
    "section": -2,
    "merge_config": -1,
    "mixing": -1,
    "samples": -1,
    "task": -1,
    "config": 0,
    "arch": 0,
    "hardware": 0,
    "processes": 0,
    "rng": 1,
    "mesh": 1,
    "tree": 1,
    "model": 2,
    "checkpoint": 2,
    "data": 3,
    "merge": 3,
    "train": 4,
    "evaluate": 4,
    "analysis": 4,
    "plan": 5,
    "search": 5,
    "report": 5,
    "launch": 5,
    "doctor": 5,
    "comparison": 6,
    "results": 6,
    "experiment": 6,
    "cli": 7,
}
MAY_IMPORT = {
    "flax": ("model/",),
    "orbax": ("checkpoint/",),
    "safetensors": ("checkpoint/",),
    "matplotlib": ("analysis/plots.py", "report.py"),
    "transformers": ("data/", "evaluate/"),
    "datasets": ("data/", "evaluate/"),
    "tensorboardX": ("train/track.py",),
    "wandb": ("train/track.py",),
    "optuna": ("search/sampling.py",),
    "lm_eval": ("evaluate/",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    if room(path) in ("__init__", "__main__"):
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "jax_ordermerge" or len(parts) < 2:
            continue
        own, other = room(path), parts[1]
        assert LEVELS[other] < LEVELS[own] or (own == other and path.parent != PACKAGE), (
            f"{path.name} imports {name}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path):
    relative = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        allowed = MAY_IMPORT.get(name.split(".")[0])
        assert allowed is None or relative.startswith(allowed), f"{relative} imports {name}"
        assert not (
            room(path)
            in (
                "errors",
                "section",
                "samples",
                "task",
                "merge_config",
                "config",
                "arch",
                "hardware",
            )
            and name.split(".")[0] == "jax"
        ), f"{relative} imports jax"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name} is too long"
            assert len(node.args.args) <= 7, (
                f"{path.name}: {node.name} takes too many positional parameters"
            )
