"""Memory and traffic of training large models on TPU slices, read from the compiled programs.

    pip install "jax[tpu]"
    JAX_PLATFORMS=cpu python benchmarks/scale.py             # all rows, a minute or two each
    JAX_PLATFORMS=cpu python benchmarks/scale.py --only 7b

The slices need not be present. Prints the tables of docs/scale.md: full fine-tuning, AdamW with
float32 masters and moments, bfloat16 matmuls, rematerialization of whole layers, sequences of 2048
tokens.
"""

import argparse
from typing import Any, NamedTuple

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ARCHITECTURES, parameter_count
from jax_ordermerge.config import make_config
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.plan import compiled, devices

GIB = 2**30
LENGTH = 2048


class Row(NamedTuple):
    """A training to measure: model, members, slice, mesh, and sequences per chip and step."""

    name: str
    members: int
    topology: str
    mesh: dict[str, int]
    sequences: int = 1


ROWS = [
    Row("llama-2-7b", 4, "v5p:4x4x2", {"order": 4, "fsdp": 8}),
    Row("llama-2-7b", 4, "v6e:4x8", {"order": 4, "fsdp": 8}),
    Row("llama-3.1-8b", 4, "v5p:4x4x2", {"order": 4, "fsdp": 8}),
    Row("llama-3.1-8b", 4, "v6e:4x8", {"order": 4, "fsdp": 8}),
    Row("llama-2-70b", 2, "v5p:8x8x8", {"order": 2, "fsdp": 256}),
]


def measure(row: Row) -> tuple[str, list[str]]:
    """Return the row's line of the table of memory, and its lines of the table of collectives."""
    sections: dict[str, Any] = {
        "model": {"compute_dtype": "bfloat16", "remat": "full", "attention": "splash"},
        "population": {"members": row.members},
        "data": {"max_length": LENGTH},
        "training": {"batch": row.mesh["fsdp"] * row.sequences},
        "mesh": row.mesh,
    }
    topology, model = parse(row.topology), ARCHITECTURES[row.name]
    assert topology.device is not None
    mesh = meshes.make_mesh(**row.mesh, devices=devices.topology_devices(topology))
    needs = compiled.step_requirements(training_spec(make_config(sections)), model, mesh)
    size = f"{parameter_count(model) / 1e9:.2f} B"
    setup = f"| {row.name}, {size} | {row.members} | {row.topology} | "
    shape = " x ".join(f"{name} {size}" for name, size in row.mesh.items())
    sizes = (needs.arguments, needs.temporaries, needs.bytes)
    gib = " | ".join(f"{size / GIB:.1f}" for size in sizes)
    fraction = needs.bytes / topology.device.memory
    return f"{setup}{shape} | {gib} | {fraction:.0%} | {needs.seconds:.0f} |", [
        f"{setup}{kind} | {' '.join(axes)} | {count:,.0f} | {size / GIB:.2f} |"
        for (kind, axes), (count, size) in needs.collectives.items()
    ]


def print_table(columns: list[str], lines: list[str]) -> None:
    """Print a table of Markdown."""
    print("\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a model's name, any case")
    only = parser.parse_args().only.lower()
    results = [measure(row) for row in ROWS if only in row.name.lower()]
    memory = ["state GiB per chip", "temporaries GiB per chip", "total GiB", "of the chip's memory"]
    setup = ["model", "members", "slice"]
    print_table([*setup, "mesh", *memory, "compiled in s"], [line for line, _ in results])
    print()
    traffic = ["collective", "mesh axes crossed", "operations per step", "GiB received per chip"]
    print_table([*setup, *traffic], [line for _, lines in results for line in lines])


if __name__ == "__main__":
    main()
