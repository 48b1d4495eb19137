"""Near swap: limit the change of each element.

Source: alchemonaut's method in mergekit, `nearswap`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.merge.methods.parameters import NonNegative
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(tensor: Tensor, *, t: NonNegative) -> Prepared:
    """Near swap: theta = theta_0 + min(1, t / |tau|) tau.

    A change up to the length t is taken as it is, and a longer one is cut to t. In mergekit |tau|
    is at least 1e-6.

    Args:
        tensor: of one member. Takes no weights.
        t: the largest change of an element.
    """
    # the cut compares float32 magnitudes, so the limit is rounded the same way
    return {"t": np.float32(t)}


def apply(part: Part, *, t: jax.Array) -> jax.Array:
    """Cut the change of each element to [-t, t]."""
    (tau,), (member,) = part.task_vectors(), part.floats()
    # The member itself, and not theta_0 + tau, which may round. sign(tau) t and not (t / |tau|)
    # tau: a quotient would round, and need a case for tau = 0.
    return jnp.where(jnp.abs(tau) <= t, member, part.base_float() + jnp.sign(tau) * t)


METHODS.register("nearswap", Method(prepare, apply, "mergekit", weights="none", members=(1, 1)))
