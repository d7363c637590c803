"""How many completions decode side by side, and what cache they need, within a memory budget."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srft_jax.config import ModelConfig, UsageError
from srft_jax.mesh import largest_of_processes, least_mib_left, row_shards, split_axes
from srft_jax.rollout.request import SamplingConfig
from srft_jax.rollout.row_table import RowTable, power_of_two

# Prompt slots per full group of rows: a group's slowest member holds its prompt's slot after the
# others have ended. At log-normal lengths the longest of 16 runs 3.6 times the mean, so four keep
# 94% of the rows busy. Each is read at every step, used or not.
_PROMPTS_PER_FULL_GROUP = 4
_SPARE_PROMPTS = 2  # few rows vary more: one group of 16 at a time keeps 97% busy instead of 89%

# MiB, where a device does not say what it has left (a CPU), and the share of it that is taken.
_UNKNOWN_LEFT = 2048
SHARE_OF_LEFT = 0.8

_LEAST_CAPACITY = 32


@dataclasses.dataclass(frozen=True)
class Demand:
    """Work to be done; each number is the largest of any process.

    Attributes:
        longest_prompt: Tokens, forced ones included.
        longest_completion: Tokens that a completion may have, forced ones included.
        prompts: Distinct prompts.
        largest_group: Completions of one prompt.
        completions: Completions of one process.
        stop_ids: Stop ids of one completion.
        max_rows: Most completions decoded side by side, by all devices together.
    """

    longest_prompt: int
    longest_completion: int
    prompts: int
    largest_group: int
    completions: int
    stop_ids: int
    max_rows: int


@dataclasses.dataclass(frozen=True)
class SamplerSizes:
    """Sizes of one shard, and how many shards there are.

    Attributes:
        shards: Parts that rows are split into, over all processes.
        rows: Completions decoded side by side.
        prompts: Prompts kept.
        lanes: Most rows of one prompt.
        prompt_capacity: Most tokens that a prompt's cache may have room for.
        capacity: Most own tokens that a row's cache may have room for.
        stop_ids: Most stop ids of a row.
    """

    shards: int
    rows: int
    prompts: int
    lanes: int
    prompt_capacity: int
    capacity: int
    stop_ids: int

    @property
    def local_shards(self) -> int:
        return self.shards // jax.process_count()


def capacity_for(length: int) -> int:
    """Return room for `length` tokens: 0, 32, 64, 128, 192, 256, 384, 512, ...

    So a run sees few sizes. They are multiples of 64 from there on: CPUs read others at half the
    speed.
    """
    if not length:
        return 0
    power = power_of_two(max(length, _LEAST_CAPACITY))
    return power * 3 // 4 if power >= 256 and length <= power * 3 // 4 else power


def demand_on(table: RowTable, max_rows: int) -> Demand:
    """Return what runs and waits, the most of any process; all processes must call this."""
    entries, running = table.unfinished, table.running
    waiting = [completion for entry in entries for completion in entry.waiting]
    completions = [*waiting, *(row.completion for row in running)]
    prompts = {id(prompt): prompt for prompt in (*entries, *(row.prompt for row in running))}
    groups = [
        len(prompt.waiting) + sum(row.prompt is prompt for row in running)
        for prompt in prompts.values()
    ]
    return Demand(
        *largest_of_processes(
            max((len(prompt.tokens) for prompt in prompts.values()), default=1),
            max((pending.request.max_new_tokens for pending in completions), default=1),
            len(prompts),
            max(groups, default=1),
            len(completions),
            max((len(completion.request.stop_ids) for completion in completions), default=0),
            max_rows,
        )
    )


def sampler_sizes(
    model_config: ModelConfig,
    demand: Demand,
    config: SamplingConfig,
    mesh: Mesh | None,
    budget_mib: int,
) -> SamplerSizes:
    """Return as many rows as there are completions, `demand.max_rows` allows and memory holds.

    Args:
        model_config: Architecture.
        demand: What is to be completed.
        config: Segments, precision, and the longest completion of requests that name no limit.
        mesh: Devices as they are laid out for decoding.
        budget_mib: Memory for the cache on each device.

    Raises:
        UsageError: memory does not hold one row and its prompt.
    """
    nothing = SamplerSizes(row_shards(mesh) if mesh else 1, 0, 0, 0, 0, 0, 0)
    sizes = grown_sizes(nothing, model_config, demand, config, mesh, budget_mib)
    if sizes is None:
        tokens = capacity_for(demand.longest_prompt) + _own_capacity(demand, config)
        needed = _bytes_per_token(model_config, config.dtype, mesh) * (tokens + config.segment)
        raise UsageError(
            f"the KV cache of one prompt of {demand.longest_prompt} tokens and one completion of "
            f"{demand.longest_completion} takes {needed / 2**20:.4g} MiB, more than the "
            f"{budget_mib} MiB there are; lower max_new_tokens or raise cache_mib"
        )
    return sizes


def grown_sizes(
    floor: SamplerSizes,
    model_config: ModelConfig,
    demand: Demand,
    config: SamplingConfig,
    mesh: Mesh | None,
    budget_mib: int,
) -> SamplerSizes | None:
    """Return sizes as `sampler_sizes` does, none below `floor`: a sampler that runs cannot shrink.

    None where memory does not hold the floor's rows and prompts at the demand's lengths.
    """
    shards, token = floor.shards, _bytes_per_token(model_config, config.dtype, mesh)

    def sizes_with(rows: int) -> SamplerSizes:
        lanes = min(power_of_two(demand.largest_group), rows)
        # No more prompts than rows: each row completes one.
        kept = min(rows, _PROMPTS_PER_FULL_GROUP * -(-rows // lanes) + _SPARE_PROMPTS)
        wanted = SamplerSizes(
            shards=shards,
            rows=rows,
            prompts=min(kept, power_of_two(-(-demand.prompts // floor.local_shards))),
            lanes=lanes,
            prompt_capacity=capacity_for(demand.longest_prompt),
            capacity=_own_capacity(demand, config),
            stop_ids=-(-max(demand.stop_ids, 1) // 4) * 4,
        )
        larger = map(max, dataclasses.astuple(wanted), dataclasses.astuple(floor))
        return SamplerSizes(*larger)

    def fits(sizes: SamplerSizes) -> bool:
        own = sizes.rows * (sizes.capacity + config.segment)
        return token * (own + sizes.prompts * sizes.prompt_capacity) <= 2**20 * budget_mib

    completions = -(-demand.completions * jax.process_count() // shards)  # of a shard
    most = _in_fours(min(-(-demand.max_rows // shards), completions))
    rows = most
    while rows > 1 and not fits(sizes_with(rows)):
        rows = rows - 4 if rows > 4 else rows // 2
    if not fits(sizes_with(rows)):
        return None
    # Turns count only where memory, not the number of completions or of slots, limits the rows.
    return sizes_with(rows if rows == most else _in_even_turns(completions, rows))


def _own_capacity(demand: Demand, config: SamplingConfig) -> int:
    """Own tokens of a row; at least a whole segment, which is what is settled at once."""
    return capacity_for(max(demand.longest_completion, config.max_new_tokens, config.segment))


def _in_even_turns(completions: int, rows: int) -> int:
    """The fewest rows that need no more turns: a step reads the cache of every row, idle or not.

    In: 56 completions, room for 44 rows.  Out: 28, which take two turns as 44 would.
    """
    turns = -(-completions // rows)
    return _in_fours(-(-completions // turns))


def _in_fours(rows: int) -> int:
    """Round up to a multiple of four, or to a power of two up to four."""
    return -(-rows // 4) * 4 if rows > 4 else power_of_two(rows)


def _bytes_per_token(config: ModelConfig, dtype: str, mesh: Mesh | None) -> int:
    """Bytes of one token's keys and values in all layers, on one device."""
    kv_heads = config.num_kv_heads
    if mesh:
        for axis in split_axes(mesh, "kv_heads", kv_heads):
            kv_heads //= mesh.shape[axis]
    return 2 * config.num_layers * kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def cache_budget_mib(config: SamplingConfig) -> int:
    """Return MiB for the cache on each device; all processes must call it, to decide alike."""
    if config.cache_mib is not None:
        return config.cache_mib
    left = least_mib_left()
    return _UNKNOWN_LEFT if left is None else int(SHARE_OF_LEFT * left)
