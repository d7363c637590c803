"""Which devices a collective exchanges among, in each of XLA's spellings."""

import math
import re

import numpy as np

from srft_jax.planning.hlo.parser import Instruction

Group = tuple[int, ...]  # indices into the mesh's flat list of devices


def device_group(collective: Instruction, num_devices: int) -> Group:
    """Return the first group, which stands for all; for a permutation, its first pair.

    In: replica_groups={{0,1},{2,3}}.  Out: (0, 1).
    In: replica_groups=[2,4]<=[4,2]T(1,0).  Out: (0, 2, 4, 6).
    In: replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}.  Out: (0, 1, 2, 3).
    """
    text = collective.attributes
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(match[1]), int(match[2])
    if match := re.search(r"replica_groups=(\[[^ ]*)", text):
        groups = _read_iota(match[1])
        return tuple(groups.reshape(-1, groups.shape[-1])[0].tolist())
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
        return _read_mesh(axes=match[1], order=match[2], grouped=match[3])
    if match := re.search(r"replica_groups=\{\{([\d, ]+)\}", text):
        return tuple(int(number) for number in match[1].split(","))
    return tuple(range(num_devices))  # no groups are named: all devices exchange


def _read_iota(text: str) -> np.ndarray:
    """In: "[2,4]<=[4,2]T(1,0)".  Out: the numbers 0 to 7 as [4, 2], transposed, as [2, 4]."""
    shapes = [[int(n) for n in part.split(",")] for part in re.findall(r"\[([\d,]+)\]", text)]
    shape, dims = shapes[0], shapes[-1]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    if order := re.search(r"T\(([\d,]+)\)", text):
        numbers = numbers.transpose([int(n) for n in order[1].split(",")])
    return numbers.reshape(shape)


def _read_mesh(axes: str, order: str, grouped: str) -> Group:
    """Return the devices along the grouped axes of a mesh.

    In: "'a'=2,'b'=4", "", "'b'".  Out: (0, 1, 2, 3).
    In: "'a'=8", "", "'a':(2)2", the part of 2 behind the first 2 of 8.  Out: (0, 2).
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if "device_ids=" in order:
        numbers = _read_iota(order.partition("=")[2].strip("() ")).reshape(-1)
    parts: list[tuple[int, bool]] = []  # (size, whether the group extends along it)
    for name, size in sizes.items():
        match = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", grouped)
        before, inside = (int(match[1] or 1), int(match[2] or size)) if match else (size, 1)
        parts += [(before, False), (inside, True), (size // before // inside, False)]
    numbers = numbers.reshape([size for size, _ in parts])
    first = numbers[tuple(slice(None) if in_group else 0 for _, in_group in parts)]
    return tuple(first.ravel().tolist())
