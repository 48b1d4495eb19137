"""Every method: the same bits from files, from an Orbax checkpoint and from device memory, for any slabs, workers and mesh."""

import jax
import numpy as np
import pytest

from jax_ordermerge import arch, tree
from jax_ordermerge import mesh as meshes
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.merge import engine, plan, population
from jax_ordermerge.merge.methods import METHODS
from jax_ordermerge.merge.sources import Directory, Member

# several slabs of 256 elements a tensor; rows that are no multiple of anything in one of the two
CONFIGS = {
    "even": arch.ModelConfig(vocab_size=40, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2),
    "odd": arch.ModelConfig(vocab_size=37, hidden_size=36, intermediate_size=50, num_layers=2, num_heads=3, qkv_bias=True),
}
# what a method cannot do without
GIVEN = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.05}, "passthrough": {}, "nuslerp": {}, "arcee_fusion": {}}
TWO, ONE = {"slerp", "nuslerp"}, {"passthrough", "nearswap", "arcee_fusion"}
CASES = [(name, {}) for name in METHODS] + [
    ("selection", {"resample": "exhaustive"}),
    ("selection", {"resample": 2, "granularity": "row"}),
    ("ties", {"density": 0.5}),
    ("dare_ties", {"rescale": "norm"}),
]


def place(params, config, mesh, lead=()):
    specs = {spec.path: spec for spec in arch.tensor_table(config)}
    return tree.unflatten(
        {
            path: jax.device_put(leaf, meshes.sharding((*lead, *specs[path].axes), leaf.shape, mesh))
            for path, leaf in tree.flatten(params).items()
        }
    )


@pytest.fixture(scope="module", params=CONFIGS)
def stored(request, tmp_path_factory):
    """Four members and the base: in memory, as directories, and as an Orbax checkpoint; values of bfloat16, sparsely changed."""
    config, root, generator = CONFIGS[request.param], tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    members, base = {}, {}
    for spec in arch.tensor_table(config):
        base[spec.path] = np.asarray(jax.numpy.asarray(generator.normal(size=spec.shape), "bfloat16"), np.float32)
        taus = 0.1 * generator.normal(size=(4, *spec.shape)) * (generator.random((4, *spec.shape)) < 0.5)
        members[spec.path] = np.asarray(jax.numpy.asarray(base[spec.path][None] + taus, "bfloat16"), np.float32)
    members, base = tree.unflatten(members), tree.unflatten(base)
    for i in range(4):
        convert.export(members, config, root / f"member_{i}", dtype="bfloat16", member=i)
    convert.export(base, config, root / "base", dtype="bfloat16")
    orbax.save(root / "checkpoints", 1, {"params": jax.tree.map(jax.numpy.asarray, members)}, {})
    return config, members, base, root


def tensors(directory):
    reader = Reader(directory)
    return {name: reader.read(name).tobytes() for name in reader.names}


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=lambda value: str(value))
def test_same_bits(stored, tmp_path, name, parameters):
    config, members, base, root = stored
    count = 1 if name in ONE else 2 if name in TWO else 4
    own = jax.tree.map(lambda x: x[:count], members)
    settings = {"method": name, "seed": 7, "parameters": {**GIVEN.get(name, {}), **parameters}}
    expected = None
    for i, sizes in enumerate([None, (1, 8, 1), (2, 4, 1), (4, 2, 1)]):
        if sizes is None:
            merged = population.merge(own, base, config, dtype="bfloat16", **settings)
        elif count % sizes[0]:
            continue
        else:
            mesh = meshes.make_mesh(*sizes)
            merged = population.merge(
                place(own, config, mesh, ("member",)), place(base, config, mesh), config, dtype="bfloat16", **settings
            )
        convert.export(merged, config, tmp_path / f"mesh_{i}", dtype="bfloat16")
        found = tensors(tmp_path / f"mesh_{i}")
        expected = expected or found
        assert found == expected, sizes
    files = [Directory(root / f"member_{i}") for i in range(count)]
    known = Directory(root / "base")
    stacked = [Member(root / "checkpoints", i, config, tokenizer=None, label=f"m{i}") for i in range(count)]
    for label, sources, more in (
        ("files", files, {"slab_elements": 256, "workers": 3}),
        ("whole", files, {"workers": 1}),
        ("orbax", stacked, {"slab_elements": 512}),
    ):
        made = plan.uniform(sources, known, dtype="bfloat16", **settings)
        engine.merge_plan(made, tmp_path / label, **more)
        assert tensors(tmp_path / label) == expected, label
