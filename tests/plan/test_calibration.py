"""Estimates of published runs have the speeds that were measured."""

import numpy as np
import pytest

from jax_ordermerge.arch import ARCHITECTURES
from jax_ordermerge.config import make_config
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.hardware import DEVICES, parse
from jax_ordermerge.plan import analytic, calibration
from jax_ordermerge.plan.analytic import Workload
from jax_ordermerge.plan.results import OptionPlan
from jax_ordermerge.train import flops


def estimate(run, **model):
    """Return the estimated plan of a published run."""
    topology = parse(run.topology)
    rows = run.rows * topology.size
    spec = plan_spec(
        make_config(
            {
                "population": {"members": 1},
                "training": {"batch": rows},
                "data": {"max_length": run.length},
                "mesh": {"order": 1, "fsdp": -1},
                "model": model,
            }
        )
    )
    architecture = ARCHITECTURES[run.model]
    needed = flops.training_flops(architecture, np.full(rows, run.length))
    work = Workload(rows, run.length, float(rows * run.length), needed, 10)
    step = analytic.estimate_step(spec, architecture, topology, work)
    return OptionPlan(spec, {}, topology, work, step)


@pytest.mark.parametrize("run", calibration.RUNS, ids=lambda run: run.topology)
def test_the_estimate_of_a_published_run_has_its_speed(run):
    option = estimate(run)
    speed = option.tokens_per_second / option.topology.size
    assert speed == pytest.approx(run.tokens_per_second, rel=0.01)


# MFU with causal attention, counted by hand: 6 N without the table of embeddings, and 6 L D T
@pytest.mark.parametrize(
    ("topology", "weights", "layers", "width", "length", "published"),
    [
        ("v6e:16x16", 7.504924672e9, 32, 4096, 8192, 7207),
        ("v5p:8x8x8", 68.714504192e9, 80, 8192, 4096, 692),
        ("h100:8", 6.607343616e9, 32, 4096, 4096, 10672),
    ],
)
def test_mfu_of_published_runs(topology, weights, layers, width, length, published):
    run = next(run for run in calibration.RUNS if run.topology == topology)
    per_token = 6 * weights + 6 * layers * width * length
    expected = per_token * published / parse(topology).device.flops
    assert estimate(run).mfu == pytest.approx(expected, rel=0.01)


def test_the_plan_says_where_the_share_comes_from():
    text = " ".join(analytic.assumptions(parse("v6e:16x16")))
    assert "45% of the peak, by a published run: llama-3.1-8b on v6e:16x16" in text
    assert "maxtext/blob/main/docs/reference/models/tiering.md" in text
    assert "is assumed: no published run is known for b200" in calibration.describe(
        parse("b200:8").device
    )
    assert all(0 < calibration.matmul_efficiency(device) < 0.8 for device in DEVICES)
