"""Cost of a search: 200 candidates on the quickstart's population, against training one member.

    python benchmarks/search.py --work WORK    # about 3 minutes on two CPU cores

WORK keeps the trained population for the next time. Each program is a separate process without a
cache of compiled programs: `ordermerge train` with one member, and `ordermerge search` over the
four members with 200 candidates, without the export of the winner. Wall times include the start of
JAX, reading the inputs and compilation. The table is appended to benchmarks/RESULTS.md. For the
memory of a search see tests/experiment/test_search.py.
"""

import argparse
import datetime as dt
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import jax
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
VALIDATION = 256
SPACE = {
    "budget": 200,
    "sampler": "random",
    "methods": [
        {"method": "task_arithmetic", "parameters": {"scale": {"low": 0.5, "high": 2.0}}},
        {"method": "average", "weights": "simplex", "scale": {"low": 0.8, "high": 1.6}},
        {
            "method": "average",
            "scale": {"low": 0.8, "high": 1.6},
            "groups": {"mlp": {"low": 0.7, "high": 1.3}},
        },
        {
            "method": "selection",
            "parameters": {"resample": [0, "exhaustive"]},
            "scale": {"low": 0.8, "high": 1.6},
        },
        {
            "method": "ties",
            "parameters": {"density": {"low": 0.3, "high": 0.9}},
            "scale": {"low": 0.8, "high": 1.6},
        },
    ],
}


def timed(*arguments: str) -> float:
    """Run the command line in a new process and return its wall time in seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jax_ordermerge", *arguments], check=True, env=environment, cwd=ROOT
    )
    return time.perf_counter() - start


def main() -> None:
    """Train, search, and append the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=pathlib.Path, required=True, help="directory for the runs")
    work = parser.parse_args().work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    config = [
        "configs/quickstart.yaml",
        "--set",
        f"data.validation_examples={VALIDATION}",
        "--set",
        "data.test=null",
    ]
    if not (work / "four" / "metrics" / "state.json").is_file():
        timed("train", *config, "--set", f"output={work / 'four'}", "--set", "evaluation.tasks=[]")
    (work / "space.yaml").write_text(yaml.safe_dump(SPACE))
    for name in ("one", "out"):
        shutil.rmtree(work / name, ignore_errors=True)
    load = os.getloadavg()[0]
    alone = ["population.members=1", "evaluation.tasks=[]", f"output={work / 'one'}"]
    member = timed("train", *config, *(x for setting in alone for x in ("--set", setting)))
    space, out = str(work / "space.yaml"), work / "out"
    search = timed("search", str(work / "four"), "--space", space, "--out", str(out), "--no-export")
    results = json.loads((out / "results.json").read_text())
    written = sorted(path.name for path in out.iterdir())
    cpu = platform.processor() or platform.machine()
    rounds = ", ".join(map(str, results["settings"]["sizes"]))
    table = f"""
## Search, {dt.date.today()}, {os.cpu_count()} x {cpu} cpu, jax {jax.__version__}

`python benchmarks/search.py --work WORK`: {results["tried"]} candidates (200 of five methods, \
members, average, base), {results["examples"]} validation examples, rounds of {rounds}; \
{results["measured_fully"]} were measured on all. One round; load average {load:.2f} at the start. \
Written: {", ".join(written)}.

| what | wall s |
|---|---|
| `ordermerge train`, one member, 3 epochs | {member:.1f} |
| `ordermerge search`, 200 candidates | {search:.1f}, of which the search {results["seconds"]:.1f} |
| ratio | {search / member:.2f} |
"""
    print(table)
    with (ROOT / "benchmarks" / "RESULTS.md").open("a") as file:
        file.write(table)


if __name__ == "__main__":
    main()
