"""The first minutes: where the time of `ordermerge run configs/quickstart.yaml` goes.

    python benchmarks/first_minutes.py --work WORK --before REVISION    # about 4 minutes, two cores

The quickstart of a git revision and that of this working tree take turns. Each starts with empty
caches of a user of its own, and then runs again with another seed, which finds what the first run
has left there. Then `ordermerge merge` averages two of the merges, also twice. Seconds are walls,
medians of the rounds, by stage and by kind:

- import: import statements, wherever they are reached;
- compile: tracing, lowering and compiling programs, or reading them from the cache;
- write: exports of merges, and what a checkpoint keeps the training waiting for;
- run: everything else.

The table is appended to benchmarks/RESULTS.md.
"""

import argparse
import collections
import datetime as dt
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = ("start", "open", "train", "merge", "analyze", "evaluate", "controls", "report")
KINDS = ("import", "compile", "write", "run")
RUNS = ("cold", "second")

# It runs in a process of the revision that is measured, so it hooks what both revisions have.
DRIVER = r"""
import builtins, json, os, sys, threading, time

start = float(os.environ["FIRST_MINUTES_START"])
report, *settings = sys.argv[1:]
stages = [["start", start, None]]        # name, begin, end; later ones lie in earlier ones
intervals = {"import": [], "compile": [], "write": []}
counts = []                              # (when, event)
main, depth, plain_import = threading.get_ident(), 0, builtins.__import__


def timed_import(*args, **options):
    global depth
    if threading.get_ident() != main:
        return plain_import(*args, **options)
    begin, depth = time.time(), depth + 1
    try:
        return plain_import(*args, **options)
    finally:
        depth -= 1
        if depth == 0:
            intervals["import"].append((begin, time.time()))


intervals["import"].append((start, time.time()))  # of the interpreter itself
builtins.__import__ = timed_import
import jax_ordermerge.cli as cli

if hasattr(cli, "program_cache"):
    cli.program_cache.set_default()
import jax
from jax_ordermerge.config import load_config
from jax_ordermerge.experiment import export, pipeline
from jax_ordermerge.experiment.stages import evaluate


def on_duration(event, seconds, **_):
    now = time.time()
    if event.startswith("/jax/core/compile/"):
        intervals["compile"].append((now - seconds, now))
        if event.endswith("backend_compile_duration"):
            counts.append((now, "programs"))
    elif event == "/jax/checkpoint/write/async/blocking_duration_secs":
        intervals["write"].append((now - seconds, now))


def on_event(event, **_):
    if event == "/jax/compilation_cache/cache_hits":
        counts.append((time.time(), "cached"))


jax.monitoring.register_event_duration_secs_listener(on_duration)
jax.monitoring.register_event_listener(on_event)


def hook(module, name, stage=None, kind=None):
    plain = getattr(module, name)

    def hooked(*args, **options):
        begin = time.time()
        try:
            return plain(*args, **options)
        finally:
            if kind:
                intervals[kind].append((begin, time.time()))
            else:
                stages.append([stage or args[1].name, begin, time.time()])

    setattr(module, name, hooked)


hook(pipeline, "_open_run", "open")
hook(pipeline, "_run_stage")
hook(evaluate.controls, "measure_controls", "controls")
hook(export, "export", kind="write")
config = load_config("configs/quickstart.yaml", settings)
stages[0][2] = time.time()
pipeline.run(config)
end = time.time()
with open(report, "w") as file:
    json.dump({"stages": stages, "intervals": intervals, "counts": counts,
               "wall": end - start}, file)
"""


def union(intervals: list[list[float]]) -> list[list[float]]:
    """Return intervals without overlap: a program is traced within the trace of another."""
    joined: list[list[float]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined


def overlap(intervals: list[list[float]], begin: float, end: float) -> float:
    """Return the seconds of intervals that lie between two times."""
    return sum(max(0.0, min(end, b) - max(begin, a)) for a, b in union(intervals))


def summarize(report: dict) -> dict[str, dict[str, float]]:
    """Return seconds and numbers of programs by stage and kind, with those of `all`."""
    rows: dict[str, dict[str, float]] = {}
    spans = {name: (begin, end) for name, begin, end in report["stages"]}
    for name, (begin, end) in spans.items():
        row = {"wall": end - begin}
        for kind, intervals in report["intervals"].items():
            row[kind] = overlap(intervals, begin, end)
        row["run"] = row["wall"] - sum(row[kind] for kind in ("import", "compile", "write"))
        for count in ("programs", "cached"):
            row[count] = sum(begin <= when <= end and count == x for when, x in report["counts"])
        rows[name] = row
    # the controls are a part of the evaluation, which has the rest
    for key in rows["evaluate"]:
        rows["evaluate"][key] -= rows["controls"][key]

    total = collections.Counter[str]()
    for row in rows.values():
        total.update(row)
    rows["all"] = dict(total)
    rows["all"]["wall"] = report["wall"]
    return rows


def call(arguments: list[str], tree: pathlib.Path, user: pathlib.Path) -> tuple[float, float]:
    """Run Python in a tree with the caches of a user; return wall and CPU seconds."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_", "ORDERMERGE_"))
    }
    environment |= {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(user)}
    environment |= {"FIRST_MINUTES_START": str(time.time()), "JAX_PLATFORMS": "cpu"}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.time() - begin, cpu


def measure(tree: pathlib.Path, work: pathlib.Path, settings: list[str]) -> dict[str, dict]:
    """Run the quickstart and a merge twice with fresh caches; return the results by run."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    user, results = work / "user", {}
    for seed, name in enumerate(RUNS):
        report, own = work / f"{name}.json", [f"output={work / name}", f"seed={seed}"]
        _, cpu = call(["-c", DRIVER, str(report), *own, *settings], tree, user)
        results[name] = {"rows": summarize(json.loads(report.read_text())), "cpu": cpu}
    models = [str(work / "cold" / "merged" / name) for name in ("average", "ties")]
    for name in RUNS:
        command = ["-m", "jax_ordermerge", "merge", *models, "--method", "average"]
        wall, cpu = call([*command, "--out", str(work / f"merge-{name}")], tree, user)
        results[name] |= {"merge_wall": wall, "merge_cpu": cpu}
    return results


def table(results: dict[str, list[dict[str, dict]]]) -> str:
    """Return the table of the medians of the rounds of each tree."""

    def median(tree: str, run: str, *keys: str) -> float:
        values = []
        for round_ in results[tree]:
            value = round_[run]
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    columns = [(tree, run) for run in RUNS for tree in ("before", "after")]
    lines = [
        "| stage | kind | " + " | ".join(f"{run}, {tree}" for tree, run in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for stage in ("all", *STAGES):
        for kind in ("wall", *KINDS):
            cells = [median(*column, "rows", stage, kind) for column in columns]
            if kind == "wall" or max(cells) >= 0.05:
                title = f"**{stage}**" if kind == "wall" else ""
                row = " | ".join(f"{cell:.1f}" for cell in cells)
                lines.append(f"| {title} | {kind} s | {row} |")
        programs = [
            f"{median(*column, 'rows', stage, 'programs'):.0f}"
            f" ({median(*column, 'rows', stage, 'cached'):.0f})"
            for column in columns
        ]
        if stage == "all" or any(not cell.startswith("0 ") for cell in programs):
            lines.append(f"|  | programs (cached) | {' | '.join(programs)} |")
    for title, key in (
        ("quickstart, CPU s", "cpu"),
        ("`ordermerge merge` of two merges, wall s", "merge_wall"),
        ("`ordermerge merge` of two merges, CPU s", "merge_cpu"),
    ):
        row = " | ".join(f"{median(*column, key):.1f}" for column in columns)
        lines.append(f"| {title} |  | {row} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both trees in turns and append the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=pathlib.Path, required=True, help="directory for the runs")
    parser.add_argument("--before", required=True, help="git revision to compare with")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every run"
    )
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(ROOT)]
    revision = subprocess.run(
        [*git, "rev-parse", "--short", arguments.before], check=True, capture_output=True, text=True
    ).stdout.strip()
    old = work / f"tree-{revision}"
    if not old.is_dir():
        subprocess.run([*git, "worktree", "add", "--detach", str(old), revision], check=True)
    load = os.getloadavg()[0]
    results: dict[str, list[dict[str, dict]]] = {"before": [], "after": []}
    for number in range(arguments.rounds):
        for name, tree in (("before", old), ("after", ROOT)):
            results[name].append(measure(tree, work / f"{name}-{number}", arguments.set))
            print(name, json.dumps(results[name][-1]["cold"]["rows"]["all"]), flush=True)
    subprocess.run([*git, "worktree", "remove", "--force", str(old)], check=True)
    cpu = platform.processor() or platform.machine()
    extra = "".join(f" --set {setting}" for setting in arguments.set)
    text = f"""
## The first minutes, {dt.date.today()}, {os.cpu_count()} x {cpu} cpu, jax {jax.__version__}

`python benchmarks/first_minutes.py --work WORK --before {arguments.before} --rounds \
{arguments.rounds}{extra}`: `ordermerge run configs/quickstart.yaml`, before at {revision}; \
medians of the rounds; load average {load:.2f} at the start. "cold" has an empty cache of the \
user, "second" is the next run with another seed. A program is cached where it was read from the \
disk.

{table(results)}
"""
    print(text)
    with (ROOT / "benchmarks" / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
