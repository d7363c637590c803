"""What processes have of arrays over all of them, and what they tell each other."""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srft_jax.mesh.rules import RULES

# Bytes of a process that are exchanged at a time: the devices hold as many of every process.
_LARGEST_BLOCK = 2**22


def rows_of_process(array: jax.Array) -> np.ndarray:
    """Those rows, in order, that devices of this process hold."""
    if array.is_fully_replicated:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def rows_of_all(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays [rows of this process, ...] as parts of arrays over all processes, by rows."""
    if mesh is None:
        return tree
    where = NamedSharding(mesh, PartitionSpec(RULES["rows"]))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), tree)


def placed(tree: Any, shardings: Any) -> Any:
    """Host arrays that are the same in every process, each on its sharding."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(place, tree, shardings)


def largest_of_processes(*values: int) -> tuple[int, ...]:
    """Each value's maximum over processes, which must all call this: so they decide alike."""
    if jax.process_count() == 1:
        return values
    of_all = multihost_utils.process_allgather(np.asarray(values, np.int32))
    return tuple(int(value) for value in of_all.max(axis=0))


def least_mib_left() -> int | None:
    """What every device of every process still has; None where devices do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in one for one in stats):
        return None
    least = min(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    return -largest_of_processes(-(least // 2**20))[0]


def gathered(value: Any) -> list[Any]:
    """The values that all processes call this with, in their order; anything that pickle takes.

    In blocks of few sizes, for each of which a program compiles.
    """
    if jax.process_count() == 1:
        return [value]
    data = pickle.dumps(value)
    (longest,) = largest_of_processes(len(data))
    size = min(1 << (longest - 1).bit_length(), _LARGEST_BLOCK)
    parts = [bytearray() for _ in range(jax.process_count())]
    for start in range(0, longest, size):
        block = data[start : start + size].ljust(size, b"\0")
        received = multihost_utils.process_allgather(np.frombuffer(block, np.uint8))
        for part, of_process in zip(parts, received, strict=True):
            part += of_process.tobytes()
    return [pickle.loads(part) for part in parts]  # which does not look at the zeros behind
