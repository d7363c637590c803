"""Joining several processes, often on several machines, to one run, before any device is used."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import jax
from jax._src import clusters  # no public function tells whether JAX would find a cluster

from srft_jax.config import DistributedConfig, RunConfig, UsageError, Verb
from srft_jax.config.stored_config import changes
from srft_jax.host.peers import Peers
from srft_jax.mesh import gathered

# JAX's names of the kinds of cluster in which it finds the other processes without being told.
_CLUSTERS = ("ompi", "slurm", "gketpu", "gcetpu")
# How long to wait for the others: machines of a pod do not start at the same moment.
START_SECONDS = 300
# Seconds without a sign of life after which JAX ends all other processes; see also peers.py.
HEARTBEAT_SECONDS = 45


@contextlib.contextmanager
def joined(verb: Verb, config: RunConfig) -> Iterator[RunConfig]:
    """Meet the other processes, if there are any, and stay in touch with them.

    Process 0 alone prints to standard output. An error ends this process without waiting for the
    others, which are told of it and end as well: see `Peers`. The verbs `report` and `plan` are one
    process everywhere. If another process does not come in time, JAX ends this one.

    Yields:
        The configuration without the section `distributed`, which differs between processes.

    Raises:
        UsageError: the section is incomplete, or processes have different configurations.
    """
    plain = dataclasses.replace(config, distributed=DistributedConfig())
    if verb in ("report", "plan") or not _initialize(config.distributed):
        yield plain
        return
    with Peers() as peers, contextlib.ExitStack() as stack:
        if jax.process_index() != 0:
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        _check_same_everywhere(plain)
        print(f"processes {jax.process_count()}, of which {peers.address} is process 0")
        yield plain


def _initialize(distributed: DistributedConfig) -> bool:
    """Connect the processes of a run; return whether there are several."""
    if distributed.num_processes == 1:
        return False
    is_set = distributed != DistributedConfig()
    if is_set:
        _check(distributed)
    elif _processes_of_cluster() == 1:
        return False
    where = f" at {distributed.coordinator}" if is_set else ""
    print(f"waiting for the other processes{where}, at most {START_SECONDS} s", flush=True)
    jax.distributed.initialize(
        distributed.coordinator,
        distributed.num_processes,
        distributed.process_id,
        # Cluster detection would give each process one device of its machine instead of all.
        cluster_detection_method="deactivate" if is_set else None,
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    return True


def _processes_of_cluster() -> int:
    """Return the number of processes that JAX would find; 1 outside clusters.

    Reads environment variables and, on a TPU VM, its metadata.
    """
    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.name in _CLUSTERS and cluster.is_env_present():
            return cluster.get_process_count()
    return 1


def _check(distributed: DistributedConfig) -> None:
    """Raise UsageError unless the section says which processes there are and which one is here."""
    missing = [name for name, value in vars(distributed).items() if value is None]
    if missing:
        raise UsageError(
            f"distributed.{' and distributed.'.join(missing)} is not set: several processes need "
            f"all of {', '.join(vars(distributed))}; one takes num_processes = 1 alone"
        )
    count, number, coordinator = (
        distributed.num_processes,
        distributed.process_id,
        distributed.coordinator,
    )
    assert count is not None and number is not None and coordinator is not None
    if not 0 <= number < count:
        raise UsageError(
            f"distributed.process_id = {number} is not from 0 to distributed.num_processes - 1 = "
            f"{count - 1}"
        )
    if not coordinator.rpartition(":")[2].isdigit():
        raise UsageError(f"distributed.coordinator = {coordinator} is not HOST:PORT")


def _check_same_everywhere(config: RunConfig) -> None:
    """Raise UsageError in all processes if one has another configuration than process 0."""
    first, *others = gathered(config)
    for number, other in enumerate(others, start=1):
        if different := changes(first, other):
            text = ", ".join(
                f"{key} = {here} (process 0: {there})" for key, (there, here) in different.items()
            )
            raise UsageError(f"process {number} has another configuration: {text}")
