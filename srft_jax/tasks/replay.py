"""Verb `replay`: compute a skipped update again, term by term and sequence by sequence."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from srft_jax.batch import Batch, Role, Rows, TrainState
from srft_jax.config import RunConfig, UsageError
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.objectives import loss as losses
from srft_jax.objectives.stages import Stage, Stages
from srft_jax.report.terminal import table
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.plan import with_rows
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_frozen, load_reference
from srft_jax.training.microbatch import LossFn, StepInputs, in_batch_order, make_loss_fn
from srft_jax.training.optimizer import make_optimizers
from srft_jax.training.saved_batch import saved_batch
from srft_jax.training.state import abstract_state
from srft_jax.training.updates import make_stage_functions, put

MOST_SHOWN, LARGEST_SHOWN = 20, 5  # sequences: broken ones, or else of the largest loss


class _Microbatch(NamedTuple):
    """Tokens [B, T], their log-probs, and the loss's terms by name."""

    rows: Rows
    logprob: Array
    terms: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """A sequence of the batch: ids up to its first trained token and from there on, loss of all
    terms, and what the table shows of it."""

    prompt: list[int]
    completion: list[int]
    loss: float
    facts: dict[str, str]


def replay(config: RunConfig) -> int:
    """Print what the newest checkpoint makes of the newest saved batch; nothing is updated.

    Raises:
        UsageError: the run has no saved batch, or no checkpoint.
    """
    saved = saved_batch(config.run_dir)
    if saved is None:
        raise UsageError(f"{config.run_dir} has no saved batch: none of its updates was skipped")
    step, batch = saved
    setup, _ = with_rows(prepare(config))  # which compiles where there is no run
    config = setup.config
    with jax.set_mesh(setup.mesh):
        transformations = make_optimizers(
            config.training,
            setup.stages,
            prompts_per_step=config.data.prompts_per_step,
            model_config=setup.model_config,
        ).transformations
        saved_at, state = _newest_state(
            config.run_dir, abstract_state(transformations, setup.model_config, setup.mesh)
        )
        stage = _stage_of(setup.stages, step, batch)
        frozen_params = load_frozen(config.model, setup.model_config, setup.mesh, config.seed)
        reference_params = load_reference(config.model, setup.objective, frozen_params, setup.mesh)
        functions = make_stage_functions(
            stage,
            setup.model_config,
            transformations[stage.optimizer],
            temperature=config.rollout.temperature,
            runtime=setup.runtime,
            logits_mib=config.training.logits_mib,
            frozen_params=frozen_params,
            reference_params=reference_params,
        )
        batch = put(batch, setup.mesh)
        if functions.old_logprobs is not None and not batch.on_policy:
            batch = functions.old_logprobs(state, batch)
        inputs = StepInputs(state, frozen_params, reference_params, batch)
        loss_fn = make_loss_fn(
            setup.model_config,
            stage.objective,
            temperature=config.rollout.temperature,
            runtime=setup.runtime,
            logits_mib=config.training.logits_mib,
        )
        microbatches = _compute(loss_fn, inputs, setup.mesh)
        norms = jax.device_get(functions.gradient_norms(state, inputs.batch))
    print(f"the batch of step {step}, under the parameters of step {saved_at}\n")
    rows = [
        [name, _number(_total(microbatches, name)), _number(norms[f"loss/{name}_gradient_norm"])]
        for name in microbatches[0].terms
    ]
    print(table(["term", "loss", "gradient norm"], rows) + "\n")
    sequences = [sequence for part in microbatches for sequence in _sequences(part)]
    print(_describe(sequences, setup.tokenizer))
    return 0


def _newest_state(run_dir: str, like: TrainState) -> tuple[int, TrainState]:
    """Step and state of the newest checkpoint; `like` says shapes and shardings."""
    with Checkpoints(run_dir) as checkpoints:
        step = checkpoints.newest()
        if step is None:
            raise UsageError(f"{run_dir} has no checkpoint yet")
        return step, checkpoints.restore(step, like)[0]


def _stage_of(stages: Stages, step: int, batch: Batch) -> Stage:
    """Where demonstrations are buffered, they are never in one batch with completions."""
    sampled = np.any(batch.rows.loss_mask & (batch.rows.role != Role.DEMONSTRATION))
    if stages.buffered is not None and not sampled:
        return stages.buffered
    return stages.at(step)


def _compute(loss_fn: LossFn, inputs: StepInputs, mesh: Mesh) -> list[_Microbatch]:
    """The microbatches in use, on the host."""
    everywhere = NamedSharding(mesh, PartitionSpec())  # all processes look at all of it

    @functools.partial(jax.jit, out_shardings=everywhere)
    def compute(inputs: StepInputs, i: Array) -> _Microbatch:
        tokens = loss_fn(inputs.state.params, inputs, i, None)[1]
        terms = losses.loss_terms(*tokens)
        return in_batch_order(_Microbatch(tokens.rows, tokens.stats.logprob, terms), inputs.batch)

    used = range(int(inputs.batch.num_microbatches))
    return [jax.device_get(compute(inputs, np.int32(i))) for i in used]


def _total(microbatches: Sequence[_Microbatch], term: str) -> float:
    return float(sum(np.sum(one.terms[term]) for one in microbatches))


def _number(value: Any) -> str:
    return f"{float(value):.4g}"


def _sequences(microbatch: _Microbatch) -> Iterator[_Sequence]:
    """The microbatch's sequences that have trained tokens."""
    rows, logprob, terms = microbatch
    loss = sum(terms.values(), start=np.zeros_like(logprob))
    for number in np.unique(rows.sequence_ids):
        inside = (rows.segment_ids > 0) & (rows.sequence_ids == number)
        trained = inside & rows.loss_mask
        if not trained.any():
            continue
        start = int(np.argmax(rows.loss_mask[inside]))
        log_ratio = logprob[trained] - rows.old_logprobs[trained]
        facts = {
            "role": Role(int(rows.role[trained][-1])).name.lower(),
            "advantage": _number(rows.advantage[trained][0]),
            "loss": _number(loss[inside].sum()),
            "min logprob": _number(logprob[trained].min()),
            "max logprob": _number(logprob[trained].max()),
            "max ratio": _number(np.exp(log_ratio.max())),
        }
        yield _Sequence(
            prompt=rows.tokens[inside][: start + 1].tolist(),
            completion=rows.targets[inside][start:].tolist(),
            loss=float(loss[inside].sum()),
            facts=facts,
        )


def _describe(sequences: Sequence[_Sequence], tokenizer: Tokenizer) -> str:
    """The sequences to look at: a table, and their text."""
    broken = [one for one in sequences if not np.isfinite(one.loss)]
    shown = broken[:MOST_SHOWN]
    title = f"{len(broken)} of {len(sequences)} sequences have a loss that is not finite"
    if not broken:
        shown = sorted(sequences, key=lambda one: -abs(one.loss))[:LARGEST_SHOWN]
        title = f"the loss of all {len(sequences)} sequences is finite; the largest are"
    facts = [[f"{number}", *one.facts.values()] for number, one in enumerate(shown, start=1)]
    texts = [
        f"{number}  {_text(one.prompt, tokenizer)}\n   {_text(one.completion, tokenizer)}"
        for number, one in enumerate(shown, start=1)
    ]
    return "\n".join([title, "", table(["", *shown[0].facts], facts), "", *texts])


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids).strip().replace("\n", "\n   ")
