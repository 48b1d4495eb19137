"""The notebook: short, without stored outputs, and every cell runs."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = json.loads(
    (pathlib.Path(__file__).parents[1] / "examples" / "order_merging.ipynb").read_text()
)
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def as_python(cell: str) -> str:
    """Return a cell as a program that prints the value of its last line, as a notebook shows it."""
    # IPython is where notebooks run, and is not among the packages of the tests
    cell = cell.replace("from IPython.display import Markdown", "Markdown = str")
    plain = "\n".join(
        line.replace(line.strip(), "pass") if line.strip().startswith("!") else line
        for line in cell.splitlines()
    )
    tree = ast.parse(plain)
    if isinstance(last := tree.body[-1], ast.Expr):
        call = ast.Call(ast.Name("print", ast.Load()), [last.value], [])
        tree.body[-1] = ast.copy_location(ast.Expr(call), last)
    return ast.unparse(ast.fix_missing_locations(tree))


def test_it_is_short_and_stores_no_output():
    assert NOTEBOOK["nbformat"] == 4
    assert len(CELLS) <= 10
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    program = tmp_path / "notebook.py"
    # as a notebook does, an expression at the end of a cell is shown
    program.write_text("\n".join(map(as_python, CELLS)))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    root = pathlib.Path(__file__).parents[1]
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    # the orders of the two members, their losses, the report and an answer
    assert "'member_0': " in done.stdout
    assert "'average': " in done.stdout
    assert "What to ship" in done.stdout
    assert "=" in done.stdout.splitlines()[-1]
