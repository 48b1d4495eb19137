"""The contract, swept over the whole table, and the check of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import methods
from jax_ordermerge.merge.methods import METHODS, check, check_weights

EVERY = [(name, {}) for name in METHODS] + [
    ("selection", {"resample": 2}),
    ("selection", {"resample": "exhaustive"}),
    ("selection", {"granularity": "row", "resample": 1, "resample_from": "others"}),
    ("dare_ties", {"rescale": "norm"}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in parameters.items())]) for name, parameters in EVERY]
WORDS = rng.stream_words(0, "test")
sweep = pytest.mark.parametrize(("name", "parameters"), EVERY, ids=IDS)


def merge(name, parameters, members, base, weights=None, dtype="float32", words=WORDS):
    checked = check(name, parameters)
    prepared = check_weights(name, weights, len(members))
    return methods.run(members, base, prepared, words, method=name, parameters=tuple(checked.items()), dtype=dtype)


def population(shape, count=3, dtype="float32", seed=0):
    generator = np.random.default_rng(seed)
    base = jnp.asarray(generator.normal(size=shape), dtype)
    taus = generator.normal(size=(count, *shape)) * (generator.random((count, *shape)) < 0.6)
    return (base.astype(jnp.float32)[None] + jnp.asarray(taus, jnp.float32)).astype(dtype), base


@sweep
@pytest.mark.parametrize("shape", [(9, 7), (1, 1), (3,)])
def test_identical_members_give_the_member(name, parameters, shape):
    """Whatever thins the task vectors is switched off: then nothing may be lost or added."""
    if "density" in check(name):
        parameters = {**parameters, "density": 1.0}
    member, base = population(shape, 1, "bfloat16")
    members = jnp.repeat(member, 4, axis=0)
    got = merge(name, parameters, members, base, dtype="bfloat16")
    if name == "selection" or name == "average":
        assert np.array_equal(got, member[0])
    else:  # base + (member - base) may round in float32
        np.testing.assert_allclose(got.astype(jnp.float32), member[0].astype(jnp.float32), rtol=2**-8)


@sweep
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 0.25)])
def test_permuting_members_with_their_weights_changes_nothing(name, parameters, weights):
    """Methods that draw name a member by its position, so for them only the choice that needs no draw can be compared."""
    members, base = population((8, 5))
    order = jnp.array([2, 0, 1])
    if METHODS[name].needs_key:
        if name == "selection":
            members = members[0][None] * jnp.ones((3, 1, 1))
        else:
            parameters = {**parameters, "density": 1.0}
    permuted = None if weights is None else tuple(np.array(weights)[np.array(order)].tolist())
    one, two = merge(name, parameters, members, base, weights), merge(name, parameters, members[order], base, permuted)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@sweep
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 5), (5, 1), (2, 3, 4)])
@pytest.mark.parametrize("count", [1, 3])
def test_small_shapes(name, parameters, shape, count):
    members, base = population(shape, count)
    got = jax.eval_shape(
        lambda m, b: methods.apply(
            m,
            b,
            check_weights(name, None, count),
            WORDS,
            method=name,
            parameters=tuple(check(name, parameters).items()),
            dtype="bfloat16",
        ),
        members,
        base,
    )
    assert got.shape == shape
    assert got.dtype == jnp.bfloat16


@sweep
def test_scalars_and_single_elements_have_values(name, parameters):
    for shape in ((), (1, 1)):
        members, base = population(shape)
        got = merge(name, parameters, members, base)
        assert got.shape == shape
        assert np.isfinite(got).all()
        if name == "selection":
            assert float(got.reshape(())) in members.ravel().tolist()


@sweep
def test_bfloat16_edges(name, parameters):
    """The ends of the range pass through float32 without overflow or loss.

    The lower end is four times the smallest normal number: XLA flushes subnormal terms to zero on CPU.
    """
    edge = jnp.array([3.3895e38, -3.3895e38, 2.0**-124, 0.0, -0.0, 1.0], jnp.bfloat16)
    if "density" in check(name):
        parameters = {**parameters, "density": 1.0}
    got = merge(name, parameters, jnp.stack([edge] * 2), jnp.zeros(6, jnp.bfloat16), weights=(0.5, 0.5), dtype="bfloat16")
    assert np.array_equal(got, edge)


@sweep
def test_one_trace_a_shape(name, parameters):
    members, base = population((4, 3))
    merge(name, parameters, members, base, (1.0, 2.0, 3.0))
    before = methods.run._cache_size()
    merge(name, parameters, members + 1, base, (3.0, 2.0, 1.0), words=rng.stream_words(1, "other"))
    assert methods.run._cache_size() == before


@sweep
def test_kernels_take_typed_keys_and_abstract_input(name, parameters):
    arguments = dict(check(name, parameters))
    if METHODS[name].needs_key:
        arguments["key"] = rng.stream(0, "k")
    members, base = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 4, 5), (4, 5)))
    got = jax.eval_shape(lambda m, b: METHODS[name].function(m, base=b, **arguments), members, base)
    assert got.shape == (4, 5)
    assert got.dtype == (jnp.bfloat16 if name == "selection" else jnp.float32)


@sweep
def test_a_list_of_members_is_a_stack(name, parameters):
    members, base = population((6, 5), dtype="bfloat16")
    one, two = (merge(name, parameters, given, base, dtype="bfloat16") for given in (members, list(members)))
    assert np.array_equal(one, two)


def test_members_are_rounded_to_the_dtype_before_they_are_merged():
    """1 + 2^-9 is 1 in bfloat16, so the task vector is zero; rounded at the end only, 512 times it would be 1."""
    members, base = jnp.full((2, 4), 1 + 2.0**-9), jnp.ones(4)
    got = merge("task_arithmetic", {"scale": 512.0}, members, base, dtype="bfloat16")
    assert got.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("avrage", {}, "unknown merge method 'avrage' .did you mean 'average'"),
        ("average", {"scale": 1.0}, "average has no parameter 'scale'; it takes none"),
        ("ties", {"densty": 0.1}, "ties has no parameter 'densty' .did you mean 'density'"),
        ("ties", {"density": 0.0}, "density = 0.0: input should be greater than 0"),
        ("ties", {"density": 1.5}, "density = 1.5: input should be less than or equal to 1"),
        ("ties", {"density": "0.5"}, "density = '0.5': input should be a valid number"),
        ("ties", {"normalize": "false"}, "normalize = 'false': input should be a valid boolean"),
        ("task_arithmetic", {"scale": float("nan")}, "scale = nan: input should be a finite number"),
        ("task_arithmetic", {"scale": True}, "scale = True: input should be a valid number"),
        (
            "selection",
            {"resample": -1},
            "resample = -1: input should be greater than or equal to 0 or input should be 'exhaustive'",
        ),
        ("selection", {"resample": "always"}, "resample = 'always': .* or input should be 'exhaustive'"),
        (
            "selection",
            {"granularity": "block"},
            "granularity = 'block': input should be 'element', 'row', 'column', 'tensor' or 'layer'",
        ),
        ("selection", {"granularity": "layer", "resample": 1}, "give resample: 0 or granularity: tensor"),
        ("selection", {"offset": None}, "selection has no parameter 'offset'"),
        ("dare_linear", {"rescale": "l2"}, "rescale = 'l2': input should be 'density', 'norm' or 'none'"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(name, parameters, message):
    with pytest.raises(UserError, match=message) as caught:
        check(name, parameters)
    assert "\n" not in str(caught.value)


def test_defaults_are_filled_in():
    assert check("selection") == {"resample": 0, "resample_from": "all", "granularity": "element"}
    assert check("task_arithmetic", {"scale": 1}) == {"scale": 1.0}


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
    parameters = check("selection")
    words = {
        tuple(methods.key_words(method, parameters if method == "selection" else check(method), seed, name, layer).tolist())
        for method in ("selection", "dare_linear")
        for seed in (0, 1)
        for name, layer in (("a.0", 0), ("a.1", 1), ("b.0", 0))
    }
    assert len(words) == 12
    by_layer = check("selection", {"granularity": "layer"})
    own = [
        methods.key_words("selection", by_layer, 0, name, layer).tolist() for name, layer in (("a.0", 0), ("b.0", 0), ("a.1", 1))
    ]
    assert own[0] == own[1] != own[2]
    assert methods.key_words("selection", by_layer, 0, "embed", None).tolist() == rng.stream_words(0, "select", "embed").tolist()
