"""The stage that writes the report."""

import jax

from jax_ordermerge.config import Config
from jax_ordermerge.experiment.context import RunContext, Stage
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.report import run_report


def run(ctx: RunContext) -> None:
    """Write report.html and report.md from the files of the run directory."""
    if jax.process_index() == 0:
        run_report.write(ctx.layout.root)


def is_complete(config: Config) -> bool:
    """Whether both forms of the report are written."""
    run = RunLayout(config.directory)
    return run.report_html.is_file() and run.report_markdown.is_file()


STAGE = Stage("report", run, is_complete)
