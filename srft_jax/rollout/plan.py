"""How many completions decode side by side, and what cache they need, within a memory budget."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srft_jax.config import ModelConfig, UsageError
from srft_jax.mesh import largest_of_processes, least_mib_left, row_shards, split_axes
from srft_jax.rollout.requests import SamplingConfig
from srft_jax.rollout.slots import Prompt, power_of_two

# Prompts kept for each that a full set of rows needs: the slowest of a group keeps its prompt's
# slot long after the others have gone. At log-normal lengths the longest of 16 runs 3.6 times the
# mean, so four keep 94% of the rows busy. Each is read at every step, used or not.
_PROMPTS_PER_FULL_GROUP = 4
_SPARE_PROMPTS = 2  # few rows vary more: one group of 16 at a time keeps 97% busy instead of 89%

# MiB, where a device does not say what it has left (a CPU), and the share of it that is taken.
_UNKNOWN_LEFT = 2048
SHARE_OF_LEFT = 0.8

_LEAST_CAPACITY = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one shard, and how many there are.

    Attributes:
        shards: Parts that rows are split into, over all processes.
        rows: Completions decoded side by side.
        prompts: Prompts kept.
        lanes: Most rows of one prompt.
        capacity: Most own tokens that a row's cache will have room for.
        stop_ids: Most that a row has.
    """

    shards: int
    rows: int
    prompts: int
    lanes: int
    capacity: int
    stop_ids: int

    @property
    def local_shards(self) -> int:
        return self.shards // jax.process_count()


def capacity_for(length: int) -> int:
    """Room for `length` tokens: 0, 32, 64, 128, 192, 256, 384, 512, ..., so that a run sees
    few sizes.

    Multiples of 64 from there on: CPUs read others at half the speed.
    """
    if not length:
        return 0
    power = power_of_two(max(length, _LEAST_CAPACITY))
    return power * 3 // 4 if power >= 256 and length <= power * 3 // 4 else power


def make_plan(
    model_config: ModelConfig, prompts: Sequence[Prompt], config: SamplingConfig, mesh: Mesh | None
) -> Plan:
    """As many rows as there are completions, `config.slots` allows and memory holds.

    Raises:
        UsageError: memory does not hold one row and its prompt.
    """
    shards = row_shards(mesh) if mesh else 1
    local_shards = shards // jax.process_count()
    longest_prompt, most_new, num_prompts, group, num_jobs, stops = largest_of_processes(
        max((len(prompt.tokens) for prompt in prompts), default=1),
        max((job.limit for prompt in prompts for job in prompt.waiting), default=1),
        len(prompts),
        max((len(prompt.waiting) for prompt in prompts), default=1),
        sum(len(prompt.waiting) for prompt in prompts),
        max((len(job.stop_ids) for prompt in prompts for job in prompt.waiting), default=0),
    )
    capacity = capacity_for(max(most_new, config.max_new_tokens, config.segment))
    token = _bytes_per_token(model_config, config.dtype, mesh)
    of_row = token * (capacity + config.segment)
    of_prompt = token * capacity_for(longest_prompt)
    budget = 2**20 * (_mib_left(model_config) if config.cache_mib is None else config.cache_mib)

    def sizes(rows: int) -> tuple[int, int]:
        """Prompts and lanes for so many rows of a shard."""
        lanes = min(power_of_two(group), rows)
        wanted = min(rows, _PROMPTS_PER_FULL_GROUP * -(-rows // lanes) + _SPARE_PROMPTS)
        return min(wanted, power_of_two(-(-num_prompts // local_shards))), lanes

    jobs = -(-num_jobs * jax.process_count() // shards)
    most = _in_fours(min(-(-config.slots // shards), jobs))
    rows = most
    while rows > 1 and rows * of_row + sizes(rows)[0] * of_prompt > budget:
        rows = rows - 4 if rows > 4 else rows // 2
    if of_row + of_prompt > budget:
        raise UsageError(
            f"the KV cache of one prompt of {longest_prompt} tokens and one completion of "
            f"{most_new} takes {(of_row + of_prompt) / 2**20:.4g} MiB, more than the "
            f"{budget / 2**20:.4g} MiB there are; lower max_new_tokens or raise cache_mib"
        )
    if rows < most:
        rows = _in_even_turns(jobs, rows)
    return Plan(shards, rows, *sizes(rows), capacity, stop_ids=-(-max(stops, 1) // 4) * 4)


def _in_even_turns(jobs: int, rows: int) -> int:
    """As few rows as take no more turns: a step reads the cache of every row, idle ones too.

    In: 56 jobs, room for 44 rows.  Out: 28, which take two turns as 44 would.
    """
    turns = -(-jobs // rows)
    return _in_fours(-(-jobs // turns))


def _in_fours(rows: int) -> int:
    """Rounded up, or to a power of two up to 4."""
    return -(-rows // 4) * 4 if rows > 4 else power_of_two(rows)


def _bytes_per_token(config: ModelConfig, dtype: str, mesh: Mesh | None) -> int:
    """Keys and values of all layers, on one device."""
    kv_heads = config.num_kv_heads
    if mesh:
        for axis in split_axes(mesh, "kv_heads", kv_heads):
            kv_heads //= mesh.shape[axis]
    return 2 * config.num_layers * kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


@functools.cache
def _mib_left(_: ModelConfig) -> int:
    """For the cache on each device, of any process: all of them must plan alike.

    Asked once for a model: a run in which it changed would change its shapes.
    """
    left = least_mib_left()
    return _UNKNOWN_LEFT if left is None else int(SHARE_OF_LEFT * left)
