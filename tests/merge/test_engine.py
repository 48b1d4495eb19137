"""Merging files: the bits of the population for any slabs; errors leave nothing behind."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jax_ordermerge import tree
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan, population, population_diagnostics, slabs
from jax_ordermerge.merge.sources.storage import Directory


@pytest.fixture(scope="module")
def exported(tiny, models, tmp_path_factory):
    """The members and the base as directories, in bfloat16."""
    root = tmp_path_factory.mktemp("models")
    members, base = models
    for i in range(4):
        convert.export(members, tiny, root / f"member_{i}", dtype="bfloat16", member=i)
    convert.export(base, tiny, root / "base", dtype="bfloat16")
    return [root / f"member_{i}" for i in range(4)], root / "base"


def merge(members, base, out, *, slab_elements=engine.SLAB_ELEMENTS, progress=None, **settings):
    sources = [Directory(member) for member in members]
    merge_plan = plan.uniform(sources, None if base is None else Directory(base), **settings)
    return engine.merge_plan(merge_plan, out, slab_elements=slab_elements, progress=progress)


def same_bits(first, second):
    a, b = Reader(first), Reader(second)
    return a.names == b.names and all(a.read(n).tobytes() == b.read(n).tobytes() for n in a.names)


@pytest.mark.parametrize(
    ("parameters", "slab_elements"),
    [
        ({"resample": "exhaustive"}, 1 << 24),
        ({"resample": "exhaustive"}, 50),
        ({}, 1),
        ({"resample": 2, "granularity": "row"}, 200),
        ({"resample": "exhaustive", "granularity": "column"}, 50),
    ],
    ids=str,
)
def test_selection_of_files_has_the_bits_of_the_population(
    tiny, models, exported, tmp_path, parameters, slab_elements
):
    settings = {"method": "selection", "seed": 5, "weights": (1, 2, 3, 4), "parameters": parameters}
    report = merge(*exported, tmp_path / "files", slab_elements=slab_elements, **settings)
    members, base = models
    merged = population.merge(members, base, tiny, dtype="bfloat16", **settings)
    convert.export(merged, tiny, tmp_path / "population", dtype="bfloat16")
    assert same_bits(tmp_path / "files", tmp_path / "population")
    redrawn = population_diagnostics.count_redrawn(members, base, tiny, **settings)
    total = population_diagnostics.measure_diagnostics(members, base, merged, tiny, redrawn)[
        "total"
    ]
    assert total.get("redrawn") == report["diagnostics"]["total"].get("redrawn")
    assert ("redrawn" in total) == (parameters == {"resample": "exhaustive"})


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_arithmetic_of_files_is_that_of_the_population(tiny, models, exported, tmp_path, method):
    members, base = models
    report = merge(*exported, tmp_path / "files", method=method, seed=5, slab_elements=100)
    merged = population.merge(members, base, tiny, method=method, seed=5)
    from_files = tree.flatten(convert.load_params(tmp_path / "files")[1])
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_allclose(
            from_files[path], leaf.astype(jnp.float32), rtol=2**-7, atol=1e-6, err_msg=path
        )
    expected = population_diagnostics.measure_diagnostics(members, base, merged, tiny)["total"]
    np.testing.assert_allclose(
        report["diagnostics"]["total"]["cosines"], expected["cosines"], rtol=1e-5
    )
    assert report["diagnostics"]["total"]["unchanged"] == expected["unchanged"]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3, "rescale": "norm"}),
        ("della", {"rescale": "norm"}),
        ("karcher", {}),
        ("nuslerp", {"granularity": "column", "of": "task_vectors"}),
    ],
)
def test_tensors_beyond_the_memory_are_read_again(
    exported, tmp_path, monkeypatch, method, parameters
):
    """The same bits whether tensors are loaded, or read by each pass in small slabs."""
    members, base = exported
    members = members[:2] if method == "nuslerp" else members
    settings = {"method": method, "parameters": parameters, "seed": 5}
    loaded = merge(members, base, tmp_path / "loaded", slab_elements=256, **settings)
    monkeypatch.setattr(engine, "LOADED_BYTES", 0)
    was_loaded = list[int]()
    load = slabs.FileTensor._load
    monkeypatch.setattr(slabs.FileTensor, "_load", lambda x: (was_loaded.append(1), load(x))[1])
    again = merge(members, base, tmp_path / "again", slab_elements=256, **settings)
    assert same_bits(tmp_path / "loaded", tmp_path / "again")
    assert loaded["diagnostics"] == again["diagnostics"]
    # only what a method needs as a whole: columns, and vectors where the unit is a row
    assert bool(was_loaded) == (method in ("nuslerp", "della"))


def test_the_same_command_gives_the_same_bytes_and_says_what_it_did(exported, tmp_path):
    seen = []
    for name in ("a", "b"):
        merge(
            *exported,
            tmp_path / name,
            method="selection",
            parameters={"resample": "exhaustive"},
            progress=lambda *args: seen.append(args),
        )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "merge.json",
        "merge_config.yaml",
        "model.safetensors",
    ]
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    report = json.loads((tmp_path / "a" / "merge.json").read_text())
    assert report["recipe"]["parameters"] == {
        "resample": "exhaustive",
        "resample_from": "all",
        "granularity": "element",
        "child": None,
    }
    # names alone: merge.json is published with the tensors
    assert [model["label"] for model in report["models"]] == [
        path.name for path in (*exported[0], exported[1])
    ]
    assert len({model["digest"] for model in report["models"]}) == 5
    assert len(report["diagnostics"]["tensors"]) == len(Reader(tmp_path / "a").names)
    assert yaml.safe_load((tmp_path / "a" / "merge_config.yaml").read_text())["models"] == [
        "member_0",
        "member_1",
        "member_2",
        "member_3",
    ]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "selection" in card
    assert f"{100 * report['diagnostics']['total']['redrawn'][0]:.2f} %" in card
    assert str(tmp_path) not in card
    count = len(report["diagnostics"]["tensors"])
    assert [args[:2] for args in seen] == [(i + 1, count) for i in range(count)] * 2


def test_without_a_base_there_are_no_diagnostics(exported, tmp_path):
    assert merge(exported[0], None, tmp_path / "out", method="average")["diagnostics"] is None
    assert len(Reader(tmp_path / "out").names) == len(Reader(exported[0][0]).names)


def test_members_are_rounded_to_the_dtype_of_the_output(tiny, models, tmp_path, exported):
    """float32 files merged as bfloat16 give the bits of the bfloat16 files merged."""
    members = models[0]
    for i in range(4):
        convert.export(members, tiny, tmp_path / f"wide_{i}", dtype="float32", member=i)
    wide = [tmp_path / f"wide_{i}" for i in range(4)]
    settings = {"method": "selection", "parameters": {"resample": "exhaustive"}}
    merge(wide, exported[1], tmp_path / "from_wide", dtype="bfloat16", **settings)
    merge(*exported, tmp_path / "from_stored", **settings)
    assert same_bits(tmp_path / "from_wide", tmp_path / "from_stored")
    with pytest.raises(UserError, match="stored in bfloat16 and float32; choose one of"):
        merge([wide[0], exported[0][0]], None, tmp_path / "mixed", method="average")


def test_refusals_name_the_difference_and_leave_nothing(tiny, models, exported, tmp_path):
    base = models[1]
    member = exported[0][0]
    changed = dataclasses.replace(tiny, tie_embeddings=True)
    tied = {key: value for key, value in base.items() if key != "head"}
    convert.export(tied, changed, tmp_path / "tied", dtype="bfloat16")
    short = tree.unflatten(
        {path: x[:1] if path.startswith("layers/") else x for path, x in tree.flatten(base).items()}
    )
    convert.export(
        short, dataclasses.replace(tiny, num_layers=1), tmp_path / "short", dtype="bfloat16"
    )
    cases = [
        (
            ([member, tmp_path / "tied"], None),
            {"method": "average"},
            "different architectures: tie_embeddings is False and True",
        ),
        (
            ([member, exported[0][1]], tmp_path / "short"),
            {"method": "ties"},
            "different architectures: num_layers is 2 and 1",
        ),
        (([member, tmp_path / "absent"], None), {"method": "average"}, "absent not found"),
        (([], None), {"method": "average"}, "nothing to merge"),
        (([member, exported[0][1]], None), {"method": "ties"}, "ties needs the base model"),
        (
            ([member, exported[0][1]], None),
            {"method": "selection", "parameters": {"resample": 1}},
            "selection with resample needs the base model",
        ),
        (([member, exported[0][1]], None), {"method": "avrage"}, "did you mean 'average'"),
        (
            ([member, exported[0][1]], None),
            {"method": "average", "weights": (1,)},
            "1 weights for 2 members",
        ),
        (
            ([member, exported[0][1]], None),
            {"method": "average", "dtype": "float61"},
            "did you mean 'float16'",
        ),
        (
            ([member, exported[0][1]], None),
            {"method": "average", "slab_elements": 0},
            "must be positive",
        ),
    ]
    for sources, settings, message in cases:
        with pytest.raises(UserError, match=message):
            merge(*sources, tmp_path / "out", **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short", "tied"]


def test_an_overflow_of_float16_is_refused(tiny, models, tmp_path):
    base = models[1]
    for name, factor in (("base", 0.0), ("large", 1.0), ("again", 1.0)):
        filled = tree.unflatten(
            {path: np.full_like(x, 60_000.0 * factor) for path, x in tree.flatten(base).items()}
        )
        convert.export(filled, tiny, tmp_path / name, dtype="float16")
    sources = [tmp_path / "large", tmp_path / "again"]
    with pytest.raises(UserError, match="overflows float16; choose dtype bfloat16 or float32"):
        merge(
            sources,
            tmp_path / "base",
            tmp_path / "out",
            method="task_arithmetic",
            parameters={"scale": 2.0},
        )
    assert not (tmp_path / "out").exists()
