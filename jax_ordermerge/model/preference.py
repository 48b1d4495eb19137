"""Losses of preference pairs, from log-probabilities of whole responses.

Axis letters: `B` pair, `C` its responses (0 chosen, 1 rejected).
"""

import jax
import jax.numpy as jnp

from jax_ordermerge.config import Dpo


def pair_losses(
    logps_BC: jax.Array, reference_BC: jax.Array, tokens_BC: jax.Array, settings: Dpo
) -> jax.Array:
    """Return the loss of each pair, float32[B].

    With r = log pi(y|x) - log pi_ref(y|x), `sigmoid` is -log sigmoid(beta (r_chosen - r_rejected))
    and `ipo` is (r_chosen / tokens - r_rejected / tokens - 1 / (2 beta))^2.

    Args:
        logps_BC: log-probabilities of the responses, summed over their tokens.
        reference_BC: the same under the reference model.
        tokens_BC: numbers of response tokens; only `ipo` reads them.
        settings: `loss`, `beta` (tau in the IPO paper) and, for `sigmoid`, `label_smoothing` e: a
            share e of the preferences is assumed to be wrong. With the margin m the loss is then
            -(1 - e) log sigmoid(m) - e log sigmoid(-m).

    Example:
        >>> even = jnp.zeros((1, 2))
        >>> better = jnp.array([[2.0, -3.0]])
        >>> sigmoid, ipo = Dpo(beta=1.0), Dpo(beta=1.0, loss="ipo")
        >>> [
        ...     round(pair_losses(logps, even, even + 1, sigmoid).item(), 4)
        ...     for logps in (even, better)
        ... ]  # log 2 at first
        [0.6931, 0.0067]
        >>> pair_losses(better, even, even + 10, ipo).tolist()
        [0.0]

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7; Azar et al. 2023,
    https://arxiv.org/abs/2310.12036, equation 17; https://ericmitchell.ai/cdpo.pdf, equation 3.
    """
    ratios_BC = logps_BC - reference_BC
    if settings.loss == "ipo":
        # Mean per token, as in TRL. The paper does not say so, its authors do: a square of sums
        # would depend on the length of the response.
        ratios_BC = ratios_BC / jnp.maximum(tokens_BC, 1)
        return jnp.square(ratios_BC[:, 0] - ratios_BC[:, 1] - 1 / (2 * settings.beta))
    # log_sigmoid and not log(sigmoid): it does not underflow where a pair is far from learned.
    gaps_B = settings.beta * (ratios_BC[:, 0] - ratios_BC[:, 1])
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * jax.nn.log_sigmoid(gaps_B) - smoothing * jax.nn.log_sigmoid(-gaps_B)


def scores(logps_BC: jax.Array, reference_BC: jax.Array, *, beta: float) -> dict[str, jax.Array]:
    """Return the metrics of preference learning per pair, float32[B] under the names of TRL.

    The reward of a response is beta (log pi(y|x) - log pi_ref(y|x)). The margin is the reward of
    the chosen response less that of the rejected one. The accuracy is 1 where the margin is
    above 0.

    Args:
        logps_BC, reference_BC: as in `pair_losses`.
        beta: beta of the loss.

    Example:
        >>> metrics = scores(jnp.array([[-4.0, -9.0]]), jnp.array([[-5.0, -8.0]]), beta=0.5)
        >>> {name: values.item() for name, values in metrics.items()}
        {'rewards/chosen': 0.5, 'rewards/rejected': -0.5, 'rewards/accuracies': 1.0,
         'rewards/margins': 1.0, 'logps/chosen': -4.0, 'logps/rejected': -9.0}
    """
    rewards_BC = beta * (logps_BC - reference_BC)
    margins_B = rewards_BC[:, 0] - rewards_BC[:, 1]
    return {
        "rewards/chosen": rewards_BC[:, 0],
        "rewards/rejected": rewards_BC[:, 1],
        # a tie is not right: at the start all margins are 0
        "rewards/accuracies": (margins_B > 0).astype(jnp.float32),
        "rewards/margins": margins_B,
        "logps/chosen": logps_BC[:, 0],
        "logps/rejected": logps_BC[:, 1],
    }
