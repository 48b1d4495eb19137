"""Adapters on a quantized base: trained on it, resumed, and merged from the base as it was."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.arch import tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Dpo, Lora, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import lora, quantization
from jax_ordermerge.train import frozen, loop, members, objective
from jax_ordermerge.train.frozen import Storage

FORMATS = tuple(quantization.FORMATS)
LORA = {"rank": 2, "alpha": 4, "base_dtype": "nf4", "base_block": 4}


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory, tiny_base, tiny_model):
    directory = tmp_path_factory.mktemp("quantized") / "base"
    convert.export(tiny_base, tiny_model, directory, dtype="float32")
    return directory


@pytest.fixture(scope="module")
def train(tiny_train, base_directory):
    """`tiny_train` with adapters on a base of nf4."""

    def run(directory, *, training=None, **changes):
        sections = {
            "lora": LORA,
            "model": {"base": str(base_directory)},
            "training": {"learning_rate": 0.1, **(training or {})},
        }
        return tiny_train(directory, make_mesh(), **(sections | changes))

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_mesh_has_the_same_bits(name, tiny_base, tiny_model, same_bits):
    params, table = tiny_base, tensor_table(tiny_model)
    storage = Storage("float32", name, 4)
    here, there = (
        frozen.place(params, table, storage, mesh) for mesh in (make_mesh(), make_mesh(2, 2, 2))
    )
    assert same_bits(here, there)
    # codes and scales lie where the weight would
    down = there["layers"]["mlp"]["down"]
    assert {tuple(leaf.sharding.spec) for leaf in down.values()} == {(None, "fsdp", "tensor")}
    # what is stored already is taken as it is
    assert frozen.place(there, table, storage, make_mesh(2, 2, 2)) is there


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_of_a_base_have_the_values_of_memory(
    name, base_directory, tiny_base, tiny_model, same_bits
):
    """Layer by layer onto a mesh, and all of them at once; also where the rest is bfloat16."""
    storage = Storage("bfloat16", name, 4)
    expected = frozen.place(tiny_base, tensor_table(tiny_model), storage, make_mesh())
    loaded = frozen.load(base_directory, storage, make_mesh(2, 2, 2))
    assert same_bits(loaded, expected)
    abstract = frozen.abstract(tensor_table(tiny_model), storage, make_mesh(2, 2, 2))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), loaded) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )
    quantized = {path for path in tree.flatten(loaded) if path.endswith(("/scale", name))}
    matrices = [spec for spec in tensor_table(tiny_model) if spec.is_hidden_matrix]
    assert len(quantized) == 2 * len(matrices) == 2 * 7


@pytest.mark.parametrize("name", FORMATS)
def test_generation_takes_the_dequantized_base(name, tiny_base, tiny_model, same_bits):
    table = tensor_table(tiny_model)
    base = frozen.place(tiny_base, table, Storage("float32", name, 4), make_mesh())
    adapter = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32),
        convert.abstract_tensors(lora.table(tiny_model, Lora(rank=2, targets=("q", "down")))),
    )
    merged = lora.dense(base, adapter, 2.0)
    assert same_bits(merged, lora.dense(quantization.dense(base), adapter, 2.0))
    assert {path: leaf.shape for path, leaf in tree.flatten(merged).items()} == {
        spec.path: spec.shape for spec in table
    }


def test_a_training_is_that_on_the_dequantized_base(
    trained, tiny_base, tiny_model, tiny_examples, recorder, tmp_path
):
    table = tensor_table(tiny_model)
    stored = frozen.place(tiny_base, table, Storage("float32", "nf4", 4), make_mesh())
    raw = dict(trained.spec.tracking.resolved_config)
    spec = training_spec(
        make_config(raw | {"lora": LORA | {"base_dtype": None, "base_block": None}})
    )

    def losses(base, name):
        layout = RunLayout(tmp_path / name)
        loop.train(spec, tiny_model, base, tiny_examples, make_mesh(), layout, watch=recorder())
        with np.load(layout.training_losses) as saved:
            return saved["losses"]

    np.testing.assert_allclose(trained.losses(), losses(quantization.dense(stored), "a"), rtol=1e-5)
    # and not that on the base as it was
    assert np.abs(trained.losses() - losses(tiny_base, "b")).max() > 1e-3


def test_fused_members_train_on_the_same_base(trained, train, tmp_path):
    fused = train(tmp_path, lora=LORA | {"fused": True})
    assert any(
        text.startswith("2 members at a time are one program") for text in fused.watch.messages
    )
    np.testing.assert_allclose(fused.losses(), trained.losses(), rtol=1e-5)


def test_the_first_margins_of_dpo_are_zero(tiny_base, tiny_model):
    """Where the reference is the base that members start from, and not where it is the original."""
    random = np.random.default_rng(0)
    rows = random.integers(1, tiny_model.vocab_size, (6, 2, 12)).astype(np.int32)
    batch = {
        "tokens": rows,
        "targets": np.roll(rows, -1, -1),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), rows.shape),
        "segments": np.ones_like(rows),
        "weights": np.ones(rows.shape, np.float32),
    }
    table, settings = tensor_table(tiny_model), Lora(rank=2, targets=("q",))
    stored = frozen.place(tiny_base, table, Storage("float32", "int4", 4), make_mesh())
    adapter = lora.init_params(tiny_model, settings, 0)
    dpo = objective.adapted(objective.dpo(tiny_model, Dpo(), dtype="float32"), lora.scale(settings))
    scores = jax.jit(
        lambda reference, base: dpo(adapter, batch | {"reference": reference}, base)[1]
    )
    zeros = np.zeros((6, 2), np.float32)

    def logps(base):
        sums = scores(zeros, base).scores
        return np.stack([sums["logps/chosen"], sums["logps/rejected"]], -1)

    assert not np.any(scores(logps(stored), stored).scores["rewards/margins"])
    assert np.abs(scores(logps(tiny_base), stored).scores["rewards/margins"]).max() > 1e-4


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(trained, train, tmp_path):
    changes = {"training": {"checkpoint_every": 2, "log_every": 3}}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=3, **changes)
    np.testing.assert_array_equal(train(tmp_path, **changes).losses(), trained.losses())


def test_members_are_merged_from_the_base_as_it_was(trained, tiny_base, tiny_model, same_bits):
    """The same adapters give the same members, whatever base they were trained on."""
    settings = trained.spec.lora.model_copy(update={"base_dtype": "bfloat16", "base_block": None})
    plain = dataclasses.replace(trained.spec, lora=settings, base_dtype="bfloat16")
    population, expected = (
        members.restore_members(spec, tiny_model, make_mesh(), trained.layout)
        for spec in (trained.spec, plain)
    )
    assert same_bits(population, expected)
    adapter = members.restore_adapter(trained.spec, tiny_model, trained.layout, 1)
    dense = lora.dense(tiny_base, adapter, lora.scale(trained.spec.lora))
    for ours, theirs in zip(
        *map(jax.tree.leaves, (tree.member(population, 1), dense)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", [{"base_dtype": "int4"}, {"base_block": 8}])
def test_another_quantization_is_another_training(trained, tiny_model, tiny_examples, change):
    raw = dict(trained.spec.tracking.resolved_config) | {"lora": LORA | change}
    with pytest.raises(UserError, match=r"is of another training \(config differs\)"):
        loop.train(
            training_spec(make_config(raw)),
            tiny_model,
            dict,
            tiny_examples,
            make_mesh(),
            trained.layout,
        )


@pytest.mark.parametrize(
    ("block", "mesh", "message"),
    [
        (
            8,
            make_mesh(1, 2),
            "lora.base_block = 8 does not divide the 4 inputs of layers/attention/q that are on a"
            " device; set it to 4",
        ),
        (
            16,
            make_mesh(),
            "lora.base_block = 16 does not divide the 8 inputs of layers/attention/q that are on a"
            " device; set it to 8",
        ),
        (
            2,
            make_mesh(1, 8),
            "lora.base_block = 2 does not divide the 1 inputs of layers/attention/q that are on a"
            " device; choose another mesh or base_dtype",
        ),
    ],
)
def test_blocks_that_do_not_fit(tiny_model, block, mesh, message):
    with pytest.raises(UserError) as caught:
        frozen.abstract(tensor_table(tiny_model), Storage("bfloat16", "int8", block), mesh)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_dtype": "int5"},
            "lora.base_dtype = 'int5': input should be 'float32', 'bfloat16', 'int8', 'int4' or"
            " 'nf4'",
        ),
        ({"base_dtype": "nf4", "base_block": 7}, "base_block = 7: input should be a multiple of 2"),
        (
            {"base_block": 32},
            "lora.base_block = 32 is of a quantized base, and lora.base_dtype = None: set it to int8,"
            " int4 or nf4, or remove lora.base_block",
        ),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(UserError) as caught:
        make_config({"lora": settings})
    assert message in str(caught.value)
