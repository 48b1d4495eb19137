"""Adapters: their start, their memory, and settings that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Lora, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import lora
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.optimizer import make_optimizer, make_schedule
from jax_ordermerge.train.trainable import make_trainable
from tests.train.test_lora import SETTINGS, spec_of


def test_a_member_starts_as_the_base_with_the_same_values_everywhere(tiny_model, same_bits):
    settings = Lora(**SETTINGS)
    here, there = (
        lora.init_params(tiny_model, settings, 0, mesh) for mesh in (None, make_mesh(2, 2, 2))
    )
    assert same_bits(here, there)
    assert not same_bits(here, lora.init_params(tiny_model, settings, 1))
    for spec in lora.table(tiny_model, settings):
        values = tree.flatten(here)[spec.path]
        if spec.path.endswith("lora_b"):
            assert not values.any()
            continue
        bound = spec.hf_shape[-1] ** -0.5  # as torch's kaiming_uniform_(a=sqrt(5))
        assert 0.8 * bound < np.abs(values).max() < bound
        assert not (values[0] == values[1]).any()  # layers differ


def memory(members, config, model, rows=4, length=64):
    """Bytes of the arguments and the temporaries of a compiled step."""
    mesh = make_mesh()
    parts = make_trainable(config, model, mesh)
    tx = make_optimizer(config.training, 10, parts.trained)
    state = steps.abstract_state(
        convert.abstract_tensors(parts.trained, mesh, members=members), tx, mesh
    )
    frozen = convert.abstract_tensors(parts.frozen, mesh, dtype=config.base_dtype)
    step = steps.train_step(
        parts.objective, tx, make_schedule(config.training, 10), lengths=[length]
    )
    place = NamedSharding(mesh, P("order"))
    shapes = dict.fromkeys(steps.SEQUENCES, (members, 1, rows, length)) | {
        "ids": (members, 1, rows),
        "bucket": (members, 1),
    }
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "weights" else jnp.int32, sharding=place
        )
        for name, shape in shapes.items()
    }
    analysis = steps.compile_step(step, mesh, state, batch, frozen).memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


@pytest.mark.slow
def test_eight_adapters_cost_at_most_half_as_much_again_as_one():
    model = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=4
    )
    low = spec_of({"lora": {"rank": 2}, "model": {"compute_dtype": "float32"}})
    single, eight = (memory(count, low, model) for count in (1, 8))
    assert eight < 1.5 * single
    full = memory(1, spec_of({"model": {"compute_dtype": "float32"}}), model)
    base = 4 * arch.parameter_count(model)
    assert full > single + 2 * base  # neither moments nor gradients of the base are held


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ["q_prj"]},
            "lora.targets: q_prj is not a matrix of this model (did you mean 'q_proj'?); it has q,"
            " k, v, o, gate, up, down",
        ),
        ({"targets": ["norm"]}, "lora.targets: norm is not a matrix of this model"),
        ({"targets": []}, "lora.targets is empty"),
    ],
)
def test_targets_that_are_none(tiny_model, settings, message):
    with pytest.raises(UserError) as caught:
        lora.table(tiny_model, Lora(**settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"lora": {"rnk": 4}}, "unknown key lora.rnk (did you mean 'rank'?)"),
        ({"lora": {"dropout": 0.1}}, "unknown key lora.dropout"),
        ({"lora": {"rank": 0}}, "lora.rank = 0: input should be greater than 0"),
        ({"lora": {}, "model": {"init": "random"}}, "model.init = random has none"),
    ],
)
def test_settings_that_are_refused(raw, message):
    with pytest.raises(UserError) as caught:
        make_config(raw)
    assert message in str(caught.value)


def test_target_names():
    model = ModelConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_heads=4,
        qkv_bias=True,
        qk_norm="per_head",
    )
    every = [spec.path for spec in lora.targets(model, Lora())]
    assert every == [
        s.path
        for s in tensor_table(model)
        if s.kind in ("attention", "mlp") and s.path.endswith("weight")
    ]
    assert len(every) == 7
    assert lora.targets(model, Lora(targets="all-linear")) == lora.targets(model, Lora())
    assert lora.targets(model, Lora(targets=("q", "q_proj"))) == lora.targets(
        model, Lora(targets="q")
    )
