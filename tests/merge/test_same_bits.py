"""Every method gives the same bits from files, an Orbax checkpoint and memory, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import arch, tree
from jax_ordermerge import mesh as meshes
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.merge import engine, plan, population
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.sources.storage import Checkpoint, Directory

MESHES = [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2)]
# what a method cannot do without
GIVEN = {"nearswap": {"t": 0.05}}
TABLE = [(name, {}, None) for name in table.METHODS]
MORE = [
    ("average", {"normalize": False}, (0.1, 0.7, -0.3, 0.2)),
    ("task_arithmetic", {"scale": 0.3}, (0.1, 0.7, -0.3, 0.2)),
    ("selection", {"resample": "exhaustive"}, (1, 2, 3, 4)),
    ("selection", {"resample": 2, "granularity": "row"}, None),
    ("selection", {"resample": 1, "resample_from": "others", "granularity": "column"}, None),
    ("selection", {"child": 1}, None),
    ("ties", {"density": 0.5, "rescale": "norm"}, None),
    ("dare_ties", {"rescale": "norm"}, (0.1, 0.7, -0.3, 0.2)),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.2, "rescale": "norm"}, None),
    ("della", {"rescale": "norm"}, None),
    ("sce", {"select_topk": 0.4}, None),
    ("nuslerp", {"granularity": "row", "of": "task_vectors", "zero": "right_angle"}, (0.6, 0.2)),
    ("nuslerp", {"granularity": "column"}, None),
    ("karcher", {"of": "task_vectors"}, (0.1, 0.7, 0.3, 0.2)),
    ("model_stock", {"granularity": "row"}, None),
]
IDS = [
    "-".join([name, *(f"{k}={v}" for k, v in parameters.items())])
    for name, parameters, _ in TABLE + MORE
]


def count_of(name):
    low, high = table.METHODS[name].members
    return int(min(max(4, low), high))


def sparse(shape, generator):
    """Four members and a base as bfloat16 training leaves them, as float32."""
    base = generator.normal(size=shape)
    task_vectors = 0.1 * generator.normal(size=(4, *shape)) * (generator.random((4, *shape)) < 0.5)
    return [
        np.asarray(jnp.asarray(x, "bfloat16"), np.float32)
        for x in (base[None] + task_vectors, base)
    ]


QUICK = {"average", "selection", "ties", "dare_linear"}


def slow_unless_quick(cases, ids):
    return [
        pytest.param(
            *one, id=i, marks=() if one[0] in QUICK and len(one[1]) < 1 else pytest.mark.slow
        )
        for one, i in zip(cases, ids, strict=True)
    ]


@pytest.mark.parametrize(("name", "parameters", "weights"), slow_unless_quick(TABLE + MORE, IDS))
def test_on_every_mesh(name, parameters, weights):
    """Two layers of a tensor. Rows, columns, both, or members are sharded."""
    members, base = sparse((2, 24, 256), np.random.default_rng(0))
    members, checked = (
        members[: count_of(name)],
        table.check_parameters(name, {**GIVEN.get(name, {}), **parameters}),
    )
    settings = {
        "method": name,
        "seed": 7,
        "weights": weights,
        "parameters": checked,
        "dtype": "float32",
    }
    names = ["layers.0.w", "layers.1.w"]
    expected = np.asarray(
        population.Leaf(jnp.asarray(members), jnp.asarray(base), names, True, **settings).merge()
    )
    for i, name_ in enumerate(names):
        key_bits = table.key_bits(name, checked, 7, name_, i)
        needed = jnp.asarray(base[i]) if table.METHODS[name].needs_base(checked) else None
        alone = table.merge_tensor(
            name,
            list(jnp.asarray(members[:, i])),
            base=needed,
            weights=weights,
            key_bits=key_bits,
            **checked,
        )
        assert alone.tobytes() == expected[i].tobytes()
    for sizes in MESHES:
        if len(members) % sizes[0]:
            continue
        mesh, axes = meshes.make_mesh(*sizes), ("layer", "mlp", "embed")
        placed = jax.device_put(members, meshes.sharding(("member", *axes), members.shape, mesh))
        placed_base = jax.device_put(base, meshes.sharding(axes, base.shape, mesh))
        got = population.Leaf(placed, placed_base, names, True, **settings).merge()
        assert np.asarray(got).tobytes() == expected.tobytes(), sizes


CONFIG = arch.ModelConfig(
    family="qwen2",
    vocab_size=37,
    hidden_size=36,
    intermediate_size=50,
    num_layers=2,
    num_heads=3,
    qkv_bias=True,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Four members and the base in three storages. Sizes of rows divide no block or mesh."""
    root, generator = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    both = {spec.path: sparse(spec.shape, generator) for spec in arch.tensor_table(CONFIG)}
    members, base = (tree.unflatten({path: x[i] for path, x in both.items()}) for i in (0, 1))
    for i in range(4):
        convert.export(members, CONFIG, root / f"member_{i}", dtype="bfloat16", member=i)
    convert.export(base, CONFIG, root / "base", dtype="bfloat16")
    orbax.save(root / "checkpoints", 1, {"params": jax.tree.map(jnp.asarray, members)}, {})
    return members, base, root


def tensors(directory):
    reader = Reader(directory)
    return {name: reader.read(name).tobytes() for name in reader.names}


FILES = [name for name in table.METHODS if table.METHODS[name].needs is None]


@pytest.mark.parametrize(
    ("name", "parameters"),
    slow_unless_quick(
        [*((name, {}) for name in FILES), ("selection", {"resample": 1})],
        [*FILES, "selection-resample=1"],
    ),
)
def test_from_files_and_checkpoints(stored, tmp_path, name, parameters):
    members, base, root = stored
    count = count_of(name)
    settings = {"method": name, "seed": 7, "parameters": {**GIVEN.get(name, {}), **parameters}}
    merged = population.merge(
        jax.tree.map(lambda x: x[:count], members), base, CONFIG, dtype="bfloat16", **settings
    )
    convert.export(merged, CONFIG, tmp_path / "memory", dtype="bfloat16")
    expected = tensors(tmp_path / "memory")
    files = [Directory(root / f"member_{i}") for i in range(count)]
    stacked = [
        Checkpoint(root / "checkpoints", i, CONFIG, tokenizer=None, label=f"m{i}")
        for i in range(count)
    ]
    for label, sources, more in (
        ("slabs", files, {"slab_elements": 256, "workers": 3}),
        ("whole", files, {"workers": 1}),
        ("orbax", stacked, {"slab_elements": 512}),
    ):
        made = plan.uniform(sources, Directory(root / "base"), dtype="bfloat16", **settings)
        engine.merge_plan(made, tmp_path / label, **more)
        assert tensors(tmp_path / label) == expected, label
