"""Verb `replay`: compute a skipped update again, term by term and sequence by sequence."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from srft_jax.batch import TrainState
from srft_jax.config import RunConfig, UsageError
from srft_jax.objectives import loss as losses
from srft_jax.ops.rounding import ROUND_AS_WRITTEN
from srft_jax.report.batch_view import MicrobatchTerms, sequences_text, terms_table
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.planned import forward_options, with_rows
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_frozen, load_reference
from srft_jax.training.microbatch import (
    FixedParams,
    LossFn,
    StepInputs,
    in_batch_order,
    make_loss_fn,
)
from srft_jax.training.optimizer import make_optimizers
from srft_jax.training.saved_batch import saved_batch
from srft_jax.training.state import abstract_state
from srft_jax.training.updates import make_stage_functions, prepare_batch


def replay(config: RunConfig) -> int:
    """Print what the newest checkpoint makes of the newest saved batch; nothing is updated.

    Raises:
        UsageError: the run has no saved batch, none that can be read, or no checkpoint; or the
            configuration does not have the batch's stage.
    """
    saved = saved_batch(config.run_dir)
    if saved is None:
        raise UsageError(f"{config.run_dir} has no saved batch: none of its updates was skipped")
    step, stage_name, batch = saved
    setup, _ = with_rows(prepare(config))  # which compiles where there is no run
    config, stage = setup.config, setup.stages.named(stage_name)
    with jax.set_mesh(setup.mesh):
        transformations = make_optimizers(
            config.training, setup.stages, setup.model_config
        ).transformations
        saved_at, state = _newest_state(
            config.run_dir, abstract_state(setup.model_config, transformations, setup.mesh)
        )
        frozen_params = load_frozen(config.model, setup.model_config, setup.mesh, config.seed)
        reference_params = load_reference(config.model, setup.objective, frozen_params, setup.mesh)
        fixed = FixedParams(frozen_params, reference_params)
        options = forward_options(setup)
        functions = make_stage_functions(stage, options, transformations[stage.optimizer])
        batch = prepare_batch(functions, state, batch, setup.mesh, fixed)
        inputs = StepInputs(state, batch, fixed)
        microbatches = _compute(make_loss_fn(options, stage.objective), inputs, setup.mesh)
        norms = jax.device_get(functions.gradient_norms(inputs))
    print(
        f"the batch of step {step} in stage {stage.name}, under the parameters of step {saved_at}\n"
    )
    print(terms_table(microbatches, norms) + "\n")
    print(sequences_text(microbatches, setup.tokenizer))
    return 0


def _newest_state(run_dir: str, like: TrainState) -> tuple[int, TrainState]:
    """Step and state of the newest checkpoint; `like` says shapes and shardings."""
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        step = checkpoints.newest()
        if step is None:
            raise UsageError(f"{run_dir} has no checkpoint yet")
        return step, checkpoints.restore(step, like)[0]


def _compute(loss_fn: LossFn, inputs: StepInputs, mesh: Mesh) -> list[MicrobatchTerms]:
    """The microbatches in use, on the host."""
    everywhere = NamedSharding(mesh, PartitionSpec())  # all processes look at all of it

    # Compiled as the step is: in bfloat16 its numbers would differ otherwise.
    @functools.partial(jax.jit, out_shardings=everywhere, compiler_options=ROUND_AS_WRITTEN)
    def compute(inputs: StepInputs, i: Array) -> MicrobatchTerms:
        tokens = loss_fn(inputs.state.params, inputs, i, None)[1]
        terms = losses.loss_terms(*tokens)
        return in_batch_order(
            MicrobatchTerms(tokens.rows, tokens.stats.logprob, terms), inputs.batch
        )

    used = range(int(inputs.batch.num_microbatches))
    return [jax.device_get(compute(inputs, np.int32(i))) for i in used]
