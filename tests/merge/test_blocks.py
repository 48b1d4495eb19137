"""Merges of small populations as runs of elements: the bits of the merge leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import arch, tree
from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import random_bits
from jax_ordermerge.merge import blocks, population, population_diagnostics, rescale
from jax_ordermerge.merge.methods import parts, table
from jax_ordermerge.merge.methods.linear import combine, gram_matrix
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.search.candidates import Candidate, Population

# Tensors of several blocks of 256, and norms that fill none. Of few shapes, since each of them is a
# program of every method that merges leaf by leaf.
CONFIG = arch.ModelConfig(
    vocab_size=24, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4
)
NAMES = [name for name, *_ in arch.hf_tensors(CONFIG)]
MERGES = [
    ("average", {}, (1, 2, 3)),
    ("selection", {"resample": "exhaustive"}, (1, 2, 5)),
    ("selection", {"child": 1}, None),
    ("ties", {"density": 0.3, "rescale": "norm"}, None),
    ("dare_ties", {"density": 0.6}, (0.5, 0.1, 0.4)),
    ("lambda_matched", {"resample": 2}, None),
]


@pytest.fixture(scope="module")
def small():
    """Three members and a base in bfloat16, sparsely changed: many values tie."""
    generator = np.random.default_rng(0)
    members, base = {}, {}
    for spec in arch.tensor_table(CONFIG):
        start = generator.normal(size=spec.shape)
        changed = generator.random((3, *spec.shape)) < 0.6
        task_vectors = generator.choice([-0.25, 0.125, 0.5], (3, *spec.shape)) * changed
        members[spec.path] = jnp.asarray(start + task_vectors, "bfloat16")
        base[spec.path] = jnp.asarray(start, "bfloat16")
    return tree.unflatten(members), tree.unflatten(base)


def blocks_of(models, dtype="bfloat16"):
    return blocks.Blocks(*models, CONFIG, dtype)


def check_same(models, method, parameters, weights, scales=None, dtype="bfloat16"):
    settings = {
        "method": method,
        "parameters": parameters,
        "weights": weights,
        "seed": 4,
        "scales": scales,
    }
    got = blocks_of(models, dtype).merge(**settings)
    expected = population.merge(*models, CONFIG, **settings, dtype=dtype)
    assert list(tree.flatten(got)) == list(tree.flatten(expected))
    for path, leaf in tree.flatten(expected).items():
        other = tree.flatten(got)[path]
        assert (other.dtype, other.shape) == (leaf.dtype, leaf.shape)
        unsigned = f"u{leaf.dtype.itemsize}"
        assert np.array_equal(np.asarray(other).view(unsigned), np.asarray(leaf).view(unsigned)), (
            path
        )


@pytest.mark.parametrize(("method", "parameters", "weights"), MERGES, ids=str)
def test_the_bits_are_those_of_the_merge_leaf_by_leaf(small, method, parameters, weights):
    check_same(small, method, parameters, weights)


@pytest.mark.parametrize(("method", "dtype"), [("average", "bfloat16"), ("selection", "float32")])
def test_lambdas_of_tensors_have_the_same_bits(small, method, dtype):
    scales = {name: 0.5 + number / 7 for number, name in enumerate(NAMES)}
    check_same(small, method, {}, None, scales, dtype)


def all_methods():
    for name, method in table.METHODS.items():
        low, high = method.members
        if method.needs is None and low <= 3 <= high:
            yield name


@pytest.mark.slow
@pytest.mark.parametrize("method", list(all_methods()))
def test_every_method_of_the_table_has_the_same_bits_or_is_left_to_the_leaves(small, method):
    parameters = {"t": 0.5} if "t" in table.parameter_names(method) else {}
    checked = table.check_parameters(method, parameters)
    if table.METHODS[method].unit(checked) == "element":
        check_same(small, method, parameters, None)
    else:
        merged = blocks_of(small).merge(
            method=method, parameters=parameters, weights=None, seed=0, scales=None
        )
        assert merged is None


def test_a_selection_moves_every_bit_of_a_nan(small):
    members, base = small
    flat = tree.flatten(members)
    payload = np.asarray(flat["norm/weight"]).view(np.uint16).copy()
    payload[:, ::2] = [[0x7F81], [0xFF93], [0x7FC5]]  # signalling and quiet, with payloads
    flat["norm/weight"] = jnp.asarray(payload.view(jnp.bfloat16))
    check_same((tree.unflatten(flat), base), "selection", {}, None)


def test_a_member_at_other_lambdas_has_the_bits_of_rescale(small):
    members, base = small
    scales = {name: 1 + number / 9 for number, name in enumerate(NAMES)}
    got = tree.flatten(blocks_of(small).rescale_member(2, scales))
    expected = tree.flatten(rescale.rescale_member(members, base, CONFIG, 2, scales=scales))
    for path, leaf in expected.items():
        assert np.array_equal(np.asarray(got[path]), np.asarray(leaf)), path


def test_one_program_serves_all_shapes_lambdas_and_seeds(small):
    blocks._merge_runs.clear_cache()
    built = blocks_of(small)
    for seed, scales in ((0, None), (1, dict.fromkeys(NAMES, 1.2))):
        for density in (0.3, 0.9):
            built.merge(
                method="dare_linear",
                parameters={"density": density},
                weights=None,
                seed=seed,
                scales=scales,
            )
    # runs of 256 and norms of 32 are both in it
    assert blocks._merge_runs._cache_size() == 1


@pytest.mark.parametrize("parameters", [{"resample": 2}, {"resample": "exhaustive"}, {}], ids=str)
def test_what_is_redrawn_is_counted_as_leaf_by_leaf(small, parameters):
    settings = {"method": "selection", "seed": 4, "weights": (1, 2, 5), "parameters": parameters}
    counts = blocks_of(small).count_redrawn(**settings)
    expected = population_diagnostics.count_redrawn(*small, CONFIG, **settings)
    assert counts.keys() == expected.keys() == (set(NAMES) if parameters else set())
    for name in counts:
        assert np.array_equal(counts[name], expected[name]), name
    merged = Population(CONFIG, *small, "bfloat16").merge(**settings)
    report = Population(CONFIG, *small, "bfloat16").measure_diagnostics(merged, **settings)
    assert report == population_diagnostics.measure_diagnostics(*small, merged, CONFIG, expected)
    assert ("redrawn" in report["total"]) == bool(parameters)


def test_sums_are_those_of_each_tensor(small):
    """The inner products of `gram_matrix` beside those of a tensor that lies in memory alone."""
    built = blocks_of(small)
    flat, flat_base = (tree.flatten(x) for x in small)
    key_bits = np.zeros((len(NAMES), 2), np.uint32)
    for number, (spec, layer, _) in enumerate(built._tensors()):
        member, base = flat[spec.path], flat_base[spec.path]
        if spec.stacked:
            member, base = member[:, layer], base[layer]
        alone = parts.InMemoryTensor(list(member), base)
        tensor = blocks._Tensor(number, spec.hf_shape, None, True, key_bits, built)
        expected = gram_matrix(alone, "task_vectors")
        assert np.array_equal(gram_matrix(tensor, "task_vectors"), expected), spec.path


def count_drawn(part):
    return jnp.sum(random_bits(part.key_bits, part.indices()) >> 31, dtype=jnp.uint32)


def test_a_measurement_is_kept_for_the_same_call_alone(small):
    built, zeros = blocks_of(small), np.zeros((len(NAMES), 2), np.uint32)
    calls = {"reduce": "sum", "static": ()}
    first = built.measure(count_drawn, (), zeros, **calls)
    assert built.measure(count_drawn, (), zeros.copy(), **calls) is first
    # about half of the elements of each tensor, by another key others
    other = built.measure(count_drawn, (), zeros + np.uint32(1), **calls)
    assert [int(x) for x in other] != [int(x) for x in first]
    for x, (spec, _, _) in zip(first, built._tensors(), strict=True):
        size = np.prod(spec.hf_shape)
        assert abs(int(x) - size / 2) < 3 * np.sqrt(size)


def test_tensors_that_are_treated_in_different_ways_are_left_to_the_leaves(small):
    """A density that keeps all of 32 elements, and not all of 1,024, takes two programs."""
    settings = {"method": "ties", "parameters": {"density": 1 - 1e-9}, "weights": None, "seed": 0}
    assert blocks_of(small).merge(**settings, scales=None) is not None
    mixed = table.Method(
        lambda tensor: {"x": np.float32(1), "large": len(tensor.shape) > 1},
        lambda part, *, x, large: combine(part.members, jnp.full(3, x)) * (2 if large else 1),
        "none",
    )
    table.METHODS.register("mixed", mixed)
    try:
        settings |= {"method": "mixed", "parameters": {}}
        assert blocks_of(small).merge(**settings, scales=None) is None
        built = Population(CONFIG, *small, "bfloat16").build(Candidate("mixed"))
        expected = population.merge(*small, CONFIG, method="mixed", seed=0)
    finally:
        table.METHODS.unregister("mixed")
    for path, leaf in tree.flatten(expected).items():
        assert np.array_equal(np.asarray(tree.flatten(built)[path]), np.asarray(leaf))


def test_wrong_settings_are_refused_as_by_the_leaves(small):
    settings = {"method": "ties", "seed": 0, "scales": None}
    with pytest.raises(UserError, match="has no parameter 'densty'"):
        blocks_of(small).merge(**settings, weights=None, parameters={"densty": 1})
    with pytest.raises(UserError, match="2 weights for 3 members"):
        blocks_of(small).merge(**settings, weights=(1, 2), parameters={})


def test_large_and_sharded_populations_are_left_to_the_leaves(small, monkeypatch):
    members, base = small
    assert blocks.fits(members)
    elements = sum(leaf.size for leaf in jax.tree.leaves(members))
    monkeypatch.setattr(blocks, "LARGEST", elements)
    assert blocks.fits(members)
    monkeypatch.setattr(blocks, "LARGEST", elements - 1)
    assert not blocks.fits(members)
    assert Population(CONFIG, members, base, "bfloat16").blocks is None
    monkeypatch.undo()
    mesh = make_mesh(order=1, fsdp=2)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert not blocks.fits(jax.device_put(members, replicated))
