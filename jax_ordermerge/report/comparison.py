"""Run directories side by side: what differs in their configs, and what came of it, as comparison.html and comparison.md."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from jax_ordermerge.errors import UserError
from jax_ordermerge.report import document, formatting, plots, run_report
from jax_ordermerge.report.document import Block, Bullets, Heading, Paragraph, Picture, Table
from jax_ordermerge.report.run_report import Run

_NAMES = ("name", "output")  # differ in any two runs


def write(directories: Sequence[str | Path], out: str | Path) -> Path:
    """Compare runs and write comparison.html, comparison.md and the picture of the latter into a directory.

    Args:
        directories: two or more run directories; the first is the one that the others are compared with.
        out: is made if it is not there.

    Returns:
        the path of comparison.html.

    Raises:
        UserError: fewer than two runs, no run directory, runs of the same name, or of objectives whose losses differ in kind.
    """
    runs = [run_report.read(Path(directory)) for directory in directories]
    names = [run.name for run in runs]
    if len(runs) < 2:
        raise UserError(
            f"{len(runs)} run was given; a comparison takes two or more run directories"
        )
    units = {run.loss_unit for run in runs}
    if len(units) > 1:
        raise UserError(
            f"the losses of these runs are of different kinds ({', '.join(sorted(units))}); compare runs of one objective"
        )
    if len(set(names)) < len(names):
        raise UserError(
            f"two of the runs have the same name ({', '.join(names)}); give each config a name of its own"
        )
    page = Path(out) / "comparison.html"
    document.publish(page, f"Comparison: {', '.join(names)}", build(runs), pictures=".")
    return page


def build(runs: Sequence[Run]) -> list[Block]:
    """Return the blocks of the comparison."""
    missing = [
        f"{run.name} has no {file} yet" for run in runs for file, found in _stages(run) if not found
    ]
    blocks: list[Block] = [Heading("What differs"), _settings(runs)]
    blocks += [Bullets(missing)] if missing else []
    analyzed = [
        run for run in runs if run.analysis and run.analysis["fixed_effects"].get("coefficients")
    ]
    if analyzed:
        blocks += [Heading("Imbalance: slope of the final loss by position"), *_imbalance(analyzed)]
    evaluated = [run for run in runs if run.evaluations]
    if evaluated:
        blocks += [Heading("Members and merges"), *_results(evaluated)]
    return blocks


def _stages(run: Run) -> list[tuple[str, Any]]:
    return [("analysis.json", run.analysis), ("evaluations.json", run.evaluations)]


def _settings(runs: Sequence[Run]) -> Block:
    flat = [_flatten(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in _NAMES]
    rows = [
        [key, *(str(one.get(key, "–")) for one in flat)]
        for key in keys
        if len({str(one.get(key, "–")) for one in flat}) > 1
    ]
    digests = [str((run.data or {}).get("train", {}).get("digest", "–")) for run in runs]
    if len(set(digests)) > 1:
        rows.append(["digest of the training data", *digests])
    if not rows:
        return Paragraph("The configs are the same but for their names.")
    columns = tuple(range(len(runs) + 1))
    return Table(
        ["setting", *(run.name for run in runs)],
        rows,
        "All other settings are the same.",
        text=columns,
    )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return found


def _imbalance(runs: Sequence[Run]) -> list[Block]:
    rows = []
    first = {tuple(row["epochs"]): row for row in runs[0].analysis["fixed_effects"]["coefficients"]}  # type: ignore[index]
    for run in runs:
        assert run.analysis is not None
        for row in run.analysis["fixed_effects"]["coefficients"]:
            other = None if run is runs[0] else first.get(tuple(row["epochs"]))
            epoch = " = ".join(map(str, row["epochs"]))
            slope = f"{row['estimate']:+.4f} ± {row['se']:.4f}"
            rows.append(
                [
                    f"{run.name}, epoch {epoch}",
                    slope,
                    formatting.p_text(row["p"]),
                    _difference(row, other),
                ]
            )
    unit = runs[0].loss_unit
    caption = (
        f"In {unit} from the first to the last place; below 0: what comes early ends worse. Difference: slope less that of the first "
        "run, the errors added in quadrature (the runs are taken to be independent)."
    )
    named = {
        run.name: run.analysis["fixed_effects"]["coefficients"] for run in runs if run.analysis
    }
    picture = Picture(
        "slopes", plots.slopes(named, unit), "Slopes of every run by epoch, with 95 % intervals."
    )
    table = Table(["run, epoch", "slope ± se", "p", "difference"], rows, caption)
    return [picture, table]


def _difference(row: Mapping[str, float], other: Mapping[str, float] | None) -> str:
    if other is None:
        return ""
    gap, se = row["estimate"] - other["estimate"], math.hypot(row["se"], other["se"])
    p = float(2 * stats.norm.sf(abs(gap) / se)) if se > 0 else 1.0
    return f"{gap:+.4f} ± {se:.4f}, {formatting.p_text(p)}"


def _results(runs: Sequence[Run]) -> list[Block]:
    rows: list[list[str]] = []
    strong = []
    for run in runs:
        assert run.evaluations is not None
        models = run.evaluations["models"]
        members = [model for model in models if model["kind"] == "member"]
        tasks = list(dict.fromkeys(task for model in models for task in model.get("tasks", {})))
        compared = run_report.compare(run)
        strong.append(len(rows))
        shares = {
            task: formatting.mean_sd(
                [100 * m["tasks"][task]["accuracy"] for m in members if task in m.get("tasks", {})],
                1,
            )
            for task in tasks
        }
        rows.append(
            [
                f"{run.name}: mean member (sd)",
                formatting.mean_sd([model.get("loss") for model in members], 4),
                "",
                formatting.number(run.cosine, 3),
                "; ".join(f"{task} {share} %" for task, share in shares.items()),
            ]
        )
        for name, found in compared["merges"].items():
            own = [model for model in models if model["name"] in found["names"]]
            gain = (
                ""
                if found["loss"] is None
                else formatting.interval(found["loss"]["mean_member"], 1, 4)
            )
            loss = formatting.plus_minus(own[0].get("loss"), own[0].get("loss_se"), 4)
            if len(own) > 1:
                loss = formatting.mean_sd([model.get("loss") for model in own], 4)
            scored = "; ".join(
                f"{task} {100 * sum(model['tasks'][task]['accuracy'] for model in own) / len(own):.1f} %"
                for task in found["tasks"]
            )
            rows.append([f"{run.name}: {name}", loss, gain, "", scored])
    caption = (
        f"Held-out loss in {runs[0].loss_unit}; difference: merge less the mean member of its own run, ± standard error [95 % paired bootstrap "
        "interval]; of several merge seeds their mean (sd). Cosine: mean over pairs of the members' task vectors; the nearer to 1, the more alike the orders made them."
    )
    header = ["model", "loss", "against the mean member", "cosine of members", "tasks"]
    return [Table(header, rows, caption, text=(0, 4), strong=strong)]
