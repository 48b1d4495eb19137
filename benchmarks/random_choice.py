"""The hash of the random choice beside jax.random: statistics of both, and the cost per number.

    python benchmarks/random_choice.py      # under a minute on two CPU cores

Prints the table of docs/random_choice.md. A p-value says how often good numbers would look worse
than these: good ones are spread evenly between 0 and 1, and bad ones are near 0.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jax_ordermerge import rng
from jax_ordermerge.hash_rng import element_index, random_bits

ROWS, COLUMNS, MEMBERS = 1024, 4096, 3
SHAPE = (ROWS, COLUMNS)

Draw = Callable[[int, str, int], np.ndarray]


@jax.jit
def _hash(key_bits: jax.Array, round_: int) -> jax.Array:
    return random_bits(key_bits, element_index(SHAPE), round_)


@jax.jit
def _threefry(key_bits: jax.Array, round_: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_bits, impl="threefry2x32"), round_)
    return jax.random.bits(key, SHAPE)


PROGRAMS = {"hash": _hash, "jax.random": _threefry}


def member_of(h: np.ndarray) -> np.ndarray:
    """Return the member that a number chooses, all being equally likely."""
    return (h >> 16).astype(np.uint64) * MEMBERS >> 16


def statistics_of(draw: Draw) -> dict[str, float]:
    """Return the p-values of one generator."""
    h = draw(0, "t", 0)
    p = {
        "members equally often": stats.chisquare(
            np.bincount(member_of(h).ravel(), minlength=MEMBERS)
        ).pvalue
    }
    counts = [
        np.bincount(member_of(draw(0, f"t{i}", 0)).ravel(), minlength=MEMBERS) for i in range(50)
    ]
    p["the same, spread over 50 tensors"] = stats.kstest(
        [stats.chisquare(c).pvalue for c in counts], "uniform"
    ).pvalue
    pairs = {
        "neighbours": (h[:, :-1], h[:, 1:]),
        "rows": (h[:-1], h[1:]),
        "tensors": (h, draw(0, "u", 0)),
        "seeds": (h, draw(1, "t", 0)),
        "rounds": (h, draw(0, "t", 1)),
    }
    for name, (x, y) in pairs.items():
        table = np.bincount((member_of(x) * MEMBERS + member_of(y)).ravel(), minlength=MEMBERS**2)
        p[f"independence of {name}"] = stats.chisquare(table).pvalue
    triples = (h.ravel()[: h.size // 3 * 3].reshape(-1, 3) >> 28).astype(int) @ [256, 16, 1]
    p["three in a row fill the cube"] = stats.chisquare(np.bincount(triples, minlength=4096)).pvalue
    p["uniform"] = stats.kstest(h.ravel() / 2**32, "uniform").pvalue
    return p


def nanoseconds(program: Callable[..., jax.Array]) -> float:
    """Return the CPU time per number in nanoseconds, median of 7."""
    key_bits = jnp.asarray(rng.stream_key_bits(0, "t"))
    jax.block_until_ready(program(key_bits, 0))
    times = []
    for i in range(7):
        start = time.process_time()
        jax.block_until_ready(program(key_bits, i))
        times.append(time.process_time() - start)
    return float(np.median(times)) / (ROWS * COLUMNS) * 1e9


def main() -> None:
    """Print the table."""
    columns = {}
    for name, program in PROGRAMS.items():
        p_values = statistics_of(
            lambda seed, of, round_, run=program: np.asarray(
                run(jnp.asarray(rng.stream_key_bits(seed, of)), round_)
            )
        )
        columns[name] = {
            **{k: f"{v:.3f}" for k, v in p_values.items()},
            "CPU ns per number": f"{nanoseconds(program):.2f}",
        }
    print(f"| p-value of | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")


if __name__ == "__main__":
    main()
