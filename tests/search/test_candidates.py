"""Candidates in device memory: the bits of the same merge of files, few programs, clear errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import arch, tree
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.sources.storage import Directory
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.search import controls, subsets
from jax_ordermerge.search.candidates import Candidate, Population, baselines, check

CONFIG = arch.ModelConfig(
    vocab_size=37, hidden_size=36, intermediate_size=50, num_layers=2, num_heads=3
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Three members and a base in bfloat16: in memory, and as directories."""
    root, generator = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    members, base = {}, {}
    for spec in arch.tensor_table(CONFIG):
        start = generator.normal(size=spec.shape)
        task_vectors = (
            0.1
            * generator.normal(size=(3, *spec.shape))
            * (generator.random((3, *spec.shape)) < 0.7)
        )
        members[spec.path], base[spec.path] = (
            jnp.asarray(start + task_vectors, "bfloat16"),
            jnp.asarray(start, "bfloat16"),
        )
    population = Population(CONFIG, tree.unflatten(members), tree.unflatten(base), "bfloat16")
    for i in range(3):
        convert.export(population.members, CONFIG, root / f"member_{i}", dtype="bfloat16", member=i)
    convert.export(population.base, CONFIG, root / "base", dtype="bfloat16")
    return population, root


def tensors(directory):
    reader = Reader(directory)
    return {name: reader.read(name).tobytes() for name in reader.names}


def from_files(root, out, candidate, dtype=None):
    files = [Directory(root / f"member_{i}") for i in range(3)]
    settings = {
        "method": candidate.method,
        "seed": candidate.seed,
        "parameters": candidate.parameters,
        "weights": candidate.weights,
    }
    merge_plan = plan.uniform(files, Directory(root / "base"), dtype="bfloat16", **settings)
    if dtype is not None:
        merge_plan = dataclasses.replace(merge_plan, out_dtype=np.dtype(dtype))
    engine.merge_plan(merge_plan, out)
    return out


SELECTION = Candidate("selection", {"resample": "exhaustive"}, seed=5)
CONTROLS = controls.make_controls(
    ["lambda_line", "norm_matched", "lambda_matched", "seeds", "children", "barrier"],
    3,
    {"selection": SELECTION},
    0,
)
SUBSETS = [control for control in subsets.make_controls(3, SELECTION, 0) if control.at == (0, 2)]


def control_per_group():
    """One control of every group, and the average."""
    merges = {x.group: x for x in CONTROLS if x.candidate.kind == "merge"}
    return [pytest.param(control.candidate, id=control.name) for control in merges.values()]


@pytest.mark.parametrize("candidate", control_per_group())
def test_a_control_is_the_same_merge_of_files(stored, tmp_path, candidate):
    population, root = stored
    convert.export(population.build(candidate), CONFIG, tmp_path / "memory", dtype="bfloat16")
    assert tensors(from_files(root, tmp_path / "files", candidate)) == tensors(tmp_path / "memory")


def test_the_average_of_a_subset_is_the_merge_of_these_files(stored, tmp_path):
    population, root = stored
    control = next(control for control in SUBSETS if control.candidate.method == "average")
    convert.export(
        population.build(control.candidate), CONFIG, tmp_path / "memory", dtype="bfloat16"
    )
    files = [Directory(root / f"member_{member}") for member in control.at]
    merge_plan = plan.uniform(files, Directory(root / "base"), method="average", dtype="bfloat16")
    engine.merge_plan(merge_plan, tmp_path / "files")
    assert tensors(tmp_path / "files") == tensors(tmp_path / "memory")


def test_a_selection_of_a_subset_draws_from_it_alone(stored):
    population, _ = stored
    control = next(control for control in SUBSETS if control.candidate.method == "selection")
    built, members = (
        tree.flatten(x) for x in (population.build(control.candidate), population.members)
    )
    for path, merged in built.items():
        first, _, third = np.asarray(members[path], np.float32)
        merged = np.asarray(merged, np.float32)
        assert ((merged == first) | (merged == third)).all()
        # of many elements that differ, some come from either
        if (first != third).sum() > 50:
            assert (merged != first).any()
            assert (merged != third).any()


def test_lambda_of_any_merge_is_task_arithmetic_of_it(stored, tmp_path):
    population, root = stored
    candidate = Candidate("selection", {"resample": 1}, seed=3, scale=1.3)
    convert.export(population.build(candidate), CONFIG, tmp_path / "memory", dtype="bfloat16")
    unscaled = from_files(
        root, tmp_path / "unscaled", dataclasses.replace(candidate, scale=1.0), dtype="float32"
    )
    scaled = plan.uniform(
        [Directory(unscaled)],
        Directory(root / "base"),
        method="task_arithmetic",
        parameters={"scale": 1.3},
        dtype="float32",
    )
    engine.merge_plan(
        dataclasses.replace(scaled, out_dtype=np.dtype(jnp.bfloat16)), tmp_path / "files"
    )
    assert tensors(tmp_path / "files") == tensors(tmp_path / "memory")


def test_lambda_of_a_member_is_task_arithmetic_of_its_files(stored, tmp_path):
    population, root = stored
    candidate = Candidate("member", {"number": 1}, scale=1.3)
    convert.export(population.build(candidate), CONFIG, tmp_path / "memory", dtype="bfloat16")
    scaled = plan.uniform(
        [Directory(root / "member_1")],
        Directory(root / "base"),
        method="task_arithmetic",
        parameters={"scale": 1.3},
        dtype="bfloat16",
    )
    engine.merge_plan(scaled, tmp_path / "files")
    assert tensors(tmp_path / "files") == tensors(tmp_path / "memory")


def test_lambda_of_a_member_is_the_formula_also_by_group(stored):
    population, _ = stored
    candidate = Candidate("member", {"number": 2}, scale=1.5, groups={"mlp": 0.5, "layers:0-0": 2})
    built, base = tree.flatten(population.build(candidate)), tree.flatten(population.base)
    members = tree.flatten(population.members)
    for spec in arch.tensor_table(CONFIG):
        start = np.asarray(base[spec.path], np.float64)
        task_vector = np.asarray(members[spec.path][2], np.float64) - start
        factor = 1.5 * (0.5 if spec.kind == "mlp" else 1.0)
        if spec.stacked:
            layers = np.array([2.0, 1.0]).reshape(2, *[1] * (start.ndim - 1))
            factor = factor * layers
        # Half a unit in the last place of bfloat16 is at most 2**-8 of the number.
        np.testing.assert_allclose(
            np.asarray(built[spec.path], np.float64),
            start + factor * task_vector,
            rtol=2**-8,
            atol=1e-5,
        )


def test_a_member_at_another_lambda_has_the_same_bits_on_a_mesh(stored):
    population, _ = stored
    mesh = make_mesh(order=2, fsdp=2, tensor=2)
    specs = {spec.path: spec for spec in arch.tensor_table(CONFIG)}
    sharded = {
        path: jax.device_put(
            jnp.concatenate([leaf, leaf[:1]]),
            NamedSharding(mesh, P("order", *[None] * len(specs[path].shape))),
        )
        for path, leaf in tree.flatten(population.members).items()
    }
    base = jax.device_put(population.base, NamedSharding(mesh, P()))
    spread = Population(CONFIG, tree.unflatten(sharded), base, "bfloat16")
    candidate = Candidate("member", {"number": 1}, scale=0.7)
    expected = tree.flatten(population.build(candidate))
    for path, leaf in tree.flatten(spread.build(candidate)).items():
        assert np.array_equal(leaf, expected[path]), path


def test_lambda_by_group_touches_that_group_alone(stored):
    population, _ = stored
    grouped = tree.flatten(
        population.build(
            Candidate("average", groups={"mlp": 0.5, "layers:1-1": 0.0, "attention": 2.0})
        )
    )
    base, members = tree.flatten(population.base), tree.flatten(population.members)
    for spec in arch.tensor_table(CONFIG):
        merged, start = grouped[spec.path], np.asarray(base[spec.path], np.float64)
        mean = np.asarray(members[spec.path], np.float64).mean(0)
        if spec.stacked:
            assert np.array_equal(merged[1], base[spec.path][1]), spec.path
            merged, start, mean = merged[0], start[0], mean[0]
        factor = {"mlp": 0.5, "attention": 2.0}.get(spec.kind, 1.0)
        # Half a unit in the last place of bfloat16 is at most 2**-8 of the number.
        np.testing.assert_allclose(
            np.asarray(merged, np.float64), start + factor * (mean - start), rtol=2**-8, atol=1e-5
        )


def test_members_and_base_are_themselves(stored):
    population, _ = stored
    for candidate in baselines(3, 0)[1:]:
        built = tree.flatten(population.build(candidate))
        expected = (
            population.base
            if candidate.kind == "base"
            else tree.member(population.members, candidate.parameters["number"])
        )
        for path, leaf in tree.flatten(expected).items():
            assert np.array_equal(built[path], leaf), (candidate.name, path)


def test_other_hyperparameters_do_not_compile_again(stored):
    population, _ = stored

    def family(x):
        return [
            Candidate("task_arithmetic", {"scale": x}, weights=(x, 1 - x, 0.1)),
            Candidate("dare_linear", {"density": x}, scale=1 + x),
            Candidate("average", groups={"mlp": x}, scale=x),
            Candidate("selection", {"resample": "exhaustive"}, seed=int(100 * x)),
            Candidate("member", {"number": int(3 * x)}),
            Candidate("member", {"number": int(3 * x)}, scale=x, groups={"mlp": 1 + x}),
        ]

    for candidate in family(0.3):
        population.build(candidate)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compilations.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    for candidate in family(0.7):
        population.build(candidate)
    jax.monitoring.clear_event_listeners()
    assert not compilations


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (Candidate("avrage"), "unknown merge method 'avrage' (did you mean 'average'?)"),
        (
            Candidate("ties", {"densty": 1}),
            "merge method ties has no parameter 'densty' (did you mean 'density'?)",
        ),
        (
            Candidate("average", weights=(1.0, 2.0)),
            "merge method average: 2 weights for 3 members; give one per member",
        ),
        (Candidate("fisher"), "a search does not offer fisher, which looks at data itself"),
        (
            Candidate("average", groups={"layers:1-2": 0.5}),
            "group of tensors layers:1-2: expected layers:FIRST-LAST within 0 to 1",
        ),
        (
            Candidate("average", groups={"norms": 0.5}),
            "unknown group of tensors norms (did you mean 'norm'?)",
        ),
        (Candidate("slerp"), "merge method slerp takes 2 models, 3 were given"),
        (
            Candidate("member", {"number": 3}),
            "candidate member with parameters {'number': 3}: expected number, 0 to 2",
        ),
        (Candidate("member", {"number": 1.0}), "expected number, 0 to 2"),
        (Candidate("member"), "expected number, 0 to 2"),
        (
            Candidate("member", {"number": 0}, groups={"layers:0-9": 2.0}),
            "group of tensors layers:0-9: expected layers:FIRST-LAST within 0 to 1",
        ),
    ],
)
def test_a_candidate_that_cannot_be_built_is_refused(candidate, message):
    with pytest.raises(UserError) as caught:
        check(candidate, 3, CONFIG)
    assert message in str(caught.value)
