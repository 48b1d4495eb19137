"""Plan, launch and run accept and refuse the same meshes over slices and nodes."""

import types

import numpy as np
import pytest

from jax_ordermerge import mesh as meshes
from jax_ordermerge.commands import launch
from jax_ordermerge.config import make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.launch import render
from jax_ordermerge.mesh_shape import mesh_shape
from jax_ordermerge.plan import analytic, planner

GKE = {"image": "image", "volume": "runs"}


class FakeDevice(types.SimpleNamespace):
    """What `mesh_utils` and `Mesh` ask of a device; equal by its number."""

    def __hash__(self):
        return self.id


def make_devices(nodes, size):
    return [
        FakeDevice(
            id=node * size + index,
            slice_index=node,
            process_index=node,
            platform="gpu",
            device_kind="NVIDIA H100 80GB HBM3",
        )
        for node in range(nodes)
        for index in range(size)
    ]


# nodes, devices of each, axes, and the number of nodes along each axis; None is a refusal
CONFIGS = [
    (2, 8, {"order": 1, "fsdp": -1}, {"fsdp": 2}),
    (2, 8, {"order": 2, "fsdp": -1}, {"order": 2}),
    (4, 8, {"order": 2, "fsdp": -1}, {"order": 2, "fsdp": 2}),
    (4, 8, {"order": 4, "fsdp": 4, "tensor": 2}, {"order": 4}),
    (2, 8, {"order": 1, "data": 4, "fsdp": 4}, {"data": 2}),
    (4, 8, {"order": 1, "data": 2, "fsdp": 16}, {"data": 2, "fsdp": 2}),
    (6, 8, {"order": 3, "fsdp": 16}, {"order": 3, "fsdp": 2}),
    (2, 8, {"order": 2, "fsdp": 8, "dcn": {"fsdp": 2}}, {"fsdp": 2}),
    (2, 8, {"order": 1, "fsdp": 1, "tensor": 16}, None),  # activations over the network
    (3, 8, {"order": 2, "fsdp": 4, "tensor": 3}, None),
    (4, 8, {"order": 2, "fsdp": 16, "dcn": {"order": 2}}, None),  # half of the nodes
    (2, 8, {"order": 1, "fsdp": 8}, None),  # a node without work
]


@pytest.mark.parametrize(("nodes", "size", "axes", "expected"), CONFIGS)
def test_plan_launch_and_run_agree(nodes, size, axes, expected):
    config = make_config(
        {"output": "/mnt/shared/runs/x", "mesh": axes, "population": {"members": 12}}
    )
    spec, topology = plan_spec(config), parse(f"h100:{size}x{nodes}")
    job = launch.make_job(config)
    gke = GKE | {"accelerator": "nvidia-h100-80gb", "nodes": str(nodes), "gpus": str(size)}
    slurm = {"nodes": str(nodes), "gpus": str(size)}
    checks = [
        lambda: planner.plan_experiment(
            spec, topology.name, architecture="llama-2-7b", examples=64, analytic_only=True
        ),
        lambda: render.render(job, "slurm", slurm),
        lambda: render.render(job, "gke", gke),
        lambda: meshes.make_mesh(**config.mesh.model_dump(), devices=make_devices(nodes, size)),
    ]
    if expected is None:
        for check in checks:
            with pytest.raises(UserError, match="mesh"):
                check()
        return
    *_, mesh = [check() for check in checks]
    across = analytic.mesh_layout(spec, topology).across
    assert {name: count for name, count in across.items() if count > 1} == expected
    # the run's mesh: along an axis that spans n nodes, the devices of a line lie on n nodes
    node = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for position, name in enumerate(mesh.axis_names):
        lines = np.moveaxis(node, position, -1).reshape(-1, mesh.shape[name])
        assert {len(set(line)) for line in lines.tolist()} == {expected.get(name, 1)}
    # and the plan takes the network for it
    for name, count in across.items():
        speed = analytic.link_speed(name, spec, topology)
        assert speed == (topology.device.network if count > 1 else topology.device.link)


def test_slices_of_tpus_are_divided_as_nodes_are():
    config = make_config({"output": "/mnt/shared/x", "mesh": {"order": 1, "fsdp": -1}})
    options = {"accelerator": "tpu-v5-lite-podslice", "topology": "4x4", "slices": "2"}
    render.render(launch.make_job(config), "gke", GKE | options)
    across = analytic.mesh_layout(plan_spec(config), parse("v5e:4x4", slices=2)).across
    assert across["fsdp"] == 2
    odd = make_config({"output": "/mnt/shared/x", "mesh": {"order": 1, "fsdp": 1, "tensor": -1}})
    with pytest.raises(UserError, match="order 1 x data 1 x fsdp 1 cannot be divided over 2"):
        render.render(launch.make_job(odd), "gke", GKE | options)


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(UserError, match="of slices of one size"):
        mesh_shape({"order": 1, "fsdp": -1}, [8, 4])


def test_mesh_dcn_is_ignored_on_one_slice_and_may_be_open():
    assert set(mesh_shape({"fsdp": 8}, [8], {"order": 2}).across.values()) == {1}
    assert mesh_shape({"fsdp": 8}, [4, 4], {"fsdp": -1}).across["fsdp"] == 2
    with pytest.raises(UserError, match="fsdp = 3 cannot be divided over 2"):
        mesh_shape({"fsdp": 3, "order": 2}, [3, 3], {"fsdp": 2})
