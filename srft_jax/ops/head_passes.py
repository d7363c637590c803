"""Passes of the head over all rows: how they are cut, in which order, and on which device.

    statistics          sweep 1
    gradient            sweep 2, with the logits computed again
    loss_and_gradient   sweep 1 and sweep 2 of a row tile before the next row tile

Masked rows are sorted behind the rows that count and never reach a row tile. On a mesh each device
has its rows and its columns of the head. Row sums are combined over the devices that share the
rows; the head's gradient over those that share the columns, once, after the last row tile.
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
from srft_jax.ops.head_sweeps import Heads, RowStats, RowTile, Slopes, TileLayout

# Memory for tiles of logits on each device, by default.
LOGITS_BYTES = 64 * 2**20


class HeadTileSizes(NamedTuple):
    """Bounds on the sizes of tiles; they do not change results but by rounding.

    Attributes:
        least_kept_rows: Logits are kept only for row tiles of at least this many rows. In smaller
            ones the products are thin, and the head's gradient is read and written so often that a
            fourth unit of work is cheaper. Measured, see docs/benchmarks.md.
        most_rows: Rows of a row tile, at most; more do not make the products faster.
        most_columns: Columns of a column tile, at most; more do not make the products faster.
        least_columns: Columns of a column tile, at least, where the vocabulary has so many.
    """

    least_kept_rows: int = 512
    most_rows: int = 4096
    most_columns: int = 1024
    least_columns: int = 128


class HeadInputs(NamedTuple):
    """Arrays of all rows, and the heads [D, V], or [V, D] where `HeadOptions.transposed`.

    Only hidden and head take a gradient.
    """

    hidden: Float[Array, "N D"]
    head: Float[Array, "D V"]
    reference_hidden: Float[Array, "N D"] | None
    reference_head: Float[Array, "D V"] | None
    targets: Int[Array, " N"]
    mask: Bool[Array, " N"]
    temperature: Float[Array, " N"]


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """Options that are known before tracing; ops/head.py describes them."""

    softcap: float | None
    transposed: bool
    logits_bytes: int
    frozen: bool = False
    tile_sizes: HeadTileSizes = HeadTileSizes()


class PassResult(NamedTuple):
    """Results of a pass, zeros on masked rows. Fields that the pass does not compute are None.

    Attributes:
        stats: RowStats of arrays [N].
        d_hidden: Gradient by the hidden states [N, D], float32.
        d_head: Gradient by the head [D, V], float32; None for a frozen head.
        loss: The sum of losses.
    """

    stats: Any = None
    d_hidden: Any = None
    d_head: Any = None
    loss: Any = None


def make_layout(
    num_rows: int,
    vocab_size: int,
    num_heads: int,
    options: HeadOptions,
    axes: tuple[str, ...] = (),
) -> TileLayout:
    """Cut the rows and columns of one device into tiles that fit the budget of bytes.

    Kept logits take up to 7/8 of it. Row tiles are then an eighth of the rows, so that the last
    one, which masked rows leave unfilled, wastes little; but at least 256 rows. Where logits are
    not kept, a tile of logits takes a quarter of the budget, since up to four arrays of its size
    exist: logits, their gradient, and both on their way into and out of a product.
    In: 4,096 rows, 151,936 columns, 512 MiB.  Out: tiles of 512 rows, 1,024 columns, kept.
    In: 4,096 rows, 151,936 columns, 64 MiB.  Out: tiles of 4,096 rows, 1,024 columns, not kept.
    """
    sizes = options.tile_sizes
    budget = options.logits_bytes // (4 * num_heads)  # float32 numbers, for each head
    # Rows whose logits over the whole vocabulary fit into 7/8 of the budget.
    fit = budget * 7 // 8 // vocab_size
    keep = fit >= min(num_rows, sizes.least_kept_rows)
    if keep:
        rows = min(num_rows, fit, max(256, -(-num_rows // 8)))
    else:
        rows = min(num_rows, sizes.most_rows, max(1, budget // 4 // sizes.least_columns))
    columns = min(sizes.most_columns, budget // 4 // rows) // 128 * 128
    return TileLayout(
        rows=rows,
        columns=min(vocab_size, max(sizes.least_columns, columns)),
        keep=keep,
        transposed=options.transposed,
        softcap=options.softcap,
        axes=axes,
        frozen=options.frozen,
    )


def statistics(inputs: HeadInputs, options: HeadOptions) -> PassResult:
    """Compute the statistics of all rows."""
    return _on_mesh(_statistics, inputs, None, options)


def gradient(
    inputs: HeadInputs, stats: RowStats, cotangents: tuple[Array, ...], options: HeadOptions
) -> PassResult:
    """Compute the gradients from the statistics and the cotangents of `outputs_of(stats)`."""
    return _on_mesh(_gradient, inputs, (stats, cotangents), options)


def loss_and_gradient(
    objective: Callable[[tuple[Array, ...], Any], Array],
    inputs: HeadInputs,
    rows: Any,
    options: HeadOptions,
) -> PassResult:
    """Compute statistics, sum and gradients of `objective(outputs_of(stats), rows)`.

    The objective is called with one row tile after the other.
    """
    return _on_mesh(functools.partial(_loss_and_gradient, objective), inputs, rows, options)


def outputs_of(stats: RowStats) -> tuple[Array, ...]:
    """Return logprob and entropy; with a reference also its logprob and the kl."""
    if stats.kl is None:
        return stats.logprob, stats.entropy
    assert stats.reference_logprob is not None
    return stats.logprob, stats.entropy, stats.reference_logprob, stats.kl


def _slopes(cotangents: tuple[Array, ...], counts: Bool[Array, " R"]) -> Slopes:
    """Turn cotangents of `outputs_of` into slopes, zero on rows that do not count."""
    logprob, entropy, *other = (jnp.where(counts, x, 0.0) for x in cotangents)
    return Slopes(logprob, entropy, other[1] if other else None)


# ---- One device ----


def _over_row_tiles(
    mask: Bool[Array, " N"],
    size: int,
    body: Callable[[Array, Array, Any], tuple[Any, Any]],
    carry: Any,
) -> tuple[Any, Any]:
    """Run `body` on tiles of R = `size` of the rows that count.

    Args:
        mask: Rows that count.
        size: R.
        body: (indices of rows [R], which of them count [R], carry) -> carry, results [R, ...]. In
            the last tile some may not count.
        carry: The first tile's carry.

    Returns:
        The last tile's carry; the results [N, ...], zero on rows that do not count.
    """
    num_rows = mask.shape[0]
    # Stable: the rows that count come first, in their order.
    # In: mask [0, 1, 1, 0, 1], tiles of 2.  Out: order [1, 2, 4, 0, 3]; two tiles, [1, 2], [4, 0].
    order = jnp.argsort(~mask)
    count = jnp.sum(mask)
    padded = jnp.pad(order, (0, -num_rows % size))

    def run_tile(number: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
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
    # Only as many tiles as the rows that count fill: masked rows cost nothing.
    carry, results = jax.lax.fori_loop(0, -(-count // size), run_tile, (carry, empty))
    # Results stand in the sorted order: put them back.
    place = jnp.argsort(order)
    return carry, jax.tree.map(lambda x: x[place], results)


def _row_tile(
    inputs: HeadInputs, index: Int[Array, " R"], counts: Bool[Array, " R"]
) -> tuple[RowTile, Heads]:
    """Take the rows at `index`, and the heads.

    Hidden states of rows that do not count are zero: a slope of zero times a NaN would be NaN.
    """
    rows = (inputs.hidden, inputs.targets, inputs.temperature, inputs.reference_hidden)
    tile = RowTile(*jax.tree.map(lambda x: x[index], rows))
    tile = tile._replace(hidden=jnp.where(counts[:, None], tile.hidden, 0))
    return tile, Heads(inputs.head, inputs.reference_head)


def _statistics(inputs: HeadInputs, data: None, layout: TileLayout) -> PassResult:
    def body(index: Array, counts: Array, carry: None) -> tuple[None, RowStats]:
        tile, heads = _row_tile(inputs, index, counts)
        return None, sweeps.sweep_statistics(tile, heads, (), layout)[0]

    return PassResult(stats=_over_row_tiles(inputs.mask, layout.rows, body, None)[1])


def _gradient(
    inputs: HeadInputs, data: tuple[RowStats, tuple[Array, ...]], layout: TileLayout
) -> PassResult:
    def body(index: Array, counts: Array, d_head: Any) -> tuple[Any, Array]:
        stats, cotangents = jax.tree.map(lambda x: x[index], data)
        slopes = _slopes(cotangents, counts)
        tile, heads = _row_tile(inputs, index, counts)
        d_hidden, d_head = sweeps.sweep_gradient(
            tile, heads, kept=(), stats=stats, slopes=slopes, d_head=d_head, layout=layout
        )
        return d_head, d_hidden

    start = sweeps.no_gradient(inputs.head, layout)
    d_head, d_hidden = _over_row_tiles(inputs.mask, layout.rows, body, start)
    return PassResult(d_hidden=d_hidden, d_head=d_head)


def _loss_and_gradient(
    objective: Callable, inputs: HeadInputs, data: Any, layout: TileLayout
) -> PassResult:
    def body(index: Array, counts: Array, carry: Any) -> tuple[Any, Any]:
        loss, d_head, kept = carry
        tile, heads = _row_tile(inputs, index, counts)
        stats, kept = sweeps.sweep_statistics(tile, heads, kept, layout)
        rows = jax.tree.map(lambda x: x[index], data)

        def tile_loss(outputs: tuple[Array, ...]) -> Array:
            return jnp.sum(jnp.where(counts, objective(outputs, rows), 0.0))

        # A token's loss depends on its own statistics alone, so its gradient is known here, while
        # the tile's logits are still kept.
        more, cotangents = jax.value_and_grad(tile_loss)(outputs_of(stats))
        slopes = _slopes(cotangents, counts)
        d_hidden, d_head = sweeps.sweep_gradient(
            tile, heads, kept=kept, stats=stats, slopes=slopes, d_head=d_head, layout=layout
        )
        return (loss + more, d_head, kept), (stats, d_hidden)

    start = sweeps.no_gradient(inputs.head, layout)
    kept = sweeps.empty_tiles(Heads(inputs.head, inputs.reference_head), layout)
    (loss, d_head, _), (stats, d_hidden) = _over_row_tiles(
        inputs.mask, layout.rows, body, (jnp.zeros(()), start, kept)
    )
    return PassResult(stats=stats, d_hidden=d_hidden, d_head=d_head, loss=loss)


# ---- The devices of a mesh ----


class _Axes(NamedTuple):
    """Mesh axes that a dimension is split over; empty where it is whole on every device.

    Attributes:
        rows: Axes of the rows.
        columns: Axes of the vocabulary.
        model: Axes of D in the head's gradient, where parameters are sharded by D.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    model: tuple[str, ...]


def _on_mesh(
    run: Callable[..., PassResult], inputs: HeadInputs, data: Any, options: HeadOptions
) -> PassResult:
    """Run a pass on one device, or on all devices of the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    (num_rows, dim), vocab_size = inputs.hidden.shape, _vocab_size(inputs, options)
    rows = split_axes(mesh, "rows", num_rows)
    axes = _Axes(rows, split_axes(mesh, "vocab", vocab_size), ())
    axes = axes._replace(
        model=tuple(axis for axis in split_axes(mesh, "model", dim) if axis in rows)
    )
    local = functools.partial(_local, run, options, axes)
    if not axes.rows and not axes.columns:  # one device, or a mesh that divides neither
        return local(inputs, data)
    by_rows: Any = PartitionSpec(axes.rows)
    head: Any = _head_spec((), axes.columns, options)
    d_head = _head_spec(axes.model, axes.columns, options)
    input_specs = HeadInputs(
        hidden=by_rows,
        head=head,
        reference_hidden=by_rows,
        reference_head=head,
        targets=by_rows,
        mask=by_rows,
        temperature=by_rows,
    )
    return jax.shard_map(
        local,
        in_specs=(input_specs, by_rows),
        out_specs=PassResult(by_rows, by_rows, d_head, PartitionSpec()),
        check_vma=False,
    )(inputs, data)


def _head_spec(
    model: tuple[str, ...], columns: tuple[str, ...], options: HeadOptions
) -> PartitionSpec:
    return PartitionSpec(columns, model) if options.transposed else PartitionSpec(model, columns)


def _vocab_size(inputs: HeadInputs, options: HeadOptions) -> int:
    return inputs.head.shape[0 if options.transposed else 1]


def _local(
    run: Callable[..., PassResult],
    options: HeadOptions,
    axes: _Axes,
    inputs: HeadInputs,
    data: Any,
) -> PassResult:
    """Run one device's pass, and sum its results over devices."""
    num_heads = 1 if inputs.reference_head is None else 2
    num_rows, vocab_size = inputs.mask.shape[0], _vocab_size(inputs, options)
    layout = make_layout(num_rows, vocab_size, num_heads, options, axes.columns)
    if axes.columns:
        # Targets are counted from this device's first column.
        first = jax.lax.axis_index(axes.columns) * vocab_size
        inputs = inputs._replace(targets=inputs.targets - first)
    result = run(inputs, data, layout)
    # Each device has seen all of its rows, but only its columns.
    return result._replace(
        d_hidden=_total(result.d_hidden, axes.columns),
        d_head=_total_head(result.d_head, axes, options),
        loss=_total(result.loss, axes.rows),
    )


def _total(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes and x is not None else x


def _total_head(d_head: Any, axes: _Axes, options: HeadOptions) -> Any:
    """Sum the head's gradient over the devices that have other rows.

    Each device keeps the part of D that its parameters have. It is cut out first, so that the sums
    over other axes exchange no more than that part.
    """
    if d_head is None:
        return None
    if axes.model:
        dimension = 1 if options.transposed else 0
        d_head = jax.lax.psum_scatter(d_head, axes.model, scatter_dimension=dimension, tiled=True)
        # Without the barrier XLA, to exchange less, sums whole gradients over the microbatches
        # before it sums over devices: on each of 64 devices that takes 2 GiB for a head of 7B,
        # where its part takes 34 MiB.
        d_head = jax.lax.optimization_barrier(d_head)
    return _total(d_head, tuple(axis for axis in axes.rows if axis not in axes.model))
