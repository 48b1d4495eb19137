"""Memory and traffic of training large models on TPU slices that are not here, read from the compiled programs.

    pip install "jax[tpu]"
    JAX_PLATFORMS=cpu python benchmarks/scale.py             # all rows of docs/scale.md, a minute or two each
    JAX_PLATFORMS=cpu python benchmarks/scale.py --only 7b

Prints the tables of docs/scale.md. Full fine-tuning, AdamW with float32 masters and moments, bfloat16 products, whole layers recomputed,
sequences of 2048 tokens.
"""

import argparse
from typing import Any, NamedTuple

from jax_ordermerge import mesh as meshes
from jax_ordermerge import plan
from jax_ordermerge.arch import ModelConfig, Rope, parameter_count
from jax_ordermerge.config import make_config

GIB = 2**30
LENGTH = 2048
CAPACITY = {"v5e": 16, "v5p": 95, "v6e": 32}  # GB a chip, as the vendor gives it

LLAMA_2_7B = ModelConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32)
LLAMA_3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_position_embeddings=131072,
    rope=Rope(theta=500000.0, kind="llama3", factor=8.0, original_max_position_embeddings=8192),
)
LLAMA_2_70B = ModelConfig(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8)


class Row(NamedTuple):
    """A model, its number of members, where it is trained, the mesh, and sequences a chip and step."""

    name: str
    model: ModelConfig
    members: int
    topology: str
    mesh: dict[str, int]
    each: int = 1


ROWS = [
    Row("Llama-2-7B", LLAMA_2_7B, 4, "v5p:4x4x2", {"order": 4, "fsdp": 8}),
    Row("Llama-2-7B", LLAMA_2_7B, 4, "v6e:4x8", {"order": 4, "fsdp": 8}),
    Row("Llama-3.1-8B", LLAMA_3_8B, 4, "v5p:4x4x2", {"order": 4, "fsdp": 8}),
    Row("Llama-3.1-8B", LLAMA_3_8B, 4, "v6e:4x8", {"order": 4, "fsdp": 8}),
    Row("Llama-2-70B", LLAMA_2_70B, 2, "v5p:8x8x8", {"order": 2, "fsdp": 256}),
]


def measure(row: Row) -> tuple[str, list[str]]:
    """Compile the step of a row; return a line of the first table and lines of the second."""
    config: dict[str, Any] = {
        "model": {"compute_dtype": "bfloat16", "remat": "full", "attention": "splash"},
        "population": {"members": row.members},
        "data": {"max_length": LENGTH},
        "training": {"batch": row.mesh["fsdp"] * row.each},
        "mesh": row.mesh,
    }
    mesh = meshes.make_mesh(**row.mesh, devices=plan.tpu_devices(row.topology))
    needs = plan.measure(make_config(config), row.model, mesh)
    where = f"| {row.name}, {parameter_count(row.model) / 1e9:.2f} B | {row.members} | {row.topology} | "
    shape = " x ".join(f"{name} {size}" for name, size in row.mesh.items())
    held = f"{needs.arguments / GIB:.1f} | {needs.temporaries / GIB:.1f} | {needs.bytes / GIB:.1f}"
    part = needs.bytes / 1e9 / CAPACITY[row.topology.split(":")[0]]
    first = f"{where}{shape} | {held} | {part:.0%} | {needs.seconds:.0f} |"
    return first, [
        f"{where}{kind} | {' '.join(axes) or 'none'} | {count} | {size / GIB:.2f} |"
        for (kind, axes), (count, size) in needs.collectives.items()
    ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a model's name, any case")
    only = parser.parse_args().only.lower()
    found = [measure(row) for row in ROWS if only in row.name.lower()]
    heads = "state GiB a chip | temporaries GiB a chip | in all GiB | of the chip's memory | compiled in s |"
    print(f"| model | members | slice | mesh | {heads}\n|---|---|---|---|---|---|---|---|---|")
    print("\n".join(first for first, _ in found))
    print("\n| model | members | slice | exchange | mesh axes crossed | operations | GiB a chip |\n|---|---|---|---|---|---|---|")
    print("\n".join(line for _, rest in found for line in rest))


if __name__ == "__main__":
    main()
