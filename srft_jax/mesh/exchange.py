"""Arrays over several processes: their rows in one process, and values that processes exchange."""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srft_jax.mesh.rules import RULES

# Bytes that a process sends at a time. Each device then holds that many of every process.
_LARGEST_PIECE = 2**22


def rows_of_process(array: jax.Array) -> np.ndarray:
    """Return the rows of an array that devices of this process hold, in order."""
    if array.is_fully_replicated:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def rows_of_all(mesh: Mesh | None, tree: Any) -> Any:
    """Join arrays [rows of this process, ...] of all processes to arrays over the mesh, by rows.

    Without a mesh the tree is returned as it is.
    """
    if mesh is None:
        return tree
    by_rows = NamedSharding(mesh, PartitionSpec(RULES["rows"]))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_rows, x), tree)


def placed(tree: Any, shardings: Any) -> Any:
    """Place host arrays, which must be the same in every process, each by its sharding."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings)


def largest_of_processes(*values: int) -> tuple[int, ...]:
    """Return each value's maximum over processes, so that they decide alike; all must call it."""
    if jax.process_count() == 1:
        return values
    by_process = multihost_utils.process_allgather(np.asarray(values, np.int32))
    return tuple(int(value) for value in by_process.max(axis=0))


def least_mib_left() -> int | None:
    """Return the MiB of memory that every device of every process still has free.

    None where devices do not tell, as on CPUs. All processes must call it.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in device for device in stats):
        return None
    least = min(device["bytes_limit"] - device["bytes_in_use"] for device in stats)
    # The minimum over processes, as a maximum of negative numbers.
    return -largest_of_processes(-(least // 2**20))[0]


def gathered(value: Any) -> list[Any]:
    """Return the values that all processes call this with, in order of processes.

    Values may be anything that pickle takes. They travel in pieces of few sizes, powers of two,
    since each size of an exchange compiles a program of its own.
    """
    if jax.process_count() == 1:
        return [value]
    data = pickle.dumps(value)
    (longest,) = largest_of_processes(len(data))
    size = min(1 << (longest - 1).bit_length(), _LARGEST_PIECE)
    messages = [bytearray() for _ in range(jax.process_count())]
    for start in range(0, longest, size):
        piece = data[start : start + size].ljust(size, b"\0")
        received = multihost_utils.process_allgather(np.frombuffer(piece, np.uint8))
        for message, received_piece in zip(messages, received, strict=True):
            message += received_piece.tobytes()
    return [pickle.loads(message) for message in messages]  # pickle ignores the zeros at the end
