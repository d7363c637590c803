"""The two sweeps of the head over tiles of the vocabulary, for one block of rows on one device.

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

_LOWEST = -1e30  # of logits that are not there; finite, so that no inf - inf can arise
_LANES = 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the head is stored and cut.

    Attributes:
        rows: R, rows of a block.
        columns: C, columns of a tile.
        keep: Sweep 1 keeps its logits for sweep 2.
        transposed: The head is stored [V, D].
        softcap: logits = softcap * tanh(logits / softcap), before the temperature; None without.
        axes: Mesh axes that the vocabulary is split over.
        frozen: The head's gradient is not made.
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

    def num_tiles(self, head: Array) -> int:
        return -(-self.vocab_size(head) // self.columns)


class Block(NamedTuple):
    """R rows."""

    hidden: Float[Array, "R D"]
    targets: Int[Array, " R"]  # counted from this device's first column
    temperature: Float[Array, " R"]
    reference_hidden: Float[Array, "R D"] | None


class Heads(NamedTuple):
    """[D, V], or [V, D] where `Layout.transposed`; V is this device's columns."""

    policy: Array
    reference: Array | None


class RowStats(NamedTuple):
    """float32 [R]. The last three are None without a reference."""

    logprob: Array
    entropy: Array
    lse: Array
    reference_logprob: Array | None
    kl: Array | None
    reference_lse: Array | None


class Slopes(NamedTuple):
    """d loss / d (logprob, entropy, kl), float32 [R]."""

    logprob: Array
    entropy: Array
    kl: Array | None


class _Sums(NamedTuple):
    """Online sums of a policy's logits over the columns seen so far."""

    highest: Array  # m
    total: Array  # sum e^(z-m)
    weighted: Array  # sum e^(z-m) (z-m); for the policy under training only
    gap: Array  # sum e^(z-m) (z - z of the reference)
    target: Array  # z of the target, 0 until it is seen


def _slice(head: Array, i: Array, layout: Layout) -> tuple[Array, Array]:
    """Tile i and its first column; the last tile is moved back, so that it ends with the head."""
    axis = 0 if layout.transposed else 1
    start = jnp.minimum(i * layout.columns, layout.vocab_size(head) - layout.columns)
    return jax.lax.dynamic_slice_in_dim(head, start, layout.columns, axis), start


def _is_new(i: Array, start: Array, layout: Layout) -> Bool[Array, " C"]:
    """Columns that no earlier tile had: all of them, but in a last tile that was moved back."""
    return start + jnp.arange(layout.columns) >= i * layout.columns


def _logits(
    hidden: Array, weights: Array, temperature: Array, layout: Layout
) -> Float[Array, "R C"]:
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
    """Sums over the columns of two [R, C] in one pass over memory."""

    def add(a: Any, b: Any) -> Any:
        return a[0] + b[0], a[1] + b[1]

    def sums(x: Array, y: Array, axis: int) -> tuple[Array, Array]:
        zero = jnp.zeros((), x.dtype)
        return jax.lax.reduce((x, y), (zero, zero), add, (axis,))

    def in_lanes(x: Array, y: Array) -> tuple[Array, Array]:
        """XLA's CPU backend vectorises a sum over columns only if lanes are kept apart first."""
        lanes = (x.shape[0], -1, _LANES)
        return sums(*sums(x.reshape(lanes), y.reshape(lanes), 1), 1)

    if x.shape[1] % _LANES:
        return sums(x, y, 1)
    return jax.lax.platform_dependent(x, y, cpu=in_lanes, default=lambda x, y: sums(x, y, 1))


def _add_tile(
    sums: _Sums, z: Array, reference_z: Array | None, is_target: Array, is_new: Array
) -> _Sums:
    """The sums with a tile of logits more."""
    target = sums.target + jnp.sum(jnp.where(is_target, z, 0.0), axis=1)
    highest = jnp.maximum(sums.highest, jnp.max(jnp.where(is_new, z, _LOWEST), axis=1))
    moved = sums.highest - highest
    shifted = jnp.where(is_new, z - highest[:, None], _LOWEST)
    e = jnp.exp(shifted)
    total, weighted = _pair_sums(e, e * shifted)
    gap = sums.gap
    if reference_z is not None:
        gap = gap * jnp.exp(moved) + jnp.sum(e * (z - reference_z), axis=1)
    return _Sums(
        highest,
        sums.total * jnp.exp(moved) + total,
        (sums.weighted + sums.total * moved) * jnp.exp(moved) + weighted,
        gap,
        target,
    )


def _combine(sums: _Sums, axes: tuple[str, ...]) -> _Sums:
    """Sums over the columns of all devices."""
    highest = jax.lax.pmax(sums.highest, axes)
    moved = sums.highest - highest
    scale = jnp.exp(moved)
    weighted = (sums.weighted + sums.total * moved) * scale
    return _Sums(
        highest,
        *jax.lax.psum((sums.total * scale, weighted, sums.gap * scale, sums.target), axes),
    )


def _row_stats(sums: _Sums, reference: _Sums | None) -> RowStats:
    """Differences of logits come first: beside a logit of 80 the rest of a sum loses digits."""
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


def no_gradient(head: Array, layout: Layout) -> Array | None:
    """What `sweep_gradient` adds to: zeros like the head; nothing where that is frozen."""
    return None if layout.frozen else jnp.zeros(head.shape, jnp.float32)


Kept = tuple[Array, ...]  # logits of the policy, and of the reference, each [tiles, R, C]


def empty_tiles(heads: Heads, layout: Layout) -> Kept:
    """Room for what sweep 1 keeps: nothing, or the logits of a block."""
    if not layout.keep:
        return ()
    shape = (layout.num_tiles(heads.policy), layout.rows, layout.columns)
    return tuple(jnp.zeros(shape, jnp.float32) for head in heads if head is not None)


def _tile_logits(
    block: Block, heads: Heads, i: Array, layout: Layout
) -> tuple[Array, Array | None]:
    """z of tile i, of the policy and of the reference."""
    weights, _ = _slice(heads.policy, i, layout)
    z = _logits(block.hidden, weights, block.temperature, layout)
    if heads.reference is None or block.reference_hidden is None:
        return z, None
    weights, _ = _slice(heads.reference, i, layout)
    return z, _logits(block.reference_hidden, weights, block.temperature, layout)


def sweep_statistics(
    block: Block, heads: Heads, kept: Kept, layout: Layout
) -> tuple[RowStats, Kept]:
    """Sweep 1: statistics of a block of rows, and its logits where the layout keeps them."""
    columns = jnp.arange(layout.columns)

    def tile(i: Array, carry: tuple[_Sums, _Sums | None, Kept]) -> tuple[_Sums, _Sums | None, Kept]:
        sums, reference, kept = carry
        _, start = _slice(heads.policy, i, layout)
        z, reference_z = _tile_logits(block, heads, i, layout)
        is_new = _is_new(i, start, layout)
        is_target = (columns == (block.targets - start)[:, None]) & is_new
        if reference is not None and reference_z is not None:
            reference = _add_tile(reference, reference_z, None, is_target, is_new)
        logits = [x for x in (z, reference_z) if x is not None]
        if kept:
            kept = tuple(
                jax.lax.dynamic_update_index_in_dim(tiles, x, i, 0)
                for tiles, x in zip(kept, logits, strict=True)
            )
        return _add_tile(sums, z, reference_z, is_target, is_new), reference, kept

    zeros = jnp.zeros(layout.rows, jnp.float32)
    start = _Sums(jnp.full_like(zeros, _LOWEST), zeros, zeros, zeros, zeros)
    has_reference = heads.reference is not None
    carry = (start, start if has_reference else None, kept)
    sums, reference, kept = jax.lax.fori_loop(0, layout.num_tiles(heads.policy), tile, carry)
    if layout.axes:
        sums = _combine(sums, layout.axes)
        reference = _combine(reference, layout.axes) if reference is not None else None
    return _row_stats(sums, reference), kept


def _logit_slopes(
    z: Array, reference_z: Array | None, is_target: Array, stats: RowStats, slopes: Slopes
) -> Float[Array, "R C"]:
    """d loss / dz; the equation stands at the top."""
    logp = z - stats.lse[:, None]
    factor = slopes.logprob[:, None] + slopes.entropy[:, None] * (logp + stats.entropy[:, None])
    if reference_z is not None and slopes.kl is not None:
        assert stats.reference_lse is not None and stats.kl is not None
        log_ratio = logp - reference_z + stats.reference_lse[:, None]
        factor = factor - slopes.kl[:, None] * (log_ratio - stats.kl[:, None])
    return jnp.where(is_target, slopes.logprob[:, None], 0.0) - jnp.exp(logp) * factor


def _raw_slopes(dz: Array, z: Array, temperature: Array, softcap: float | None) -> Array:
    """d loss / d logits before softcap and temperature."""
    if softcap is not None:
        dz = dz * (1.0 - jnp.square(z * temperature[:, None] / softcap))
    return dz / temperature[:, None]


def sweep_gradient(
    block: Block,
    heads: Heads,
    kept: Kept,
    stats: RowStats,
    slopes: Slopes,
    d_head: Float[Array, "D V"] | None,
    layout: Layout,
) -> tuple[Float[Array, "R D"], Float[Array, "D V"] | None]:
    """Sweep 2: d_hidden of a block, and `d_head` with the block's share added; float32."""
    columns = jnp.arange(layout.columns)
    axis = 0 if layout.transposed else 1

    def tile(i: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        d_hidden, d_head = carry
        weights, start = _slice(heads.policy, i, layout)
        if kept:
            z, *rest = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in kept)
            reference_z = rest[0] if rest else None
        else:
            z, reference_z = _tile_logits(block, heads, i, layout)
        is_target = columns == (block.targets - start)[:, None]
        dz = _logit_slopes(z, reference_z, is_target, stats, slopes)
        dz = _raw_slopes(dz, z, block.temperature, layout.softcap)
        # Columns of a moved tile that an earlier one had are done already.
        dz = jnp.where(_is_new(i, start, layout), dz, 0.0).astype(block.hidden.dtype)
        if d_head is not None:
            d_weights = _outer(block.hidden, dz, layout.transposed)
            d_weights += jax.lax.dynamic_slice_in_dim(d_head, start, layout.columns, axis)
            d_head = jax.lax.dynamic_update_slice_in_dim(d_head, d_weights, start, axis)
        contract = ((1,), (axis,))
        return d_hidden + jax.lax.dot_general(
            dz,
            weights.astype(dz.dtype),
            (contract, ((), ())),
            preferred_element_type=jnp.float32,
        ), d_head

    zeros = jnp.zeros(block.hidden.shape, jnp.float32)
    return jax.lax.fori_loop(0, layout.num_tiles(heads.policy), tile, (zeros, d_head))


def _outer(hidden: Array, dz: Array, transposed: bool) -> Array:
    """hidden^T dz [D, C], or its transpose."""
    sides = (dz, hidden) if transposed else (hidden, dz)
    contract = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(*sides, contract, preferred_element_type=jnp.float32)
