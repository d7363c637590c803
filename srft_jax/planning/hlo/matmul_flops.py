"""Floating-point operations of the matmuls in a program: dots, and convolutions that are matmuls.

Elementwise work is not counted: it runs beside the matrix unit, and its time is that of its bytes.
"""

import math
import re

from srft_jax.planning.hlo.parser import Computation, Instruction


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """Return 2 per multiplication and addition of a dot or convolution; 0 for other opcodes."""
    if instruction.opcode == "dot":
        return _dot_flops(instruction, computation)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    return 0.0


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    left = computation.instructions[instruction.operands[0]].shapes[0]
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in match[1].split(",") if axis] if match else []
    return 2.0 * instruction.shapes[0].count * math.prod(left.sizes[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Return the FLOPs of a convolution, as which a TPU writes every matmul.

    A batch axis is then a window that meets one number at a time.

    In: [4, 7168, 128] x [4, 1024, 128], window={size=4 stride=3 lhs_dilate=4},
    dim_labels=0bf_0oi->0bf.  Out: 2 * 4 * 7168 * 1024 * 128.
    """
    left, right = (computation.instructions[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None  # XLA always writes them
    left_axes, right_axes, out_axes = labels[1], labels[2], labels[3]
    window = _window(instruction.attributes)
    products = out.sizes[out_axes.index("b")] * out.sizes[out_axes.index("f")]
    products *= right.sizes[right_axes.index("i")]
    for number in range(len(out_axes) - 2):
        axis = str(number)
        products *= _num_meetings(
            num_left=left.sizes[left_axes.index(axis)],
            num_out=out.sizes[out_axes.index(axis)],
            num_kernel=right.sizes[right_axes.index(axis)],
            window={key: values[number] for key, values in window.items()},
        )
    return 2.0 * products


_DEFAULTS = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


def _window(attributes: str) -> dict[str, list[str]]:
    """In: "window={size=4x7 pad=3_3x6_6}".  Out: {"pad": ["3_3", "6_6"], "stride": ["1", "1"]}."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    written = dict(part.split("=") for part in match[1].split()) if match else {}
    num_axes = len(written.get("size", "").split("x"))
    return {
        key: written[key].split("x") if key in written else [default] * num_axes
        for key, default in _DEFAULTS.items()
    }


def _num_meetings(num_left: int, num_out: int, num_kernel: int, window: dict[str, str]) -> int:
    """Return how often a kernel's number meets a number of the left side along one axis.

    Meetings with padding, or with the holes that dilation leaves, do not count. Output `out` has
    kernel number k meet position out * stride - low_pad + k * rhs_dilate of the dilated left side.
    """
    stride, dilate, step = (int(window[key]) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    low_pad = int(window["pad"].split("_")[0])
    last, count = (num_left - 1) * dilate, 0
    for out in range(num_out):
        start = out * stride - low_pad
        positions = (start + k * step for k in range(num_kernel))
        count += sum(0 <= position <= last and position % dilate == 0 for position in positions)
    return count
