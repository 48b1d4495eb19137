"""How many models stand side by side, and that each comes out as it was put in."""

import types

import jax
import pytest

from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.experiment import stack_models
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import llama

CONFIG = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
MODEL_BYTES = 4 * parameter_count(CONFIG)


@pytest.mark.parametrize(("sizes", "places"), [({}, 3), ({"order": 2, "fsdp": 2}, 4)])
def test_models_come_out_as_they_were_put_in(sizes, places):
    mesh = make_mesh(**sizes)
    models = [llama.init_params(CONFIG, seed, mesh) for seed in range(3)]
    population = stack_models.stack(iter(models), 3, CONFIG, mesh, "float32")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(population)} == {places}
    for at in range(places):
        model = stack_models.take(population, at, CONFIG, mesh, "float32")
        for leaf, expected in zip(
            jax.tree.leaves(model), jax.tree.leaves(models[min(at, 2)]), strict=True
        ):
            assert jax.device_get(leaf).tobytes() == jax.device_get(expected).tobytes()
            assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


@pytest.mark.parametrize(("models_of_memory", "expected"), [(None, 4), (20, 4), (5, 2), (1, 1)])
def test_as_many_as_fit_in_half_of_the_memory(monkeypatch, models_of_memory, expected):
    monkeypatch.setattr(stack_models, "_SMALL_BYTES", 10 * MODEL_BYTES)
    has_memory(monkeypatch, models_of_memory)
    assert stack_models.fitting(11, 4, CONFIG, make_mesh(fsdp=1), "float32") == expected


@pytest.mark.parametrize(("models_of_memory", "expected"), [(None, 11), (20, 10)])
def test_small_models_are_all_stacked(monkeypatch, models_of_memory, expected):
    monkeypatch.setattr(stack_models, "_SMALL_BYTES", 11 * MODEL_BYTES)
    has_memory(monkeypatch, models_of_memory)
    assert stack_models.fitting(11, 4, CONFIG, make_mesh(fsdp=1), "float32") == expected


def has_memory(monkeypatch, models):
    stats = None if models is None else {"bytes_limit": models * MODEL_BYTES}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(type(make_mesh()), "local_devices", property(lambda mesh: [device]))


def test_a_second_stack_compiles_nothing():
    mesh = make_mesh()
    models = [llama.init_params(CONFIG, seed, mesh) for seed in range(2)]

    def stack_and_take():
        stacked = stack_models.stack(iter(models), 2, CONFIG, mesh, "float32")
        return [stack_models.take(stacked, at, CONFIG, mesh, "float32") for at in range(2)]

    stack_and_take()
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compilations.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    stack_and_take()
    jax.monitoring.clear_event_listeners()
    assert not compilations
