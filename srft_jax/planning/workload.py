"""Token and sequence counts of one step, at mean lengths."""

import dataclasses
import math
import statistics

from srft_jax.config import ModelConfig
from srft_jax.mesh import split_axes
from srft_jax.models import families
from srft_jax.ops import head_passes
from srft_jax.ops.attention_terms import TileSizes
from srft_jax.ops.experts import tile_size
from srft_jax.planning.hlo.count import TripCount
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.program_costs import trips_by_scope
from srft_jax.rollout.cache import CacheShape
from srft_jax.rollout.packing import TOKENS_PER_PASS
from srft_jax.rollout.sizes import Demand, capacity_for, sampler_sizes


@dataclasses.dataclass(frozen=True)
class Workload:
    """Numbers of one step: rollouts, then the updates on them.

    Attributes:
        prompt_length: Tokens of a prompt on average.
        completion_length: Tokens of a completion on average.
        sequences: Sequences of one update.
        microbatches: Microbatches that one update uses; their rows count as full.
        updates: Updates of one step.
        completions: Completions sampled in one step; 0 for an objective without rollouts.
        prompts: Prompts of these completions.
    """

    prompt_length: int
    completion_length: int
    sequences: int
    microbatches: int
    updates: int
    completions: int
    prompts: int

    @property
    def inputs(self) -> int:
        """Tokens of a sequence that the model reads: the last one is a target only."""
        return self.prompt_length + self.completion_length - 1

    @property
    def trained_tokens(self) -> int:
        """Tokens of one step that have a loss."""
        return self.updates * self.sequences * self.completion_length

    @property
    def tokens(self) -> int:
        """Tokens of one step that the train step reads."""
        return self.updates * self.sequences * self.inputs


def make_workload(run: PlannedRun) -> Workload:
    """Return the workload of a step in the policy's stage."""
    stage, training = run.stages.policy, run.training
    group_size = run.completions_per_prompt if run.objective.uses_rollouts else 0
    # Rows are packed full, as mixed lengths make them; the static number M is the limit.
    tokens = stage.sequences_per_update * (
        run.lengths.mean_prompt + run.lengths.mean_completion - 1
    )
    full = math.ceil(math.ceil(tokens / training.row_length) / training.rows)
    return Workload(
        prompt_length=run.lengths.mean_prompt,
        completion_length=run.lengths.mean_completion,
        sequences=stage.sequences_per_update,
        microbatches=min(full, run.num_microbatches(stage)),
        updates=training.updates_per_rollout,
        completions=group_size * run.prompts_per_step,
        prompts=run.prompts_per_step if group_size else 0,
    )


def train_trip_count(run: PlannedRun, work: Workload) -> TripCount:
    """Return how often the train step's loops of unknown length run."""
    layer = layer_trips(run.model_config, run.tokens_on_device, work.inputs)
    head = {"head": float(num_head_tiles(run, work))}
    return trips_by_scope(head | layer, otherwise=work.microbatches)


def num_head_tiles(run: PlannedRun, work: Workload) -> int:
    """Return how often the head's loop over tiles of trained tokens runs in a microbatch."""
    model, tokens = run.model_config, int(run.tokens_on_device)
    columns = model.vocab_size
    for axis in split_axes(run.mesh, "vocab", columns):
        columns //= run.mesh.shape[axis]
    options = head_passes.HeadOptions(
        softcap=model.logit_softcap,
        transposed=model.tie_embeddings,
        logits_bytes=run.forward.logits_mib * 2**20,
        frozen=run.has_adapters,
    )
    num_heads = 2 if run.objective.uses_reference else 1
    layout = head_passes.make_layout(tokens, columns, num_heads, options)
    return math.ceil(tokens * work.completion_length / work.inputs / layout.rows)


def layer_trips(model: ModelConfig, tokens: float, length: int) -> dict[str, float]:
    """Return the trips of loops inside a layer, whose range comes with the data, by their scope.

    Attention without a kernel loops over the tiles of keys at or before each tile of queries.
    Experts loop over the tiles that their tokens fill; each expert's last tile is half full.

    Args:
        model: Architecture.
        tokens: Tokens of a forward pass on one device.
        length: Tokens of a sequence.
    """
    trips = {"attention": (math.ceil(length / TileSizes().loop_keys) + 1) / 2}
    if model.num_experts:
        assigned = int(tokens) * (model.experts_per_token or 1)
        trips["mlp"] = assigned / tile_size(assigned, model.num_experts) + model.num_experts / 2
    return trips


def cache_shape(run: PlannedRun, work: Workload, budget: float) -> CacheShape:
    """Return the cache that the sampler makes for a step's rollouts with `budget` bytes a device.

    Raises:
        UsageError: memory does not hold one completion and its prompt.
    """
    longest_prompt = run.lengths.longest_prompt + run.lengths.longest_prefix
    demand = Demand(
        longest_prompt=longest_prompt,
        longest_completion=run.sampling.max_new_tokens,
        prompts=_kept_prompts(run, work),
        largest_group=run.completions_per_prompt,
        completions=work.completions,
        stop_ids=1,
        max_rows=run.sampling.slots,
    )
    configured = run.sampling.cache_mib
    sizes = sampler_sizes(
        run.model_config,
        demand,
        run.sampling,
        run.decode_mesh(),
        max(1, int(budget / 2**20)) if configured is None else configured,
    )
    return CacheShape(
        rows=sizes.shards * sizes.rows,
        prompts=sizes.shards * sizes.prompts,
        lanes=sizes.lanes,
        prompt_capacity=capacity_for(longest_prompt),
        capacity=sizes.capacity,
        segment=run.sampling.segment,
    )


def _kept_prompts(run: PlannedRun, work: Workload) -> int:
    """Prompts that the sampler keeps apart: with `prefix = one` each is there with and without."""
    has_both = run.objective.prefix == "one" and run.lengths.longest_prefix > 0
    return 2 * work.prompts if has_both else work.prompts


def prefill_rows(run: PlannedRun, work: Workload, shape: CacheShape, shards: int) -> int:
    """Return the rows of a prefill pass on each shard, as wide as the longest prompt, its prefix
    included."""
    most = max(1, TOKENS_PER_PASS // shape.prompt_capacity)
    return min(most, math.ceil(_kept_prompts(run, work) / shards))


def num_prefills(run: PlannedRun, work: Workload, shape: CacheShape, shards: int) -> int:
    """Return how many prefill passes a step makes."""
    prompts_per_pass = shards * prefill_rows(run, work, shape, shards)
    return math.ceil(_kept_prompts(run, work) / prompts_per_pass)


def decode_steps(work: Workload, shape: CacheShape) -> int:
    """Return the decode steps of a rollout: all rows are busy until the last completions, and all
    completions have the mean length.

    In: 100 completions of 50 tokens in 64 rows.  Out: 100.
    """
    if not work.completions:
        return 0
    return math.ceil(work.completions / shape.rows) * work.completion_length


def mean_capacity(run: PlannedRun, work: Workload, shape: CacheShape) -> float:
    """Return the tokens that a row's cache has room for, on average over a completion's segments.

    The cache grows with its longest row: with all of them if they start together or have the full
    length. Otherwise some row is always long, and the cache is large throughout.

    In: completions of 8,192 in segments of 256.  Out: 4,528, as it grows 0, 256, 512, 768, 1,024,
    1,536, 1,536, 2,048, ...
    """
    start_together = work.completions <= shape.rows
    if not start_together and work.completion_length < run.sampling.max_new_tokens:
        return shape.capacity
    return statistics.fmean(map(capacity_for, range(0, work.completion_length, shape.segment)))


def model_flops(model: ModelConfig, work: Workload) -> float:
    """Return the FLOPs of a step's updates, over all devices, that no implementation can avoid.

    6 for each token and matrix parameter: 2 forward, 4 backward. The head counts for trained tokens
    alone; of the experts, those that a token is given to. Causal attention of each sequence to
    itself takes 12 L N H T^2 / 2; a sliding layer sees at most its window of keys.
    """
    layer_size, head_size = _matrix_sizes(model)
    keys_seen = [
        min(work.inputs / 2, float(model.sliding_window or math.inf)) if slides else work.inputs / 2
        for slides in model.slides
    ]
    attention = 12 * model.num_heads * model.head_dim * sum(keys_seen) * work.tokens
    return 6 * (layer_size * work.tokens + head_size * work.trained_tokens) + attention


def _matrix_sizes(model: ModelConfig) -> tuple[float, float]:
    """Return the numbers in the matrices that a token meets: of all layers, and of the head."""
    layers = 0.0
    for parameter in families.parameters(model):
        if parameter.stacked and len(parameter.axes) >= 2:
            size = float(math.prod(families.stacked_shape(parameter, model)))
            if "experts" in parameter.axes and parameter.name != "router" and model.num_experts:
                size = size * (model.experts_per_token or 1) / model.num_experts
            layers += size
    return layers, model.dim * model.vocab_size
