"""Independent populations trained as one: population 0 is that of a run without replicates."""

import csv
import json

import ml_dtypes
import numpy as np
import pytest
import yaml
from scipy import stats

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.merge.sources.references import open_model

TENSOR = "model.layers.1.mlp.up_proj.weight"
CONTROLS = ["merge.controls=[lambda_line]"]


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A run of two members, and one of three populations of two, with its messages."""
    messages, directories = [], []
    for replicates in (1, 3):
        directory = tmp_path_factory.mktemp("replicates") / "run"
        settings = [f"output={directory}", f"population.replicates={replicates}", *CONTROLS]
        config = load_config(folder / "tiny.yaml", settings)
        directories.append(pipeline.run(config, log=messages.append))
    return *directories, messages


def npz(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read(source, name=TENSOR):
    model = open_model(str(source))
    values = np.empty(model.info(name).shape, np.float32)
    model.read_into(name, 0, values)
    return values


def test_population_0_has_the_bits_of_a_run_without_replicates(runs):
    single, several, _ = runs
    for member in range(2):
        name = f"orders/member_{member}.npz"
        assert (single / name).read_bytes() == (several / name).read_bytes()
    expected = npz(single / "losses" / "train.npz")["losses"]
    assert npz(several / "losses" / "train.npz")["losses"][:2].tobytes() == expected.tobytes()
    for merge in ("average", "selection"):
        name = f"merged/{merge}/model.safetensors"
        assert (single / name).read_bytes() == (several / name).read_bytes()
    for name in ("analysis.json", "evaluations.json", "controls.json", "merge.json"):
        assert json.loads((single / name).read_text()) == json.loads((several / name).read_text())


def test_populations_are_independent(runs):
    orders = [runs[1] / "orders" / f"member_{member}.npz" for member in range(6)]
    assert len({path.read_bytes() for path in orders}) == 6
    losses = npz(runs[1] / "losses" / "train.npz")["losses"]
    assert len({member.tobytes() for member in losses}) == 6


def test_merges_of_further_populations_are_those_of_their_members(folder, runs):
    # a run that exports all of them
    several = RunLayout(runs[1])
    assert not (several.population(1).root / "merged").exists()
    config = load_config(several.config, ["merge.export=all", f"output={several.root}"])
    before = several.population(2).evaluation("average").read_text()
    pipeline.run(config, log=lambda text: None)
    third = several.population(2)
    assert third.evaluation("average").read_text() == before
    # rounded to bfloat16, added in float32 and rounded once
    first, second = (
        read(runs[1] / f"member_{m}").astype(ml_dtypes.bfloat16).astype(np.float32) for m in (4, 5)
    )
    expected = ((first + second) / 2).astype(ml_dtypes.bfloat16)
    merged = Reader(third.merged("average")).read(TENSOR)
    assert merged.view(np.uint16).tolist() == expected.view(np.uint16).tolist()
    recipe = yaml.safe_load((third.merged("average") / "merge_config.yaml").read_text())
    assert recipe["models"] == ["run/member_4", "run/member_5"]
    assert recipe["population"] == 2
    # evaluated from files or from memory: the same losses
    third.evaluation("average").unlink()
    third.evaluations.unlink()
    pipeline.run(config, log=lambda text: None)
    assert third.evaluation("average").read_text() == before


def test_a_claim_is_the_mean_of_paired_contrasts_of_populations(runs):
    rows = list(csv.DictReader((runs[1] / "contrasts.csv").read_text().splitlines()))
    run = RunLayout(runs[1])
    gaps = []
    for number in range(3):
        part = run.population(number)
        items = {
            name: json.loads(part.evaluation(name).read_text())
            for name in ("average", "member_0", "member_1")
        }
        tokens = np.array(items["average"]["tokens"], np.float64)
        losses = {name: np.array(item["losses"]) for name, item in items.items()}
        gap = losses["average"] - (losses["member_0"] + losses["member_1"]) / 2
        gaps.append(float((gap * tokens).sum() / tokens.sum()))
    key = {"measure": "loss", "model": "average", "rival": "mean_member"}
    chosen = [row for row in rows if key.items() <= row.items()]
    assert [row["population"] for row in chosen] == ["0", "1", "2", "all"]
    assert [row["errors_over"] for row in chosen] == ["items"] * 3 + ["populations"]
    np.testing.assert_allclose([float(row["estimate"]) for row in chosen[:3]], gaps, rtol=1e-6)
    test = stats.ttest_1samp(gaps, 0)
    low, high = test.confidence_interval(0.95)
    over = [float(chosen[3][name]) for name in ("estimate", "low", "high", "p")]
    np.testing.assert_allclose(over, [np.mean(gaps), low, high, test.pvalue], rtol=1e-6)
    report = (runs[1] / "report.md").read_text()
    assert "Over 3 populations" in report
    # the first screen claims it, too
    opening = report.replace("\\", "").partition("## ")[2].partition("## ")[0]
    assert f"{np.mean(gaps):+.4f} [{low:+.4f}, {high:+.4f}]" in opening
    assert "the best member by loss of each population, chosen on validation" in opening
    assert {row["measure"] for row in rows} >= {"slope, epoch 1", "slope, epoch 2", "swap"}
    assert any(row["model"] == "average, lambda 0.9" for row in rows)
    # without replicates there are no rows over populations
    single = list(csv.DictReader((runs[0] / "contrasts.csv").read_text().splitlines()))
    assert {row["population"] for row in single} == {"0"}


def test_a_complete_run_is_complete(runs):
    messages = []
    config = load_config(runs[1] / "config.yaml", [f"output={runs[1]}"])
    pipeline.run(config, log=messages.append)
    assert messages[-1].startswith("everything is done")
    # the results of every population count
    analysis, stage = RunLayout(runs[1]).population(1).analysis, pipeline.find_stage("analyze")
    content = analysis.read_bytes()
    analysis.unlink()
    assert not stage.is_complete(config)
    analysis.write_bytes(content)
    assert stage.is_complete(config)


@pytest.mark.slow
def test_device_groups_may_share_all_populations_and_not_each(runs, folder, tmp_path):
    settings = [
        f"output={tmp_path / 'run'}",
        "population.replicates=2",
        "mesh.order=4",
        "merge.controls=none",
        "evaluation.tasks=[]",
    ]
    directory = pipeline.run(load_config(folder / "tiny.yaml", settings), log=lambda text: None)
    for merge in ("average", "selection"):
        name = f"merged/{merge}/model.safetensors"
        assert (directory / name).read_bytes() == (runs[1] / name).read_bytes()
    expected = RunLayout(runs[1]).population(1).merges
    merges = json.loads(RunLayout(directory).population(1).merges.read_text())
    assert merges["merges"] == json.loads(expected.read_text())["merges"]
    config = load_config(folder / "tiny.yaml", [*settings[:3], "merge.controls=[ensemble]"])
    with pytest.raises(UserError, match="ensemble divides the members of a population"):
        pipeline.run(config.model_copy(update={"output": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_each_population_has_a_search_of_its_own_also_in_waves_across_populations(folder, tmp_path):
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    raw["output"] = str(tmp_path / "run")
    raw["data"]["validation_examples"] = 10
    raw["population"] = {"members": 2, "replicates": 2, "wave": 3}
    methods = [{"method": "average", "scale": [0.5, 0.8, 1.2, 1.5, 2.0]}]
    raw["merge"] = {
        "auto": {"methods": methods, "smallest": 4},
        "methods": [{"method": "fisher"}, {"method": "greedy_soup"}],
        "controls": ["single"],
    }
    raw["evaluation"] = {"batch": 8}
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(raw))
    directory = pipeline.run(load_config(tmp_path / "auto.yaml"), log=lambda text: None)
    for number in range(2):
        run = RunLayout(directory).population(number)
        results = json.loads(run.search.results.read_text())
        # the winner, from files or built again, is what was chosen
        chosen = results["candidates"][results["winner"]]["loss"]
        auto = json.loads(run.evaluation("auto").read_text())["summary"]
        assert auto["validation_loss"] == pytest.approx(chosen, rel=1e-6)
        assert run.is_merged("auto") == (number == 0)
        # methods that look at data see the members of their population alone
        recorded = {row["name"]: row for row in json.loads(run.merges.read_text())["merges"]}
        soup = recorded["greedy_soup"]["parameters"]
        members = [
            json.loads(run.evaluation(f"member_{m}").read_text())["summary"] for m in range(2)
        ]
        expected = [member["validation_loss"] for member in members]
        assert soup["validation_losses"] == pytest.approx(expected, rel=1e-6)
        assert recorded["fisher"]["diagnostics"]["total"]["norm_ratio"] > 0
    orders = [(directory / "orders" / f"member_{m}.npz").read_bytes() for m in range(4)]
    assert len(set(orders)) == 4
    # one compute-matched run for each population, in the orders of its first member
    single = RunLayout(directory).single
    seeds = [spec.read_bytes() for spec in single.member_orders()]
    assert len(seeds) == len(set(seeds)) == 2
    losses = [
        npz(RunLayout(directory).population(number).control_losses)["losses"][-1]
        for number in range(2)
    ]
    assert losses[0].tolist() != losses[1].tolist()
