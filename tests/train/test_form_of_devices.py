"""A training takes the form of the program that its devices ask for."""

import jax
import numpy as np
import pytest

from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import layers
from jax_ordermerge.train import members


@pytest.mark.slow
def test_a_training_by_head_is_the_flat_one(
    tmp_path, monkeypatch, tiny_train, tiny_model, tiny_base
):
    mesh = make_mesh(1, 2)
    asked = []

    def train(form):
        def choose(mesh):
            asked.append(form)
            return form

        monkeypatch.setattr(layers, "choose_form", choose)
        trained = tiny_train(
            tmp_path / form,
            mesh,
            data={"packing": "packs", "max_length": 40, "buckets": []},
            population={"members": 1},
            # a first step without warmup, and a second whose losses show what it did
            training={"batch": 4, "microbatch": 4, "epochs": 1, "warmup": 0},
        )
        assert len(trained.lines()) >= 2
        weights = members.restore_members(trained.spec, tiny_model, mesh, trained.layout)
        return jax.tree.leaves((trained.losses(), weights))

    flat, by_head = train("flat"), train("by_head")
    # by the objective and by the optimizer
    assert asked.count("by_head") == asked.count("flat") >= 2
    for x, y in zip(by_head, flat, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    start = jax.tree.leaves(tiny_base)
    assert max(float(abs(x[0] - y).max()) for x, y in zip(flat[1:], start, strict=True)) > 1e-3
