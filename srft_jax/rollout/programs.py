"""Device side of the sampler: two programs, prefill and a segment of decode steps.

What a row draws depends on its own key and the number of its token alone, neither on its place nor
on its neighbours. Everything that changes between segments is an argument, temperatures included;
what is static, and so compiled anew, is a cache's capacity (one of a few) and `Statics`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from srft_jax.batch import KVCache
from srft_jax.config import ModelConfig, Truncation
from srft_jax.mesh import by_row_shard, constrained, split_axes
from srft_jax.models.decoder import (
    Params,
    Rotary,
    Runtime,
    forward_one,
    forward_with_keys,
    output_head,
    rotary_of,
)
from srft_jax.ops.head import TokenStats, token_stats
from srft_jax.ops.layers import softcapped
from srft_jax.ops.rounding import ROUND_AS_WRITTEN
from srft_jax.rollout.cache import CacheWrites, on_shards, put_prompts, settle
from srft_jax.rollout.draw import draw_tokens, which_kinds


@dataclasses.dataclass(frozen=True)
class Statics:
    """What both programs are compiled for, besides the shapes of their arguments."""

    config: ModelConfig
    runtime: Runtime
    truncation: Truncation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptPrompts:
    """The part of the state that prefill reads and writes.

    Passed alone, so that prefill does not recompile when rows or own capacity change.
    """

    keys: tuple[Float[Array, "P K H S"], ...]  # of each layer
    values: tuple[Float[Array, "P K S H"], ...]
    hidden: Float[Array, "P D"]  # of each prompt's last token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """What stays on the device. Programs return a fresh one; the old one's buffers are donated."""

    cache: KVCache
    prompt_hidden: Float[Array, "P D"]  # of each prompt's last token
    # State of each row's last token, from which the next token is drawn.
    hidden: Float[Array, "R D"]

    @property
    def prompts(self) -> KeptPrompts:
        return KeptPrompts(self.cache.prompt_keys, self.cache.prompt_values, self.prompt_hidden)

    def with_prompts(self, prompts: KeptPrompts) -> "SamplerState":
        cache = dataclasses.replace(
            self.cache, prompt_keys=prompts.keys, prompt_values=prompts.values
        )
        return dataclasses.replace(self, cache=cache, prompt_hidden=prompts.hidden)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPrompts:
    """Prompts one after the other in rows, to be run in one forward pass."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    writes: CacheWrites
    # The forced token that follows each token, -1 elsewhere; None where no request forces any.
    forced: Int[Array, "B T"] | None
    temperatures: Float[Array, "B T"] | None  # that forced tokens are scored at, above 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowInputs:
    """The host's view of the rows before a segment, with at most E stop ids each."""

    draw_keys: UInt[Array, "R 2"]  # for threefry: other generators' draws depend on neighbours
    groups: Int[Array, " R"]
    members: Int[Array, " R"]  # within the group
    counts: Int[Array, " R"]  # tokens of the completion so far, forced ones included
    limits: Int[Array, " R"]  # tokens it may have
    positions: Int[Array, " R"]  # of its next token
    stop_ids: Int[Array, "R E"]  # -1 fills
    temperatures: Float[Array, " R"]  # 0 is greedy
    live: Bool[Array, " R"]  # rows that draw; the others idle


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """Tokens of a segment: row r has drawn the first `counts[r]` of each line."""

    tokens: Int[Array, "R U"]
    logprobs: Float[Array, "R U"]
    entropies: Float[Array, "R U"]
    counts: Int[Array, " R"]
    stopped: Bool[Array, " R"]  # by a stop id
    steps: Int[Array, ""]


@functools.partial(
    jax.jit,
    static_argnames=("statics",),
    donate_argnames=("prompts",),
    compiler_options=ROUND_AS_WRITTEN,
)
def prefill(
    params: Params, prompts: KeptPrompts, packed: PackedPrompts, *, statics: Statics
) -> tuple[KeptPrompts, TokenStats | None]:
    """Run prompts once each and put their keys, values and last hidden states into their slots.

    Returns:
        Kept prompts, and log-probs and entropies [B, T] of forced tokens where there are any.
    """
    hidden, keys, values = forward_with_keys(
        params,
        statics.config,
        packed.tokens,
        packed.positions,
        packed.segment_ids,
        runtime=statics.runtime,
    )
    keys, values = (constrained(x, (None, "rows", "kv_heads", None, None)) for x in (keys, values))
    put = put_prompts(prompts.keys, prompts.values, keys, values, packed.writes)
    last = by_row_shard(_put_last)(prompts.hidden, hidden, packed.writes)
    prompts = on_shards(KeptPrompts(*put, last))
    if packed.forced is None or packed.temperatures is None:
        return prompts, None
    stats = token_stats(
        hidden.reshape(-1, hidden.shape[-1]),
        output_head(params, statics.config),
        jnp.maximum(packed.forced, 0).reshape(-1),
        mask=(packed.forced >= 0).reshape(-1),
        temperature=packed.temperatures.reshape(-1),
        softcap=statics.config.logit_softcap,
    )
    return prompts, on_shards(TokenStats(*(x.reshape(packed.forced.shape) for x in stats)))


def _put_last(
    kept: Float[Array, "P D"], hidden: Float[Array, "B T D"], writes: CacheWrites
) -> Float[Array, "P D"]:
    last = hidden[writes.row, writes.start + writes.length - 1]
    return kept.at[writes.prompt_slot].set(last, mode="drop")


@functools.partial(
    jax.jit,
    static_argnames=("statics",),
    donate_argnames=("state",),
    compiler_options=ROUND_AS_WRITTEN,
)
def decode(
    params: Params,
    state: SamplerState,
    rows: RowInputs,
    enough_finished: Int[Array, ""],
    *,
    statics: Statics,
) -> tuple[SamplerState, Drawn]:
    """Run a segment: decode steps until the recent part is full, no row is live, or enough ended.

    The last segment's tokens are settled first, so that a row's own part need not have room for
    this segment's, which every step would read.

    Args:
        params: As `rollout.decode_layout.decode_params` returns them.
        state: With room for the tokens of all segments before this one.
        rows: What each row is to do.
        enough_finished: The segment ends once so many rows have ended: waiting ones can start.
        statics: Architecture, precision, truncation.

    Returns:
        The state after the segment, and what each row has drawn.
    """
    hidden = by_row_shard(_hidden_to_draw_from)(state.hidden, state.prompt_hidden, state.cache)
    num_rows, segment = rows.live.shape[0], state.cache.recent_keys[0].shape[-1]
    num_live_at_start = jnp.sum(rows.live)

    def goes_on(loop: _Loop) -> Bool[Array, ""]:
        num_live = jnp.sum(loop.live)
        # The recent part has a column for the next step's token.
        has_room = loop.drawn.steps < segment
        # Some completion still draws.
        is_busy = num_live > 0
        # Fewer rows have become free than it takes to stop and let waiting completions in.
        is_too_early = num_live_at_start - num_live < enough_finished
        return has_room & is_busy & is_too_early

    step = functools.partial(
        _step,
        params=params,
        head=output_head(params, statics.config),
        rows=rows,
        uniforms=_uniforms(rows, segment),
        rotary=_rotary(rows, segment, statics.config),
        kinds=which_kinds(rows.temperatures, rows.live),
        statics=statics,
    )
    start = _Loop(
        cache=settle(state.cache),
        hidden=hidden,
        live=rows.live,
        drawn=_nothing_drawn(num_rows, segment),
    )
    loop = jax.lax.while_loop(goes_on, step, start)
    return on_shards((SamplerState(loop.cache, state.prompt_hidden, loop.hidden), loop.drawn))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """What a decode step changes: `hidden` and `live` are before the next draw."""

    cache: KVCache
    hidden: Float[Array, "R D"]
    live: Bool[Array, " R"]
    drawn: Drawn


def _nothing_drawn(num_rows: int, segment: int) -> Drawn:
    floats = jnp.zeros((num_rows, segment), jnp.float32)
    return Drawn(
        tokens=jnp.zeros((num_rows, segment), jnp.int32),
        logprobs=floats,
        entropies=floats,
        counts=jnp.zeros((num_rows,), jnp.int32),
        stopped=jnp.zeros((num_rows,), bool),
        steps=jnp.zeros((), jnp.int32),
    )


def _hidden_to_draw_from(
    hidden: Float[Array, "R D"], prompt_hidden: Float[Array, "P D"], cache: KVCache
) -> Float[Array, "R D"]:
    """Hidden state each row draws from next: its prompt's last one if it has no own tokens."""
    prompt = cache.lane_of_row // cache.row_of_lane.shape[1]
    return jnp.where((cache.lengths == 0)[:, None], prompt_hidden[prompt], hidden)


def _step(
    loop: _Loop,
    *,
    params: Params,
    head: Array,
    rows: RowInputs,
    uniforms: Float[Array, "U R"],
    rotary: Rotary,
    kinds: tuple[Array, Array],
    statics: Statics,
) -> _Loop:
    """Draw the next token of every row and run the decoder on it; idle rows go along."""
    drawn = loop.drawn
    logits = jnp.dot(
        loop.hidden, head.astype(loop.hidden.dtype), preferred_element_type=jnp.float32
    )
    logits = softcapped(_whole_rows(logits), statics.config.logit_softcap)
    new = on_shards(
        draw_tokens(
            logits, uniforms[drawn.steps], rows.temperatures, statics.truncation, kinds=kinds
        )
    )
    hidden, cache = forward_one(
        params,
        statics.config,
        new.token,
        jax.tree.map(lambda table: table[drawn.steps], rotary),
        loop.cache,
        statics.runtime,
    )
    stop = loop.live & jnp.any(new.token[:, None] == rows.stop_ids, axis=1)

    def record(lines: Array, column: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(lines, column[:, None], drawn.steps, axis=1)

    new_loop = _Loop(
        cache=cache,
        hidden=hidden,
        # A row goes on unless it has drawn a stop id or this token was the last it may have.
        live=loop.live & ~stop & (rows.counts + drawn.counts + 1 < rows.limits),
        drawn=Drawn(
            tokens=record(drawn.tokens, new.token),
            logprobs=record(drawn.logprobs, new.logprob),
            entropies=record(drawn.entropies, new.entropy),
            counts=drawn.counts + loop.live,
            stopped=drawn.stopped | stop,
            steps=drawn.steps + 1,
        ),
    )
    return on_shards(new_loop)


def _uniforms(rows: RowInputs, segment: int) -> Float[Array, "U R"]:
    """Token n of member m of group g is drawn with fold_in(fold_in(fold_in(key, g), m), n)."""

    def draws(key: Array, group: Array, member: Array, count: Array) -> Float[Array, " U"]:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, group), member)
        token_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, count + jnp.arange(segment))
        return jax.vmap(jax.random.uniform)(token_keys)

    return jax.vmap(draws, out_axes=1)(rows.draw_keys, rows.groups, rows.members, rows.counts)


def _rotary(rows: RowInputs, segment: int, config: ModelConfig) -> Rotary:
    """Rotary tables [U, R, 1, H / 2] of the tokens that rows may draw, step by step."""
    positions = rows.positions + jnp.arange(segment)[:, None]
    return rotary_of(config, positions[..., None])


def _whole_rows(logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """Each row's logits on one device, equally many rows on every device: then a draw is local."""
    mesh = jax.sharding.get_abstract_mesh()
    logits = constrained(logits, ("rows", "vocab"))
    axes = split_axes(mesh, "rows", 0) + split_axes(mesh, "vocab", 0)
    if not axes or logits.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return constrained(logits, ("rows", None))
    return jax.lax.with_sharding_constraint(logits, PartitionSpec(axes))
