"""The device's side of one call: parameters in decode layout, the cache, and the two programs."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srft_jax.config import ModelConfig
from srft_jax.mesh import largest_of_processes, rows_of_all, rows_of_process
from srft_jax.models.decoder import Params, Runtime
from srft_jax.rollout.cache import CacheShape, empty_cache, on_shards, resized
from srft_jax.rollout.packing import Placed, pack_prompts
from srft_jax.rollout.plan import Plan, capacity_for
from srft_jax.rollout.requests import SamplingConfig
from srft_jax.rollout.sampler import Drawn, Program, RowInputs, SamplerState, decode, prefill
from srft_jax.rollout.slots import Placement, Slots


class Engine:
    """Runs what `slots` says. Every process calls every method, in the same order.

    Args:
        prefill_params: Of the policy, layers stacked as the trainer has them.
        decode_params: The same as `rollout.params.decode_params` returns them.
        model_config: Architecture.
        config: How to sample.
        plan: Sizes.
        key: Of this process's requests.
        mesh: Devices; None for the default one.
        with_forced: Some request has forced tokens, whose log-probs a prefill then computes.
    """

    def __init__(
        self,
        prefill_params: Params,
        decode_params: Params,
        model_config: ModelConfig,
        config: SamplingConfig,
        plan: Plan,
        key: jax.Array,
        mesh: Mesh | None,
        with_forced: bool,
    ) -> None:
        self._mesh, self._plan, self._with_forced = mesh, plan, with_forced
        self._prefill_params, self._decode_params = prefill_params, decode_params
        self._program = Program(
            model_config,
            Runtime(dtype=config.dtype, attention=config.attention),
            config.temperature,
            config.truncation,
        )
        shape = CacheShape(
            rows=plan.shards * plan.rows,
            prompts=plan.shards * plan.prompts,
            lanes=plan.lanes,
            prompt_capacity=capacity_for(1),
            capacity=0,
            segment=config.segment,
        )
        self._key = np.asarray(jax.random.bits(key, (2,), "uint32"))
        with self._in_mesh():
            self._state = _empty_state(model_config, shape, config.dtype)

    def prefill(self, slots: Slots, placements: Sequence[Placement]) -> None:
        """Runs new prompts and waits for them."""
        needed, with_new = largest_of_processes(slots.longest_prompt, bool(placements))
        if not with_new:
            return
        cache = self._state.cache
        self._resize(_fitted(cache.prompt_values[0].shape[2], needed), None)
        passes = pack_prompts(
            placements,
            shards=self._plan.local_shards,
            num_slots=self._plan.prompts,
            with_forced=self._with_forced,
        )
        for packed, placed in passes:
            with self._in_mesh():
                prompts, stats = prefill(
                    self._prefill_params,
                    self._state.prompts,
                    rows_of_all(self._mesh, packed),
                    program=self._program,
                )
            self._state = self._state.with_prompts(prompts)
            if stats is not None:
                _note_forced(placed, *map(rows_of_process, stats))
        jax.block_until_ready(self._state.prompt_hidden)

    def start(self, slots: Slots, enough_finished: int) -> Drawn:
        """Starts a segment of decode steps; its result is not waited for."""
        (longest,) = largest_of_processes(slots.longest_own)
        cache = self._state.cache
        segment = cache.recent_values[0].shape[2]
        needed = max(longest, segment) if longest else 0  # what is written is a whole segment long
        self._resize(None, _fitted(cache.values[0].shape[2], needed))
        names = ("prompt_lengths", "lengths", "row_of_lane", "lane_of_row")
        index = dict(zip(names, rows_of_all(self._mesh, slots.index()), strict=True))
        cache = dataclasses.replace(self._state.cache, **index)
        with self._in_mesh():
            self._state, drawn = decode(
                self._decode_params,
                dataclasses.replace(self._state, cache=cache),
                rows_of_all(self._mesh, row_inputs(slots, self._key, self._plan.stop_ids)),
                np.int32(enough_finished),
                program=self._program,
            )
        return drawn

    def finish(self, running: Drawn) -> Drawn:
        """Waits for a segment; the rows of this process."""
        return jax.tree.map(rows_of_process, running)

    def _resize(self, prompt_capacity: int | None, capacity: int | None) -> None:
        cache = self._state.cache
        wanted = (
            cache.prompt_values[0].shape[2] if prompt_capacity is None else prompt_capacity,
            cache.values[0].shape[2] if capacity is None else capacity,
        )
        with self._in_mesh():
            self._state = dataclasses.replace(self._state, cache=resized(cache, *wanted))

    def _in_mesh(self) -> contextlib.AbstractContextManager[object]:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()


def row_inputs(slots: Slots, key: np.ndarray, num_stop_ids: int) -> RowInputs:
    """What the running rows are to do; the others idle."""
    num_rows = slots.num_rows
    zeros: Callable[..., Any] = functools.partial(np.zeros, num_rows, dtype=np.int32)
    keys: Any = np.broadcast_to(key, (num_rows, len(key)))
    stop_ids: Any = np.full((num_rows, num_stop_ids), -1, np.int32)
    inputs = RowInputs(
        keys=keys,
        requests=zeros(),
        members=zeros(),
        counts=zeros(),
        limits=zeros(),
        positions=zeros(),
        stop_ids=stop_ids,
        live=zeros(dtype=bool),
    )
    for number, row in slots.numbered():
        inputs.requests[number] = row.job.number
        inputs.members[number] = row.job.member
        inputs.counts[number] = row.count
        inputs.limits[number] = row.job.limit
        inputs.positions[number] = len(row.prompt.tokens) + row.num_own
        inputs.stop_ids[number, : len(row.job.stop_ids)] = row.job.stop_ids
        inputs.live[number] = row.count < row.job.limit
    return inputs


def _note_forced(placed: Sequence[Placed], logprobs: np.ndarray, entropies: np.ndarray) -> None:
    for one in placed:
        prompt = one.placement.prompt
        end = one.start + len(prompt.tokens) - 1  # what stands at t is of the token at t + 1
        where = (one.row, slice(end - prompt.num_forced, end))
        prompt.forced_floats = np.stack([logprobs[where], entropies[where], logprobs[where]])


def _fitted(current: int, needed: int) -> int:
    """Grown to what is needed; made smaller only where it then is less than half as large."""
    wanted = capacity_for(needed)
    return wanted if wanted > current or 2 * wanted < current else current


@functools.partial(jax.jit, static_argnames=("config", "shape", "dtype"))
def _empty_state(config: ModelConfig, shape: CacheShape, dtype: str) -> SamplerState:
    return on_shards(
        SamplerState(
            cache=empty_cache(config, shape, dtype),
            prompt_hidden=jnp.zeros((shape.prompts, config.dim), dtype),
            hidden=jnp.zeros((shape.rows, config.dim), dtype),
        )
    )
