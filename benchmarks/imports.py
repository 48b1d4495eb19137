"""What importing each core dependency costs, for docs/reference/dependencies.md.

    python benchmarks/imports.py

Each is imported in a fresh process, alone. Two figures, the least of five: wall milliseconds of
`-X importtime`, and CPU milliseconds less those of an empty program, which hold on a busy machine.
"""

import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where the module has another name than the distribution, or a part of it is what we import.
MODULES = {
    "flax": "flax.linen",
    "orbax-checkpoint": "orbax.checkpoint",
    "huggingface-hub": "huggingface_hub",
    "ml-dtypes": "ml_dtypes",
    "pyyaml": "yaml",
}


def measure(program: str) -> tuple[float, float]:
    """Return wall milliseconds of the last import and CPU milliseconds of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return int(lines[-1].split("|")[1]) / 1e3, 1e3 * cpu


def main() -> None:
    """Print a row per dependency, and one for the package itself."""
    text = (ROOT / "pyproject.toml").read_text()
    names = [
        requirement.split(">")[0] for requirement in tomllib.loads(text)["project"]["dependencies"]
    ]
    modules = [MODULES.get(name, name) for name in names] + ["jax_ordermerge"]
    empty = min(measure("pass")[1] for _ in range(5))
    print("| module | wall ms | CPU ms |\n|---|--:|--:|")
    for module in modules:
        runs = [measure(f"import {module}") for _ in range(5)]
        wall, cpu = (min(column) for column in zip(*runs, strict=True))
        print(f"| `{module}` | {wall:,.0f} | {max(cpu - empty, 0):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
