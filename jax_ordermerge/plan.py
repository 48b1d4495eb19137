"""What a training needs on hardware that is not here: the real program, compiled for a topology, and read.

No device of the topology is needed, only its compiler (`pip install libtpu` for TPUs). Memory is what the compiler planned;
the traffic between devices is read from the compiled program.
"""

import collections
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Config
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.errors import UserError
from jax_ordermerge.train import batches, loop
from jax_ordermerge.train.split import split

_COLLECTIVE = re.compile(
    r"= (?P<shape>\S.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a compiled training step needs.

    Attributes:
        arguments: bytes a device of the state (parameters, optimizer), which the step updates in place, of the batch and of `shared`.
        temporaries: bytes a device of everything that lives only within a step.
        collectives: `(kind, axes of the mesh) -> (operations in the program, bytes a device that they give)`. Those inside a loop
            count once.
        seconds: that compilation took.
        shared: bytes a device of what all members hold in common, such as the frozen base of adapters.
    """

    arguments: int
    temporaries: int
    collectives: dict[tuple[str, tuple[str, ...]], tuple[int, int]]
    seconds: float
    shared: int = 0

    @property
    def bytes(self) -> int:
        """Bytes a device in all."""
        return self.arguments + self.temporaries


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """Return the devices of TPU slices that are not here, to compile for.

    Args:
        topology: such as `"v5p:4x4x2"` or `"v6e:4x4"`.
        slices: how many of them are joined by the data-center network.

    Raises:
        UserError: libtpu is absent, or there is no such topology.
    """
    from jax.experimental import topologies

    # what libtpu would ask the machine about, which is none of a TPU
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes: they only compile
    }.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except Exception as error:  # of several kinds, by version
        raise UserError(
            f"no TPU topology {topology}: {str(error).splitlines()[0]}; needs `pip install libtpu` and a name such as v5p:4x4x2"
        ) from error


def measure(config: Config, model: ModelConfig, mesh: Mesh) -> Needs:
    """Compile the training step of a config and read what it needs; every example is taken to be `data.max_length` long.

    Args:
        config: of the run; its data and the weights of its model are not read.
        model: the architecture.
        mesh: of devices here, or of `tpu_devices`.
    """
    size, length = config.training.batch, config.data.max_length
    ones = Ragged(np.ones(size * length, np.int32), np.arange(size + 1) * length)
    examples = Examples(ones, Ragged(ones.flat.astype(np.bool_), ones.offsets), np.arange(size))
    if config.objective.kind == "dpo":
        examples = dataclasses.replace(examples, rejected=examples, reference=np.zeros((size, 2), np.float32))
    plan = batches.make_plan(config, examples, alike=mesh.size > mesh.shape["order"])
    start = time.monotonic()
    compiled = loop.compile_training(config, model, plan, mesh)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    cut = split(config, model, mesh)
    held = convert.abstract_tensors(cut.frozen, mesh, dtype=config.base_dtype)
    # the step does not see the weights that were best, but they are there
    best = (
        convert.abstract_tensors(cut.trained, mesh, members=config.population.members)
        if config.training.checkpoint == "best"
        else {}
    )
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Needs(
        memory.argument_size_in_bytes + _held(best),
        memory.temp_size_in_bytes + outputs,
        collectives(compiled.as_text(), mesh),
        seconds,
        _held(held),
    )


def _held(abstract: tree.Tree) -> int:
    """Return the bytes a device."""
    flat = tree.flatten(abstract).values()
    return sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in flat)


def collectives(program: str, mesh: Mesh) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Return the exchanges between devices in a compiled program, by kind and by the mesh axes they cross.

    Args:
        program: HLO text after compilation; numbers in it are positions in `mesh.devices`.
        mesh: the mesh.

    Returns:
        `(kind, axes) -> (operations, bytes)`, bytes of the results on one device; what happens in a loop is counted once.

    Example:
        >>> from jax_ordermerge.mesh import make_mesh
        >>> mesh = make_mesh(2, 2)
        >>> line = "  %r = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %x), replica_groups={{0,1},{2,3}}, to_apply=%add"
        >>> collectives(line, mesh)
        {('all-reduce', ('fsdp',)): (1, 128)}
    """
    found: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for line in program.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        axes = _crossed(list(_groups(line, mesh.size)), mesh)
        count, size = found[match["kind"], axes]
        found[match["kind"], axes] = count + 1, size + _bytes(match["shape"])
    return dict(sorted(found.items()))


def _groups(line: str, devices: int) -> Iterator[Sequence[int]]:
    """Yield the numbers of the devices that exchange with each other."""
    listed = _LISTED.search(line) or _PAIRS.search(line)
    if listed:
        for group in re.findall(r"\{([\d,]*)\}", listed[1]):
            yield [int(one) for one in group.split(",")]
        return
    named = _NAMED.search(line)
    if named:
        yield from _groups_of_axes(named[1], named[2])
        return
    iota = _IOTA.search(line)
    if iota is None:
        yield range(devices)
        return
    order = np.arange(devices).reshape([int(one) for one in iota[3].split(",")])
    if iota[4]:
        order = order.transpose([int(one) for one in iota[4].split(",")])
    yield from order.reshape(int(iota[1]), int(iota[2])).tolist()


def _groups_of_axes(mesh: str, axes: str) -> list[list[int]]:
    """Read `'a'=2,'b'=8` and `'a','b':(2)4`: the whole of a, and of b the part of size 4 after one of size 2."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(mesh)}
    inside = {name: (int(before or 1), int(size or sizes[name])) for name, _, before, size in _AXIS.findall(axes)}
    shape: list[int] = []
    grouped = []
    for name, size in sizes.items():
        before, own = inside.get(name, (size, 1))
        grouped += [len(shape) + 1] if name in inside else []
        shape += [before, own, size // (before * own)]
    order = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), grouped, range(-len(grouped), 0))
    return order.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()


def _crossed(groups: list[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    crossed = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape))
        crossed |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, one in zip(mesh.axis_names, crossed, strict=True) if one)


def _bytes(shape: str) -> int:
    return sum(
        math.prod(int(one) for one in extents.split(",") if one) * (1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8)
        for kind, extents in _ARRAY.findall(shape)
    )
