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
from jax_ordermerge.arch import ARCHITECTURES, parameter_count
from jax_ordermerge.config import make_config
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.plan import compiled, devices

GIB = 2**30
LENGTH = 2048


class Row(NamedTuple):
    """A model, its number of members, where it is trained, the mesh, and sequences a chip and step."""

    name: str
    members: int
    topology: str
    mesh: dict[str, int]
    each: int = 1


ROWS = [
    Row("llama-2-7b", 4, "v5p:4x4x2", {"order": 4, "fsdp": 8}),
    Row("llama-2-7b", 4, "v6e:4x8", {"order": 4, "fsdp": 8}),
    Row("llama-3.1-8b", 4, "v5p:4x4x2", {"order": 4, "fsdp": 8}),
    Row("llama-3.1-8b", 4, "v6e:4x8", {"order": 4, "fsdp": 8}),
    Row("llama-2-70b", 2, "v5p:8x8x8", {"order": 2, "fsdp": 256}),
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
    topology, model = parse(row.topology), ARCHITECTURES[row.name]
    assert topology.device is not None
    mesh = meshes.make_mesh(**row.mesh, devices=devices.topology_devices(topology))
    needs = compiled.step_requirements(training_spec(make_config(config)), model, mesh)
    where = (
        f"| {row.name}, {parameter_count(model) / 1e9:.2f} B | {row.members} | {row.topology} | "
    )
    shape = " x ".join(f"{name} {size}" for name, size in row.mesh.items())
    held = f"{needs.arguments / GIB:.1f} | {needs.temporaries / GIB:.1f} | {needs.bytes / GIB:.1f}"
    part = needs.bytes / topology.device.memory
    first = f"{where}{shape} | {held} | {part:.0%} | {needs.seconds:.0f} |"
    return first, [
        f"{where}{kind} | {' '.join(axes)} | {count:,.0f} | {size / GIB:.2f} |"
        for (kind, axes), (count, size) in needs.collectives.items()
    ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a model's name, any case")
    only = parser.parse_args().only.lower()
    found = [measure(row) for row in ROWS if only in row.name.lower()]
    heads = "state GiB a chip | temporaries GiB a chip | in all GiB | of the chip's memory | compiled in s |"
    print(f"| model | members | slice | mesh | {heads}\n|---|---|---|---|---|---|---|---|---|")
    print("\n".join(first for first, _ in found))
    print(
        "\n| model | members | slice | exchange | mesh axes crossed | operations a step | GiB received a chip |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(line for _, rest in found for line in rest))


if __name__ == "__main__":
    main()
