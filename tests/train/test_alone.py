"""A member alone is the member of every population, in every arrangement of the same inner mesh: bit for bit."""

import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import members

VARIANTS = {
    "plain": {},
    "accumulated": {"training": {"microbatch": 2}},
    "packs": {"data": {"buckets": [], "max_length": 32, "packing": "packs"}},
    "bins": {"data": {"buckets": [], "max_length": 32, "packing": "bins"}, "training": {"microbatch": 4}},
    "lora": {"lora": {"rank": 2, "alpha": 4.0}},
    "lora, packs": {"lora": {"rank": 2, "alpha": 4.0}, "data": {"buckets": [], "max_length": 32, "packing": "packs"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_alone_and_in_populations_of_2_4_and_8(tmp_path, tiny_train, tiny_model, same_bits, variant, fsdp):
    """Every population has its own size in the config, which at level `sample` decides nothing of a member's order."""
    sections = {**VARIANTS[variant], "training": {"epochs": 1, "microbatch": 8, **VARIANTS[variant].get("training", {})}}

    def train(name, count, order, chosen=None):
        mesh = make_mesh(order, fsdp)
        run = tiny_train(tmp_path / name, mesh, members=chosen, **sections, population={"members": count})
        return tree.member(members.restore_members(run.config, tiny_model, mesh), 0 if chosen else 1), run.losses()[0 if chosen else 1]

    weights, losses = train("alone", 8, 1, chosen=(1,))
    for count, order in ((2, 1), (2, 2), (4, 4), (8, 2), (8, 4)):
        others, seen = train(f"{count}-{order}", count, order)
        assert same_bits(others, weights), (count, order)
        np.testing.assert_array_equal(seen, losses)
