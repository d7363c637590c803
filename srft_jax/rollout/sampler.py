"""Device side of the sampler: prefill, and a segment of decode steps.

Rows are padded on the left, so every row writes its next key to the same cache slot. A prompt is
prefilled once and its cache copied to the completions of its group. What a row draws depends on its
own key and step alone, neither on its slot nor on its neighbours.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srft_jax.batch import KVCache
from srft_jax.config import ModelConfig
from srft_jax.models.decoder import Params, Runtime, forward, init_cache, output_head
from srft_jax.rollout.sampling import draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wave:
    """What is fixed for a wave of B rows, with at most F forced tokens and E stop ids each."""

    keys: Array  # [B] one PRNG key a row
    forced: Int[Array, "B F"]  # -1 where nothing is forced
    limit: Int[Array, " B"]  # tokens a row may make
    stop_ids: Int[Array, "B E"]  # -1 fills


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decode step changes. A fresh one is returned; the old one's buffers are donated."""

    cache: KVCache
    hidden: Float[Array, "B D"]  # of the last token, from which the next is drawn
    positions: Int[Array, " B"]  # of the next token
    step: Int[Array, ""]  # tokens made so far
    tokens: Int[Array, "B C"]  # C tokens at most
    logprobs: Float[Array, "B C"]
    entropies: Float[Array, "B C"]
    lengths: Int[Array, " B"]  # tokens of each row so far
    done: Bool[Array, " B"]
    stopped: Bool[Array, " B"]  # done by a stop id


@functools.partial(jax.jit, static_argnames=("config", "runtime", "max_new", "room"))
def prefill(
    params: Params,
    prompts: Int[Array, "P S"],
    lengths: Int[Array, " P"],
    prompt_of_row: Int[Array, " B"],
    active: Bool[Array, " B"],
    *,
    config: ModelConfig,
    runtime: Runtime,
    max_new: int,
    room: int,
) -> DecodeState:
    """Runs each prompt once and hands its cache to its rows, with `room` free slots.

    Args:
        params: Of the policy.
        prompts: Padded on the left.
        lengths: Tokens of each prompt.
        prompt_of_row: Which prompt a row completes.
        active: Rows that are wanted; the others fill the shape.
        config: Architecture.
        runtime: Precision.
        max_new: Room for tokens in the state.
        room: Free cache slots.
    """
    num_prompts, width = prompts.shape
    start = (width - lengths)[:, None]
    slots = jnp.arange(width)[None, :]
    cache = init_cache(config, num_prompts, width, runtime.dtype)
    real = (slots >= start).astype(jnp.int32)
    out = forward(
        params, config, prompts, jnp.maximum(slots - start, 0), real, cache=cache, runtime=runtime
    )
    num_rows = prompt_of_row.shape[0]
    rows_cache = jax.tree.map(lambda x: x[prompt_of_row] if x.ndim else x, out.cache)
    return DecodeState(
        cache=grow(rows_cache, room),
        hidden=out.hidden[prompt_of_row, -1],
        positions=lengths[prompt_of_row],
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((num_rows, max_new), jnp.int32),
        logprobs=jnp.zeros((num_rows, max_new), jnp.float32),
        entropies=jnp.zeros((num_rows, max_new), jnp.float32),
        lengths=jnp.zeros((num_rows,), jnp.int32),
        done=~active,
        stopped=jnp.zeros((num_rows,), bool),
    )


@functools.partial(jax.jit, static_argnames=("room",))
def grow(cache: KVCache, room: int) -> KVCache:
    """The same cache with `room` more free slots."""
    pad = [(0, 0), (0, 0), (0, room), (0, 0)]
    return KVCache(
        keys=tuple(jnp.pad(x, pad) for x in cache.keys),
        values=tuple(jnp.pad(x, pad) for x in cache.values),
        segment_ids=jnp.pad(cache.segment_ids, [(0, 0), (0, room)]),
        length=cache.length,
    )


@functools.partial(
    jax.jit,
    static_argnames=("config", "runtime", "temperature", "steps"),
    donate_argnames=("state",),
)
def decode(
    params: Params,
    wave: Wave,
    state: DecodeState,
    *,
    config: ModelConfig,
    runtime: Runtime,
    temperature: float,
    steps: int,
) -> DecodeState:
    """Up to `steps` decode steps; ends early when every row is done."""
    head = output_head(params, config)
    last = state.step + steps

    def wanted(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < last) & ~jnp.all(state.done)

    def step(state: DecodeState) -> DecodeState:
        return _step(params, head, wave, state, config, runtime, temperature)

    return jax.lax.while_loop(wanted, step, state)


def _step(
    params: Params,
    head: Array,
    wave: Wave,
    state: DecodeState,
    config: ModelConfig,
    runtime: Runtime,
    temperature: float,
) -> DecodeState:
    """Draws the next token of every row and runs the decoder on it; rows that are done idle."""
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.step)))(
        wave.keys
    )
    is_forced = state.step < wave.forced.shape[1]
    column = jnp.minimum(state.step, wave.forced.shape[1] - 1)
    forced = jnp.where(
        is_forced, jax.lax.dynamic_index_in_dim(wave.forced, column, axis=1, keepdims=False), -1
    )
    drawn = draw(state.hidden, head, uniform, forced, temperature)

    stop = jnp.any(drawn.token[:, None] == wave.stop_ids, axis=1) & (forced < 0) & ~state.done
    lengths = state.lengths + ~state.done
    out = forward(
        params,
        config,
        drawn.token[:, None],
        state.positions[:, None],
        jnp.ones_like(state.positions)[:, None],
        cache=state.cache,
        runtime=runtime,
    )

    assert out.cache is not None

    def record(buffer: Array, column: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], state.step, axis=1)

    return DecodeState(
        cache=out.cache,
        hidden=out.hidden[:, 0],
        positions=state.positions + 1,
        step=state.step + 1,
        tokens=record(state.tokens, drawn.token),
        logprobs=record(state.logprobs, drawn.logprob),
        entropies=record(state.entropies, drawn.entropy),
        lengths=lengths,
        done=state.done | stop | (lengths >= wave.limit),
        stopped=state.stopped | stop,
    )
