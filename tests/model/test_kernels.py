"""Accelerator kernels, interpreted, against a loop and the XLA path. They compile for a TPU."""

import functools
import os
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import fusion
from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError
from jax_ordermerge.model import kernels, llama
from jax_ordermerge.model.attention import Tokens, attend
from jax_ordermerge.train import objective
from tests.model.test_attention import inputs, naive, packed

HERE = [
    "xla",
    "splash_interpreted",
    *(
        pytest.param(
            kernel,
            marks=pytest.mark.skipif(
                jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU"
            ),
        )
        for kernel in ("cudnn", "cudnn_packed")
    ),
]


def documents(kernel, T):
    """Two documents a row and padding behind; one document a row where a kernel takes no more."""
    return packed(T, (T - 9,) if kernel == "cudnn" else (T // 3, T // 2))


@pytest.fixture
def reference_cudnn(monkeypatch):
    """The call of jax by its reference implementation, whose arguments mean the same."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, implementation, **named: real(*a, implementation="xla", **named),
    )


def close(actual, expected, atol):
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=atol
    )


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(("T", "lengths"), [(5, (5,)), (300, (20, 150, 101))])
def test_splash_against_a_loop(T, lengths, window):
    q, k, v = inputs(T, T)
    tokens = packed(T, lengths)
    out = jax.jit(
        lambda *a: attend(*a, tokens, tokens, window=window, kernel="splash_interpreted")
    )(q, k, v)
    assert out.dtype == q.dtype
    real = tokens.segments > 0
    close(np.asarray(out)[real], naive(q, k, v, tokens, tokens, window)[real], 1e-5)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("kernel", HERE[1:])
def test_outputs_and_gradients_of_xla(kernel, window):
    tokens = documents(kernel, 300)
    arrays = inputs(300, 300, H=8)
    if kernel.startswith("cudnn"):
        arrays = [x.astype(jnp.bfloat16) for x in arrays]
    real = (tokens.segments > 0)[:, :, None, None]

    def both(kernel):
        def loss(*a):
            out = attend(*a, tokens, tokens, window=window, kernel=kernel)
            return jnp.where(real, jnp.sin(out.astype(jnp.float32)), 0).sum(), jnp.where(
                real, out, 0
            )

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    (gradients, out), (expected_gradients, expected) = both(kernel), both("xla")
    close(out, expected, 2e-2 if kernel.startswith("cudnn") else 1e-5)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        close(gradient, reference, 5e-2 if kernel.startswith("cudnn") else 1e-4)


@pytest.mark.parametrize("kernel", [*HERE[:2], "cudnn_packed"])
@pytest.mark.usefixtures("reference_cudnn")
def test_a_document_does_not_change_another_one(kernel):
    """Not in a bit, and no gradient. The call of cuDNN is computed by jax, mask and all."""
    q, k, v = inputs(300, 300)
    tokens = packed(300, (120, 100))
    document_1 = tokens.segments == 1
    document_2 = (tokens.segments == 2)[:, :, None, None]

    @jax.jit
    def of_document_2(*a):
        def loss(*a):
            out = attend(*a, tokens, tokens, kernel=kernel)
            return jnp.where(document_2, jnp.sin(out), 0).sum(), jnp.where(document_2, out, 0)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*a)

    gradients, out = of_document_2(q, k, v)
    changed = [np.where(document_1[:, :, None, None], 3 * x + 1, x) for x in (q, k, v)]
    gradients_2, out_2 = of_document_2(*changed)
    np.testing.assert_array_equal(out, out_2)
    for gradient, same in zip(gradients, gradients_2, strict=True):
        assert abs(gradient[tokens.segments == 2]).max() > 0
        assert not np.asarray(gradient)[document_1].any()
        np.testing.assert_array_equal(gradient, same)


@pytest.mark.parametrize(
    "shape",
    [
        {"fsdp": 2, "tensor": 4},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        {"order": 2, "data": 2, "sequence": 2},
    ],
)
def test_splash_on_a_mesh(shape):
    # Two kv heads over a tensor axis of four are repeated. Under `order` the inner axes are made
    # manual too.
    q, k, v = inputs(300, 300, N=8, K=2)
    tokens = Tokens(*map(jnp.asarray, packed(300, (120, 100))))
    real = (tokens.segments > 0)[:, :, None, None]

    def loss(arrays, tokens, kernel="splash_interpreted"):
        out = attend(*arrays, tokens, tokens, window=130, kernel=kernel)
        return jnp.where(real, jnp.sin(out), 0).sum()

    expected = jax.jit(jax.grad(functools.partial(loss, kernel="xla")))((q, k, v), tokens)
    mesh = meshes.make_mesh(**shape)
    members = meshes.map_members(lambda arrays, tokens: jax.grad(loss)(arrays, tokens), mesh)
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), (q, k, v))
    gradients = jax.jit(members)(pair, tokens)
    for gradient, reference in zip(gradients, expected, strict=True):
        close(gradient[0], reference, 1e-4)
        close(gradient[1], reference, 1e-4)


@pytest.mark.parametrize("window", [None, 7])
def test_gradients_of_a_model(tiny_batch, window):
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        sliding_window=window,
        full_attention_layers=(0, 2),
    )
    params = llama.init_params(config, 0)

    def gradients(kernel):
        loss = objective.sft(config, dtype="float32", kernel=kernel)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, tiny_batch)

    (loss, sums), actual = gradients("splash_interpreted")
    (expected_loss, expected_sums), expected = gradients("xla")
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    close(sums.losses, expected_sums.losses, 1e-4)
    for gradient, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(gradient, reference, 1e-4)


@pytest.fixture
def tiny_batch():
    random = np.random.default_rng(0)
    positions, segments = packed(40, (21, 12))
    batch = {
        name: random.integers(0, 32, (2, 40)).astype(np.int32) for name in ("tokens", "targets")
    }
    return batch | {
        "positions": positions,
        "segments": segments,
        "weights": (segments > 0).astype(np.float32),
    }


# ------------------------------------------------------------ cuDNN


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.usefixtures("reference_cudnn")
def test_cudnn_is_asked_for_causal_rows_with_lengths(window):
    q, k, v = inputs(40, 40)
    tokens = packed(40, (33,))
    tokens.segments[1], tokens.positions[1] = 0, 0  # a row of padding
    out = np.asarray(
        jax.jit(lambda *a: attend(*a, tokens, tokens, window=window, kernel="cudnn"))(q, k, v)
    )
    real = tokens.segments > 0
    close(out[real], naive(q, k, v, tokens, tokens, window)[real], 1e-5)
    assert not out[~real].any()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.usefixtures("reference_cudnn")
def test_cudnn_is_asked_for_the_documents_of_packed_rows(window):
    q, k, v = inputs(40, 40)
    tokens = packed(40, (20, 13))
    out = jax.jit(lambda *a: attend(*a, tokens, tokens, window=window, kernel="cudnn_packed"))(
        q, k, v
    )
    real = tokens.segments > 0
    close(np.asarray(out)[real], naive(q, k, v, tokens, tokens, window)[real], 1e-5)
    assert np.isfinite(out).all()


@pytest.mark.usefixtures("reference_cudnn")
def test_cudnn_on_a_mesh_keeps_documents_apart():
    q, k, v = inputs(40, 40, N=4, K=2)
    tokens = Tokens(*map(jnp.asarray, packed(40, (20, 13))))
    mesh = meshes.make_mesh(fsdp=2, tensor=4)  # two kv heads on four devices are repeated
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), (q, k, v))
    members = meshes.map_members(
        lambda arrays, tokens: attend(*arrays, tokens, tokens, kernel="cudnn_packed"), mesh
    )
    out = np.asarray(jax.jit(members)(pair, tokens))[1]
    real = tokens.segments > 0
    close(out[real], naive(q, k, v, tokens, tokens, None)[real], 1e-5)


@pytest.mark.parametrize("kernel", ["cudnn", "cudnn_packed", "splash_interpreted"])
def test_fused_members_have_the_attention_of_each(kernel, reference_cudnn, monkeypatch):
    """Of cuDNN one call has the rows of all members, inside a rematerialized scan on a mesh."""
    # two rows per member, of other documents in each
    members = inputs(24, 24), [0.7 * x[::-1] for x in inputs(24, 24)]
    lengths = [(20,), (11,)] if kernel == "cudnn" else [(10, 5), (3, 16)]
    tokens = jax.tree.map(lambda *x: jnp.stack(x), *(packed(24, sizes) for sizes in lengths))
    arrays = tuple(jnp.stack(x) for x in zip(*members, strict=True))
    rows, real = [], jax.nn.dot_product_attention

    def record(q, *rest, **named):
        rows.append(len(q))
        return real(q, *rest, **named)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)

    def loss(arrays, tokens):
        def layer(total, _):
            out = attend(*arrays, tokens, tokens, kernel=kernel)
            return total + jnp.sin(out).sum(), None

        return jax.lax.scan(jax.checkpoint(layer), jnp.zeros(()), length=2)[0]

    step = jax.value_and_grad(loss)

    def both(states, inputs, shared):
        return states, fusion.fuse_members(step, (True, True))(states, inputs)

    mesh = meshes.make_mesh(1, 2)
    _, fused = jax.jit(meshes.update_groups(both, mesh))(arrays, tokens, ())
    # a device has one row of each of two members
    assert (2 in rows) == (kernel != "splash_interpreted")
    for member in (0, 1):
        of_member = jax.tree.map(lambda x: x[member], (arrays, tokens))  # noqa: B023
        expected = jax.jit(step)(*of_member)
        for actual, alone in zip(jax.tree.leaves(fused), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(actual[member], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("reference_cudnn")
def test_layers_with_and_without_a_window_by_cudnn():
    config = ModelConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=16,
        num_layers=3,
        num_heads=4,
        sliding_window=7,
        full_attention_layers=(0, 2),
    )
    params, tokens = llama.init_params(config, 0), packed(40, (33,))
    ids = np.random.default_rng(0).integers(0, 32, (2, 40))
    out, reference = (
        llama.hidden(config, params, ids, *tokens, dtype="float32", kernel=kernel)[0]
        for kernel in ("cudnn", "xla")
    )
    real = tokens.segments > 0
    close(np.asarray(out)[real], np.asarray(reference)[real], 1e-5)


@pytest.mark.usefixtures("reference_cudnn")
@pytest.mark.parametrize(
    "tokens", [packed(40, (20, 13)), packed(40, (20,), left=5)], ids=["packed", "padded in front"]
)
def test_rows_that_cudnn_would_mix_become_nan(tokens):
    q, k, v = inputs(40, 40)
    out = attend(q, k, v, tokens, tokens, kernel="cudnn")
    assert np.isnan(out).all()


# ------------------------------------------------------------ choice


def devices(platform, **axes):
    """What `choose` reads of a mesh."""
    return types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(platform=platform)]), shape=axes
    )


CONFIG = ModelConfig(
    vocab_size=32, hidden_size=256, intermediate_size=16, num_layers=2, num_heads=4
)
WIDE = ModelConfig(vocab_size=32, hidden_size=1024, intermediate_size=16, num_layers=2, num_heads=4)


@pytest.mark.parametrize(
    ("mesh", "config", "dtype", "packed", "kernel"),
    [
        (devices("cpu"), CONFIG, "bfloat16", False, "xla"),
        (devices("tpu"), CONFIG, "float32", True, "splash"),
        (devices("tpu", sequence=2), WIDE, "bfloat16", True, "splash"),
        (devices("gpu"), CONFIG, "bfloat16", False, "cudnn"),
        (devices("gpu"), CONFIG, "bfloat16", True, "cudnn_packed"),
        (devices("gpu"), CONFIG, "float32", False, "xla"),
        (devices("gpu"), WIDE, "bfloat16", False, "xla"),
        (devices("gpu", sequence=2), CONFIG, "bfloat16", False, "xla"),
    ],
)
def test_auto_takes_what_is_right(mesh, config, dtype, packed, kernel):
    assert kernels.choose("auto", config, mesh, dtype=dtype, packed=packed) == kernel
    assert kernels.choose("xla", config, mesh, dtype=dtype, packed=packed) == "xla"


@pytest.mark.parametrize(
    ("asked", "mesh", "config", "dtype", "packed", "text"),
    [
        (
            "splash",
            devices("gpu"),
            CONFIG,
            "bfloat16",
            False,
            "splash runs on TPU, the devices are gpu",
        ),
        (
            "cudnn",
            devices("tpu"),
            CONFIG,
            "bfloat16",
            False,
            "cudnn runs on NVIDIA GPU, the devices are tpu",
        ),
        (
            "cudnn",
            devices("gpu"),
            CONFIG,
            "float32",
            False,
            "computes in bfloat16, model.compute_dtype is float32",
        ),
        (
            "cudnn",
            devices("gpu"),
            WIDE,
            "bfloat16",
            False,
            "a multiple of 8 up to 128, this model has 256",
        ),
        (
            "cudnn",
            devices("gpu", sequence=2),
            CONFIG,
            "bfloat16",
            False,
            "takes whole sequences, mesh.sequence divides them",
        ),
    ],
)
def test_a_kernel_that_would_be_wrong_is_refused(asked, mesh, config, dtype, packed, text):
    with pytest.raises(UserError, match=rf"^model.attention = .*{text}.*; give auto or xla$"):
        kernels.choose(asked, config, mesh, dtype=dtype, packed=packed)


# ------------------------------------------------------------ TPU

# A train step: `order` outside, the kernels inside, heads that the tensor axis divides and kv heads
# that it does not.
PROGRAM = """
    import numpy as np
    from jax_ordermerge import hardware
    from jax_ordermerge import mesh as meshes
    from jax_ordermerge.arch import ModelConfig
    from jax_ordermerge.config import make_config
    from jax_ordermerge.data.examples import Examples, Ragged
    from jax_ordermerge.experiment.specs import training_spec
    from jax_ordermerge.plan import devices
    from jax_ordermerge.train import batches
    from jax_ordermerge.train.programs import Programs

    mesh = meshes.make_mesh(devices=devices.topology_devices(hardware.parse("{topology}")), **{axes})
    model = ModelConfig(
        vocab_size=512, hidden_size=8 * {head}, intermediate_size=256, num_layers=2,
        num_heads=8, num_kv_heads=2, sliding_window={window}, full_attention_layers={full},
    )
    training = {{"batch": 8, "epochs": 1}}
    config = make_config({{"population": {{"members": 2}}, "training": training}})
    rows = [np.ones(700)] * 8
    examples = Examples(Ragged.of(rows, np.int32), Ragged.of(rows, np.bool_), np.arange(8))
    plan = batches.make_plan(training_spec(config), examples)
    text = Programs(model, plan, mesh).compile_step().as_text()
    print(text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "axes", "head", "window", "full"),
    [
        ("v5p:2x2x1", {"order": 2, "fsdp": 2}, 128, None, ()),
        ("v6e:4x2", {"order": 2, "fsdp": 1, "tensor": 4}, 64, 300, ()),
        ("v6e:4x2", {"order": 2, "fsdp": 2, "sequence": 2}, 80, None, ()),
        # the scanned layer has both kernels, and takes one
        ("v5p:2x2x1", {"order": 2, "fsdp": 2}, 128, 300, (0,)),
    ],
)
def test_the_train_step_compiles_for_a_tpu(topology, axes, head, window, full):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
    program = textwrap.dedent(
        PROGRAM.format(topology=topology, axes=axes, head=head, window=window, full=full)
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # per scanned layer: forward once (its output is saved for the backward pass), the gradient of
    # queries, the gradient of keys and values
    assert int(done.stdout) == 3 * (2 if full else 1)
