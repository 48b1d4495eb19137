"""Every optimizer against numpy, per tensor, layer and member, in the program of populations."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jax_ordermerge import tree
from jax_ordermerge.arch import hf_tensors, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import (
    OPTIMIZERS,
    Optimizer,
    OptimizerSettings,
    Training,
    make_config,
    to_dict,
)
from jax_ordermerge.config.training import Constant
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import optimizer
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.objective import ExampleSums

STEPS, MEMBERS, LENGTH = 5, 4, 4
COMMON = {
    "learning_rate": 0.02,
    "schedule": {"kind": "wsd", "decay": 2},
    "warmup": 2,
    "weight_decay": 0.3,
    "clip_norm": 2.0,
}
CASES = {
    "adamw": {"optimizer": {"kind": "adamw", "beta2": 0.95}},
    "adafactor": {"optimizer": {"kind": "adafactor", "min_dim_size_to_factor": 8}},
    "lion": {"optimizer": "lion"},
    "sgd": {"optimizer": {"kind": "sgd", "momentum": 0.8}},
    "sgd-nesterov": {
        "optimizer": {"kind": "sgd", "momentum": 0.8, "nesterov": True},
        "decay_on": "all",
    },
    "muon": {"optimizer": "muon", "decay_on": "hidden"},
}


def training(case, **changes):
    return Training(**{**COMMON, **CASES[case], **changes})


# ------------------------------------------------------------ a training with an analytic gradient


def pulls(xp, params, c):
    """Return a gradient for every parameter, {path: array}.

    They are sixteenths that depend on the data `c`, so that sums of squares are exact.
    """
    numbers = {
        path: (37 * xp.arange(x.size, dtype=xp.int32) + 11 * c + place) % 61 - 30
        for place, (path, x) in enumerate(params.items())
    }
    return {
        path: (numbers[path] / 16).reshape(x.shape).astype(x.dtype) for path, x in params.items()
    }


def objective(params, batch, frozen=None):
    """Return a loss per token that is linear in the parameters; its gradient is `pulls`."""
    flat = tree.flatten(params)
    gradient = pulls(jnp, flat, batch["tokens"][0, 0])
    loss = sum(jnp.vdot(x, gradient[path]) for path, x in flat.items())
    tokens = batch["weights"].sum(-1)
    return loss * tokens.sum(), ExampleSums(loss * tokens, tokens)


def batch_of(step, members):
    tokens = np.stack([np.full((1, 4, LENGTH), 3 * step + 7 * m, np.int32) for m in members])
    ones = np.ones_like(tokens)
    batch = {
        "tokens": tokens,
        "targets": ones,
        "positions": ones,
        "segments": ones,
        "weights": ones.astype(np.float32),
    }
    return batch | {"ids": ones[..., 0], "bucket": ones[:, :, 0, 0] * 0}


def run(settings, model, base, members, shape):
    """Train, and return the state and the reported learning rates."""
    mesh = make_mesh(*shape)
    table = tensor_table(model)
    tx = optimizer.make_optimizer(settings, STEPS, table)
    abstract = steps.abstract_state(
        convert.abstract_params(model, mesh, members=len(members)), tx, mesh
    )
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("order"))
    kinds = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for name, x in batch_of(0, members).items()
    }
    step = steps.train_step(
        objective, tx, optimizer.make_schedule(settings, STEPS), lengths=[LENGTH]
    )
    program = steps.compile_step(step, mesh, abstract, kinds, {})
    state, rates = steps.initial_state([base], tx, abstract), []
    for number in range(STEPS):
        state, metrics = program(state, jax.device_put(batch_of(number, members), place), {})
        rates.append(np.asarray(metrics.learning_rate)[0].astype(np.float64))
    return jax.device_get(state), rates


# ---------------------------------------------- directions in float64, for one tensor of one layer


def adam(s, hidden):
    m = v = 0
    for t in range(1, STEPS + 1):
        g, _ = yield
        m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g**2
        yield m / (1 - s.beta1**t) / (np.sqrt(v / (1 - s.beta2**t)) + s.epsilon)


def lion(s, hidden):
    m = 0
    while True:
        g, _ = yield
        direction = np.sign(s.beta1 * m + (1 - s.beta1) * g)
        m = s.beta2 * m + (1 - s.beta2) * g
        yield direction


def sgd(s, hidden):
    m = 0
    while True:
        g, _ = yield
        m = s.momentum * m + g
        yield g + s.momentum * m if s.nesterov else m


def adafactor(s, hidden):
    """Algorithm 4 of Shazeer and Stern: factored where both sides are large enough."""
    row = column = full = 0
    for t in range(1, STEPS + 1):
        g, theta = yield
        beta, square = 1 - t**-s.decay_rate, g**2 + s.epsilon
        if g.ndim == 2 and min(g.shape) >= s.min_dim_size_to_factor:
            row = beta * row + (1 - beta) * square.mean(1, keepdims=True)
            column = beta * column + (1 - beta) * square.mean(0, keepdims=True)
            full = row * column / row.mean()
        else:
            full = beta * full + (1 - beta) * square
        u = g / np.sqrt(full)
        u /= max(1, np.sqrt((u**2).mean()))
        yield u * max(1e-3, np.sqrt((theta**2).mean()))


def muon(s, hidden):
    if not hidden:
        yield from adam(s, hidden)
    m = 0
    for t in range(1, STEPS + 1):
        g, _ = yield
        m = s.momentum * m + (1 - s.momentum) * g
        x = s.momentum * m / (1 - s.momentum ** (t + 1)) + (1 - s.momentum) * g / (
            1 - s.momentum**t
        )
        x /= np.linalg.norm(x) + s.epsilon
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        yield 0.2 * math.sqrt(max(x.shape)) * x


DIRECTIONS = {"adamw": adam, "adafactor": adafactor, "lion": lion, "sgd": sgd, "muon": muon}


def reference(s, model, base, member, rates):
    """Weights of a member after the training, {Hugging Face name: float64}."""
    flat = {path: np.asarray(x, np.float64) for path, x in tree.flatten(base).items()}
    tensors = {name: (spec, layer) for name, spec, layer in hf_tensors(model)}
    theta = {
        name: np.array(flat[spec.path] if layer is None else flat[spec.path][layer])
        for name, (spec, layer) in tensors.items()
    }
    hidden = {
        name: spec.kind in ("attention", "mlp") and theta[name].ndim == 2
        for name, (spec, _) in tensors.items()
    }
    decayed = {
        name: {"all": True, "matrices": x.ndim == 2, "hidden": hidden[name]}[s.decay_on]
        for name, x in theta.items()
    }
    directions = {name: DIRECTIONS[s.optimizer.kind](s.optimizer, hidden[name]) for name in tensors}
    for number, rate in enumerate(rates):
        gradient = pulls(np, flat, 3 * number + 7 * member)
        g = {
            name: gradient[spec.path] if layer is None else gradient[spec.path][layer]
            for name, (spec, layer) in tensors.items()
        }
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        for name, direction in directions.items():
            pull = g[name] * min(1, s.clip_norm / norm)
            penalty = s.weight_decay * theta[name] * decayed[name]
            next(direction)
            if s.optimizer.kind == "sgd":
                theta[name] = theta[name] - rate * direction.send((pull + penalty, theta[name]))
            else:
                theta[name] = theta[name] - rate * (direction.send((pull, theta[name])) + penalty)
    return theta


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, marks=() if case in ("adamw", "muon") else pytest.mark.slow)
        for case in CASES
    ],
)
def trained(request, tiny_model, tiny_base):
    settings = training(request.param, ema=0.9 if request.param == "lion" else None)
    return settings, *run(settings, tiny_model, tiny_base, range(MEMBERS), (2, 4, 1))


def test_every_tensor_of_every_layer_and_member_is_that_of_numpy(trained, tiny_model, tiny_base):
    settings, state, rates = trained
    np.testing.assert_allclose(rates, [0, 0.01, 0.02, 0.02, 0.01], rtol=1e-6)
    params = tree.flatten(state.params)
    for member in range(MEMBERS):
        expected = reference(settings, tiny_model, tiny_base, member, rates)
        for name, spec, layer in hf_tensors(tiny_model):
            index = () if layer is None else (layer,)
            actual = params[spec.path][member, *index]
            start = np.asarray(tree.flatten(tiny_base)[spec.path][index])
            moved = np.abs(expected[name] - start).max()
            assert moved > 1e-5
            # Muon's iteration multiplies small singular values, and their rounding, by up to 3.4^5
            tolerance = 1e-3 if settings.optimizer.kind == "muon" else 1e-4
            np.testing.assert_allclose(
                actual,
                expected[name],
                rtol=0,
                atol=tolerance * moved,
                err_msg=f"{name} of member {member}",
            )


def test_a_member_alone_has_the_same_bits(trained, tiny_model, tiny_base, same_bits):
    settings, state, _ = trained
    single, _ = run(settings, tiny_model, tiny_base, [2], (1, 4, 1))
    assert same_bits(tree.member(single, 0), tree.member(state, 2))
    assert not same_bits(tree.member(state, 1), tree.member(state, 2))


# ----------------------------------------------------------------------- weight decay and clipping


@pytest.mark.parametrize(
    ("decay_on", "spared"),
    [("matrices", {"norm"}), ("hidden", {"norm", "embedding", "head"}), ("all", set())],
)
def test_weight_decay_spares(tiny_model, tiny_base, decay_on, spared):
    settings = Training(
        learning_rate=0.1, warmup=0, schedule="constant", weight_decay=0.5, decay_on=decay_on
    )
    tx = optimizer.make_optimizer(settings, 10, tensor_table(tiny_model))
    zeros = jax.tree.map(jnp.zeros_like, tiny_base)
    updates, _ = tx.update(zeros, tx.init(tiny_base), tiny_base)
    flat, params = tree.flatten(updates), tree.flatten(tiny_base)
    for spec in tensor_table(tiny_model):
        decay = 0.0 if spec.kind in spared else -0.05
        np.testing.assert_allclose(flat[spec.path], decay * params[spec.path], rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_parameters(tiny_model, tiny_base):
    settings = Training(
        learning_rate=1.0, warmup=0, clip_norm=0.5, optimizer={"beta1": 0.0, "epsilon": 1e3}
    )
    tx = optimizer.make_optimizer(settings, 10, tensor_table(tiny_model))
    ones = jax.tree.map(jnp.ones_like, tiny_base)
    updates, _ = tx.update(ones, tx.init(tiny_base), tiny_base)
    count = sum(x.size for x in jax.tree.leaves(ones))
    # with a large epsilon Adam's first update is nearly -gradient / epsilon
    np.testing.assert_allclose(
        tree.flatten(updates)["norm/weight"], -0.5 / count**0.5 / 1e3, rtol=1e-4
    )


def test_an_optax_without_muon(monkeypatch, tiny_model):
    monkeypatch.delattr(optax.contrib, "scale_by_muon")
    with pytest.raises(
        UserError,
        match=r"training\.optimizer = muon: optax .* has no optax\.contrib\.scale_by_muon; install",
    ):
        optimizer.make_optimizer(Training(optimizer="muon"), 10, tensor_table(tiny_model))


# --------------------------------------------------------------------------------------- placement


def placements(settings, model, shape=(2, 2, 2)):
    """Return {field of the state and path: spec} of the abstract state."""
    mesh = make_mesh(*shape)
    tx = optimizer.make_optimizer(settings, 10, tensor_table(model))
    state = steps.abstract_state(convert.abstract_params(model, mesh, members=4), tx, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert all(leaf.sharding.mesh == mesh for _, leaf in leaves)
    return {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in leaves}


def spec_of(specs, field, name):
    (spec,) = [
        tuple(spec)
        for path, spec in specs.items()
        if f".{field}[" in path and path.endswith(f"['{name}']['weight']")
    ]
    return spec


def test_factored_moments_keep_the_axes_that_are_left(tiny_model):
    specs = placements(training("adafactor"), tiny_model)
    # gate [M, L, F, D]: rows are averages over the longer axis, columns over the shorter one; q is
    # square
    assert spec_of(specs, "v_row", "gate") == ("order", None, "fsdp")
    assert spec_of(specs, "v_col", "gate") == ("order", None, "tensor")
    assert (spec_of(specs, "v_row", "q"), spec_of(specs, "v_col", "q")) == (
        ("order", None, "tensor"),
        ("order", None, "fsdp"),
    )
    assert spec_of(specs, "v", "k") == ("order", None, "tensor", "fsdp")  # too small to factor
    assert all(spec[0] == "order" for spec in specs.values())


@pytest.mark.parametrize("case", ["adamw", "lion", "sgd", "muon"])
def test_moments_and_averages_are_sharded_like_their_parameters(tiny_model, case):
    specs = placements(training(case, ema=0.9, moments="bfloat16"), tiny_model)
    fields = {"adamw": ("mu", "nu"), "sgd": ("trace",)}.get(case, ("mu",))
    for field in (*fields, "ema"):
        assert spec_of(specs, field, "gate") == ("order", None, "tensor", "fsdp")
    assert all(spec[0] == "order" for spec in specs.values())


# -------------------------------------------------------------------------------- bfloat16 moments


@pytest.mark.parametrize("case", list(CASES))
def test_all_moments_are_bfloat16_and_nothing_else_is(tiny_model, tiny_base, case):
    plain = jax.eval_shape(
        optimizer.make_optimizer(training(case), 10, tensor_table(tiny_model)).init, tiny_base
    )
    tx = optimizer.make_optimizer(
        training(case, moments="bfloat16", ema=0.9), 10, tensor_table(tiny_model)
    )
    state = jax.eval_shape(lambda params: tx.update(params, tx.init(params), params)[1], tiny_base)
    moments = [
        x for x in jax.tree.leaves(plain) if x.dtype == jnp.float32 and x.shape != (3,)
    ]  # (3,): Muon's coefficients
    assert len(moments) == sum(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.inner)) > 0
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}


def test_rounding_to_nearest_is_that_of_numpy():
    tx = optimizer.in_bfloat16(optax.scale_by_adam(0.9, 0.95), stochastic=False)
    random = np.random.default_rng(0)
    params = {"w": jnp.zeros(1000)}
    state, mu, nu = tx.init(params), np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    for t in range(1, 4):
        g = random.normal(size=1000).astype(np.float32)
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params)
        mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g * g
        np.testing.assert_allclose(
            updates["w"], mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.95**t)) + 1e-8), rtol=1e-5
        )
        mu, nu = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (mu, nu))
        # a value at the middle of two may go either way by the last bit of float32
        assert (np.asarray(state.inner.nu["w"], np.float32) != nu).mean() < 0.01
        mu, nu = (
            np.asarray(state.inner.mu["w"], np.float32),
            np.asarray(state.inner.nu["w"], np.float32),
        )


@pytest.mark.parametrize(("stochastic", "expected"), [(False, 1.0), (True, 0.999**500)])
def test_a_second_moment_that_should_fall(stochastic, expected):
    tx = optimizer.in_bfloat16(optax.scale_by_adam(0.9, 0.999), stochastic=stochastic)
    zeros = {"w": jnp.zeros(10000)}
    state = tx.init(zeros)
    state = state._replace(inner=state.inner._replace(nu={"w": jnp.ones(10000, jnp.bfloat16)}))
    state, _ = jax.lax.scan(lambda state, _: (tx.update(zeros, state)[1], None), state, length=500)
    assert float(state.inner.nu["w"].astype(jnp.float32).mean()) == pytest.approx(
        expected, rel=2e-3
    )


@pytest.mark.slow
def test_rounding_bits_follow_no_mesh(tiny_model, tiny_base, same_bits):
    settings = training("adamw", moments="bfloat16")
    one_device, eight_devices = (
        run(settings, tiny_model, tiny_base, range(2), shape)[0] for shape in ((1, 1, 1), (2, 4, 1))
    )
    assert same_bits(one_device, eight_devices)


# ---------------------------------------------------------------------------------------- averages


def test_the_average_is_weighted_by_powers_of_the_decay():
    tx = optimizer.averaged(optax.sgd(0.1), 0.8)
    params = {"w": jnp.float32(5.0)}
    state, seen = tx.init(params), []
    assert float(state.ema["w"]) == 5.0
    for step in range(6):
        updates, state = tx.update({"w": jnp.float32(step - 3)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"]))
        powers = 0.8 ** np.arange(len(seen))[::-1]
        assert float(state.ema["w"]) == pytest.approx(
            float(np.average(seen, weights=powers)), rel=1e-6
        )


# ----------------------------------------------------------------------- an optimizer from outside


class SignSettings(OptimizerSettings):
    """Settings of a toy optimizer: gradient descent by the sign of the gradient."""

    scale: float = 1.0


def sign_direction(settings, table):
    return optax.stateless_with_tree_map(lambda g, _: settings.scale * jnp.sign(g))


@pytest.fixture
def sign():
    OPTIMIZERS.register("sign", Optimizer(SignSettings, sign_direction))
    yield "sign"
    OPTIMIZERS.unregister("sign")


def test_a_registered_optimizer_trains_a_population(sign, tiny_model, tiny_base):
    config = make_config({"training": {"optimizer": {"kind": sign, "scale": 0.5}, "warmup": 0}})
    assert make_config(to_dict(config)) == config
    with pytest.raises(UserError, match=r"optimizer\.beta1 \(kind sign has: scale\)"):
        make_config({"training": {"optimizer": {"kind": sign, "beta1": 0.5}}})
    settings = config.training.model_copy(update={"learning_rate": 0.01, "schedule": Constant()})
    state, _ = run(settings, tiny_model, tiny_base, range(2), (2, 4, 1))
    moved = state.params["embed"]["weight"] - np.asarray(tiny_base["embed"]["weight"])
    # five steps of 0.005, up or down; a zero gradient does not move
    np.testing.assert_allclose(moved / 0.005, np.round(moved / 0.005), atol=1e-3)
    assert 0 < np.abs(moved).max() < 0.0251


def test_an_optimizer_is_registered_once():
    with pytest.raises(ValueError, match="optimizer 'adamw' is registered already"):
        OPTIMIZERS.register("adamw", Optimizer(SignSettings, sign_direction))
