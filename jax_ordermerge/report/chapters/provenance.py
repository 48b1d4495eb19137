"""Chapter: what produced the run: command, device, versions, data, orders and config."""

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

import yaml

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.report.document import Block, Fold, Heading, Table
from jax_ordermerge.report.run import Run, missing


def provenance(run: Run) -> list[Block]:
    """Return the table of origins, the digests of the orders and the resolved config."""
    rows = [*_training(run), *_versions(run), *_data(run)]
    blocks: list[Block] = [Heading("Provenance"), Table(["", ""], rows, text=(0, 1))]
    files = {
        run.layout.training_state: run.state,
        run.layout.data: run.data,
        run.layout.order_digests: run.digests,
    }
    blocks += [missing(run, "train", file) for file, content in files.items() if not content]
    if run.digests:
        blocks.append(Fold("Digests of the orders", _yaml(run.digests)))
    return [*blocks, Fold("Resolved config", _yaml(run.config))]


def _training(run: Run) -> Iterator[list[str]]:
    config, state = run.config, run.state or {}
    yield ["base", str(config.get("model", {}).get("base"))]
    yield ["seed", str(config.get("seed"))]
    yield ["orders", ", ".join(f"{k} {v}" for k, v in config.get("population", {}).items())]
    output = str(config.get("output", "")).replace("{name}", str(config.get("name")))
    command = f"ordermerge run {remote.address(output) or run.layout.config}"
    # what was typed, where the training wrote it down; else a command that continues the run
    yield ["command", str(state.get("command", command))]
    # an unfinished training has no totals yet
    for key in ("device", "devices", "parameters", "tokens", "compilations"):
        if key in state:
            yield [key, str(state[key])]
    # only of a training that was fused
    if "fused_members" in state:
        yield [
            "exactness",
            f"{state['fused_members']} members at a time in one program (lora.fused): each equals"
            " the member trained alone up to rounding, not bit for bit",
        ]
    if "seconds" in state:
        yield ["wall time of training", f"{state['seconds']:.1f} s"]


def _versions(run: Run) -> Iterator[list[str]]:
    for name, version in (run.state or {}).get("versions", {}).items():
        yield [f"version of {name}", str(version)]
    # the report may be written later, elsewhere, by another version than the training
    package = f"jax_ordermerge {metadata.version('jax_ordermerge')}"
    yield ["version of report", f"{package}, Python {platform.python_version()}"]


def _data(run: Run) -> Iterator[list[str]]:
    for name, split in (run.data or {}).items():
        if isinstance(split, Mapping):
            lines = [
                str(split.get("source")),
                f"digest {split.get('digest')}",
                ", ".join(f"{split[key]} {key}" for key in ("examples", "tokens") if key in split),
                ", ".join(f"{key} {value}" for key, value in (split.get("counts") or {}).items()),
            ]
            # one mapping, and no list, in runs of before there were mixtures
            sources = [] if isinstance(split.get("sources"), Mapping) else split.get("sources", [])
            for source in sources if len(sources) > 1 else ():
                parts = [f"{source[key]} {key}" for key in ("examples", "tokens")]
                weight = [f"weight {source['weight']:g}"] if source["weight"] != 1 else []
                lines.append(f"{source['name']}: {', '.join([*parts, *weight])}")
            yield [f"data: {name}", "\n".join(line for line in lines if line)]


def _yaml(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=120)
