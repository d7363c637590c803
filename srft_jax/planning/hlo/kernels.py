"""Work of Pallas kernels, into which XLA does not look: declared, or known here by name."""

import math
import re
from typing import NamedTuple

from srft_jax.planning.hlo.text import Computation, Instruction, Shape


class Work(NamedTuple):
    """FLOPs of products of matrices, and bytes that go between a device's two memories."""

    flops: float
    bytes: float


def declared(call: Instruction) -> Work | None:
    """What a kernel says of itself by `cost_estimate`."""
    found = [re.search(rf'"{key}":"?(\d+)', call.attributes) for key in ("flops", "bytes_accessed")]
    flops, accessed = (float(of[1]) if of else None for of in found)
    return None if flops is None or accessed is None else Work(flops, accessed)


# Products of [T, H] x [H, S] or their like in each pass of splash attention: scores and output;
# of the backward passes scores, d_weights, and each gradient that the pass makes.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def of_splash(call: Instruction, computation: Computation) -> Work | None:
    """Of a pass of splash attention over causal rows; None of another kernel.

    Queries [N, T, H] and keys [K, S, H], behind an axis of rows where a device has several, are cut
    into blocks of which those above the diagonal are left out; n (n + 1) / 2 of n x n remain. For
    each block of one side all blocks of the other are read that it meets, two arrays of them, by
    each query head. Segments and windows leave out no block here, so they cost what plain causal
    rows do.
    """
    products = [n for name, n in _SPLASH_PRODUCTS.items() if name in call.op_name]
    if not products:
        return None
    shapes = [computation.instructions[name].shapes[0] for name in call.operands]
    arrays = [one for one in shapes if len(one.sizes) > 2 and one.dtype not in ("s8", "s32")]
    query, key = arrays[:2]
    blocks = next(shape for shape in shapes if shape.dtype in ("s8", "s32")).sizes[-2:]
    share = (1 + 1 / max(blocks)) / 2
    num_heads, (length, head_dim) = math.prod(query.sizes[:-2]), query.sizes[-2:]  # of all rows
    flops = 2.0 * products[0] * num_heads * length * key.sizes[-2] * head_dim * share
    by_key = "dkv" in call.op_name
    outer, inner = (blocks[1], query) if by_key else (blocks[0], key)
    again = 2 * num_heads * share * outer * _of_one_head(inner)
    return Work(flops, again + sum(shape.bytes for shape in call.shapes) + query.bytes)


def _of_one_head(shape: Shape) -> float:
    """In one row."""
    return shape.bytes / math.prod(shape.sizes[:-2])
