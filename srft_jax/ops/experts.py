"""A mixture of gated MLPs, each token through a few of them: none is dropped, none is padded much.

Tokens are put in order of their experts, in blocks that belong to one expert each. A loop over the
blocks that there are multiplies each with its expert's matrix: work grows with the tokens, and with
the number of experts only by the blocks that are not full. (Where XLA has no instruction for it,
jax.lax.ragged_dot multiplies all tokens with the matrices of all experts.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from srft_jax.mesh import split_axes

# Tokens of a block; in between, what an expert gets on average. Small blocks read a matrix often,
# large ones are padded much.
_LEAST_BLOCK, _MOST_BLOCK = 8, 128


class ExpertOptions(NamedTuple):
    """What is static: how many experts a token has, whether their weights are to sum to 1."""

    experts_per_token: int
    norm_topk_prob: bool
    activation: Callable[[Array], Array]


class ExpertParams(NamedTuple):
    """Of one layer."""

    router: Float[Array, "D E"]
    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


def expert_mlp(
    x: Float[Array, "N D"], params: ExpertParams, options: ExpertOptions
) -> Float[Array, "N D"]:
    """sum_k w_k down_k(activation(gate_k(x)) * up_k(x)) over a token's likeliest experts k.

    w are the router's probabilities, float32. On a mesh each device does this for its rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = split_axes(mesh, "rows", x.shape[0])
    function = functools.partial(_expert_mlp, options)
    if rows:
        # All rows together would be put in order across devices.
        function = jax.shard_map(
            function,
            in_specs=(PartitionSpec(rows), PartitionSpec()),
            out_specs=PartitionSpec(rows),
            axis_names=set(rows),
            check_vma=False,
        )
    return function(x, params)


def _expert_mlp(options: ExpertOptions, x: Float[Array, "N D"], params: ExpertParams) -> Array:
    weights, experts = _routed(x, params.router, options)
    num_experts = params.gate.shape[0]
    size = block_size(experts.size, num_experts)
    places, blocks = _in_blocks(experts.reshape(-1), num_experts, size)
    room = blocks.experts.shape[0] * size
    # Set once and read once, which the backward pass knows: it adds nothing at random.
    repeated = jnp.repeat(x, options.experts_per_token, axis=0)
    sorted_x = jnp.zeros((room, x.shape[1]), x.dtype).at[places].set(repeated, unique_indices=True)
    gate = _by_expert(size, sorted_x, params.gate.astype(x.dtype), blocks)
    up = _by_expert(size, sorted_x, params.up.astype(x.dtype), blocks)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    middle = options.activation(gate) * up
    out = _by_expert(size, middle, params.down.astype(x.dtype), blocks)
    out = out.at[places].get(unique_indices=True).reshape(*experts.shape, -1)
    # Rounded once: XLA may or may not round each product, and sampler and trainer would differ.
    return jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype)


def _routed(
    x: Float[Array, "N D"], router: Float[Array, "D E"], options: ExpertOptions
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The likeliest experts of each token and their weights, float32."""
    logits = jnp.dot(x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), options.experts_per_token)
    if options.norm_topk_prob:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


class _Blocks(NamedTuple):
    """Places [0, size), [size, 2 size), ... of tokens in order: whose they are."""

    experts: Int[Array, " blocks"]
    in_use: Int[Array, ""]


def _in_blocks(
    experts: Int[Array, " A"], num_experts: int, size: int
) -> tuple[Int[Array, " A"], _Blocks]:
    """Where each of A assignments goes.

    In: experts [1, 0, 1], blocks of 2.  Out: places [2, 0, 3], blocks of experts [0, 1].
    """
    counts = jnp.bincount(experts, length=num_experts)
    blocks = -(-counts // size)
    order = jnp.argsort(experts)  # stable
    sorted_experts = experts[order]
    rank = jnp.arange(experts.shape[0]) - (jnp.cumsum(counts) - counts)[sorted_experts]
    place = (jnp.cumsum(blocks) - blocks)[sorted_experts] * size + rank
    places = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    # Full blocks, and one that is not for each expert that has any.
    most = experts.shape[0] // size + min(num_experts, experts.shape[0])
    of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(most), side="right")
    return places, _Blocks(jnp.minimum(of_block, num_experts - 1), jnp.sum(blocks))


def block_size(num_assignments: int, num_experts: int) -> int:
    """A power of two near what an expert gets on average."""
    average = max(1, num_assignments // num_experts)
    return min(max(1 << (average - 1).bit_length(), _LEAST_BLOCK), _MOST_BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_expert(
    size: int, x: Float[Array, "M D"], matrices: Float[Array, "E D F"], blocks: _Blocks
) -> Float[Array, "M F"]:
    """Each block of x times the matrix of its expert; places past the last block give 0."""
    return _products(size, x, matrices, blocks, transposed=False)


def _products(
    size: int, x: Array, matrices: Array, blocks: _Blocks, *, transposed: bool
) -> Float[Array, "M out"]:
    """Of each block of x with its expert's matrix as it stands, or turned over where it is read:
    to turn all of them over beforehand would copy them."""
    contracted = 1 if transposed else 0

    def multiply(block: Array, out: Array) -> Array:
        tokens = jax.lax.dynamic_slice_in_dim(x, block * size, size)
        product = jax.lax.dot_general(
            tokens,
            matrices[blocks.experts[block]],
            (((1,), (contracted,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), block * size, 0)

    start = jnp.zeros((x.shape[0], matrices.shape[2 - contracted]), x.dtype)
    return jax.lax.fori_loop(0, blocks.in_use, multiply, start)


def _by_expert_forward(
    size: int, x: Array, matrices: Array, blocks: _Blocks
) -> tuple[Array, tuple[Any, ...]]:
    return _by_expert(size, x, matrices, blocks), (x, matrices, blocks)


def _by_expert_backward(
    size: int, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, None]:
    """dx = dy W^T, block by block as before; dW = x^T dy, summed in float32 where it stands."""
    x, matrices, blocks = saved

    def add(block: Array, total: Array) -> Array:
        tokens, d_tokens = (
            jax.lax.dynamic_slice_in_dim(of, block * size, size) for of in (x, d_out)
        )
        share = jnp.dot(tokens.T, d_tokens, preferred_element_type=jnp.float32)
        return total.at[blocks.experts[block]].add(share)

    d_x = _products(size, d_out, matrices, blocks, transposed=True)
    start = jnp.zeros(matrices.shape, jnp.float32)
    d_matrices = jax.lax.fori_loop(0, blocks.in_use, add, start)
    return d_x, d_matrices.astype(matrices.dtype), None


_by_expert.defvjp(_by_expert_forward, _by_expert_backward)
