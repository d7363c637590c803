"""How much of everything a step of the run has, at the lengths that the plan takes."""

import dataclasses
import math
import statistics

from srft_jax.config import Objective, RunConfig
from srft_jax.mesh import split_axes
from srft_jax.models import families
from srft_jax.objectives.stages import Stage
from srft_jax.ops import head_passes
from srft_jax.ops.attention_terms import TileSizes
from srft_jax.ops.experts import block_size
from srft_jax.planning.hlo.count import TripCount
from srft_jax.planning.program_costs import trips_by_scope
from srft_jax.rollout.cache import CacheShape
from srft_jax.rollout.packing import TOKENS_PER_PASS
from srft_jax.rollout.sizes import Demand, capacity_for, sampler_sizes
from srft_jax.setup.outline import Outline


@dataclasses.dataclass(frozen=True)
class Workload:
    """Of one step: rollouts, then the updates on them.

    Attributes:
        prompt_length: Tokens, on average.
        completion_length: Likewise.
        sequences: Of one update.
        microbatches: Of one update, in use; their rows are taken as full.
        updates: Of one step.
        completions: Sampled in one step; 0 for an objective without rollouts.
        prompts: Likewise.
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
        """Of one step that a loss is taken of."""
        return self.updates * self.sequences * self.completion_length

    @property
    def tokens(self) -> int:
        """Of one step that the train step reads."""
        return self.updates * self.sequences * self.inputs


def longest_answer(config: RunConfig, objective: Objective) -> int:
    """Return the most tokens after a prompt: of a completion, without rollouts a demonstration."""
    completion, demonstration = config.rollout.max_new_tokens, config.max_demonstration_tokens
    return completion if objective.uses_rollouts else demonstration


def workload_of(run: Outline) -> Workload:
    """Of the run's last stage."""
    config = run.config
    stage = run.stages.policy
    prompt, completion = config.plan.mean_prompt, config.plan.mean_completion
    prompt = config.data.max_prompt_tokens if prompt is None else prompt
    completion = longest_answer(config, run.objective) if completion is None else completion
    group = config.rollout.completions_per_prompt if run.objective.uses_rollouts else 0
    return Workload(
        prompt_length=prompt,
        completion_length=completion,
        sequences=stage.sequences_per_update,
        microbatches=_microbatches(run, stage, prompt + completion - 1),
        updates=config.training.updates_per_rollout,
        completions=group * config.data.prompts_per_step,
        prompts=config.data.prompts_per_step if group else 0,
    )


def _microbatches(run: Outline, stage: Stage, length: int) -> int:
    """Rows packed full, as mixed lengths make them, but no more than the run has."""
    training = run.config.training
    rows = math.ceil(stage.sequences_per_update * length / training.row_length)
    return min(math.ceil(rows / training.rows), run.num_microbatches(stage))


def head_blocks(run: Outline, work: Workload) -> int:
    """How often the head's loop over blocks of trained tokens runs on a device, a microbatch."""
    training, model, shape = run.config.training, run.model_config, run.mesh.shape
    shards = shape["data"] * shape["fsdp"] * shape["context"]
    tokens = training.rows * training.row_length // shards
    columns = model.vocab_size
    for axis in split_axes(run.mesh, "vocab", columns):
        columns //= shape[axis]
    options = head_passes.Options(
        softcap=model.logit_softcap,
        transposed=model.tie_embeddings,
        logits_bytes=training.logits_mib * 2**20,
        frozen=run.config.model.lora is not None,
    )
    num_heads = 2 if run.objective.uses_reference else 1
    layout = head_passes.make_layout(tokens, columns, num_heads, options)
    return math.ceil(tokens * work.completion_length / work.inputs / layout.rows)


def block_loops(run: Outline, tokens: float, length: int) -> dict[str, float]:
    """Loops inside a layer whose range comes with the data, by the scope that they are in.

    Attention without a kernel goes over the blocks of keys at or before each block of queries;
    experts over the blocks that their tokens fill, the last of each half.

    Args:
        run: Model.
        tokens: Of a forward pass, on one device.
        length: Of a sequence.
    """
    model = run.model_config
    found = {"attention": (math.ceil(length / TileSizes().loop_keys) + 1) / 2}
    if model.num_experts:
        assigned = int(tokens) * (model.experts_per_token or 1)
        found["mlp"] = assigned / block_size(assigned, model.num_experts) + model.num_experts / 2
    return found


def train_loops(run: Outline, work: Workload) -> TripCount:
    """Of the train step."""
    training, shape = run.config.training, run.mesh.shape
    shards = shape["data"] * shape["fsdp"] * shape["context"]
    tokens = training.rows * training.row_length / shards
    by_scope = {"head": float(head_blocks(run, work))} | block_loops(run, tokens, work.inputs)
    return trips_by_scope(by_scope, otherwise=work.microbatches)


def cache_shape(run: Outline, work: Workload, budget: float) -> CacheShape:
    """Of a step's rollouts, as the sampler plans it for so many bytes on each device.

    Raises:
        UsageError: they do not hold one completion and its prompt.
    """
    config, sampling = run.config, run.sampling
    group = config.rollout.completions_per_prompt
    demand = Demand(
        longest_prompt=config.data.max_prompt_tokens,
        longest_completion=config.rollout.max_new_tokens,
        prompts=work.prompts,
        largest_group=group,
        completions=work.completions,
        stop_ids=1,
    )
    given = sampling.cache_mib
    sizes = sampler_sizes(
        run.model_config,
        demand,
        sampling,
        run.decode_mesh(),
        budget_mib=max(1, int(budget / 2**20)) if given is None else given,
    )
    return CacheShape(
        rows=sizes.shards * sizes.rows,
        prompts=sizes.shards * sizes.prompts,
        lanes=sizes.lanes,
        prompt_capacity=capacity_for(config.data.max_prompt_tokens),
        capacity=sizes.capacity,
        segment=sampling.segment,
    )


def prefill_rows(work: Workload, shape: CacheShape, shards: int) -> int:
    """Of a pass, on each shard: as wide as the longest prompt, no more than there are prompts."""
    most = max(1, TOKENS_PER_PASS // shape.prompt_capacity)
    return min(most, math.ceil(work.prompts / shards))


def decode_steps(work: Workload, shape: CacheShape) -> int:
    """With all rows busy until the last completions, which all take as long."""
    if not work.completions:
        return 0
    return math.ceil(work.completions / shape.rows) * work.completion_length


def mean_capacity(run: Outline, work: Workload, shape: CacheShape) -> float:
    """Own tokens that a row's cache has room for, over the segments of a completion.

    It grows with the longest row there is, so with all of them if they start together: those of a
    step that the rows hold at once, or as long as each other. Else the longest is taken throughout.

    In: completions of 8,192 in segments of 256.  Out: 4,528, as it grows 0, 256, 512, 768, 1,024,
    1,536, 1,536, 2,048, ...
    """
    is_longest = work.completion_length >= run.config.rollout.max_new_tokens
    if work.completions > shape.rows and not is_longest:
        return shape.capacity
    return statistics.fmean(map(capacity_for, range(0, work.completion_length, shape.segment)))


def model_flops(run: Outline, work: Workload) -> float:
    """Of a step's updates, over all devices, that no implementation can avoid.

    6 for each token and matrix parameter (2 forward, 4 backward; the head for trained tokens alone;
    of experts those that a token is given to), and attention of each sequence to itself, causal:
    12 L N H T^2 / 2, in layers that slide of no more keys than the window.
    """
    model = run.model_config
    of_layers, of_head = _matrices(run)
    lengths = [
        min(work.inputs / 2, float(model.sliding_window or math.inf)) if slides else work.inputs / 2
        for slides in model.slides
    ]
    attention = 12 * model.num_heads * model.head_dim * sum(lengths) * work.tokens
    return 6 * (of_layers * work.tokens + of_head * work.trained_tokens) + attention


def _matrices(run: Outline) -> tuple[float, float]:
    """Numbers in matrices that a token is multiplied with: of all layers, and of the head."""
    model, of_layers = run.model_config, 0.0
    for row in families.parameters(model):
        if row.stacked and len(row.axes) >= 2:
            size = float(math.prod(families.stacked_shape(row, model)))
            if "experts" in row.axes and row.name != "router" and model.num_experts:
                size = size * (model.experts_per_token or 1) / model.num_experts
            of_layers += size
    return of_layers, model.dim * model.vocab_size
