"""A member alone is, bit for bit, the member of every population on the same inner mesh."""

import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import members

PACKED = {"buckets": [], "max_length": 32, "packing": "packs"}
LORA = {"rank": 2, "alpha": 4.0}
VARIANTS = {
    "plain": {"training": {"microbatch": 8}},
    "accumulated, packed": {"training": {"microbatch": 4}, "data": PACKED},
    "packed anew in each order": {
        "training": {"microbatch": 8},
        "data": PACKED | {"packing": "bins"},
    },
    "lora, accumulated": {"training": {"microbatch": 4}, "lora": LORA},
    "lora, packed": {"training": {"microbatch": 8}, "lora": LORA, "data": PACKED},
}


# On CPU the update of two local members is fused otherwise than that of one, and a multiplication
# and an addition may be rounded once or twice; nowhere else was this seen.
ONE_ROUNDING = pytest.mark.xfail(
    reason="two adapters in one device group, accumulated: the last bit of a few elements differs"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=ONE_ROUNDING if name == "lora, accumulated" else ())
        for name in VARIANTS
    ],
)
def test_alone_and_in_populations_of_2_4_and_8(
    tmp_path, tiny_train, tiny_model, same_bits, variant
):
    def train(count, order, chosen=None):
        place = 1 if chosen is None else 0
        sections = VARIANTS[variant] | {"population": {"members": count}}
        sections["training"] = sections["training"] | {"epochs": 1}
        run = tiny_train(
            tmp_path / f"{count}-{order}-{place}", make_mesh(order, 2), members=chosen, **sections
        )
        # what was trained of the member: adding an adapter to its base is tested elsewhere
        if run.spec.lora is not None:
            return members.restore_adapter(run.spec, tiny_model, run.layout, 1), run.losses()[place]
        return tree.member(
            members.restore_members(run.spec, tiny_model, make_mesh(), run.layout), place
        ), run.losses()[place]

    weights, losses = train(8, 1, chosen=(1,))
    for count, order in ((2, 1), (4, 2), (8, 4)):
        population_member, population_losses = train(count, order)
        assert same_bits(population_member, weights), (count, order)
        np.testing.assert_array_equal(population_losses, losses)
