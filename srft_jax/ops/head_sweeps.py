"""The two sweeps of the head over tiles of columns, for one tile of rows on one device.

    z = softcap(hidden head) / temperature, per row
    sweep 1   m = max z, s = sum e^(z-m), t = sum e^(z-m) (z-m), all of them online
              lse = m + log s,  logprob = z[target] - lse,  entropy = log s - t / s
    sweep 2   with a, b, k the derivatives of the loss by logprob, entropy and kl:
              d loss / dz_v = a [v = target] - p_v (a + b (log p_v + entropy)
                                                      - k (log p_v - log q_v - kl))
              d_hidden += dz head^T,  d_head[tile] += hidden^T dz

q is the reference policy where there is one, kl = sum_v p_v (log p_v - log q_v). On several devices
each has its own columns, and the sums are combined over `Layout.axes`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Stands for logits of columns that are not new; finite, so that no inf - inf can arise.
_LOWEST = -1e30
# Lanes that a sum over columns keeps apart on CPUs, see `_pair_sums`.
_LANES = 64


@dataclasses.dataclass(frozen=True)
class TileLayout:
    """How the head is stored and cut into tiles.

    Attributes:
        rows: Rows of a row tile, R.
        columns: Columns of a column tile, C.
        keep: Whether sweep 1 keeps its logits for sweep 2.
        transposed: Whether the head is stored as [V, D].
        softcap: Cap: logits = softcap * tanh(logits / softcap), before the temperature; or None.
        axes: Mesh axes that the vocabulary is split over.
        frozen: Whether the head takes no gradient, so that none is made.
    """

    rows: int
    columns: int
    keep: bool
    transposed: bool
    softcap: float | None
    axes: tuple[str, ...]
    frozen: bool

    def vocab_size(self, head: Array) -> int:
        return head.shape[0 if self.transposed else 1]

    def num_column_tiles(self, head: Array) -> int:
        return -(-self.vocab_size(head) // self.columns)


class RowTile(NamedTuple):
    """Arrays of R rows; targets are counted from this device's first column."""

    hidden: Float[Array, "R D"]
    targets: Int[Array, " R"]
    temperature: Float[Array, " R"]
    reference_hidden: Float[Array, "R D"] | None


class Heads(NamedTuple):
    """Heads [D, V], or [V, D] where `TileLayout.transposed`; V counts this device's columns."""

    policy: Array
    reference: Array | None


class RowStats(NamedTuple):
    """Statistics of R rows, float32 [R]; the last three are None without a reference.

    Attributes:
        logprob: log p of the target.
        entropy: Entropy of p.
        lse: Log-sum-exp of the policy's logits.
        reference_logprob: log q of the target.
        kl: sum_v p_v (log p_v - log q_v).
        reference_lse: Log-sum-exp of the reference's logits.
    """

    logprob: Array
    entropy: Array
    lse: Array
    reference_logprob: Array | None
    kl: Array | None
    reference_lse: Array | None


class Slopes(NamedTuple):
    """Derivatives of the loss by logprob, entropy and kl, float32 [R]."""

    logprob: Array
    entropy: Array
    kl: Array | None


class _LogitSums(NamedTuple):
    """Online sums of a policy's logits over the columns so far, float32 [R].

    Attributes:
        highest: m, the highest logit z.
        total: sum e^(z-m).
        weighted: sum e^(z-m) (z-m); read for the policy under training only.
        gap: sum e^(z-m) (z - z of the reference).
        target: z of the target, 0 until its column comes.
    """

    highest: Array
    total: Array
    weighted: Array
    gap: Array
    target: Array


def _column_tile(head: Array, i: Array, layout: TileLayout) -> tuple[Array, Array]:
    """Return column tile i of the head, and its first column.

    The last tile is moved back, so that it ends where the head ends.
    In: 300 columns, tiles of 128.  Out: first columns 0, 128, 172.
    """
    axis = 0 if layout.transposed else 1
    start = jnp.minimum(i * layout.columns, layout.vocab_size(head) - layout.columns)
    return jax.lax.dynamic_slice_in_dim(head, start, layout.columns, axis), start


def _is_new(i: Array, start: Array, layout: TileLayout) -> Bool[Array, " C"]:
    """Return which columns of tile i no earlier tile had: all, unless it was moved back."""
    return start + jnp.arange(layout.columns) >= i * layout.columns


def _logits(
    hidden: Array, weights: Array, temperature: Array, layout: TileLayout
) -> Float[Array, "R C"]:
    """Return z = softcap(hidden weights) / temperature, float32."""
    contract = ((1,), (1 if layout.transposed else 0,))
    raw = jax.lax.dot_general(
        hidden,
        weights.astype(hidden.dtype),
        (contract, ((), ())),
        preferred_element_type=jnp.float32,
    )
    if layout.softcap is not None:
        raw = layout.softcap * jnp.tanh(raw / layout.softcap)
    return raw / temperature[:, None]


def _pair_sums(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the sums over the columns of two arrays [R, C], in one pass over memory."""

    def add(a: Any, b: Any) -> Any:
        return a[0] + b[0], a[1] + b[1]

    def sums(x: Array, y: Array, axis: int) -> tuple[Array, Array]:
        zero = jnp.zeros((), x.dtype)
        return jax.lax.reduce((x, y), (zero, zero), add, (axis,))

    def in_lanes(x: Array, y: Array) -> tuple[Array, Array]:
        """Sum in two steps: XLA for CPUs vectorises a sum only if lanes are kept apart first."""
        lanes = (x.shape[0], -1, _LANES)
        return sums(*sums(x.reshape(lanes), y.reshape(lanes), 1), 1)

    if x.shape[1] % _LANES:
        return sums(x, y, 1)
    return jax.lax.platform_dependent(x, y, cpu=in_lanes, default=lambda x, y: sums(x, y, 1))


def _add_columns(
    sums: _LogitSums, z: Array, reference_z: Array | None, is_target: Array, is_new: Array
) -> _LogitSums:
    """Add a column tile of logits to the sums.

    Args:
        sums: Sums of the columns so far.
        z: Logits [R, C].
        reference_z: The reference's logits [R, C].
        is_target: Which logit is the target's, [R, C].
        is_new: Which columns no earlier tile had, [C].
    """
    target = sums.target + jnp.sum(jnp.where(is_target, z, 0.0), axis=1)
    # Columns that an earlier tile had count for nothing: exp(_LOWEST) is 0.
    highest = jnp.maximum(sums.highest, jnp.max(jnp.where(is_new, z, _LOWEST), axis=1))
    moved = sums.highest - highest  # sums so far are relative to the old highest logit
    shifted = jnp.where(is_new, z - highest[:, None], _LOWEST)
    e = jnp.exp(shifted)
    total, weighted = _pair_sums(e, e * shifted)
    gap = sums.gap
    if reference_z is not None:
        gap = gap * jnp.exp(moved) + jnp.sum(e * (z - reference_z), axis=1)
    return _LogitSums(
        highest=highest,
        total=sums.total * jnp.exp(moved) + total,
        weighted=(sums.weighted + sums.total * moved) * jnp.exp(moved) + weighted,
        gap=gap,
        target=target,
    )


def _combine(sums: _LogitSums, axes: tuple[str, ...]) -> _LogitSums:
    """Combine the sums of devices, each over its own columns, to sums over all columns."""
    # The sums of each device are made relative to the highest logit of all devices first.
    highest = jax.lax.pmax(sums.highest, axes)
    moved = sums.highest - highest
    scale = jnp.exp(moved)
    weighted = (sums.weighted + sums.total * moved) * scale
    return _LogitSums(
        highest,
        *jax.lax.psum((sums.total * scale, weighted, sums.gap * scale, sums.target), axes),
    )


def _row_stats(sums: _LogitSums, reference: _LogitSums | None) -> RowStats:
    """Compute statistics from the sums over all columns.

    Differences of logits come first: beside a logit of 80 the rest of a sum loses digits.
    """
    log_total = jnp.log(sums.total)
    stats = RowStats(
        logprob=sums.target - sums.highest - log_total,
        # On shifted logits all terms are <= 0, so nothing cancels.
        entropy=log_total - sums.weighted / sums.total,
        lse=sums.highest + log_total,
        reference_logprob=None,
        kl=None,
        reference_lse=None,
    )
    if reference is None:
        return stats
    reference_log_total = jnp.log(reference.total)
    gap = reference.highest - sums.highest + (reference_log_total - log_total)
    return stats._replace(
        reference_logprob=reference.target - reference.highest - reference_log_total,
        kl=sums.gap / sums.total + gap,
        reference_lse=reference.highest + reference_log_total,
    )


def no_gradient(head: Array, layout: TileLayout) -> Array | None:
    """Return the array that `sweep_gradient` adds to: zeros like the head; None if it is frozen."""
    return None if layout.frozen else jnp.zeros(head.shape, jnp.float32)


# Logits of a row tile, [column tiles, R, C] for the policy and for the reference; or nothing.
Kept = tuple[Array, ...]


def empty_tiles(heads: Heads, layout: TileLayout) -> Kept:
    """Return room for the logits that sweep 1 keeps."""
    if not layout.keep:
        return ()
    shape = (layout.num_column_tiles(heads.policy), layout.rows, layout.columns)
    return tuple(jnp.zeros(shape, jnp.float32) for head in heads if head is not None)


def _tile_logits(
    rows: RowTile, heads: Heads, i: Array, layout: TileLayout
) -> tuple[Array, Array | None]:
    """Return the logits of column tile i, of the policy and of the reference."""
    weights, _ = _column_tile(heads.policy, i, layout)
    z = _logits(rows.hidden, weights, rows.temperature, layout)
    if heads.reference is None or rows.reference_hidden is None:
        return z, None
    weights, _ = _column_tile(heads.reference, i, layout)
    return z, _logits(rows.reference_hidden, weights, rows.temperature, layout)


def sweep_statistics(
    rows: RowTile, heads: Heads, kept: Kept, layout: TileLayout
) -> tuple[RowStats, Kept]:
    """Run sweep 1: return statistics of a row tile, and its logits if the layout keeps them.

    Args:
        rows: The row tile.
        heads: Heads of the policy and of the reference.
        kept: Room for the logits, from `empty_tiles`.
        layout: How the head is stored and cut.
    """
    columns = jnp.arange(layout.columns)
    Carry = tuple[_LogitSums, _LogitSums | None, Kept]

    def add_column_tile(i: Array, carry: Carry) -> Carry:
        sums, reference, kept = carry
        _, start = _column_tile(heads.policy, i, layout)
        z, reference_z = _tile_logits(rows, heads, i, layout)
        is_new = _is_new(i, start, layout)
        # A target in another tile, or on another device, equals no column here.
        is_target = (columns == (rows.targets - start)[:, None]) & is_new
        if reference is not None and reference_z is not None:
            reference = _add_columns(reference, reference_z, None, is_target, is_new)
        logits = [x for x in (z, reference_z) if x is not None]
        if kept:
            kept = tuple(
                jax.lax.dynamic_update_index_in_dim(tiles, x, i, 0)
                for tiles, x in zip(kept, logits, strict=True)
            )
        return _add_columns(sums, z, reference_z, is_target, is_new), reference, kept

    zeros = jnp.zeros(layout.rows, jnp.float32)
    start = _LogitSums(jnp.full_like(zeros, _LOWEST), zeros, zeros, zeros, zeros)
    has_reference = heads.reference is not None
    carry = (start, start if has_reference else None, kept)
    num_tiles = layout.num_column_tiles(heads.policy)
    sums, reference, kept = jax.lax.fori_loop(0, num_tiles, add_column_tile, carry)
    if layout.axes:
        sums = _combine(sums, layout.axes)
        reference = _combine(reference, layout.axes) if reference is not None else None
    return _row_stats(sums, reference), kept


def _logit_slopes(
    z: Array, reference_z: Array | None, is_target: Array, stats: RowStats, slopes: Slopes
) -> Float[Array, "R C"]:
    """Return d loss / dz; the equation stands at the top of this file."""
    logp = z - stats.lse[:, None]
    factor = slopes.logprob[:, None] + slopes.entropy[:, None] * (logp + stats.entropy[:, None])
    if reference_z is not None and slopes.kl is not None:
        assert stats.reference_lse is not None and stats.kl is not None
        # log p - log q, with log q = reference_z - reference_lse.
        log_ratio = logp - reference_z + stats.reference_lse[:, None]
        factor = factor - slopes.kl[:, None] * (log_ratio - stats.kl[:, None])
    return jnp.where(is_target, slopes.logprob[:, None], 0.0) - jnp.exp(logp) * factor


def _raw_slopes(dz: Array, z: Array, temperature: Array, softcap: float | None) -> Array:
    """Return d loss / d logits before softcap and temperature."""
    if softcap is not None:
        # z temperature is the capped logit c tanh(x / c), whose derivative by x is 1 - tanh^2.
        dz = dz * (1.0 - jnp.square(z * temperature[:, None] / softcap))
    return dz / temperature[:, None]


def sweep_gradient(
    rows: RowTile,
    heads: Heads,
    *,
    kept: Kept,
    stats: RowStats,
    slopes: Slopes,
    d_head: Float[Array, "D V"] | None,
    layout: TileLayout,
) -> tuple[Float[Array, "R D"], Float[Array, "D V"] | None]:
    """Run sweep 2: return d_hidden of a row tile, and `d_head` with its share added; float32.

    Args:
        rows: The row tile.
        heads: Heads of the policy and of the reference.
        kept: Logits that sweep 1 kept; empty to compute them again.
        stats: Statistics from sweep 1.
        slopes: Derivatives of the loss by the statistics.
        d_head: Gradient of the head so far; None for a frozen head.
        layout: How the head is stored and cut.
    """
    columns = jnp.arange(layout.columns)
    axis = 0 if layout.transposed else 1

    def add_column_tile(i: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        d_hidden, d_head = carry
        weights, start = _column_tile(heads.policy, i, layout)
        if kept:
            # The policy's logits, and the reference's if there is one.
            z, *rest = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in kept)
            reference_z = rest[0] if rest else None
        else:
            z, reference_z = _tile_logits(rows, heads, i, layout)
        is_target = columns == (rows.targets - start)[:, None]
        dz = _logit_slopes(z, reference_z, is_target, stats, slopes)
        dz = _raw_slopes(dz, z, rows.temperature, layout.softcap)
        # A last tile that was moved back has columns that an earlier tile has already added.
        dz = jnp.where(_is_new(i, start, layout), dz, 0.0).astype(rows.hidden.dtype)
        if d_head is not None:
            d_weights = _outer(rows.hidden, dz, layout.transposed)
            d_weights += jax.lax.dynamic_slice_in_dim(d_head, start, layout.columns, axis)
            d_head = jax.lax.dynamic_update_slice_in_dim(d_head, d_weights, start, axis)
        contract = ((1,), (axis,))
        return d_hidden + jax.lax.dot_general(
            dz,
            weights.astype(dz.dtype),
            (contract, ((), ())),
            preferred_element_type=jnp.float32,
        ), d_head

    zeros = jnp.zeros(rows.hidden.shape, jnp.float32)
    num_tiles = layout.num_column_tiles(heads.policy)
    return jax.lax.fori_loop(0, num_tiles, add_column_tile, (zeros, d_head))


def _outer(hidden: Array, dz: Array, transposed: bool) -> Array:
    """Return hidden^T dz [D, C], or its transpose [C, D]."""
    sides = (dz, hidden) if transposed else (hidden, dz)
    contract = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(*sides, contract, preferred_element_type=jnp.float32)
