"""Which devices exchange something in a collective: XLA's replica groups, in all its spellings."""

import math
import re

import numpy as np

from srft_jax.planning.hlo.text import Instruction

Group = tuple[int, ...]  # places in the mesh's flat list of devices


def group_of(instruction: Instruction, num_devices: int) -> Group:
    """The first group, which stands for all; of a permutation, the first pair.

    In: replica_groups={{0,1},{2,3}}.  Out: (0, 1).
    In: replica_groups=[2,4]<=[4,2]T(1,0).  Out: (0, 2, 4, 6).
    In: replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}.  Out: (0, 1, 2, 3).
    """
    text = instruction.attributes
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(found[1]), int(found[2])
    if found := re.search(r"replica_groups=(\[[^ ]*)", text):
        return _first(_iota(found[1]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
        return _of_mesh(found[1], found[2], found[3])
    if found := re.search(r"replica_groups=\{\{([\d, ]+)\}", text):
        return tuple(int(number) for number in found[1].split(","))
    return tuple(range(num_devices))  # no groups: all of them


def _first(groups: np.ndarray) -> Group:
    return tuple(groups.reshape(-1, groups.shape[-1])[0].tolist())


def _iota(text: str) -> np.ndarray:
    """In: "[2,4]<=[4,2]T(1,0)".  Out: the numbers 0 to 7 as [4, 2], transposed, as [2, 4]."""
    shapes = [[int(n) for n in part.split(",")] for part in re.findall(r"\[([\d,]+)\]", text)]
    shape, dims = shapes[0], shapes[-1]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    if order := re.search(r"T\(([\d,]+)\)", text):
        numbers = numbers.transpose([int(n) for n in order[1].split(",")])
    return numbers.reshape(shape)


def _of_mesh(axes: str, order: str, grouped: str) -> Group:
    """Devices along the grouped axes of a mesh; `'a':(2)4` is the part of 4 behind the first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if "device_ids=" in order:
        numbers = _iota(order.partition("=")[2].strip("() ")).reshape(-1)
    parts: list[tuple[int, bool]] = []  # sizes in order, and whether they are of the group
    for name, size in sizes.items():
        found = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", grouped)
        before, own = (int(found[1] or 1), int(found[2] or size)) if found else (size, 1)
        parts += [(before, False), (own, True), (size // before // own, False)]
    numbers = numbers.reshape([size for size, _ in parts])
    first = numbers[tuple(slice(None) if of_group else 0 for _, of_group in parts)]
    return tuple(first.ravel().tolist())
