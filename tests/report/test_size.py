"""The report stays small enough to be sent by mail."""

from pathlib import Path

import numpy as np

from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.config import load_config
from jax_ordermerge.config.merge import DEFAULT_CONTROLS, merge_name
from jax_ordermerge.layout import RunLayout, write_json, write_npz
from jax_ordermerge.report import run_report
from jax_ordermerge.search import controls, subsets
from jax_ordermerge.search.candidates import Candidate
from tests.report import test_run_report as example

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SAMPLES, ITEMS = 1536, 400


def measure_controls(layout, members, selections):
    """Write the results of the default controls, with planted losses."""
    listed = controls.make_controls(DEFAULT_CONTROLS, members, selections, 0)
    listed += subsets.make_controls(members, Candidate("selection"), 0)
    rng = np.random.default_rng(0)
    difficulty, tokens = rng.normal(2, 0.5, ITEMS), np.full(ITEMS, 20.0)
    measured = {
        control.name: controls.ControlLosses(difficulty + rng.normal(0, 0.02, ITEMS), 2.0)
        for control in listed
    }
    arrays = {
        "names": np.array(list(measured)),
        "ids": np.arange(ITEMS),
        "losses": np.stack([control.losses for control in measured.values()]),
        "tokens": tokens,
    }
    write_npz(layout.control_losses, arrays)
    compared = controls.compare(listed, measured, tokens, resamples=20, seed=0)
    means = {name: control.losses for name, control in measured.items()}
    curves = subsets.curves(listed, means, tokens, resamples=20, seed=0)
    write_json(layout.controls, {"split": "test", **compared, "subsets": asdict(curves)})


def test_the_report_of_a_run_of_the_quickstarts_size_is_below_400_kilobytes(tmp_path):
    config = load_config(QUICKSTART)
    members, specs = config.population.members, config.merge.methods
    merges = [merge_name(spec) for spec in specs]
    names = ["base", *(f"member_{member}" for member in range(members)), *merges]
    example.training(tmp_path, members)
    example.evaluation(tmp_path, names, ITEMS)
    example.analysis(tmp_path, members, merges, SAMPLES, config.training.epochs)
    example.merges(tmp_path, merges, members)
    selections = {
        merge_name(spec): Candidate(spec.method, dict(spec.parameters))
        for spec in specs
        if spec.method == "selection"
    }
    measure_controls(RunLayout(tmp_path), members, selections)
    page = run_report.write(tmp_path)
    # every chapter but those of a search and of several populations
    text = page.read_text()
    for chapter in ("Training", "Position in the order", "Models and merges", "Controls", "Items"):
        assert f"<h2>{chapter}</h2>" in text
    assert page.stat().st_size < 400_000
