"""The Fisher diagonal against gradients of single examples, member by member."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.data import pack
from jax_ordermerge.model import llama
from jax_ordermerge.rng import stream
from jax_ordermerge.train import fisher, objective


@pytest.mark.slow
def test_it_is_the_mean_square_of_the_gradients_of_single_examples(tiny_model, tiny_examples):
    members = [llama.init_params(tiny_model, seed) for seed in range(2)]
    loss = objective.sft(tiny_model, dtype="float32", remat="none")
    lengths = pack.bucket_lengths(tiny_examples.longest)
    settings = {"count": 3, "lengths": lengths, "seed": 5}
    information = fisher.diagonal(
        loss, tree.stack(members), tiny_examples, mesh=meshes.make_mesh(2, 1, 1), **settings
    )
    rows = np.asarray(
        jax.random.permutation(stream(5, "fisher", "examples"), len(tiny_examples))[:3]
    )
    for m, params in enumerate(members):
        squares = []
        for row in rows:
            batch = {
                k: jnp.asarray(v)
                for k, v in pack.collate(tiny_examples, np.array([row]), lengths[-1]).items()
            }
            squares.append(
                jax.tree.map(jnp.square, jax.grad(lambda p, b=batch: loss(p, b)[0])(params))
            )
        expected = jax.tree.map(lambda *xs: sum(xs) / 3, *squares)
        jax.tree.map(
            lambda a, b, m=m: np.testing.assert_allclose(a[m], b, rtol=1e-4, atol=1e-9),
            information,
            expected,
        )
    assert max(float(x.max()) for x in jax.tree.leaves(information)) > 0
