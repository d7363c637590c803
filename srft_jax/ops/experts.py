"""A mixture of gated MLPs, each token through a few of them: no token is dropped, padding is small.

Tokens are sorted by expert and cut into tiles, each of one expert. A loop over the tiles in use
multiplies each with its expert's matrix: work grows with the tokens, and with the number of experts
only by their last tiles, which are not full. (Where XLA has no instruction for it,
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

# Bounds on the tokens of a tile. Small tiles read a matrix often, large ones have much padding.
_LEAST_TILE, _MOST_TILE = 8, 128


class ExpertOptions(NamedTuple):
    """Options that are known before tracing.

    Attributes:
        experts_per_token: Number of experts that a token goes through, k.
        norm_topk_prob: Whether the weights of a token's experts are scaled to sum to 1.
        activation: Activation of the gate.
    """

    experts_per_token: int
    norm_topk_prob: bool
    activation: Callable[[Array], Array]


class ExpertParams(NamedTuple):
    """Parameters of one layer's E experts, and of the router that chooses among them."""

    router: Float[Array, "D E"]
    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


def expert_mlp(
    x: Float[Array, "N D"], params: ExpertParams, options: ExpertOptions
) -> Float[Array, "N D"]:
    """Return sum_k w_k down_k(activation(gate_k(x)) * up_k(x)) over a token's likeliest experts k.

    The weights w are the router's probabilities, float32. On a mesh each device computes its rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = split_axes(mesh, "rows", x.shape[0])
    function = functools.partial(_expert_mlp, options)
    if rows:
        # Without shard_map, all rows together would be sorted by expert, across devices.
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
    size = tile_size(experts.size, num_experts)
    places, tiles = assign_tiles(experts.reshape(-1), num_experts, size)
    room = tiles.experts.shape[0] * size
    # Each place is written once and read once. The backward pass knows it by unique_indices, and
    # copies instead of adding in any order.
    repeated = jnp.repeat(x, options.experts_per_token, axis=0)
    sorted_x = jnp.zeros((room, x.shape[1]), x.dtype).at[places].set(repeated, unique_indices=True)
    gate = _by_expert(size, sorted_x, params.gate.astype(x.dtype), tiles)
    up = _by_expert(size, sorted_x, params.up.astype(x.dtype), tiles)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    middle = options.activation(gate) * up
    out = _by_expert(size, middle, params.down.astype(x.dtype), tiles)
    out = out.at[places].get(unique_indices=True).reshape(*experts.shape, -1)
    # The sum is rounded once. Rounding each product is left to XLA, so that sampler and trainer
    # could differ.
    return jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype)


def _routed(
    x: Float[Array, "N D"], router: Float[Array, "D E"], options: ExpertOptions
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """Return the weights of each token's likeliest experts, float32, and the experts."""
    logits = jnp.dot(x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), options.experts_per_token)
    if options.norm_topk_prob:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


class ExpertTiles(NamedTuple):
    """Tiles of sorted tokens: tile i has the places [i size, (i + 1) size).

    Attributes:
        experts: Expert of each tile.
        in_use: Number of tiles that have tokens; they come first.
    """

    experts: Int[Array, " tiles"]
    in_use: Int[Array, ""]


def assign_tiles(
    experts: Int[Array, " A"], num_experts: int, size: int
) -> tuple[Int[Array, " A"], ExpertTiles]:
    """Return the place of each of A assignments of a token to an expert, and the tiles.

    In: experts [1, 0, 1], tiles of 2.  Out: places [2, 0, 3]; tiles of experts [0, 1].
    """
    counts = jnp.bincount(experts, length=num_experts)
    num_tiles = -(-counts // size)
    order = jnp.argsort(experts)  # stable
    sorted_experts = experts[order]
    # Position of each assignment among the assignments of its expert.
    rank = jnp.arange(experts.shape[0]) - (jnp.cumsum(counts) - counts)[sorted_experts]
    # An expert's first place is behind the tiles of all experts before it.
    place = (jnp.cumsum(num_tiles) - num_tiles)[sorted_experts] * size + rank
    places = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    # At most: all full tiles, and one that is not full for each expert that has any token.
    most = experts.shape[0] // size + min(num_experts, experts.shape[0])
    tile_experts = jnp.searchsorted(jnp.cumsum(num_tiles), jnp.arange(most), side="right")
    return places, ExpertTiles(jnp.minimum(tile_experts, num_experts - 1), jnp.sum(num_tiles))


def tile_size(num_assignments: int, num_experts: int) -> int:
    """Return a power of two near the number of tokens that an expert gets on average.

    In: 300 assignments, 8 experts.  Out: 64, since an expert gets 37 on average.
    """
    average = max(1, num_assignments // num_experts)
    return min(max(1 << (average - 1).bit_length(), _LEAST_TILE), _MOST_TILE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_expert(
    size: int, x: Float[Array, "M D"], matrices: Float[Array, "E D F"], tiles: ExpertTiles
) -> Float[Array, "M F"]:
    """Return each tile of x times the matrix of its expert; 0 behind the last tile in use."""
    return _products(size, x, matrices, tiles, transposed=False)


def _products(
    size: int, x: Array, matrices: Array, tiles: ExpertTiles, *, transposed: bool
) -> Float[Array, "M out"]:
    """Return each tile of x times its expert's matrix, or times its transpose.

    A matrix is transposed where it is read: transposing all of them beforehand would copy them.
    """
    contracted = 1 if transposed else 0

    def multiply(tile: Array, out: Array) -> Array:
        tokens = jax.lax.dynamic_slice_in_dim(x, tile * size, size)
        product = jax.lax.dot_general(
            tokens,
            matrices[tiles.experts[tile]],
            (((1,), (contracted,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), tile * size, 0)

    start = jnp.zeros((x.shape[0], matrices.shape[2 - contracted]), x.dtype)
    return jax.lax.fori_loop(0, tiles.in_use, multiply, start)


def _by_expert_forward(
    size: int, x: Array, matrices: Array, tiles: ExpertTiles
) -> tuple[Array, tuple[Any, ...]]:
    return _by_expert(size, x, matrices, tiles), (x, matrices, tiles)


def _by_expert_backward(
    size: int, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, None]:
    """Return dx = dy W^T, tile by tile, and dW = x^T dy, summed in float32."""
    x, matrices, tiles = saved

    def add(tile: Array, total: Array) -> Array:
        tokens, d_tokens = (
            jax.lax.dynamic_slice_in_dim(array, tile * size, size) for array in (x, d_out)
        )
        share = jnp.dot(tokens.T, d_tokens, preferred_element_type=jnp.float32)
        return total.at[tiles.experts[tile]].add(share)

    d_x = _products(size, d_out, matrices, tiles, transposed=True)
    start = jnp.zeros(matrices.shape, jnp.float32)
    d_matrices = jax.lax.fori_loop(0, tiles.in_use, add, start)
    return d_x, d_matrices.astype(matrices.dtype), None


_by_expert.defvjp(_by_expert_forward, _by_expert_backward)
