"""Recipes of mergekit 0.1.5, run from the same YAML: its numbers, or its random distribution."""

import pathlib

import numpy as np
import pytest

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.merge import engine
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.recipe import planner

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GOLDENS = np.load(GOLDEN / "merge" / "mergekit.npz")
HUB = {
    "example-org/base": "base",
    "example-org/math": "a",
    "example-org/code": "b",
    "example-org/chat": "c",
}
CASES = sorted(
    {
        name.split("/")[0]
        for name in GOLDENS.files
        if name.endswith("/yaml") and not name.startswith(("random", "example"))
    }
)
RANDOM = sorted({name.split("/")[1] for name in GOLDENS.files if name.startswith("random/")})
EXAMPLES = sorted((GOLDEN / "merge" / "examples").glob("*.yml"))


@pytest.fixture(scope="module")
def inputs(golden_checkpoints):
    models = golden_checkpoints.models()
    assert golden_checkpoints.digest(models) == str(GOLDENS["digest"])
    return models


@pytest.fixture(scope="module")
def resolve(golden_checkpoints, inputs, tmp_path_factory):
    """From a name in a recipe to a directory."""
    root = tmp_path_factory.mktemp("mergekit")
    golden_checkpoints.write(root, inputs)
    return lambda name: root / HUB.get(name, name)


def execute(plan, seed=0, only=None):
    """The tensors of a plan, each merged in one piece."""
    merged = {}
    for out in plan.outputs:
        if only is not None and out.name not in only:
            continue
        arrays = {
            view: np.empty(out.shape, plan.sources[view.source].info(view.name).dtype)
            for view in (*out.members, out.base)
            if view
        }
        for view, array in arrays.items():
            plan.sources[view.source].read_into(view.name, 0, array)
        merged[out.name] = np.asarray(
            table.merge_tensor(
                out.method,
                [arrays[view] for view in out.members],
                base=arrays.get(out.base),
                weights=out.weights,
                key_bits=table.key_bits(out.method, out.parameters, seed, out.name, out.layer),
                dtype=plan.dtype,
                **out.parameters,
            )
        ).astype(plan.out_dtype)
    return merged


def recorded(case):
    return {
        name.removeprefix(f"{case}/"): GOLDENS[name]
        for name in GOLDENS.files
        if name.startswith(f"{case}/") and name[-5:] != "/yaml"
    }


def assert_same_numbers(tensors, case):
    """Within 1e-6 of the largest element; half a unit of bfloat16 more where that was stored."""
    for name, expected in recorded(case).items():
        off = np.abs(tensors[name].astype(np.float64) - expected)
        rounding = np.abs(expected) * 2.0**-8 if tensors[name].dtype.name == "bfloat16" else 0
        assert (off <= 1e-6 * np.abs(expected).max() + rounding).all(), (
            f"{name}: {off.max() / np.abs(expected).max():.2g} off"
        )


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_gives_the_numbers_of_mergekit(case, resolve):
    plan = planner.plan_recipe(str(GOLDENS[f"{case}/yaml"]), resolve=resolve)
    assert_same_numbers(execute(plan, only=recorded(case)), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_recipe_gives_the_numbers_of_mergekit_from_files_in_slabs(case, resolve, tmp_path):
    recipe_plan = planner.plan_recipe(str(GOLDENS[f"{case}/yaml"]), resolve=resolve)
    engine.merge_plan(recipe_plan, tmp_path / "out", slab_elements=256, with_diagnostics=False)
    reader = Reader(tmp_path / "out")
    assert_same_numbers({name: reader.read(name) for name in reader.names}, case)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_unchanged_and_from_files(path, resolve, tmp_path):
    engine.merge_plan(planner.plan_recipe(path, resolve=resolve), tmp_path / "out")
    reader = Reader(tmp_path / "out")
    assert_same_numbers({name: reader.read(name) for name in reader.names}, f"example_{path.stem}")


@pytest.fixture(scope="module")
def runs(resolve):
    """Over as many seeds as mergekit ran: the tensors of a random recipe, [seeds, *s]."""

    def run(case, only=None):
        plan, seeds = (
            planner.plan_recipe(str(GOLDENS[f"random/{case}/yaml"]), resolve=resolve),
            int(GOLDENS[f"random/{case}/seeds"]),
        )
        merged = [execute(plan, seed, only) for seed in range(seeds)]
        return {
            name: np.stack([tensors[name] for tensors in merged]).astype(np.float64)
            for name in merged[0]
        }

    return run


@pytest.mark.parametrize("case", [case for case in RANDOM if "alone" not in case])
def test_a_random_recipe_of_three_members_is_distributed_as_in_mergekit(case, runs):
    expected = recorded(f"random/{case}")
    names = [name.removeprefix("mean/") for name in expected if name.startswith("mean/")]
    distances, variances = [], []
    for name, values in runs(case, names).items():
        mean, spread = expected[f"mean/{name}"], expected[f"std/{name}"].astype(np.float64)
        pooled = np.sqrt((values.var(axis=0) + spread**2) / (len(values) - 1))
        drawn = pooled > 1e-6 * np.abs(mean).max()
        np.testing.assert_allclose(
            values.mean(axis=0)[~drawn], mean[~drawn], rtol=0, atol=2e-6 * np.abs(mean).max()
        )
        distances.append((values.mean(axis=0) - mean)[drawn] / pooled[drawn])
        variances.append(
            [
                values.var(axis=0).sum() / np.abs(mean).max() ** 2,
                (spread**2).sum() / np.abs(mean).max() ** 2,
            ]
        )
    z = np.concatenate(distances)
    assert len(z) > 500
    assert 0.85 < (z**2).mean() < 1.15
    assert np.abs(z).max() < 6
    ours, theirs = np.sum(variances, axis=0)
    assert ours == pytest.approx(theirs, rel=0.1)  # each is known to some 3 %


@pytest.mark.parametrize("case", [case for case in RANDOM if "alone" in case])
def test_a_random_recipe_of_one_member_keeps_what_mergekit_keeps(
    case, runs, inputs, golden_checkpoints
):
    expected, tensors = recorded(f"random/{case}"), runs(case)
    names = list(golden_checkpoints.shapes())
    moved = [tensors[name] - inputs["base"][name] for name in names]
    task_vectors = [(inputs["a"][name] - inputs["base"][name]).astype(np.float64) for name in names]
    seeds = int(GOLDENS[f"random/{case}/seeds"])
    ours, theirs = (
        np.concatenate([(x != 0).sum(axis=0).ravel() for x in moved]),
        expected["kept"].astype(np.int64),
    )
    changed = np.concatenate([(tau != 0).ravel() for tau in task_vectors])
    assert (ours[~changed] == 0).all()
    # two binomial counts with a probability of their own in each element
    p = (ours + theirs)[changed] / (2 * seeds)
    spread = np.sqrt(2 * seeds * np.clip(p * (1 - p), 1e-9, None))
    z = ((ours - theirs)[changed] / spread)[(p > 0) & (p < 1)]
    assert 0.9 < (z**2).mean() < 1.1
    assert np.abs(z).max() < 6
    for quantity, of in (
        ("fraction", lambda x, tau: (x != 0).sum() / (tau != 0).sum()),
        ("l1", lambda x, tau: np.abs(x).sum() / np.abs(tau).sum()),
    ):
        values = np.array(
            [
                [of(x, tau) for x, tau in zip(changes, task_vectors, strict=True)]
                for changes in zip(*moved, strict=True)
            ]
        )
        error = np.sqrt((values.var(axis=0) + expected[quantity].var(axis=0)) / seeds) + 1e-5
        assert (np.abs(values.mean(axis=0) - expected[quantity].mean(axis=0)) < 5 * error).all(), (
            quantity
        )
        # the median: a small vector sometimes loses everything, which is rare and far
        np.testing.assert_allclose(
            np.median(values.std(axis=0)),
            np.median(expected[quantity].std(axis=0)),
            rtol=0.15,
            atol=1e-6,
        )
