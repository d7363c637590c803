"""Passes over all rows of the head: what is cut how, in which order, and on which device.

    statistics          sweep 1
    gradient            sweep 2, with the logits computed again
    loss_and_gradient   sweep 1 and sweep 2 of a block before the next block

Rows that are masked are sorted behind the others and never reach a block. On a mesh each device has
its rows and its columns of the head; row sums are combined over the devices that share the rows,
the head's gradient over those that share the columns, once, after the last block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from srft_jax.mesh import split_axes
from srft_jax.ops import head_sweeps as sweeps
from srft_jax.ops.head_sweeps import Heads, Layout, RowStats, Slopes

LOGITS_BYTES = 64 * 2**20

# With fewer rows at a time the products are thin, and the head's gradient is read and written so
# often, that a fourth unit is cheaper. Measured, see docs/benchmarks.md.
LEAST_KEPT_ROWS = 512
# More do not make the products faster.
MOST_ROWS, MOST_COLUMNS = 4096, 1024
LEAST_COLUMNS = 128


class Inputs(NamedTuple):
    """All rows. Only hidden and head take a gradient."""

    hidden: Float[Array, "N D"]
    head: Float[Array, "D V"]  # [V, D] where `Options.transposed`
    reference_hidden: Float[Array, "N D"] | None
    reference_head: Float[Array, "D V"] | None
    targets: Int[Array, " N"]
    mask: Bool[Array, " N"]
    temperature: Float[Array, " N"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change the result, and what is static; see ops/head.py."""

    softcap: float | None
    transposed: bool
    logits_bytes: int
    frozen: bool = False


class Result(NamedTuple):
    """What a pass makes; zeros on masked rows. Fields that it does not make are None."""

    stats: Any = None  # RowStats of [N]
    d_hidden: Any = None  # [N, D], float32
    d_head: Any = None  # [D, V], float32; of a frozen head there is none
    loss: Any = None


def make_layout(
    num_rows: int,
    vocab_size: int,
    num_heads: int,
    options: Options,
    axes: tuple[str, ...] = (),
) -> Layout:
    """Blocks and tiles for the rows and columns of one device, from the budget of bytes.

    Kept logits take up to 7/8 of it. Blocks are then an eighth of the rows, so that the last one,
    which masked rows leave unfilled, wastes little; but at least 256 rows. Where logits are not
    kept, a tile takes a quarter of the budget, as it is there up to four times: logits, their
    gradient, and on the way into and out of a product.
    In: 4,096 rows, 151,936 columns, 512 MiB.  Out: blocks of 512 rows, tiles of 1,024, kept.
    In: the same, 64 MiB.  Out: blocks of 4,096 rows, tiles of 1,024, not kept.
    """
    budget = options.logits_bytes // (4 * num_heads)  # float32 numbers
    fit = budget * 7 // 8 // vocab_size
    keep = fit >= min(num_rows, LEAST_KEPT_ROWS)
    if keep:
        rows = min(num_rows, fit, max(256, -(-num_rows // 8)))
    else:
        rows = min(num_rows, MOST_ROWS, max(1, budget // 4 // LEAST_COLUMNS))
    columns = max(LEAST_COLUMNS, min(MOST_COLUMNS, budget // 4 // rows) // 128 * 128)
    return Layout(
        rows=rows,
        columns=min(vocab_size, columns),
        keep=keep,
        transposed=options.transposed,
        softcap=options.softcap,
        axes=axes,
        frozen=options.frozen,
    )


def statistics(inputs: Inputs, options: Options) -> Result:
    return _on_mesh(_statistics, inputs, None, options)


def gradient(
    inputs: Inputs, stats: RowStats, cotangents: tuple[Array, ...], options: Options
) -> Result:
    """From the statistics and the cotangents of `outputs_of(stats)`."""
    return _on_mesh(_gradient, inputs, (stats, cotangents), options)


def loss_and_gradient(
    objective: Callable[[tuple[Array, ...], Any], Array],
    inputs: Inputs,
    rows: Any,
    options: Options,
) -> Result:
    """Of the sum of `objective(outputs_of(stats), rows)`, which is called with blocks of rows."""
    return _on_mesh(functools.partial(_loss_and_gradient, objective), inputs, rows, options)


def outputs_of(stats: RowStats) -> tuple[Array, ...]:
    """logprob, entropy; with a reference also its logprob and the kl."""
    if stats.kl is None:
        return stats.logprob, stats.entropy
    assert stats.reference_logprob is not None
    return stats.logprob, stats.entropy, stats.reference_logprob, stats.kl


def _slopes(cotangents: tuple[Array, ...], counts: Bool[Array, " R"]) -> Slopes:
    """From the cotangents of `outputs_of`."""
    logprob, entropy, *other = (jnp.where(counts, x, 0.0) for x in cotangents)
    return Slopes(logprob, entropy, other[1] if other else None)


# ---- One device ----


def _over_blocks(
    mask: Bool[Array, " N"],
    size: int,
    body: Callable[[Array, Array, Any], tuple[Any, Any]],
    carry: Any,
) -> tuple[Any, Any]:
    """Runs `body` on blocks of R = `size` of the rows that count.

    Args:
        mask: Rows that count.
        size: R.
        body: (indices of rows [R], which of them count [R], carry) -> carry, results [R, ...]. In
            the last block some may not count.
        carry: Goes from block to block.

    Returns:
        The last carry; the results [N, ...], zero on rows that do not count.
    """
    num_rows = mask.shape[0]
    order = jnp.argsort(~mask)  # stable: the rows that count come first
    count = jnp.sum(mask)
    padded = jnp.pad(order, (0, -num_rows % size))

    def block(number: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, results = state
        start = number * size
        counts = start + jnp.arange(size) < count
        carry, new = body(jax.lax.dynamic_slice_in_dim(padded, start, size), counts, carry)

        def put(buffer: Array, x: Array) -> Array:
            x = jnp.where(counts.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
            return jax.lax.dynamic_update_slice_in_dim(buffer, x, start, 0)

        return carry, jax.tree.map(put, results, new)

    _, shapes = jax.eval_shape(body, padded[:size], mask[:size], carry)
    empty = jax.tree.map(lambda x: jnp.zeros((*padded.shape, *x.shape[1:]), x.dtype), shapes)
    carry, results = jax.lax.fori_loop(0, -(-count // size), block, (carry, empty))
    place = jnp.argsort(order)
    return carry, jax.tree.map(lambda x: x[place], results)


def _block(
    inputs: Inputs, index: Int[Array, " R"], counts: Bool[Array, " R"]
) -> tuple[sweeps.Block, Heads]:
    """Rows that do not count are zero: a slope of zero times a NaN would not be."""
    rows = (inputs.hidden, inputs.targets, inputs.temperature, inputs.reference_hidden)
    block = sweeps.Block(*jax.tree.map(lambda x: x[index], rows))
    block = block._replace(hidden=jnp.where(counts[:, None], block.hidden, 0))
    return block, Heads(inputs.head, inputs.reference_head)


def _statistics(inputs: Inputs, data: None, layout: Layout) -> Result:
    def body(index: Array, counts: Array, carry: None) -> tuple[None, RowStats]:
        return None, sweeps.sweep_statistics(*_block(inputs, index, counts), (), layout)[0]

    return Result(stats=_over_blocks(inputs.mask, layout.rows, body, None)[1])


def _gradient(inputs: Inputs, data: tuple[RowStats, tuple[Array, ...]], layout: Layout) -> Result:
    def body(index: Array, counts: Array, d_head: Any) -> tuple[Any, Array]:
        stats, cotangents = jax.tree.map(lambda x: x[index], data)
        slopes = _slopes(cotangents, counts)
        d_hidden, d_head = sweeps.sweep_gradient(
            *_block(inputs, index, counts), (), stats, slopes, d_head, layout
        )
        return d_head, d_hidden

    start = sweeps.no_gradient(inputs.head, layout)
    d_head, d_hidden = _over_blocks(inputs.mask, layout.rows, body, start)
    return Result(d_hidden=d_hidden, d_head=d_head)


def _loss_and_gradient(objective: Callable, inputs: Inputs, data: Any, layout: Layout) -> Result:
    def body(index: Array, counts: Array, carry: Any) -> tuple[Any, Any]:
        loss, d_head, kept = carry
        block, heads = _block(inputs, index, counts)
        stats, kept = sweeps.sweep_statistics(block, heads, kept, layout)
        rows = jax.tree.map(lambda x: x[index], data)

        def block_loss(outputs: tuple[Array, ...]) -> Array:
            return jnp.sum(jnp.where(counts, objective(outputs, rows), 0.0))

        more, cotangents = jax.value_and_grad(block_loss)(outputs_of(stats))
        slopes = _slopes(cotangents, counts)
        d_hidden, d_head = sweeps.sweep_gradient(block, heads, kept, stats, slopes, d_head, layout)
        return (loss + more, d_head, kept), (stats, d_hidden)

    start = sweeps.no_gradient(inputs.head, layout)
    kept = sweeps.empty_tiles(Heads(inputs.head, inputs.reference_head), layout)
    (loss, d_head, _), (stats, d_hidden) = _over_blocks(
        inputs.mask, layout.rows, body, (jnp.zeros(()), start, kept)
    )
    return Result(stats, d_hidden, d_head, loss)


# ---- The devices of a mesh ----


class _Axes(NamedTuple):
    """Mesh axes that something is split over; empty where it is whole on every device."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    model: tuple[str, ...]  # of the head's gradient: where parameters are sharded by D


def _on_mesh(run: Callable[..., Result], inputs: Inputs, data: Any, options: Options) -> Result:
    """A pass on one device, or on all of the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    (num_rows, dim), vocab_size = inputs.hidden.shape, _vocab_size(inputs, options)
    rows = split_axes(mesh, "rows", num_rows)
    axes = _Axes(rows, split_axes(mesh, "vocab", vocab_size), ())
    axes = axes._replace(model=tuple(a for a in split_axes(mesh, "model", dim) if a in rows))
    local = functools.partial(_local, run, options, axes)
    if not axes.rows and not axes.columns:
        return local(inputs, data)
    of_rows: Any = PartitionSpec(axes.rows)
    head: Any = _head_spec((), axes.columns, options)
    d_head = _head_spec(axes.model, axes.columns, options)
    return jax.shard_map(
        local,
        in_specs=(Inputs(of_rows, head, of_rows, head, of_rows, of_rows, of_rows), of_rows),
        out_specs=Result(of_rows, of_rows, d_head, PartitionSpec()),
        check_vma=False,
    )(inputs, data)


def _head_spec(model: tuple[str, ...], columns: tuple[str, ...], options: Options) -> PartitionSpec:
    return PartitionSpec(columns, model) if options.transposed else PartitionSpec(model, columns)


def _vocab_size(inputs: Inputs, options: Options) -> int:
    return inputs.head.shape[0 if options.transposed else 1]


def _local(
    run: Callable[..., Result], options: Options, axes: _Axes, inputs: Inputs, data: Any
) -> Result:
    """One device's pass, and the sums with the others."""
    num_heads = 1 if inputs.reference_head is None else 2
    num_rows, vocab_size = inputs.mask.shape[0], _vocab_size(inputs, options)
    layout = make_layout(num_rows, vocab_size, num_heads, options, axes.columns)
    if axes.columns:
        first = jax.lax.axis_index(axes.columns) * vocab_size
        inputs = inputs._replace(targets=inputs.targets - first)
    result = run(inputs, data, layout)
    return result._replace(
        d_hidden=_total(result.d_hidden, axes.columns),
        d_head=_total_head(result.d_head, axes, options),
        loss=_total(result.loss, axes.rows),
    )


def _total(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes and x is not None else x


def _total_head(d_head: Any, axes: _Axes, options: Options) -> Any:
    """Summed over the devices that have other rows; each keeps the part of D of its parameters,
    which comes first, so that the others exchange no more than that part."""
    if d_head is None:
        return None
    if axes.model:
        dimension = 1 if options.transposed else 0
        d_head = jax.lax.psum_scatter(d_head, axes.model, scatter_dimension=dimension, tiled=True)
        # Else XLA, to exchange less, sums whole gradients over the microbatches before devices:
        # on each of 64 devices 2 GiB for a head of 7B, where its part takes 34 MiB.
        d_head = jax.lax.optimization_barrier(d_head)
    return _total(d_head, tuple(axis for axis in axes.rows if axis not in axes.model))
