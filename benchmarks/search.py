"""What a search costs: 200 candidates on the quickstart's population against the training of one of its members.

    python benchmarks/search.py --work WORK          # about 3 minutes on two CPU cores; WORK keeps the trained population for the next time

Each program is a process of its own, started cold (no cache of compiled programs): wall time of `ordermerge train` with one member, and of
`ordermerge search` over the four members with a space of 200 candidates, without the export of the winner. Both read their inputs, start
JAX and compile. Appends the table to benchmarks/RESULTS.md. The memory is what jax holds while a candidate is measured (tests/experiment/test_choosing.py).
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
    """Run the command line in a process of its own and return its wall time in seconds."""
    environment = {
        key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
    }
    environment["PYTHONPATH"] = str(ROOT)
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
    member = timed(
        "train",
        *config,
        "--set",
        f"output={work / 'one'}",
        "--set",
        "population.members=1",
        "--set",
        "evaluation.tasks=[]",
    )
    search = timed(
        "search",
        str(work / "four"),
        "--space",
        str(work / "space.yaml"),
        "--out",
        str(work / "out"),
        "--no-export",
    )
    found = json.loads((work / "out" / "results.json").read_text())
    written = sorted(path.name for path in (work / "out").iterdir())
    told = [
        f"\n## Search, {dt.date.today()}, {os.cpu_count()} x {platform.processor() or platform.machine()} cpu, jax {jax.__version__}\n",
        f"`python benchmarks/search.py --work WORK`: {found['tried']} candidates (200 of five methods, members, average, base), {found['examples']} "
        f"validation examples, rounds of {', '.join(map(str, found['settings']['sizes']))}; {found['measured_whole']} were measured on all. One round; "
        f"load average {load:.2f} at the start. Written: {', '.join(written)}.\n",
        "| what | wall s |\n|---|---|",
        f"| `ordermerge train`, one member, 3 epochs | {member:.1f} |",
        f"| `ordermerge search`, 200 candidates | {search:.1f} (of which the search itself {found['seconds']:.1f}) |",
        f"| ratio | {search / member:.2f} |\n",
    ]
    print("\n".join(told))
    with (ROOT / "benchmarks" / "RESULTS.md").open("a") as file:
        file.write("\n".join(told))


if __name__ == "__main__":
    main()
