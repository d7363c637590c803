"""Meshes on one slice and several, and the error for a mesh that does not fit the devices."""

import dataclasses

import numpy as np
import pytest
from machines import Device, hosts, slices, torus

from srft_jax.config import MeshConfig, UsageError
from srft_jax.mesh import decode_mesh, flat_mesh, make_mesh, mesh_shape
from srft_jax.mesh.layout import valid_shapes


@pytest.mark.parametrize(
    ("config", "num_devices", "shape"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(fsdp=4, tensor=2), 16, (2, 4, 1, 2)),
        (MeshConfig(data=2, fsdp=-1, context=4), 64, (2, 8, 4, 1)),
        (MeshConfig(data=1, context=-1, tensor=3), 12, (1, 1, 4, 3)),
        (MeshConfig(data=4, tensor=-1, slices=2), 32, (4, 1, 1, 8)),
    ],
)
def test_one_axis_takes_what_the_others_leave(config, num_devices, shape):
    assert mesh_shape(config, num_devices) == shape


@pytest.mark.parametrize(
    ("config", "num_devices", "message"),
    [
        (
            MeshConfig(fsdp=-1),
            8,
            "mesh.data and mesh.fsdp are -1, which one axis alone can be (data is",
        ),
        (MeshConfig(context=0), 8, "mesh.context = 0 is below 1"),
        (MeshConfig(tensor=-2), 8, "mesh.tensor = -2 is below 1"),
        (
            MeshConfig(data=1, fsdp=3),
            8,
            "mesh data=1 x fsdp=3 x context=1 x tensor=1 does not fit 8 devices; the nearest of "
            "the 20 that do: data=1 x fsdp=4 x context=1 x tensor=2; ",
        ),
        (
            MeshConfig(data=1, fsdp=8, slices=2),
            8,
            "does not fit 8 devices of 2 slices, which data spans; the nearest of the 10 that do: "
            "data=2 x fsdp=4 x context=1 x tensor=1; ",
        ),
    ],
)
def test_the_error_for_a_misfit_names_meshes_that_fit(config, num_devices, message):
    with pytest.raises(UsageError) as caught:
        mesh_shape(config, num_devices)
    assert message in str(caught.value)
    assert str(caught.value).count(" x fsdp=") in (
        0,
        5,
    )  # at most five, though 256 devices fit 165 meshes
    offered = [part.split(": ")[-1] for part in str(caught.value).split("; ")[1:]]
    for shape in offered:
        sizes = dict(axis.split("=") for axis in shape.split(" x "))
        asked = MeshConfig(
            **{axis: int(size) for axis, size in sizes.items()}, slices=config.slices
        )
        assert np.prod(mesh_shape(asked, num_devices)) == num_devices


@pytest.mark.parametrize(
    "devices",
    [
        torus("TPU v5 lite", 2, 4),
        torus("TPU v6 lite", 4, 8),
        torus("TPU v5", 2, 2, 4),
        torus("TPU v4", 2, 2, 4),
        torus("TPU7x", 2, 2, 2, cores=2),
    ],
    ids=lambda devices: devices[0].device_kind,
)
def test_every_product_is_a_mesh_of_every_torus(devices):
    for shape in valid_shapes(len(devices), 1):
        placed = make_mesh(MeshConfig(*shape), devices).devices
        assert placed.shape == shape
        assert {device.id for device in placed.flat} == set(range(len(devices)))


def test_neighbours_on_the_last_axis_are_neighbours_in_the_machine():
    placed = make_mesh(MeshConfig(data=4, tensor=4), torus("TPU v5", 4, 2, 2)).devices
    for row in placed.reshape(4, 4):
        steps = np.abs(np.diff([device.coords for device in row], axis=0)).sum(axis=1)
        assert (steps <= 2).all()


@pytest.mark.parametrize(
    ("devices", "config"),
    [
        (hosts("TPU v5 lite", 8, 8), MeshConfig(data=1, fsdp=-1)),
        (hosts("TPU v5", 2, 2, 4), MeshConfig(data=-1)),
        (hosts("TPU v6 lite", 4, 8), MeshConfig(data=1, context=-1)),
    ],
)
def test_four_neighbours_are_a_host_and_can_share_a_copy(devices, config):
    mesh = make_mesh(config, devices)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    copies = decode_mesh(mesh, 4).devices.reshape(-1, 4)
    for copy in copies:
        assert len({device.process_index for device in copy}) == 1
        x, y, _ = zip(*(device.coords for device in copy), strict=True)
        assert (max(x) - min(x), max(y) - min(y)) == (1, 1)


def test_several_axes_lie_as_jax_lays_them():
    mesh = make_mesh(MeshConfig(data=8, fsdp=8), hosts("TPU v5 lite", 8, 8))
    for line in mesh.devices.reshape(8, 8):
        assert min(len({device.coords[axis] for device in line}) for axis in (0, 1)) == 1


def test_slices_are_not_mixed_when_their_processes_are_put_together():
    by_two = [
        dataclasses.replace(device, process_index=n % 2 + 2 * (1 - device.slice_index))
        for n, device in enumerate(slices(2, 4))
    ]
    devices = make_mesh(MeshConfig(data=2, fsdp=4, slices=2), by_two).devices
    assert [device.process_index for device in devices.flat] == [2, 2, 3, 3, 0, 0, 1, 1]
    assert [device.slice_index for device in devices.flat] == [0] * 4 + [1] * 4


def test_a_copy_is_not_split_over_processes():
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), hosts("TPU v5 lite", 8, 8))
    with pytest.raises(UsageError, match="rollout.tensor = 8 splits a copy .* over processes"):
        decode_mesh(mesh, 8)


def test_data_alone_spans_slices():
    placed = make_mesh(MeshConfig(data=4, fsdp=2, context=2, slices=2), slices(2, 8)).devices
    slice_numbers = np.vectorize(lambda device: device.slice_index)(placed)
    for data_index, numbers in enumerate(slice_numbers):
        assert (numbers == data_index // 2).all()


def test_another_number_of_slices_is_an_error():
    with pytest.raises(
        UsageError, match="mesh.slices = 1, but the number of slices of the dev.* 2"
    ):
        make_mesh(MeshConfig(), slices(2, 4, "tpu"))
    with pytest.raises(UsageError, match="mesh.slices = 0 is below 1"):
        make_mesh(MeshConfig(slices=0), slices(2, 4))
    with pytest.raises(UsageError, match="number of processes, which count here, is 1"):
        make_mesh(MeshConfig(slices=2), torus("TPU v5 lite", 2, 4))


def test_a_flat_mesh_takes_devices_of_any_slices():
    devices = slices(2, 4, "tpu")
    mesh = flat_mesh(devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert list(mesh.devices.flat) == devices


def test_machines_with_gpus_may_be_laid_out_as_one():
    placed = make_mesh(MeshConfig(data=1, fsdp=8), slices(2, 4)).devices
    assert [device.slice_index for device in placed.flat] == [0] * 4 + [1] * 4


def test_a_process_is_a_slice_where_devices_say_nothing_of_slices():
    devices = [Device(n, "gpu", process_index=n // 4, platform="gpu") for n in range(8)]
    placed = make_mesh(MeshConfig(data=2, tensor=4, slices=2), devices).devices
    assert [[device.process_index for device in row.flat] for row in placed] == [[0] * 4, [1] * 4]
