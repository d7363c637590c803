"""Floating-point operations of single instructions: products of matrices, as XLA writes them.

Elementwise work is not counted: it runs beside the matrix unit, and its time is that of its bytes.
"""

import math
import re

from srft_jax.planning.hlo.text import Computation, Instruction


def flops_of(instruction: Instruction, computation: Computation) -> float:
    """2 for each multiplication and addition of a dot or a convolution; of all else 0."""
    if instruction.opcode == "dot":
        return _of_dot(instruction, computation)
    if instruction.opcode == "convolution":
        return _of_convolution(instruction, computation)
    return 0.0


def _of_dot(instruction: Instruction, computation: Computation) -> float:
    left = computation.instructions[instruction.operands[0]].shapes[0]
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * instruction.shapes[0].count * math.prod(left.sizes[axis] for axis in axes)


def _of_convolution(instruction: Instruction, computation: Computation) -> float:
    """On a TPU every product is one: a batch is a window that meets one number at a time.

    In: [4, 7168, 128] x [4, 1024, 128], window={size=4 stride=3 lhs_dilate=4},
    dim_labels=0bf_0oi->0bf.  Out: 2 * 4 * 7168 * 1024 * 128.
    """
    left, right = (computation.instructions[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None  # XLA always writes them
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    window = _window(instruction.attributes)
    products = out.sizes[of_out.index("b")] * out.sizes[of_out.index("f")]
    products *= right.sizes[of_right.index("i")]
    for number in range(len(of_out) - 2):
        axis = str(number)
        sizes = left.sizes[of_left.index(axis)], out.sizes[of_out.index(axis)]
        kernel = right.sizes[of_right.index(axis)]
        products *= _met(*sizes, kernel, {key: of[number] for key, of in window.items()})
    return 2.0 * products


_DEFAULTS = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


def _window(attributes: str) -> dict[str, list[str]]:
    """In: "window={size=4x7 pad=3_3x6_6}".  Out: {"pad": ["3_3", "6_6"], "stride": ["1", "1"]}."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in found[1].split()) if found else {}
    axes = len(given.get("size", "").split("x"))
    return {
        key: given[key].split("x") if key in given else [default] * axes
        for key, default in _DEFAULTS.items()
    }


def _met(num_left: int, num_out: int, kernel: int, window: dict[str, str]) -> int:
    """How often a number of the kernel meets one of the left side: neither padding nor a hole.

    With c = out * stride - low pad, kernel k meets position c + k * rhs_dilate.
    """
    stride, dilate, step = (int(window[key]) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(window["pad"].split("_")[0])
    span, count = (num_left - 1) * dilate, 0
    for out in range(num_out):
        start = out * stride - low
        count += sum(
            0 <= start + k * step <= span and (start + k * step) % dilate == 0
            for k in range(kernel)
        )
    return count
