"""The contract, swept over the whole table, and the check of parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods import parts, table
from jax_ordermerge.merge.methods.table import METHODS, check_parameters, check_weights

REQUIRED = {"nearswap": {"t": 0.5}}
# what thins the task vectors, and the value that switches it off
DENSE = {"density": 1.0, "select_topk": 1.0, "threshold": 0.0, "spread": -1e9}
DENSE_OF = {"nearswap": {"t": 3.4e38}, "ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 0.0}}
# the largest element for methods that square elements, and for those that add before they divide;
# the range of bfloat16 for others
SQUARES = (
    "norm_matched",
    "lambda_matched",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
)
TOP = {
    **dict.fromkeys(SQUARES, 2.0**60),
    **dict.fromkeys(("greedy_soup", "ram", "ramplus_tl", "consensus", "fisher"), 2.0**126),
}
PAIRS = {"fisher"}  # the second half of the members are positive numbers that belong to the first
EVERY = [(name, REQUIRED.get(name, {})) for name in METHODS] + [
    ("selection", {"resample": 2}),
    ("selection", {"resample": "exhaustive"}),
    ("selection", {"granularity": "row", "resample": 1, "resample_from": "others"}),
    ("selection", {"child": 0}),
    ("dare_ties", {"rescale": "norm"}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.2, "rescale": "norm"}),
    ("della", {"rescale": "norm"}),
    ("sce", {"select_topk": 0.4}),
    ("nuslerp", {"granularity": "row", "of": "task_vectors"}),
    ("nuslerp", {"granularity": "column"}),
    ("model_stock", {"granularity": "row"}),
    ("passthrough", {"scale": 0.7}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in parameters.items())]) for name, parameters in EVERY]
KEY_BITS = rng.stream_key_bits(0, "test")
sweep = pytest.mark.parametrize(("name", "parameters"), EVERY, ids=IDS)


def merge(name, parameters, members, base, weights=None, dtype="float32", key_bits=KEY_BITS):
    return table.merge_tensor(
        name, members, base=base, weights=weights, key_bits=key_bits, dtype=dtype, **parameters
    )


def prepare(name, parameters, members, base, weights=None):
    """What the method's parts must know: arrays, and what selects the program."""
    tensor = parts.InMemoryTensor(
        list(members), base, weights=check_weights(name, weights, len(members)), key_bits=KEY_BITS
    )
    return parts.split_static(
        table.METHODS[name].prepare(tensor, **check_parameters(name, parameters))
    )


def population_of(shape, count=3, dtype="float32", seed=0):
    generator = np.random.default_rng(seed)
    base = jnp.asarray(generator.normal(size=shape), dtype)
    task_vectors = generator.normal(size=(count, *shape)) * (
        generator.random((count, *shape)) < 0.6
    )
    return (base.astype(jnp.float32)[None] + jnp.asarray(task_vectors, jnp.float32)).astype(
        dtype
    ), base


def dense(name, parameters):
    """The parameters with whatever thins the task vectors switched off."""
    return {
        **parameters,
        **{key: value for key, value in DENSE.items() if key in check_parameters(name, parameters)},
        **DENSE_OF.get(name, {}),
    }


def allowed(name, count):
    """The number of members nearest to `count` that the method takes."""
    low, high = METHODS[name].members
    least = 2 if name == "consensus" else low  # its k is 2
    count = int(min(max(count, low, least), high))
    return count + count % 2 if name in PAIRS else count


def meant_for(name, members):
    """The members, where the method wants other numbers in the second half."""
    half = len(members) // 2
    if name not in PAIRS:
        return members
    positive = [(1 + jnp.minimum(jnp.abs(x), 1)).astype(x.dtype) for x in members[half:]]
    return jnp.stack([*members[:half], *positive])


def population_for(name, shape, count=3, dtype="float32"):
    members, base = population_of(shape, allowed(name, count), dtype)
    return meant_for(name, members), base


def weights_for(name, weights):
    """The weights, or None if the method takes none."""
    members, base = population_for(name, (2,), len(weights))
    try:
        prepare(name, REQUIRED.get(name, {}), members, base, weights)
    except UserError as error:
        if "takes no weights" in str(error):
            return None
        raise
    return weights


class Abstract(parts.InMemoryTensor):
    """A tensor without values: whatever is asked of it is 1."""

    def total(self, function, *arrays, reduce="sum", among=None, **static):
        part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.part)
        results = jax.eval_shape(
            lambda part, *arrays: function(part, *arrays, **static), part, *arrays
        )
        return jax.tree.map(
            lambda x: np.ones(x.shape, np.int64) if x.dtype == np.uint32 else np.ones(x.shape[:-2]),
            results,
        )


@sweep
@pytest.mark.parametrize("shape", [(9, 7), (1, 1), (3,)])
def test_identical_members_give_the_member(name, parameters, shape):
    """Whatever thins the task vectors is switched off: then nothing may be lost or added."""
    if name == "iso_c" and shape == (9, 7):
        pytest.skip("makes the singular values of any task vector equal")
    if "scale" in parameters:
        parameters = {**parameters, "scale": 1.0}
    member, base = population_of(shape, 1, "bfloat16")
    members = meant_for(name, jnp.repeat(member, allowed(name, 4), axis=0))
    got = merge(name, dense(name, parameters), members, base, dtype="bfloat16")
    if name in ("selection", "average", "passthrough"):
        assert np.array_equal(got, member[0])
    else:  # base + (member - base) may round in float32
        np.testing.assert_allclose(
            got.astype(jnp.float32), member[0].astype(jnp.float32), rtol=2**-8
        )


@sweep
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 0.25)])
def test_permuting_members_with_their_weights_changes_nothing(name, parameters, weights):
    """Methods that draw are compared where the draw does not matter.

    They name a member by its position, which the permutation changes.
    """
    count = allowed(name, 3)
    if "child" in parameters:
        weights = None
    members, base = population_for(name, (8, 5), count)
    order = [1, 0, 3, 2] if name in PAIRS else [x for x in (2, 0, 1) if x < count]
    if METHODS[name].draws:
        if METHODS[name].weights == "probabilities":
            members = jnp.broadcast_to(members[0], members.shape)
        else:
            parameters = {**parameters, "density": 1.0}
    member_weights = None if weights is None else weights_for(name, (*weights, 1.0)[:count])
    permuted = None if member_weights is None else tuple(np.array(member_weights)[order].tolist())
    one, two = (
        merge(name, parameters, members, base, member_weights),
        merge(name, parameters, members[jnp.array(order)], base, permuted),
    )
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@sweep
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 5), (5, 1), (2, 3, 4)])
@pytest.mark.parametrize("count", [1, 3])
def test_small_shapes(name, parameters, shape, count):
    members, base = population_for(name, shape, count)
    tensor = Abstract(list(members), base, key_bits=KEY_BITS)
    prepared, static = parts.split_static(
        table.METHODS[name].prepare(tensor, **check_parameters(name, parameters))
    )
    got = jax.eval_shape(
        lambda part: table.merge_part(part, prepared, method=name, static=static, dtype="bfloat16"),
        tensor.part,
    )
    assert got.shape == shape
    assert got.dtype == jnp.bfloat16


@sweep
def test_scalars_and_single_elements_have_values(name, parameters):
    for shape in ((), (1, 1)):
        members, base = population_for(name, shape, 3)
        got = merge(name, parameters, members, base)
        assert got.shape == shape
        assert np.isfinite(got).all()
        if name == "selection":
            assert float(got.reshape(())) in members.ravel().tolist()


@sweep
def test_bfloat16_edges(name, parameters):
    """The ends of the range pass through float32 without overflow or loss.

    The lower end is four times the smallest normal number: XLA flushes subnormal terms to zero on
    CPU.
    """
    top = TOP.get(name, 3.3895e38)
    edge = jnp.array([top, -top, 2.0**-124, 0.0, -0.0, 1.0], jnp.bfloat16)
    count = allowed(name, 2)
    member_weights = weights_for(name, (0.5, 0.5)[:count])
    if "scale" in parameters:
        parameters = {**parameters, "scale": 1.0}
    got = merge(
        name,
        dense(name, parameters),
        meant_for(name, [edge] * count),
        jnp.zeros(6, jnp.bfloat16),
        weights=member_weights,
        dtype="bfloat16",
    )
    assert np.array_equal(got, edge)


@sweep
def test_one_trace_a_shape(name, parameters):
    """Other models, keys, weights and numeric parameters do not compile again."""
    count = allowed(name, 3)
    members, base = population_for(name, (4, 3), count)
    if name == "sce":
        parameters = {"select_topk": 0.8}
    first = check_parameters(name, parameters)
    second = {
        key: 0.9 * value if isinstance(value, float) else value for key, value in first.items()
    }
    member_weights, other = (
        weights_for(name, weights[:count])
        for weights in ((1.0, 2.0, 3.0, 4.0), (3.0, 2.0, 1.0, 4.0))
    )
    if "child" in parameters:
        member_weights = other = None
    merge(name, first, members, base, member_weights)
    before = table.merge_part_jit._cache_size(), parts.measure._cache_size()
    merge(name, second, members + 1, base, other, key_bits=rng.stream_key_bits(1, "other"))
    assert (table.merge_part_jit._cache_size(), parts.measure._cache_size()) == before


@sweep
def test_parts_take_abstract_input(name, parameters):
    count = allowed(name, 3)
    prepared, static = prepare(name, parameters, *population_for(name, (4, 5), count, "bfloat16"))
    one = jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)
    part = parts.Part((one,) * count, one, jax.ShapeDtypeStruct((2,), jnp.uint32))
    got = jax.eval_shape(lambda part: METHODS[name].apply(part, **prepared, **dict(static)), part)
    assert got.shape == (4, 5)
    assert got.dtype == (
        jnp.bfloat16
        if METHODS[name].exact or (name, parameters) == ("passthrough", {})
        else jnp.float32
    )


@sweep
def test_a_list_of_members_is_a_stack(name, parameters):
    members, base = population_for(name, (6, 5), 3, dtype="bfloat16")
    one, two = (
        merge(name, parameters, models, base, dtype="bfloat16")
        for models in (members, list(members))
    )
    assert np.array_equal(one, two)


class Cut(parts.InMemoryTensor):
    """A tensor seen in parts only: runs of 512 elements or of 16 rows, as the method allows."""

    def __init__(self, unit, members, base):
        super().__init__(members, base, key_bits=KEY_BITS)
        self.unit = unit

    def parts(self):
        if self.unit == "tensor" or (self.unit == "row" and len(self.shape) < 2):
            yield self.part
            return
        size, width = math.prod(self.shape), math.prod(self.shape[1:])
        step = 512 if self.unit == "element" else 16 * width
        for start in range(0, size, step):
            shape = (
                (min(step, size - start),)
                if self.unit == "element"
                else (min(step, size - start) // width, *self.shape[1:])
            )
            members, base = jax.tree.map(
                lambda x, start=start, shape=shape: x.reshape(-1)[
                    start : start + math.prod(shape)
                ].reshape(shape),
                (self.part.members, self.part.base),
            )
            yield parts.Part(
                members,
                base,
                self.part.key_bits,
                jnp.array([start, 0], jnp.uint32),
                jnp.uint32(start // width),
            )

    def total(self, function, *arrays, reduce="sum", among=None, **static):
        sums = parts.Sums(reduce)
        for part in self.parts():
            results = parts.measure(
                part,
                *arrays,
                function=function,
                static=tuple(static.items()),
                dtype=part.members[0].dtype,
            )
            sums.add(results)
        return sums.result()


def same_bits(one, two):
    return np.array_equal(*(np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (one, two)))


@sweep
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((40, 48), "float32"), pytest.param((700,), "bfloat16", marks=pytest.mark.slow)],
    ids=str,
)
def test_parts_give_the_bits_of_the_whole(name, parameters, shape, dtype):
    members, base = population_for(name, shape, 3, dtype)
    checked = check_parameters(name, parameters)
    cut = Cut(METHODS[name].unit(checked), list(members), base)
    prepared, static = parts.split_static(table.METHODS[name].prepare(cut, **checked))
    results = [
        table.merge_part_jit(part, prepared, method=name, static=static, dtype=jnp.dtype(dtype))
        for part in cut.parts()
    ]
    full = merge(name, parameters, members, base, dtype=dtype)
    assert same_bits(jnp.concatenate([x.ravel() for x in results]), full.ravel())


def test_members_are_rounded_to_the_dtype_before_they_are_merged():
    """1 + 2^-9 is 1 in bfloat16, so the task vector is zero.

    Rounded at the end only, 512 times it would be 1.
    """
    members, base = jnp.full((2, 4), 1 + 2.0**-9), jnp.ones(4)
    got = merge("task_arithmetic", {"scale": 512.0}, members, base, dtype="bfloat16")
    assert got.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("avrage", {}, "unknown merge method 'avrage' .did you mean 'average'"),
        ("average", {"scale": 1.0}, "average has no parameter 'scale' .known: normalize"),
        ("norm_matched", {"scale": 1.0}, "norm_matched has no parameter 'scale'; it takes none"),
        ("ties", {"densty": 0.1}, "ties has no parameter 'densty' .did you mean 'density'"),
        ("ties", {"density": 0.0}, "density = 0.0: input should be greater than 0"),
        ("ties", {"density": 1.5}, "density = 1.5: input should be less than or equal to 1"),
        (
            "ties",
            {"density": [0.5, 1.5]},
            "density = 1.5: input should be less than or equal to 1$",
        ),
        ("ties", {"density": [0.5]}, "one number for all of the 2 members, or one per member"),
        ("slerp", {"t": -0.1}, "t = -0.1: input should be greater than or equal to 0"),
        ("ties", {"density": "0.5"}, "density = '0.5': input should be a valid number"),
        ("ties", {"normalize": "false"}, "normalize = 'false': input should be a valid boolean"),
        (
            "task_arithmetic",
            {"scale": float("nan")},
            "scale = nan: input should be a finite number",
        ),
        ("task_arithmetic", {"scale": True}, "scale = True: input should be a valid number"),
        # infinite in float32
        (
            "task_arithmetic",
            {"scale": 3.5e38},
            "scale = 3.5e.38: input should be less than or equal",
        ),
        ("nearswap", {"t": 1e39}, "t = 1e.39: input should be less than or equal to 340282346638"),
        ("karcher", {"tol": -1.0}, "tol = -1.0: input should be greater than 0$"),
        (
            "selection",
            {"resample": -1},
            "resample = -1: input should be greater than or equal to 0 "
            "or input should be 'exhaustive'",
        ),
        (
            "selection",
            {"resample": "always"},
            "resample = 'always': .* or input should be 'exhaustive'",
        ),
        (
            "selection",
            {"granularity": "block"},
            "granularity = 'block': input should be "
            "'element', 'row', 'column', 'tensor' or 'layer'",
        ),
        (
            "selection",
            {"granularity": "layer", "resample": 1},
            "give resample: 0 or granularity: tensor",
        ),
        ("selection", {"offset": None}, "selection has no parameter 'offset'"),
        (
            "dare_linear",
            {"rescale": "l2"},
            "rescale = 'l2': input should be 'density', 'norm' or 'none'",
        ),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(name, parameters, message):
    with pytest.raises(UserError, match=message) as caught:
        check_weights(name, None, 2, check_parameters(name, parameters))
    assert "\n" not in str(caught.value)


def test_defaults_are_filled_in():
    assert check_parameters("selection") == {
        "resample": 0,
        "resample_from": "all",
        "granularity": "element",
        "child": None,
    }
    assert check_parameters("task_arithmetic", {"scale": 1}) == {"scale": 1.0, "normalize": False}


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("average", (1, 2), "2 weights for 3 members"),
        ("average", (1, -1, 0), "positive sum"),
        ("average", (0, 0, 0), "positive sum"),
        ("ties", (1, float("inf"), 1), "finite"),
        ("selection", (1, 1, -1), "not negative"),
        ("selection", (0, 0, 0), "sum is positive"),
    ],
)
def test_wrong_weights_are_refused_in_one_line(name, weights, message):
    with pytest.raises(UserError, match=message):
        check_weights(name, weights, 3)


def test_keys_are_named_by_tensor_method_and_seed():
    parameters = check_parameters("selection")
    key_bits = {
        tuple(
            table.key_bits(
                method,
                parameters if method == "selection" else check_parameters(method),
                seed,
                name,
                layer,
            ).tolist()
        )
        for method in ("selection", "dare_linear")
        for seed in (0, 1)
        for name, layer in (("a.0", 0), ("a.1", 1), ("b.0", 0))
    }
    assert len(key_bits) == 12
    by_layer = check_parameters("selection", {"granularity": "layer"})
    own = [
        table.key_bits("selection", by_layer, 0, name, layer).tolist()
        for name, layer in (("a.0", 0), ("b.0", 0), ("a.1", 1))
    ]
    assert own[0] == own[1] != own[2]
    assert (
        table.key_bits("selection", by_layer, 0, "embed", None).tolist()
        == rng.stream_key_bits(0, "select", "embed").tolist()
    )
