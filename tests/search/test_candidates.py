"""Candidates in device memory: with the bits of the same merge of files, few programs, little memory, clear refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import arch, tree
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.sources.storage import Directory
from jax_ordermerge.search import controls
from jax_ordermerge.search.candidates import Candidate, Population, anchors, check

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
    stock = Population(CONFIG, tree.unflatten(members), tree.unflatten(base), "bfloat16")
    for i in range(3):
        convert.export(stock.members, CONFIG, root / f"member_{i}", dtype="bfloat16", member=i)
    convert.export(stock.base, CONFIG, root / "base", dtype="bfloat16")
    return stock, root


def tensors(directory):
    reader = Reader(directory)
    return {name: reader.read(name).tobytes() for name in reader.names}


def from_files(root, out, one, dtype=None):
    files = [Directory(root / f"member_{i}") for i in range(3)]
    settings = {
        "method": one.method,
        "seed": one.seed,
        "parameters": one.parameters,
        "weights": one.weights,
    }
    made = plan.uniform(files, Directory(root / "base"), dtype="bfloat16", **settings)
    engine.merge_plan(
        made if dtype is None else dataclasses.replace(made, out_dtype=np.dtype(dtype)), out
    )
    return out


SELECTION = Candidate("selection", {"resample": "exhaustive"}, seed=5)
CONTROLS = controls.controls(
    ["lambda_line", "norm_matched", "lambda_matched", "seeds", "children", "barrier"],
    3,
    {"selection": SELECTION},
    0,
)


def of_groups():
    """One control of every group, and the average."""
    merges = {one.group: one for one in CONTROLS if one.candidate.kind == "merge"}
    return [pytest.param(one.candidate, id=one.name) for one in merges.values()]


@pytest.mark.parametrize("candidate", of_groups())
def test_a_control_is_the_same_merge_of_files(stored, tmp_path, candidate):
    stock, root = stored
    convert.export(stock.build(candidate), CONFIG, tmp_path / "memory", dtype="bfloat16")
    assert tensors(from_files(root, tmp_path / "files", candidate)) == tensors(tmp_path / "memory")


def test_lambda_of_any_merge_is_task_arithmetic_of_it(stored, tmp_path):
    stock, root = stored
    one = Candidate("selection", {"resample": 1}, seed=3, scale=1.3)
    convert.export(stock.build(one), CONFIG, tmp_path / "memory", dtype="bfloat16")
    whole = from_files(
        root, tmp_path / "whole", dataclasses.replace(one, scale=1.0), dtype="float32"
    )
    again = plan.uniform(
        [Directory(whole)],
        Directory(root / "base"),
        method="task_arithmetic",
        parameters={"scale": 1.3},
        dtype="float32",
    )
    engine.merge_plan(
        dataclasses.replace(again, out_dtype=np.dtype(jnp.bfloat16)), tmp_path / "files"
    )
    assert tensors(tmp_path / "files") == tensors(tmp_path / "memory")


def test_lambda_by_group_touches_that_group_alone(stored):
    stock, _ = stored
    grouped = tree.flatten(
        stock.build(Candidate("average", groups={"mlp": 0.5, "layers:1-1": 0.0, "attention": 2.0}))
    )
    base, members = tree.flatten(stock.base), tree.flatten(stock.members)
    for spec in arch.tensor_table(CONFIG):
        own, start = grouped[spec.path], np.asarray(base[spec.path], np.float64)
        mean = np.asarray(members[spec.path], np.float64).mean(0)
        if spec.stacked:
            assert np.array_equal(own[1], base[spec.path][1]), spec.path
            own, start, mean = own[0], start[0], mean[0]
        factor = {"mlp": 0.5, "attention": 2.0}.get(spec.kind, 1.0)
        # half a unit in the last place of bfloat16 is at most 2**-8 of the number
        np.testing.assert_allclose(
            np.asarray(own, np.float64), start + factor * (mean - start), rtol=2**-8, atol=1e-5
        )


def test_members_and_base_are_themselves(stored):
    stock, _ = stored
    for one in anchors(3, 0)[1:]:
        built = tree.flatten(stock.build(one))
        expected = (
            stock.base
            if one.kind == "base"
            else tree.member(stock.members, one.parameters["number"])
        )
        assert all(
            np.array_equal(built[path], leaf) for path, leaf in tree.flatten(expected).items()
        ), one.name


def test_other_numbers_compile_nothing(stored):
    stock, _ = stored

    def family(x):
        return [
            Candidate("task_arithmetic", {"scale": x}, weights=(x, 1 - x, 0.1)),
            Candidate("dare_linear", {"density": x}, scale=1 + x),
            Candidate("average", groups={"mlp": x}, scale=x),
            Candidate("selection", {"resample": "exhaustive"}, seed=int(100 * x)),
            Candidate("member", {"number": int(3 * x)}),
        ]

    for one in family(0.3):
        stock.build(one)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compilations.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    for one in family(0.7):
        stock.build(one)
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
            "merge method average: 2 weights for 3 members; give one a member",
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
    ],
)
def test_what_cannot_be_made_is_refused(candidate, message):
    with pytest.raises(UserError) as caught:
        check(candidate, 3, CONFIG)
    assert message in str(caught.value)
