"""The report of one run: report.html, a file that needs no other, and report.md."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jax_ordermerge import console
from jax_ordermerge.layout import SearchLayout, read_search
from jax_ordermerge.report import contrasts, document, findings, search_findings
from jax_ordermerge.report.chapters import imbalance, merges, models, provenance, summary
from jax_ordermerge.report.document import Block, Bullets, Chapter, Heading, Paragraph
from jax_ordermerge.report.run import Run, compare_models, read_run


def write(run_directory: str | Path) -> Path:
    """Write report.html, report.md and its pictures in report/; return the path of the first.

    Stages that have no output yet are named in the report.

    Raises:
        UserError: the directory is no run directory, or a file in it is not valid JSON.
    """
    run = read_run(run_directory)
    title = f"Order merging report: {run.name}"
    compare_models([run], "report")
    contrasts.write(run)
    document.publish(run.layout.report_html, title, build(run), pictures="report")
    return run.layout.report_html


def write_search(run_directory: Path, directory: Path) -> Path:
    """Write search.html, search.md and their picture beside the results of a search.

    Args:
        run_directory: of the run whose members were merged.
        directory: of the search.

    Returns:
        The path of search.html.
    """
    run, layout = read_run(run_directory), SearchLayout(directory)
    # the same chapter as in the report, for a search that was started by itself
    blocks = merges.search(read_search(layout), run.loss_unit)
    document.publish(layout.page, f"Search for a merge: {run.name}", blocks, pictures=".")
    return layout.page


def build(run: Run) -> list[Block]:
    """Return the blocks of the report."""
    # from the findings down to what they rest on; what only reproduces the run comes last
    chapters: list[tuple[str, Callable[[], Sequence[Block]]]] = [
        ("Findings in full", lambda: _findings(run)),
        ("Over populations", lambda: contrasts.chapter(run)),
        ("Training", lambda: imbalance.training(run)),
        ("Position in the order", lambda: [*imbalance.imbalance(run), *imbalance.mitigation(run)]),
        (
            "Models and merges",
            lambda: [*models.results(run), *models.texts(run), *merges.merges(run)],
        ),
        ("Search", lambda: merges.search(run.search, run.loss_unit)),
        ("Controls", lambda: merges.controls(run)),
        ("Items", lambda: models.answers(run)),
        ("Provenance", lambda: provenance.provenance(run)),
    ]
    report: list[Block] = [Paragraph(_introduction(run)), *summary.summary(run)]
    for title, make in console.track(chapters, len(chapters), "report", "chapters", transient=True):
        # of a stage without output there may be nothing to say
        if blocks := make():
            report.append(Chapter(title, _below(title, blocks)))
    return report


def _below(title: str, blocks: Sequence[Block]) -> Sequence[Block]:
    """Return the blocks of a chapter without a first heading that repeats its title."""
    first = blocks[0]
    return blocks[1:] if isinstance(first, Heading) and first.text == title else blocks


_DIFFERENCES = {
    "order": "in another order",
    "init": "in the same order, from another initialization of the adapters",
    "all": "in another order and from another initialization of the adapters",
}


def _introduction(run: Run) -> str:
    model, population, training = (
        run.config.get(key, {}) for key in ("model", "population", "training")
    )
    merges = f" {len(run.merge['merges'])} merges of them were made." if run.merge else ""
    difference = _DIFFERENCES[population.get("vary", "order")]
    count = population.get("replicates", 1)
    replicates = (
        f" That was done {count} times, with independent members: {count} populations. The claims "
        "are over all populations; what else stands here is about population 0."
        if count > 1
        else ""
    )
    return (
        f"The base {model.get('base')} was fine-tuned {population.get('members')} times for "
        f"{training.get('epochs')} epochs on the same data, each time {difference} (level "
        f"{population.get('level')}, reshuffle {population.get('reshuffle')})."
        f"{replicates}{merges} Brackets hold 95 % intervals."
    )


def _findings(run: Run) -> list[Block]:
    sentences = findings.sentences(run)
    if run.search:
        sentences += search_findings.sentences(run.search)
    return [Bullets(sentences)] if sentences else []
