"""A run directory becomes report.html (one file that needs nothing else) and report.md. Reads the run directory only."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from jax_ordermerge.analysis import choice, texts
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config.merge import AUTO
from jax_ordermerge.errors import UserError
from jax_ordermerge.report import document, findings, formatting, plots
from jax_ordermerge.report.document import Block, Bullets, Fold, Heading, Paragraph, Picture, Table

SAMPLES_SHOWN, STEPS_SHOWN = 5, 8


@dataclass(frozen=True)
class Run:
    """What a run directory holds; None or empty where a stage has no output yet."""

    directory: Path
    config: dict[str, Any]
    data: dict[str, Any] | None
    digests: Any
    lines: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    state: dict[str, Any] | None
    analysis: dict[str, Any] | None
    merge: dict[str, Any] | None
    evaluations: dict[str, Any] | None
    items: dict[str, dict[str, Any]]
    controls: dict[str, Any] | None = None
    search: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Of the config, else of the directory."""
        return str(self.config.get("name", self.directory.name))

    @property
    def models(self) -> list[dict[str, Any]]:
        """The evaluated ones, in the order of the report."""
        return self.evaluations["models"] if self.evaluations else []

    @property
    def resampling(self) -> dict[str, int]:
        """How items are resampled: `resamples`, `seed`."""
        return {
            "resamples": self.config.get("evaluation", {}).get("bootstrap", 1000),
            "seed": self.config.get("seed", 0),
        }

    @property
    def cosine(self) -> float | None:
        """Mean over pairs of the cosines of the members' task vectors; None where no merge was made."""
        for merge in (self.merge or {"merges": []})["merges"]:
            matrix = merge.get("diagnostics", {}).get("total", {}).get("cosines") or []
            pairs = [
                value for i, row in enumerate(matrix) for value in row[i + 1 :] if value is not None
            ]
            if pairs:
                return float(sum(pairs) / len(pairs))
        return None

    @property
    def loss_unit(self) -> str:
        """What losses are of."""
        return formatting.loss_unit(self.config.get("objective", {}))


def write(run_directory: str | Path) -> Path:
    """Write report.html, report.md and the pictures of the latter in report/, and return the path of report.html.

    Stages that have no output yet are named in the report.

    Raises:
        UserError: the directory is no run directory, or a file in it is not what it should be.
    """
    run = read(Path(run_directory))
    title = f"Order merging report: {run.name}"
    blocks = build(run)
    page = run.directory / "report.html"
    document.publish(page, title, blocks, pictures="report")
    return page


def write_search(run_directory: Path, directory: Path) -> Path:
    """Write search.html, search.md and their picture beside the results of a search, and return the path of search.html.

    Args:
        run_directory: of the run whose members were merged.
        directory: holds results.json.
    """
    run, page = read(run_directory), directory / "search.html"
    found = _json(directory / "results.json")
    title = f"Search for a merge: {run.config.get('name', run_directory.name)}"
    document.publish(page, title, choice.search_blocks(found, run.loss_unit), pictures=".")
    return page


def read(directory: Path) -> Run:
    """Read what is there of a run.

    Raises:
        UserError: there is no config.yaml, or a file is not valid JSON.
    """
    if not (directory / "config.yaml").is_file():
        raise UserError(
            f"{directory} is not a run directory (it has no config.yaml); give the output directory of a run"
        )
    evaluations = _json(directory / "evaluations.json")
    names = [model["name"] for model in evaluations["models"]] if evaluations else []
    items = {name: _json(directory / "evaluations" / f"{name}.json") for name in names}
    return Run(
        directory=directory,
        config=yaml.safe_load((directory / "config.yaml").read_text()) or {},
        data=_json(directory / "data.json"),
        digests=_json(directory / "orders" / "digests.json"),
        lines=_lines(directory / "metrics" / "train.jsonl"),
        samples=_lines(directory / "metrics" / "samples.jsonl"),
        state=_json(directory / "metrics" / "state.json"),
        analysis=_json(directory / "analysis.json"),
        merge=_json(directory / "merge.json"),
        evaluations=evaluations,
        items={name: found for name, found in items.items() if found},
        controls=_json(directory / "controls.json"),
        search=_json(directory / "search" / "results.json"),
    )


def build(run: Run) -> list[Block]:
    """Return the blocks of the report."""
    comparison = compare(run)
    told = findings.sentences(run.analysis, run.evaluations, comparison, run.merge, run.loss_unit)
    summary: list[Block] = [Paragraph(_introduction(run)), Heading("What was found")]
    if run.search:
        told.append(choice.sentence(run.search))
    summary.append(
        Bullets(told)
        if told
        else Paragraph("Nothing yet: neither the analysis nor the evaluation has been run.")
    )
    return [
        *summary,
        *_results(run, comparison),
        *texts.blocks(run.models, run.items, **run.resampling),
        *choice.search_blocks(run.search, run.loss_unit),
        *_controls(run),
        *_training(run),
        *_imbalance(run),
        *_mitigation(run),
        *_merges(run),
        *_samples(run),
        *_provenance(run),
    ]


def compare(run: Run) -> findings.Comparison:
    """Compare the merges of a run with its members and with the average; see `findings.compare`."""
    return findings.compare(run.models, run.items, merge=run.merge, **run.resampling)


def _introduction(run: Run) -> str:
    model, population, training = (
        run.config.get(key, {}) for key in ("model", "population", "training")
    )
    merges = f" {len(run.merge['merges'])} merges of them were made." if run.merge else ""
    return (
        f"The base {model.get('base')} was fine-tuned {population.get('members')} times for {training.get('epochs')} epochs on the same "
        f"data, each time in another order (level {population.get('level')}, reshuffle {population.get('reshuffle')}).{merges} "
        "An error after ± is one standard error unless something else is said."
    )


# --- results ----------------------------------------------------------------------------------------------------------------


def _results(run: Run, comparison: findings.Comparison) -> list[Block]:
    heading = Heading("Base, members and merges")
    if not run.evaluations:
        return [heading, _missing("evaluate", "evaluations.json")]
    models = run.evaluations["models"]
    tasks = list(dict.fromkeys(task for model in models for task in model.get("tasks", {})))
    with_loss = [model for model in models if model.get("loss") is not None]
    blocks: list[Block] = [heading, result_table(run, comparison)]
    if with_loss:
        blocks.append(
            Picture(
                "losses", plots.losses(with_loss, run.loss_unit), "Held-out loss of every model."
            )
        )
    for task in tasks:
        having = [model for model in models if task in model.get("tasks", {})]
        blocks.append(
            Picture(
                _slug(f"accuracy-{task}"),
                plots.accuracies(having, task),
                f"Right answers on {task}.",
            )
        )
    if comparison["merges"]:
        blocks += [
            Heading("Paired differences, merge less member", 3),
            difference_table(comparison),
        ]
    return blocks


def result_table(run: Run, comparison: findings.Comparison) -> Table:
    """Return a row a model, one with the mean of the members, and one with that of the merges of several seeds."""
    best, models = comparison["best"], run.models
    tasks = list(dict.fromkeys(task for model in models for task in model.get("tasks", {})))
    means = {
        "mean member (sd between members)": [model for model in models if model["kind"] == "member"]
    }
    for name, found in comparison["merges"].items():
        if len(found["names"]) > 1:
            means[f"mean {name} (sd between merge seeds)"] = [
                model for model in models if model["name"] in found["names"]
            ]
    rows, strong = [], []
    for model in models:
        mark = f" (best on {best['chosen_on']})" if best and best["name"] == model["name"] else ""
        rows.append(
            [
                model["name"] + mark,
                formatting.plus_minus(model.get("loss"), model.get("loss_se"), 4),
                formatting.number(model.get("perplexity"), 3),
                formatting.number(model.get("validation_loss"), 4),
                *(_share(model.get("tasks", {}).get(task)) for task in tasks),
            ]
        )
        for name, some in means.items():
            if some and some[-1] is model:
                strong.append(len(rows))
                rows.append([name, *_mean_cells(some, tasks)])
    tokens = models[0].get("tokens") if models else None
    size = f"; {tokens} answer tokens" if tokens else ""
    items = {
        task: next(model["tasks"][task]["n"] for model in models if task in model.get("tasks", {}))
        for task in tasks
    }
    counts = "".join(f"; {task}: {count} items" for task, count in items.items())
    return Table(
        [
            "model",
            "loss ± se",
            "perplexity",
            "validation loss",
            *(f"{task}, % ± se" for task in tasks),
        ],
        rows,
        f"On the {(run.evaluations or {}).get('split', 'test')} split{size}{counts}. Loss in {run.loss_unit}.",
        strong=strong,
    )


def _mean_cells(models: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    columns = [
        [row.get(key) for row in models] for key in ("loss", "perplexity", "validation_loss")
    ]
    shares = [
        [100 * row["tasks"][task]["accuracy"] for row in models if task in row.get("tasks", {})]
        for task in tasks
    ]
    cells = [
        formatting.mean_sd(values, digits)
        for values, digits in zip(columns, (4, 3, 4), strict=True)
    ]
    return [*cells, *(formatting.mean_sd(values, 1) for values in shares)]


def difference_table(comparison: findings.Comparison) -> Table:
    """Return a row for each merge, or for all seeds of one, and measure: differences to the mean member, the best one and the average."""
    rows = []
    for name, found in comparison["merges"].items():
        seeds = f" (mean of {len(found['names'])} seeds)" if len(found["names"]) > 1 else ""
        measures = [
            ("loss", found["loss"], 1, 4),
            *((f"{task}, points", gaps, 100, 1) for task, gaps in found["tasks"].items()),
        ]
        for measure, gaps, scale, digits in measures:
            if gaps is not None:
                test = gaps.get("mcnemar")
                exact = (
                    f"{test['only_first']} : {test['only_second']}, {formatting.p_text(test['p'])}"
                    if test
                    else ""
                )
                against = ("mean_member", "best_member", "average")
                rows.append(
                    [
                        name + seeds,
                        measure,
                        *(_difference(gaps, key, scale, digits) for key in against),
                        exact,
                    ]
                )
    header = [
        "merge",
        "measure",
        "against the mean member",
        "against the best member",
        "against the average",
    ]
    caption = (
        "Difference ± standard error [95 % paired bootstrap interval], p of the paired t-test, and where it is larger p corrected by Holm's "
        "method over the merges (of answers of single models, from McNemar's test); losses weigh tokens where their numbers are stored, else "
        "examples alike. Of several merge seeds the mean over them is compared on each item, and their spread is in error, interval and p. "
        "Less loss and more points are better."
    )
    if any(row[-1] for row in rows):
        header.append("McNemar, best member")
        caption += " McNemar: items only the merge : only the member answers rightly."
    return Table(header, [row[: len(header)] for row in rows], caption, text=(0, 1))


def _difference(gaps: Mapping[str, Any], key: str, scale: float, digits: int) -> str:
    if key not in gaps:
        return ""
    shown, corrected = (
        formatting.interval(gaps[key], scale, digits),
        formatting.p_text(gaps["holm"][key]),
    )
    return (
        shown if shown.endswith(corrected) else f"{shown}, by Holm {corrected.removeprefix('p ')}"
    )


def _controls(run: Run) -> list[Block]:
    chosen = next(
        (model for model in (run.evaluations or {"models": []})["models"] if model["name"] == AUTO),
        None,
    )
    return choice.control_blocks(run.controls, run.loss_unit, chosen)


# --- training and imbalance -------------------------------------------------------------------------------------------------


def _training(run: Run) -> list[Block]:
    if not run.lines:
        return [Heading("Training"), _missing("train", "metrics/train.jsonl")]
    last = run.lines[-1]
    losses = ", ".join(f"{loss:.4f}" for loss in last["loss"])
    return [
        Heading("Training"),
        Picture(
            "training",
            plots.training(run.lines, run.loss_unit),
            "Training loss of the members and learning rate.",
        ),
        Paragraph(f"After step {last['step']} the members' training losses were {losses}."),
        *_while_training(run),
    ]


def _while_training(run: Run) -> list[Block]:
    if not run.samples:
        return []
    first = run.samples[0]
    every = -(-len(run.samples) // STEPS_SHOWN)
    shown = run.samples[::-1][::every][::-1]  # evenly spaced, the last one among them
    rows = [
        [str(line["step"]), *(formatting.shortened(texts[0]) for texts in line["texts"])]
        for line in shown
    ]
    header = ["step", *(f"member {member}" for member in first["members"])]
    caption = f"Answers while training to the first of {len(first['prompts'])} prompts: {formatting.shortened(first['prompts'][0])}"
    return [Table(header, rows, caption, text=range(1, len(header)))]


def _imbalance(run: Run) -> list[Block]:
    heading = Heading("Training imbalance: final loss by position in the order")
    if not run.analysis:
        return [heading, _missing("analyze", "analysis.json")]
    design = run.analysis["design"]
    blocks: list[Block] = [heading]
    if curves := plots.positions(run.analysis, run.loss_unit):
        blocks.append(
            Picture(
                "positions",
                curves,
                (
                    f"Loss of the {design['samples']} training samples after training, by where they stood, in {design['bins']} bins with 95 % "
                    "bootstrap bands. Shaded: warm-up. On the right each sample is compared with itself in the other members."
                ),
            )
        )
    blocks.append(Heading("Fixed effects: each sample compared with itself", 3))
    rows = [
        row
        for key in ("fixed_effects", "fixed_effects_warmup")
        for row in run.analysis[key].get("coefficients", [])
    ]
    if rows:
        blocks.append(_coefficient_table(rows))
    reasons = [run.analysis[key].get("reason") for key in ("fixed_effects", "fixed_effects_warmup")]
    named = zip(("Fixed effects", "Warm-up apart"), reasons, strict=True)
    blocks += [Paragraph(f"{name}: not determined, {reason}.") for name, reason in named if reason]
    if picture := plots.effects(run.analysis, run.lines, run.loss_unit):
        blocks.append(
            Picture(
                "effects",
                picture,
                "Slope of the final loss by position in each epoch, with 95 % intervals.",
            )
        )
    return [*blocks, Heading("One member at a time", 3), _member_table(run.analysis)]


def _coefficient_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    body = []
    for row in rows:
        epoch = " = ".join(map(str, row["epochs"])) + (f", {row['part']}" if "part" in row else "")
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        body.append(
            [
                epoch,
                f"{row['estimate']:+.4f}",
                f"{row['se']:.4f}",
                f"{row['z']:.1f}",
                formatting.p_text(row["p"]),
                interval,
            ]
        )
    return Table(
        ["epoch", "slope", "se", "z", "p", "95 %"],
        body,
        (
            "loss[i, s] = a_s + c_i + sum over epochs of b_e position[i, s, e]; errors clustered by sample. Below 0: what comes early ends "
            "worse. The rows with a warm-up are a second fit, in which the line of epoch 1 may bend where the warm-up ends."
        ),
    )


def _member_table(analysis: Mapping[str, Any]) -> Table:
    rows = []
    for member in analysis["members"]:
        for row in member["epochs"]:
            start = [f"{member['member']}, epoch {row['epoch']}"]
            if "reason" in row:
                rows.append([*start, row["reason"], "", "", "", ""])
                continue
            rows.append(
                [
                    *start,
                    f"{row['spearman']['rho']:+.3f} ({formatting.p_text(row['spearman']['p'])})",
                    f"{row['pearson']['r']:+.3f} ({formatting.p_text(row['pearson']['p'])})",
                    f"{row['slope']['estimate']:+.4f} ± {row['slope']['se']:.4f}",
                    formatting.gap_or_reason(row["decile_gap"]),
                    formatting.p_text(row["permutation_p"]),
                ]
            )
    return Table(
        [
            "member",
            "Spearman rho",
            "Pearson r",
            "slope ± se",
            "first less last bin",
            "permutation p",
        ],
        rows,
        "Here the difficulty of the samples is noise, so that one member alone often shows nothing.",
    )


def _mitigation(run: Run) -> list[Block]:
    heading = Heading("The position effect before and after merging")
    if not run.analysis:
        return [heading, _missing("analyze", "analysis.json")]
    if not run.analysis["merged"]:
        return [heading, Paragraph("The analysis holds no merges.")]
    blocks: list[Block] = [heading]
    if picture := plots.merging(run.analysis, run.loss_unit):
        blocks.append(
            Picture(
                "merging",
                picture,
                "Samples a member saw early less those it saw late, with 95 % intervals.",
            )
        )
    rows = []
    for name, found in run.analysis["merged"].items():
        for epoch, gap in enumerate(found["early_late"]):
            cells = [
                formatting.gap_or_reason(gap if "reason" in gap else gap[key])
                for key in ("members", "merged", "difference")
            ]
            slopes = [_slope(found[key], epoch + 1) for key in ("after", "change", "mean_position")]
            rows.append([f"{name}, epoch {epoch + 1}", *cells, *slopes])
    caption = (
        "Gap: loss of the half of the samples that a member saw early less the half it saw late, mean over the members' orders. Slopes: by "
        "a sample's mean position in all members; what is left, the change against the members, and the plain regression of the merge's "
        "losses with the base's loss as covariate where it is known. Not every gap that closes was closed by skill: averaging over orders does it."
    )
    header = [
        "merge",
        "gap in members",
        "gap in merge",
        "difference",
        "slope left",
        "change of slope",
        "plain slope",
    ]
    return [*blocks, Table(header, rows, caption)]


def _slope(found: Mapping[str, Any], epoch: int) -> str:
    if "reason" in found:
        return f"– ({found['reason']})"
    row = next(row for row in found["coefficients"] if epoch in row["epochs"])
    return f"{row['estimate']:+.4f} ± {row['se']:.4f} ({formatting.p_text(row['p'])})"


# --- merges, samples, provenance --------------------------------------------------------------------------------------------


def _merges(run: Run) -> list[Block]:
    heading = Heading("Merges and task vectors")
    if not run.merge:
        return [heading, _missing("merge", "merge.json")]
    rows, matrix = [], None
    for merge in run.merge["merges"]:
        total = merge.get("diagnostics", {}).get("total", {})
        matrix = matrix or total.get("cosines")
        zeros = total.get("unchanged")
        settings = {"weights": merge["weights"]} if merge.get("weights") else {}
        text = ", ".join(
            f"{key}={value}" for key, value in (settings | (merge.get("parameters") or {})).items()
        )
        rows.append(
            [
                merge["name"],
                merge["method"],
                text,
                str(merge.get("seed", "")),
                " ".join(f"{100 * z:.1f}" for z in zeros) if zeros else "–",
                formatting.percent(total.get("unchanged_by_all")),
                " ".join(f"{100 * part:.1f}" for part in total.get("redrawn", ())) or "–",
                formatting.number(total.get("norm_ratio"), 3),
                formatting.number(total.get("lambda_eff"), 3),
            ]
        )
    header = [
        "merge",
        "method",
        "parameters",
        "seed",
        "zeros by member, %",
        "zero in all, %",
        "drawn again, %",
        "norm ratio",
        "lambda_eff",
    ]
    blocks: list[Block] = [
        heading,
        Table(
            header,
            rows,
            (
                f"Stored and merged as {run.merge.get('dtype')}; the dtype decides how many elements of the task vectors are exactly zero. Drawn again: "
                "elements in each round of a selection's resampling, of those that some member changed. Norm ratio: "
                "merged task vector over the mean norm of the members'. lambda_eff: its length along the mean task vector, 1 for the average."
            ),
            text=(0, 1, 2),
        ),
    ]
    if matrix and len(matrix) > 1:
        blocks.append(
            Picture(
                "cosines",
                plots.cosines(matrix),
                "Cosines between the members' task vectors, all tensors together.",
            )
        )
    return blocks


def _samples(run: Run) -> list[Block]:
    tasks = list(
        dict.fromkeys(task for found in run.items.values() for task in found.get("tasks", {}))
    )
    blocks: list[Block] = []
    for task in tasks:
        by_model = {
            name: {str(x["id"]): x for x in found["tasks"][task]}
            for name, found in run.items.items()
            if task in found["tasks"]
        }
        first = next(iter(by_model.values()))
        common = [key for key in first if all(key in rows for rows in by_model.values())]
        # items on which the models do not agree say more than those all get right or wrong
        split = sorted(
            common,
            key=lambda key: len({bool(rows[key]["correct"]) for rows in by_model.values()}) == 1,
        )
        for key in split[:SAMPLES_SHOWN]:
            rows = [
                [
                    name,
                    formatting.shortened(items[key]["answer"]),
                    "right" if items[key]["correct"] else "wrong",
                ]
                for name, items in by_model.items()
            ]
            blocks += [
                Heading(f"{task}, item {key}", 3),
                Table(
                    ["", ""],
                    [
                        ["prompt", formatting.shortened(first[key]["prompt"])],
                        ["reference", formatting.shortened(first[key]["reference"])],
                    ],
                    text=(0, 1),
                ),
                Table(["model", "answer", ""], rows, text=(0, 1, 2)),
            ]
    note = "The first items on which the models differ come first."
    return [Heading("Answers side by side"), Paragraph(note), *blocks] if blocks else []


def _provenance(run: Run) -> list[Block]:
    state, config = run.state or {}, run.config
    output = str(config.get("output", "")).replace("{name}", str(config.get("name")))
    rows = [
        ["base", str(config.get("model", {}).get("base"))],
        ["seed", str(config.get("seed"))],
        ["orders", ", ".join(f"{k} {v}" for k, v in config.get("population", {}).items())],
        [
            "command",
            str(
                state.get(
                    "command",
                    f"ordermerge run {remote.address(output) or run.directory / 'config.yaml'}",
                )
            ),
        ],
        *(
            [key, str(state[key])]
            for key in ("device", "devices", "parameters", "tokens", "compilations")
            if key in state
        ),
        *([["wall time of training", f"{state['seconds']:.1f} s"]] if "seconds" in state else []),
    ]
    versions = dict(state.get("versions", {})) | {
        "report": f"jax_ordermerge {metadata.version('jax_ordermerge')}, Python {platform.python_version()}"
    }
    rows += [[f"version of {name}", str(version)] for name, version in versions.items()]
    for name, part in (run.data or {}).items():
        if isinstance(part, Mapping):
            counts = ", ".join(
                f"{key} {value}" for key, value in (part.get("counts") or {}).items()
            )
            size = ", ".join(f"{part[key]} {key}" for key in ("examples", "tokens") if key in part)
            text = [str(part.get("source")), f"digest {part.get('digest')}", size, counts]
            rows.append([f"data: {name}", "\n".join(line for line in text if line)])
    blocks: list[Block] = [Heading("Provenance"), Table(["", ""], rows, text=(0, 1))]
    absent = [
        ("train", "metrics/state.json", run.state),
        ("train", "data.json", run.data),
        ("train", "orders/digests.json", run.digests),
    ]
    blocks += [_missing(stage, file) for stage, file, found in absent if not found]
    if run.digests:
        blocks.append(
            Fold("Digests of the orders", yaml.safe_dump(run.digests, sort_keys=False, width=120))
        )
    return [*blocks, Fold("Resolved config", yaml.safe_dump(config, sort_keys=False, width=120))]


# --- cells and files --------------------------------------------------------------------------------------------------------


def _missing(stage: str, file: str) -> Paragraph:
    return Paragraph(f"The stage {stage} has no output yet: {file} is missing.")


def _share(task: Mapping[str, Any] | None) -> str:
    return (
        "–" if task is None else formatting.plus_minus(100 * task["accuracy"], 100 * task["se"], 1)
    )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _json(path: Path) -> Any:
    return _parse(path, path.read_text()) if path.is_file() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return (
        [_parse(path, line) for line in path.read_text().splitlines() if line.strip()]
        if path.is_file()
        else []
    )


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error.msg}, line {error.lineno}); remove it and run the stage again"
        ) from error
