"""Chapters: the training, and the effect of the position in the order, also after merging."""

from collections.abc import Sequence

from jax_ordermerge.json_types import Json
from jax_ordermerge.report import formatting
from jax_ordermerge.report.document import Block, Cell, Heading, Interval, Paragraph, Picture, Table
from jax_ordermerge.report.plots import imbalance as plots
from jax_ordermerge.report.run import Run, missing

STEPS_SHOWN = 8  # of the answers while training
_UNMEASURED = {"reason": "the analysis was made by an earlier version"}


def training(run: Run) -> list[Block]:
    """Return the picture of the losses, the last losses and the generated samples."""
    heading = Heading("Training")
    if not run.training_log:
        return [heading, missing(run, "train", run.layout.training_log)]
    # of the last batches, and so noisy: the losses to compare are those of the evaluation
    last = run.training_log[-1]
    losses = ", ".join(f"{loss:.4f}" for loss in last["loss"])
    picture = plots.training(run.training_log, run.loss_unit)
    return [
        heading,
        Picture("training", picture, "Training loss of the members and learning rate."),
        Paragraph(f"After step {last['step']} the members' training losses were {losses}."),
        *_generated_samples(run),
    ]


def _generated_samples(run: Run) -> list[Block]:
    if not run.generated_samples:
        return []
    first = run.generated_samples[0]
    # rounded up, for at most `STEPS_SHOWN` rows
    every = -(-len(run.generated_samples) // STEPS_SHOWN)
    # evenly spaced from the end, so that the last step is among them
    steps = run.generated_samples[::-1][::every][::-1]
    rows = [
        [str(step["step"]), *(formatting.shortened(texts[0]) for texts in step["texts"])]
        for step in steps
    ]
    header = ["step", *(f"member {member}" for member in first["members"])]
    prompts = first["prompts"]
    caption = (
        f"Answers while training to the first of {len(prompts)} prompts: "
        f"{formatting.shortened(prompts[0])}"
    )
    return [Table(header, rows, caption, text=range(1, len(header)))]


def imbalance(run: Run) -> list[Block]:
    """Return curves, fixed effects and the statistics of single members."""
    blocks: list[Block] = [Heading("Training imbalance: final loss by position in the order")]
    analysis = run.analysis
    if not analysis:
        return [*blocks, missing(run, "analyze", run.layout.analysis)]
    design = analysis["design"]
    if picture := plots.positions(analysis, run.loss_unit):
        caption = (
            f"Loss of the {design['samples']} training samples after training, by position, in "
            f"{design['bins']} bins with 95 % bootstrap bands. Shaded: warm-up. On the right each "
            "sample is compared with itself in the other members."
        )
        blocks.append(Picture("positions", picture, caption))
    blocks.append(Heading("Fixed effects: each sample compared with itself", 3))
    fits = {
        "Fixed effects": analysis["fixed_effects"],
        "Fixed effects with warm-up": analysis["fixed_effects_warmup"],
    }
    # one of the fits may be undetermined, as without a warm-up
    if rows := [row for fit in fits.values() for row in fit.get("coefficients", [])]:
        blocks.append(_coefficient_table(rows, _clusters(analysis)))
    blocks += [
        Paragraph(f"{name}: not determined, {fit['reason']}.")
        for name, fit in fits.items()
        if "reason" in fit
    ]
    # over the learning rate: the effect of a step should be larger where the steps are
    if picture := plots.effects(analysis, run.training_log, run.loss_unit):
        caption = "Slope of the final loss by position in each epoch, with 95 % intervals."
        blocks.append(Picture("effects", picture, caption))
    if picture := plots.trajectory(analysis, run.training_log, run.loss_unit):
        caption = (
            "What the step in which a sample was seen changes in its final loss, beside the "
            "learning rate. The band holds for all points together, with 95 % confidence."
        )
        blocks.append(Picture("trajectory", picture, caption))
    blocks += _shape(analysis)
    if sources := analysis.get("sources"):
        blocks += _by_source(sources, run)
    return [*blocks, Heading("One member at a time", 3), _member_table(analysis)]


def _shape(analysis: Json) -> list[Block]:
    """Return the omnibus tests, and the sizes of the slopes by the base's loss."""
    blocks: list[Block] = []
    tests = analysis.get("omnibus", [])
    # a mapping with a reason stands here where the tests are undetermined
    if isinstance(tests, list) and tests:
        rows = [
            [
                formatting.epochs(test),
                f"{test['statistic']:.1f}",
                f"{test['freedom']:.1f}",
                formatting.p_value(test["p"]),
                formatting.p_value(test["holm"]),
            ]
            for test in tests
        ]
        caption = (
            "Does the position matter in any way, straight line or not? Means of the bins, tested "
            "by permuting whole steps, as chi-squared with its degrees of freedom."
        )
        share = analysis.get("explained", {})
        if "lines" in share:
            caption += (
                f" Of the variance that the order causes in a sample's loss (sd {share['sd']:.4f}) "
                f"position explains {100 * share['lines']:.1f} % by a slope per epoch and "
                f"{100 * share['bins']:.1f} % by the means of the bins (adjusted)."
            )
        blocks.append(
            Table(["epoch", "chi-squared", "degrees", "p", "p, Holm over epochs"], rows, caption)
        )
    if quartiles := analysis.get("by_base_loss"):
        cells: list[list[Cell]] = [
            [
                str(row["quartile"]),
                f"{row['base_loss']:.4f}",
                f"{row['mean_loss']:.4f}",
                *(
                    cell
                    for slope in row["coefficients"]
                    for cell in (formatting.gap_or_reason(slope), f"{slope['percent']:+.1f}")
                ),
            ]
            for row in quartiles
        ]
        labels = [formatting.epochs(row) for row in quartiles[0]["coefficients"]]
        header = ["quarter", "base loss", "loss of the members"]
        header += [text for label in labels for text in (f"slope, epoch {label}", "% of loss")]
        caption = (
            "Slopes on each quarter of the samples by their loss under the base, and in per cent "
            "of the members' loss there."
        )
        blocks.append(Table(header, cells, caption))
    return blocks


def _by_source(sources: Sequence[Json], run: Run) -> list[Block]:
    """Return losses and slopes of each source of the training samples."""
    merges = list(sources[0]["merged"])
    rows: list[list[Cell]] = []
    slopes: dict[str, list[Cell]] = {}
    names: list[str] = []
    for source in sources:
        levels = [source.get("base", {}), source["members"], *source["merged"].values()]
        means = [formatting.number(level.get("mean_loss"), 4) for level in levels]
        fit = source["fixed_effects"]
        cells = [formatting.gap_or_reason(row) for row in fit.get("coefficients", [])]
        slopes[source["name"]] = cells or [formatting.gap_or_reason(fit)]
        names += [
            label
            for row in fit.get("coefficients", [])
            if (label := formatting.epochs(row)) not in names
        ]
        rows.append([source["name"], str(source["samples"]), *means])
    # a source with one reason for all slopes has it in the first column
    rows = [[*row, *slopes[str(row[0])]] for row in rows]
    width = len(merges) + 4 + max(1, len(names))
    # rows with a reason in place of slopes are shorter
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    header = ["source", "samples", "base", "mean member", *merges]
    header += [f"slope, epoch {name}" for name in names] or ["slope"]
    caption = (
        f"Mean loss of the training samples of each source ({run.loss_unit}), and the fixed "
        "effects on these samples alone, by their positions in the whole epoch. p is not corrected "
        "for the number of sources."
    )
    blocks: list[Block] = [
        Heading("By source", 3),
        Table(header, rows, caption),
    ]
    coefficients = {
        source["name"]: source["fixed_effects"]["coefficients"]
        for source in sources
        if "coefficients" in source["fixed_effects"]
    }
    if coefficients:
        picture = plots.slopes(coefficients, run.loss_unit)
        blocks.append(Picture("sources", picture, "Fixed effects of each source, 95 % intervals."))
    return blocks


def _clusters(analysis: Json) -> str:
    """Return what the errors are clustered by, and how much the losses of one step share."""
    # files of earlier versions have no unit: samples were the only one
    unit = analysis["design"].get("unit", "sample")
    text = "sample and by optimizer step, whichever is larger"
    if unit != "sample":
        text = f"{unit} ({analysis['design']['units']})"
    shared = analysis["fixed_effects"].get("step_correlation", [])
    rows = ", ".join(
        f"{row['icc']:.3f} in epoch {row['epoch']} ({formatting.p_text(row['p'])})"
        for row in shared
    )
    return f"{text}. Intra-class correlation of the residuals of a step: {rows}" if rows else text


def _coefficient_table(rows: Sequence[Json], unit: str) -> Table:
    cells = [
        [
            formatting.epochs(row) + (f", {row['part']}" if "part" in row else ""),
            formatting.gap_or_reason(row),
            f"{row['z']:.1f}",
            f"{row['percent']:+.2f} %" if "percent" in row else "–",
        ]
        for row in rows
    ]
    caption = (
        "loss[i, s] = a_s + c_i + sum over epochs of b_e position[i, s, e]; errors clustered by "
        f"{unit}. Below 0: samples seen early end with the higher loss. The rows with a warm-up "
        "are a second fit, in which the line of epoch 1 may bend where the warm-up ends."
    )
    header = ["epoch", "slope", "z", "of the mean loss"]
    return Table(header, cells, caption)


def _member_table(analysis: Json) -> Table:
    def correlation(row: Json, name: str, symbol: str) -> Cell:
        return Interval(f"{row[name][symbol]:+.3f}", p=formatting.p_value(row[name]["p"]))

    cells: list[list[Cell]] = []
    for member in analysis["members"]:
        for row in member["epochs"]:
            label = f"{member['member']}, epoch {row['epoch']}"
            # constant losses, say: the other cells are undetermined with it
            if "reason" in row:
                cells.append([label, row["reason"], *[""] * 5])
                continue
            cells.append(
                [
                    label,
                    correlation(row, "spearman", "rho"),
                    correlation(row, "pearson", "r"),
                    formatting.gap_or_reason(row["slope"]),
                    formatting.gap_or_reason(formatting.late_less_early(row["decile_gap"])),
                    formatting.p_value(row["permutation_p"]),
                    formatting.p_value(row["permutation_p_steps"])
                    if "permutation_p_steps" in row
                    else "–",
                ]
            )
    header = ["member", "Spearman rho", "Pearson r", "slope"]
    header += ["last less first bin", "p, permutation", "p, permutation of steps"]
    caption = "The difficulty of the samples is noise here, so a single member often shows nothing."
    return Table(header, cells, caption)


def mitigation(run: Run) -> list[Block]:
    """Return the gap between early and late samples, and the slopes, in members and merges."""
    heading = Heading("The position effect before and after merging")
    analysis = run.analysis
    if not analysis:
        return [heading, missing(run, "analyze", run.layout.analysis)]
    if not analysis["merged"]:
        return [heading, Paragraph("The analysis holds no merges.")]
    blocks: list[Block] = [heading]
    if picture := plots.merging(analysis, run.loss_unit):
        caption = (
            "Samples that a member saw late less those it saw early, with 95 % intervals. Dotted: "
            "expected of a plain average. Below 0, as for slopes: early samples end higher."
        )
        blocks.append(Picture("merging", picture, caption))
    rows = []
    for name, merge in analysis["merged"].items():
        for epoch, gap in enumerate(formatting.late_less_early(merge["early_late"]), start=1):
            # a reason stands for all gaps
            gaps = (
                gap if "reason" in gap else gap.get(key, _UNMEASURED)
                for key in ("members", "merged", "expected", "excess")
            )
            # from the sharpest estimate to the plain one
            slopes = (merge[key] for key in ("after", "change", "mean_position"))
            rows.append(
                [
                    f"{name}, epoch {epoch}",
                    *map(formatting.gap_or_reason, gaps),
                    *(_slope(fit, epoch) for fit in slopes),
                ]
            )
    header = ["merge", "gap in members", "gap in merge", "expected", "excess"]
    header += ["slope left", "change of slope", "plain slope"]
    caption = (
        "Gap: loss of the half of the samples that a member saw late less the half it saw early, "
        "mean over the members' orders. Expected: of a plain average of the members' losses, the "
        "gap times the share of it that these orders do not cancel; excess: gap in the merge less "
        "that. Slopes are by a sample's mean position in all members: "
        "the slope that is left, its change against the members, and the plain regression of the "
        "merge's losses, with the base's loss as a covariate where it was measured."
    )
    return [*blocks, Table(header, rows, caption)]


def _slope(fit: Json, epoch: int) -> Cell:
    if "reason" in fit:
        return formatting.gap_or_reason(fit)
    # epochs in which no order changed share one slope
    row = next(row for row in fit["coefficients"] if epoch in row["epochs"])
    return formatting.gap_or_reason(row)
