"""Methods on spheres keep the contract of all methods: parts, meshes, programs, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import mesh as meshes
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods import linear, parts, table
from jax_ordermerge.merge.methods.table import merge_tensor
from tests.merge.methods.test_spherical import draw

METHODS = [
    ("average", {}, (1, 2, 3, 5)),
    ("average", {"normalize": False}, (0.1, 0.7, -0.3, 0.2)),
    ("task_arithmetic", {"scale": 0.7, "normalize": True}, (0.1, 0.7, -0.3, 0.2)),
    ("norm_matched", {}, None),
    ("norm_matched", {}, (1, 2, 3, 5)),
    ("lambda_matched", {}, None),
    ("lambda_matched", {"resample": 2, "resample_from": "others"}, (1, 2, 3, 5)),
    ("slerp", {"t": 0.3}, None),
    ("nuslerp", {}, (0.6, 0.2)),
    ("nuslerp", {"of": "task_vectors"}, (0.6, 0.2)),
    ("nuslerp", {"granularity": "row"}, (0.6, 0.2)),
    ("nuslerp", {"granularity": "row", "of": "task_vectors", "zero": "right_angle"}, (0.6, 0.2)),
    ("nuslerp", {"granularity": "column", "of": "task_vectors"}, (0.6, 0.2)),
    ("multislerp", {}, None),
    ("multislerp", {"of": "task_vectors", "normalize": False}, (0.1, 0.7, 0.3, 0.2)),
    ("karcher", {"of": "task_vectors"}, (0.1, 0.7, 0.3, 0.2)),
    ("model_stock", {}, None),
    ("model_stock", {"granularity": "row"}, None),
]


sweep = pytest.mark.parametrize(("name", "parameters", "weights"), METHODS, ids=str)


class Cut(parts.InMemoryTensor):
    """A tensor measured in runs of elements, as files are."""

    def __init__(self, size, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.size = size

    def total(self, function, *arrays, **static):
        sums, flat = parts.Sums(), jax.tree.map(jnp.ravel, self.part._replace(key_bits=None))
        for start in range(0, flat.members[0].size, self.size):
            part = jax.tree.map(lambda x, i=start: x[i : i + self.size], flat)
            part = part._replace(
                key_bits=self.part.key_bits, offset=jnp.array([start, 0], jnp.uint32)
            )
            chosen = tuple(static.items())
            sums.add(
                parts.measure(
                    part,
                    *arrays,
                    function=function,
                    static=chosen,
                    dtype=self.part.members[0].dtype,
                )
            )
        return sums.result()

    def merge(self, name, checked):
        prepared, static = parts.split_static(table.METHODS[name].prepare(self, **checked))
        unit, shape = table.METHODS[name].unit(checked), self.shape
        run = {"method": name, "static": static, "dtype": jnp.dtype(self.part.members[0].dtype)}
        full = self.part._replace(key_bits=None)
        if unit == "tensor" or (unit == "row" and len(shape) < 2):
            return table.merge_part_jit(self.part, prepared, **run)
        step = 3 if unit == "row" else self.size
        full = full if unit == "row" else jax.tree.map(jnp.ravel, full)
        results = []
        for start in range(0, len(full.members[0]), step):
            part = jax.tree.map(lambda x, i=start: x[i : i + step], full)
            first = start * (np.prod(shape[1:], dtype=int) if unit == "row" else 1)
            part = part._replace(
                key_bits=self.part.key_bits,
                offset=jnp.array([first, 0], jnp.uint32),
                row=jnp.uint32(start),
            )
            results.append(table.merge_part_jit(part, prepared, **run))
        return jnp.concatenate(results).reshape(shape)


@sweep
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (7, 1, 129)),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [("float32", (1100,)), ("float32", (4, 512)), ("bfloat16", (10, 100))]
        ),
    ],
    ids=str,
)
def test_parts_have_the_bits_of_the_whole(name, parameters, weights, dtype, shape):
    count = int(min(4, table.METHODS[name].members[1]))
    members, base = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), given) for given in draw(shape, count)
    )
    members[0] = jnp.where(jnp.arange(shape[-1]) % 3 == 0, base, members[0])
    full = merge_tensor(
        name,
        members,
        base=base,
        weights=weights,
        key_bits=np.array([1, 2], np.uint32),
        dtype=dtype,
        **parameters,
    )
    checked = table.check_parameters(name, parameters)
    given = table.check_weights(name, weights, count)
    cut = Cut(
        768 if dtype == "bfloat16" else 256,
        members,
        base,
        weights=given,
        key_bits=np.array([1, 2], np.uint32),
    )
    assert np.array_equal(cut.merge(name, checked), full)


@pytest.mark.parametrize("of", ["members", "task_vectors"])
def test_inner_products_on_a_mesh_have_the_same_bits(of):
    """A row is one block, cut over 8 devices.

    There XLA would contract a product and an addition that it keeps apart elsewhere.
    """
    members, base = draw((64, 256), 3)
    full = linear.gram_matrix(
        parts.InMemoryTensor([jnp.asarray(x) for x in members], jnp.asarray(base)), of
    )
    layout = jax.sharding.NamedSharding(
        meshes.make_mesh(1, 8, 1), jax.sharding.PartitionSpec(None, "fsdp")
    )
    *members, base = jax.device_put((*members, base), layout)
    assert np.array_equal(linear.gram_matrix(parts.InMemoryTensor(members, base), of), full)


@sweep
def test_one_program_for_all_values(name, parameters, weights):
    """Numbers of a recipe vary by layer: no value of them compiles again."""
    count = 2 if table.METHODS[name].members[1] == 2 else 4
    members, base = draw((4, 5), count)
    merge_tensor(name, members, base=base, weights=weights, **parameters)
    before = table.merge_part_jit._cache_size(), parts.measure._cache_size()
    other = {
        key: value / 2 if isinstance(value, float) else value for key, value in parameters.items()
    }
    merge_tensor(
        name, [x + 1 for x in members], base=base, weights=weights and weights[::-1], **other
    )
    assert (table.merge_part_jit._cache_size(), parts.measure._cache_size()) == before


@pytest.mark.parametrize(
    ("name", "count", "settings", "message"),
    [
        ("slerp", 3, {}, "slerp takes 2 models, 3 were given"),
        ("nuslerp", 1, {}, "nuslerp takes 2 models, 1 were given"),
        ("model_stock", 1, {}, "model_stock takes at least 2 models, 1 were given"),
        ("slerp", 2, {"weights": (1, 2)}, "slerp takes no weights"),
        ("model_stock", 2, {"weights": (1, 2)}, "model_stock takes no weights"),
        ("karcher", 2, {"weights": (1, -1)}, "positive sum"),
        ("karcher", 2, {"tol": 0.0}, "tol = 0.0: input should be greater than 0"),
        (
            "slerp",
            2,
            {"lerp_above": 2.0},
            "lerp_above = 2.0: input should be less than or equal to 1",
        ),
        ("nuslerp", 2, {"granularity": "element"}, "input should be 'tensor', 'row' or 'column'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(name, count, settings, message):
    members, base = draw((2, 3), count)
    with pytest.raises(UserError, match=message) as caught:
        merge_tensor(name, members, base=base, **settings)
    assert "\n" not in str(caught.value)
