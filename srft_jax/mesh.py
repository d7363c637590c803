"""Meshes, and the one table from logical axes to mesh axes."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from srft_jax.config import MeshConfig, UsageError

# Logical axis -> mesh axes it is split over. What is not named is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "vocab": ("tensor",),
    "model": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh of all devices with axes data, fsdp, tensor.

    Raises:
        UsageError: an axis is below 1, or they do not multiply to the number of devices.
    """
    for axis, size in vars(config).items():
        if size < 1 and (axis, size) != ("data", -1):
            raise UsageError(f"mesh.{axis} = {size} is below 1")
    num_devices = jax.device_count()
    rest = config.fsdp * config.tensor
    data = num_devices // rest if config.data == -1 else config.data
    if data * rest != num_devices:
        raise UsageError(
            f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} "
            f"does not fit {num_devices} devices"
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def split_axes(mesh: Mesh | AbstractMesh, logical: str | None, size: int) -> tuple[str, ...]:
    """Mesh axes that a dimension of `size` is split over; none where they do not divide it.

    In: "rows", 64 on data=2, fsdp=4, tensor=2.  Out: ("data", "fsdp").
    """
    axes = tuple(name for name in RULES.get(logical or "", ()) if mesh.shape.get(name, 1) > 1)
    return axes if size % math.prod(mesh.shape[name] for name in axes) == 0 else ()


def sharding(mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Where an array with these logical axes lives; an axis that does not divide is replicated.

    In: ("layers", "model", "mlp"), (28, 3584, 18944) on fsdp=4, tensor=2.
    Out: PartitionSpec(None, "fsdp", "tensor").
    """
    spec = [
        split_axes(mesh, axis, size) or None for axis, size in zip(logical_axes, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))
