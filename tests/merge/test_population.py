"""Merging in memory: the same bits on every mesh and as tensor by tensor, and diagnostics."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import arch, rng, tree
from jax_ordermerge import mesh as meshes
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import population, population_diagnostics
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.methods.selection import select

MESHES = [(1, 8, 1), (2, 4, 1), (4, 2, 1)]
SELECTIONS = [
    ({"resample": "exhaustive"}, MESHES),
    ({"resample": 1, "resample_from": "others", "granularity": "column"}, [(2, 2, 2)]),
]


def place(params, config, mesh, lead=()):
    specs = {spec.path: spec for spec in arch.tensor_table(config)}
    return tree.unflatten(
        {
            path: jax.device_put(
                leaf, meshes.sharding((*lead, *specs[path].axes), leaf.shape, mesh)
            )
            for path, leaf in tree.flatten(params).items()
        }
    )


@pytest.mark.parametrize(("parameters", "sizes_of_meshes"), SELECTIONS, ids=str)
def test_selection_has_the_same_bits_on_every_mesh(tiny, models, bits, parameters, sizes_of_meshes):
    members, base = models
    settings = {"method": "selection", "seed": 3, "parameters": parameters, "weights": (1, 2, 3, 4)}
    expected = bits(population.merge(members, base, tiny, **settings))
    for sizes in sizes_of_meshes:
        mesh = meshes.make_mesh(*sizes)
        sharded = place(members, tiny, mesh, ("member",))
        merged = population.merge(sharded, place(base, tiny, mesh), tiny, **settings)
        got = bits(merged)
        assert all(np.array_equal(got[path], expected[path]) for path in expected), sizes
        for spec in arch.tensor_table(tiny):
            leaf = tree.flatten(merged)[spec.path]
            assert leaf.sharding.is_equivalent_to(
                meshes.sharding(spec.axes, spec.shape, mesh), leaf.ndim
            ), spec.path


def test_arithmetic_agrees_on_meshes_to_rounding(tiny, models):
    members, base = models
    expected = tree.flatten(
        population.merge(members, base, tiny, method="task_arithmetic", seed=0, dtype="float32")
    )
    mesh = meshes.make_mesh(2, 4, 1)
    merged = population.merge(
        place(members, tiny, mesh, ("member",)),
        place(base, tiny, mesh),
        tiny,
        method="task_arithmetic",
        seed=0,
        dtype="float32",
    )
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_every_hf_tensor_has_its_own_key(tiny, models):
    members, base = models
    merged = tree.flatten(
        population.merge(members, base, tiny, method="selection", seed=7, dtype="bfloat16")
    )
    draw = jax.jit(lambda m, key: select(m.astype(jnp.bfloat16), key=key))
    flat = tree.flatten(members)
    for name, spec, layer in arch.hf_tensors(tiny):
        leaf = flat[spec.path] if layer is None else flat[spec.path][:, layer]
        expected = draw(jnp.asarray(leaf), rng.stream(7, "select", name))
        assert np.array_equal(
            merged[spec.path] if layer is None else merged[spec.path][layer], expected
        ), name


def test_a_layer_comes_from_one_member(tiny, models):
    members, base = models
    origin = tree.unflatten(
        {
            path: np.broadcast_to(
                np.arange(4, dtype=np.float32).reshape(4, *(1,) * (x.ndim - 1)), x.shape
            )
            for path, x in tree.flatten(members).items()
        }
    )
    chosen = set()
    for seed in range(4):
        merged = tree.flatten(
            population.merge(
                origin,
                base,
                tiny,
                method="selection",
                seed=seed,
                parameters={"granularity": "layer"},
            )
        )
        for layer in range(2):
            origins = {
                float(v)
                for path, x in merged.items()
                if path.startswith("layers/")
                for v in np.unique(x[layer].astype(jnp.float32))
            }
            assert len(origins) == 1
            chosen |= origins
    assert len(chosen) > 1


def test_it_works_under_jit(tiny, models, bits):
    members, base = models
    settings = {"method": "selection", "seed": 1, "parameters": {"resample": "exhaustive"}}
    merge = jax.jit(lambda m, b: population.merge(m, b, tiny, **settings))
    jitted, eager = (
        bits(merge(members, base)),
        bits(population.merge(members, base, tiny, **settings)),
    )
    assert all(np.array_equal(jitted[path], eager[path]) for path in jitted)


def test_the_base_is_asked_for_by_those_that_need_it(tiny, models):
    members, _ = models
    population.merge(members, None, tiny, method="selection", seed=0)
    for method, parameters in (("ties", {}), ("selection", {"resample": 1})):
        with pytest.raises(UserError, match="needs the base"):
            population.merge(members, None, tiny, method=method, seed=0, parameters=parameters)


def test_diagnostics_against_numpy(tiny, models):
    members, base = models
    merged = population.merge(
        members,
        base,
        tiny,
        method="selection",
        seed=0,
        dtype="bfloat16",
        parameters={"resample": "exhaustive"},
    )
    report = population_diagnostics.measure_diagnostics(members, base, merged, tiny)
    assert list(report["tensors"]) == [name for name, _, _ in arch.hf_tensors(tiny)]

    def stored(params):
        return {
            path: np.asarray(x.astype(jnp.bfloat16), np.float64)
            for path, x in tree.flatten(params).items()
        }

    m, b, out = stored(members), stored(base), stored(merged)
    name, spec = "model.layers.1.mlp.down_proj.weight", "layers/mlp/down/weight"
    check_numbers(report["tensors"][name], m[spec][:, 1], b[spec][1], out[spec][1])
    everything = [
        np.concatenate([x.reshape(*lead, -1) for x in tree_.values()], axis=-1)
        for tree_, lead in ((m, (4,)), (b, ()), (out, ()))
    ]
    check_numbers(report["total"], *everything)
    assert report["total"]["elements"] == arch.parameter_count(tiny)


def check_numbers(numbers, members, base, merged):
    task_vectors = (members - base[None]).reshape(len(members), -1)
    tau = (merged - base).ravel()
    gram, mean = task_vectors @ task_vectors.T, task_vectors.mean(axis=0)
    norms = np.sqrt(np.diag(gram))
    close = {"rtol": 1e-5}
    np.testing.assert_allclose(numbers["cosines"], gram / np.outer(norms, norms), **close)
    np.testing.assert_allclose(numbers["norms"], norms, **close)
    np.testing.assert_allclose(numbers["merged_norm"], np.linalg.norm(tau), **close)
    np.testing.assert_allclose(numbers["norm_ratio"], np.linalg.norm(tau) / norms.mean(), **close)
    np.testing.assert_allclose(numbers["lambda_eff"], tau @ mean / (mean @ mean), **close)
    assert numbers["unchanged"] == [(row == 0).mean() for row in task_vectors]
    assert numbers["unchanged_by_all"] == (task_vectors == 0).all(axis=0).mean()
    assert numbers["merged_unchanged"] == (tau == 0).mean()


def test_diagnostics_of_the_average_and_of_an_unchanged_population(tiny, models):
    members, base = models
    merged = population.merge(members, base, tiny, method="average", seed=0, dtype="bfloat16")
    total = population_diagnostics.measure_diagnostics(members, base, merged, tiny)["total"]
    assert total["lambda_eff"] == pytest.approx(1, abs=1e-3)
    assert total["norm_ratio"] == pytest.approx(np.sqrt(np.mean(total["cosines"])), rel=0.05)
    same = jax.tree.map(lambda x: np.stack([x, x]), base)
    nothing = population_diagnostics.measure_diagnostics(same, base, base, tiny)["total"]
    assert nothing["cosines"] == [[None, None], [None, None]]
    assert nothing["lambda_eff"] is None
    assert nothing["unchanged_by_all"] == 1.0


def test_a_merge_on_the_mesh_moves_what_an_all_reduce_would():
    """With members over the order axis: one all-to-all, and one all-gather of the result."""
    mesh = meshes.make_mesh(4, 2, 1)
    shape, axes = (4, 64, 128), ("member", "mlp", "embed")
    members = jax.device_put(np.ones(shape, np.float32), meshes.sharding(axes, shape, mesh))
    base = jax.device_put(
        np.zeros(shape[1:], np.float32), meshes.sharding(axes[1:], shape[1:], mesh)
    )
    for name, parameters in (("average", {}), ("selection", {"resample": "exhaustive"})):
        checked = table.check_parameters(name, parameters)
        leaf = population.Leaf(
            members,
            base if table.METHODS[name].needs_base(checked) else None,
            ["w"],
            stacked=False,
            method=name,
            seed=0,
            weights=None,
            parameters=checked,
            dtype=np.dtype("float32"),
        )
        arguments, program = leaf.prepare()
        text = population._merge_leaf.lower(*arguments, **program).compile().as_text()
        counts = {
            kind: len(re.findall(rf" {kind}(?:-start)?\(", text))
            for kind in ("all-to-all", "all-gather", "all-reduce")
        }
        assert counts == {"all-to-all": 1, "all-gather": 1, "all-reduce": 0}, name
