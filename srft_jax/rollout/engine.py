"""The device's side of a sampler that is busy: the cache, and the two programs that work on it."""

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
from srft_jax.models.decoder import Params
from srft_jax.rollout.cache import (
    CacheShape,
    empty_cache,
    grown_by_shard,
    on_shards,
    resized,
    with_more_rows,
)
from srft_jax.rollout.packing import Placed, pack_prompts
from srft_jax.rollout.programs import Drawn, RowInputs, SamplerState, Statics, decode, prefill
from srft_jax.rollout.sizes import SamplerSizes, capacity_for
from srft_jax.rollout.slots import Placement, Slots


class Engine:
    """Runs what `Slots` says. Every process calls every method, in the same order.

    Programs run on this mesh, or on none, whichever mesh surrounds the call.

    Args:
        prefill_params: Parameters of the policy, layers stacked as the trainer has them.
        decode_params: The same as `decode_layout.decode_params` returns them.
        statics: What the programs are compiled for.
        sizes: Rows and prompts.
        segment: Most decode steps of a segment.
        mesh: Devices as they are laid out for decoding; None for the default one.

    Attributes:
        sizes: Rows and prompts there is room for.
        prefill_params: As given.
        decode_params: As given.
        state: Cache and hidden states on the device.
        prompt_tokens: Tokens that this process has prefilled so far.
    """

    def __init__(
        self,
        prefill_params: Params,
        decode_params: Params,
        statics: Statics,
        sizes: SamplerSizes,
        *,
        segment: int,
        mesh: Mesh | None,
    ) -> None:
        self._mesh, self._statics, self.sizes = mesh, statics, sizes
        self.prefill_params, self.decode_params = prefill_params, decode_params
        self.prompt_tokens = 0
        shape = CacheShape(
            rows=sizes.shards * sizes.rows,
            prompts=sizes.shards * sizes.prompts,
            lanes=sizes.lanes,
            prompt_capacity=capacity_for(1),
            capacity=0,
            segment=segment,
        )
        with jax.set_mesh(mesh):
            self.state = _empty_state(statics.config, shape, statics.runtime.dtype)

    def grow(self, sizes: SamplerSizes) -> None:
        """Make room for more rows and prompts beside the running ones."""
        self.sizes = sizes
        rows, prompts, shards = sizes.rows, sizes.prompts, sizes.shards
        state = self.state
        with jax.set_mesh(self._mesh):
            self.state = SamplerState(
                cache=with_more_rows(state.cache, rows=rows, prompts=prompts, shards=shards),
                prompt_hidden=grown_by_shard(state.prompt_hidden, prompts, shards),
                hidden=grown_by_shard(state.hidden, rows, shards),
            )

    def prefill(self, slots: Slots, placements: Sequence[Placement], with_forced: bool) -> None:
        """Run new prompts and wait for them.

        Args:
            slots: Rows and prompts of this process.
            placements: New prompts of this process.
            with_forced: Some process has forced tokens, whose log-probs a prefill then computes.
        """
        needed, with_new = largest_of_processes(slots.longest_prompt, bool(placements))
        if not with_new:
            return
        cache = self.state.cache
        self._resize(_fitted(cache.prompt_values[0].shape[2], needed), None)
        self.prompt_tokens += sum(len(placement.prompt.tokens) for placement in placements)
        passes = pack_prompts(
            placements,
            shards=self.sizes.local_shards,
            num_slots=self.sizes.prompts,
            with_forced=with_forced,
        )
        for packed, placed in passes:
            with jax.set_mesh(self._mesh):
                prompts, stats = prefill(
                    self.prefill_params,
                    self.state.prompts,
                    rows_of_all(self._mesh, packed),
                    statics=self._statics,
                )
            self.state = self.state.with_prompts(prompts)
            if stats is not None:
                _note_forced(placed, *map(rows_of_process, stats))
        jax.block_until_ready(self.state.prompt_hidden)

    def start(self, slots: Slots, enough_finished: int) -> Drawn:
        """Start a segment of decode steps; its result is not waited for."""
        (longest,) = largest_of_processes(slots.longest_own)
        cache = self.state.cache
        segment = cache.recent_values[0].shape[2]
        needed = max(longest, segment) if longest else 0  # what is settled is a whole segment long
        self._resize(None, _fitted(cache.values[0].shape[2], needed))
        names = ("prompt_lengths", "lengths", "row_of_lane", "lane_of_row")
        index = dict(zip(names, rows_of_all(self._mesh, slots.index()), strict=True))
        cache = dataclasses.replace(self.state.cache, **index)
        with jax.set_mesh(self._mesh):
            self.state, drawn = decode(
                self.decode_params,
                dataclasses.replace(self.state, cache=cache),
                rows_of_all(self._mesh, row_inputs(slots, self.sizes.stop_ids)),
                np.int32(enough_finished),
                statics=self._statics,
            )
        return drawn

    def finish(self, running: Drawn) -> Drawn:
        """Wait for a segment; return the rows of this process."""
        return jax.tree.map(rows_of_process, running)

    def _resize(self, prompt_capacity: int | None, capacity: int | None) -> None:
        cache = self.state.cache
        sizes = (
            cache.prompt_values[0].shape[2] if prompt_capacity is None else prompt_capacity,
            cache.values[0].shape[2] if capacity is None else capacity,
        )
        assert sizes[0] <= self.sizes.prompt_capacity and sizes[1] <= self.sizes.capacity
        with jax.set_mesh(self._mesh):
            self.state = dataclasses.replace(self.state, cache=resized(cache, *sizes))


def row_inputs(slots: Slots, num_stop_ids: int) -> RowInputs:
    """Return what the running rows are to do; the others idle."""
    num_rows = slots.num_rows
    zeros: Callable[..., Any] = functools.partial(np.zeros, num_rows, dtype=np.int32)
    keys: Any = np.zeros((num_rows, 2), np.uint32)
    stop_ids: Any = np.full((num_rows, num_stop_ids), -1, np.int32)
    temperatures: Any = np.ones(num_rows, np.float32)
    inputs = RowInputs(
        keys=keys,
        groups=zeros(),
        members=zeros(),
        counts=zeros(),
        limits=zeros(),
        positions=zeros(),
        stop_ids=stop_ids,
        temperatures=temperatures,
        live=zeros(dtype=bool),
    )
    for number, row in slots.numbered():
        completion = row.completion
        inputs.keys[number] = completion.key
        inputs.groups[number] = completion.group
        inputs.members[number] = completion.member
        inputs.counts[number] = row.count
        inputs.limits[number] = completion.limit
        inputs.positions[number] = len(row.prompt.tokens) + row.num_own
        inputs.stop_ids[number, : len(completion.request.stop_ids)] = completion.request.stop_ids
        inputs.temperatures[number] = completion.temperature
        inputs.live[number] = row.count < completion.limit
    return inputs


def _note_forced(placed: Sequence[Placed], logprobs: np.ndarray, entropies: np.ndarray) -> None:
    for place in placed:
        prompt = place.placement.prompt
        end = place.start + len(prompt.tokens) - 1  # entry t scores token t + 1
        where = (place.row, slice(end - prompt.num_forced, end))
        prompt.forced_stats = np.stack([logprobs[where], entropies[where]])


def _fitted(current: int, needed: int) -> int:
    """Grow to what is needed; shrink only where the capacity then is less than half as large."""
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
