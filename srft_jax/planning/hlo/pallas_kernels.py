"""Work of Pallas kernels, which XLA cannot look into: declared by them, or known here by name."""

import math
import re
from typing import NamedTuple

from srft_jax.planning.hlo.parser import Computation, Instruction, Shape


class KernelWork(NamedTuple):
    """FLOPs of matmuls, and bytes moved between HBM and fast memory."""

    flops: float
    bytes: float


def declared_work(call: Instruction) -> KernelWork | None:
    """Return the `cost_estimate` that a kernel declares; None if it declares none."""
    keys = ("flops", "bytes_accessed")
    matches = [re.search(rf'"{key}":"?(\d+)', call.attributes) for key in keys]
    flops, accessed = (float(match[1]) if match else None for match in matches)
    return None if flops is None or accessed is None else KernelWork(flops, accessed)


# Matmuls [T, H] x [H, S], or of the same size, in each pass of splash attention. Forward: scores
# and output. Backward: scores, d_weights, and every gradient that the pass makes.
_SPLASH_MATMULS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def splash_work(call: Instruction, computation: Computation) -> KernelWork | None:
    """Return the work of a pass of splash attention over causal rows; None for another kernel.

    Queries are [N, T, H] and keys [K, S, H], with a leading axis of rows if a device has several.
    Both are cut into tiles. Tiles above the diagonal are skipped: n (n + 1) / 2 of n x n remain.
    For each tile of one side, each query head reads all tiles of the other side that it meets, two
    arrays of them. Segments and windows skip no tile here: they cost what plain causal rows do.
    """
    matmuls = [number for name, number in _SPLASH_MATMULS.items() if name in call.op_name]
    if not matmuls:
        return None
    shapes = [computation.instructions[name].shapes[0] for name in call.operands]
    # Small integer arrays say which tiles to visit; the other arrays start with queries and keys.
    arrays = [x for x in shapes if len(x.sizes) > 2 and x.dtype not in ("s8", "s32")]
    query, key = arrays[:2]
    tiles = next(shape for shape in shapes if shape.dtype in ("s8", "s32")).sizes[-2:]
    causal_share = (1 + 1 / max(tiles)) / 2
    num_heads, (length, head_dim) = math.prod(query.sizes[:-2]), query.sizes[-2:]  # over all rows
    flops = 2.0 * matmuls[0] * num_heads * length * key.sizes[-2] * head_dim * causal_share
    loops_over_keys = "dkv" in call.op_name
    num_outer, inner = (tiles[1], query) if loops_over_keys else (tiles[0], key)
    reread = 2 * num_heads * causal_share * num_outer * _bytes_of_head(inner)
    return KernelWork(flops, reread + sum(shape.bytes for shape in call.shapes) + query.bytes)


def _bytes_of_head(shape: Shape) -> float:
    """Return the bytes of one head in one row."""
    return shape.bytes / math.prod(shape.sizes[:-2])
