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
from srft_jax.mesh import rows_of_all, rows_of_process
from srft_jax.models.decoder import Params
from srft_jax.rollout.cache import (
    CacheShape,
    empty_cache,
    grown_by_shard,
    on_shards,
    resized,
    with_more_rows,
)
from srft_jax.rollout.lock_step import Agreement
from srft_jax.rollout.packing import PackedAt, pack_prompts
from srft_jax.rollout.programs import Drawn, RowInputs, SamplerState, Statics, decode, prefill
from srft_jax.rollout.row_table import PrefillJob, RowTable
from srft_jax.rollout.sizes import SamplerSizes, capacity_for


class Engine:
    """Runs what `RowTable` says. Every process calls every method, in the same order.

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

    def prefill(self, jobs: Sequence[PrefillJob], agreed: Agreement) -> None:
        """Run new prompts and wait for them.

        Args:
            jobs: New prompts of this process.
            agreed: Lengths of all processes, and whether log-probs of forced tokens are needed.
        """
        if not agreed.longest_new:
            return
        cache = self.state.cache
        self._resize(_fitted(cache.prompt_values[0].shape[2], agreed.longest_prompt), None)
        passes = pack_prompts(
            jobs,
            shards=self.sizes.local_shards,
            num_prompt_slots=self.sizes.prompts,
            longest=agreed.longest_new,
            with_forced=bool(agreed.with_forced),
        )
        for packed, packed_at in passes:
            with jax.set_mesh(self._mesh):
                prompts, stats = prefill(
                    self.prefill_params,
                    self.state.prompts,
                    rows_of_all(self._mesh, packed),
                    statics=self._statics,
                )
            self.state = self.state.with_prompts(prompts)
            if stats is not None:
                _note_forced(packed_at, *map(rows_of_process, stats))
        jax.block_until_ready(self.state.prompt_hidden)

    def start(self, table: RowTable, agreed: Agreement, enough_finished: int) -> Drawn:
        """Start a segment of decode steps; its result is not waited for."""
        cache = self.state.cache
        segment = cache.recent_values[0].shape[2]
        # `settle` writes a whole segment at once, so the own part must be at least that long.
        needed = max(agreed.longest_own, segment) if agreed.longest_own else 0
        self._resize(None, _fitted(cache.values[0].shape[2], needed))
        index = rows_of_all(self._mesh, table.cache_index())
        cache = dataclasses.replace(self.state.cache, **index)
        with jax.set_mesh(self._mesh):
            self.state, drawn = decode(
                self.decode_params,
                dataclasses.replace(self.state, cache=cache),
                rows_of_all(self._mesh, row_inputs(table, self.sizes.stop_ids)),
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


def row_inputs(table: RowTable, num_stop_ids: int) -> RowInputs:
    """Return what the running rows are to do; the others idle."""
    num_rows = table.num_rows
    zeros: Callable[..., Any] = functools.partial(np.zeros, num_rows, dtype=np.int32)
    draw_keys: Any = np.zeros((num_rows, 2), np.uint32)
    stop_ids: Any = np.full((num_rows, num_stop_ids), -1, np.int32)
    temperatures: Any = np.ones(num_rows, np.float32)
    inputs = RowInputs(
        draw_keys=draw_keys,
        groups=zeros(),
        members=zeros(),
        counts=zeros(),
        limits=zeros(),
        positions=zeros(),
        stop_ids=stop_ids,
        temperatures=temperatures,
        live=zeros(dtype=bool),
    )
    for number, row in table.numbered():
        completion, request = row.completion, row.completion.request
        inputs.draw_keys[number] = completion.draw_key
        inputs.groups[number] = request.group
        inputs.members[number] = completion.member
        inputs.counts[number] = row.count
        inputs.limits[number] = request.max_new_tokens
        inputs.positions[number] = len(row.prompt.tokens) + row.num_own
        inputs.stop_ids[number, : len(request.stop_ids)] = request.stop_ids
        inputs.temperatures[number] = request.temperature
        # Forced tokens may be all that it may have.
        inputs.live[number] = row.count < request.max_new_tokens
    return inputs


def _note_forced(
    packed_at: Sequence[PackedAt], logprobs: np.ndarray, entropies: np.ndarray
) -> None:
    for entry in packed_at:
        prompt = entry.job.prompt
        end = entry.start + len(prompt.tokens) - 1  # entry t scores token t + 1
        where = (entry.row, slice(end - prompt.num_forced, end))
        prompt.forced_stats = np.stack([logprobs[where], entropies[where]])


def _fitted(current: int, needed: int) -> int:
    """Grow to what is needed; shrink only where the capacity then is less than half as large."""
    wanted = capacity_for(needed)
    # Each other size is a copy of the cache and may compile: a little too much room is kept.
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
