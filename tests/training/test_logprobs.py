"""Old log-probs by the trainer: of its parameters, where there is a ratio, and the sampler's."""

import jax
import numpy as np
import pytest
from tiny_training import (
    MODEL,
    OBJECTIVES,
    OPTIONS,
    SHAPE,
    TEMPERATURE,
    batch_of,
    initial_state,
    naive_logprobs,
    split,
    step,
    target_logprobs,
)

from srft_jax.batch import Role
from srft_jax.objectives.rows import TrainingSequence
from srft_jax.rollout import Request, SamplingConfig, sample
from srft_jax.training.logprobs import make_old_logprobs

OLD_LOGPROBS = make_old_logprobs(OPTIONS)


def recomputed(batch):
    with jax.default_matmul_precision("highest"):
        return jax.device_get(OLD_LOGPROBS(initial_state().params, batch))


def test_only_tokens_with_a_ratio_are_recomputed():
    batch = split("all else")
    batch.rows.old_logprobs[:] = -0.5
    filled, rows = recomputed(batch), batch.rows
    logprob = target_logprobs(naive_logprobs(batch, initial_state().params), batch)
    recomputed_tokens = rows.loss_mask[0] & np.isin(rows.role[0], [Role.SELF, Role.PREFIX])
    expected = np.where(recomputed_tokens, logprob, -0.5)
    np.testing.assert_allclose(filled.rows.old_logprobs[0], expected, rtol=1e-5)
    assert (filled.rows.old_logprobs[1:] == -0.5).all()
    np.testing.assert_array_equal(filled.rows.sampler_logprobs, rows.sampler_logprobs)


def test_every_microbatch_in_use_is_recomputed():
    whole, halves = (recomputed(split("all else", rows)).rows for rows in (8, 4))
    totals = [np.where(rows.role == Role.SELF, rows.old_logprobs, 0.0) for rows in (whole, halves)]
    np.testing.assert_allclose(totals[0][0].sum(), totals[1][:2].sum(), rtol=1e-5)
    assert totals[1][1].any()


@pytest.mark.slow
def test_they_are_the_samplers():
    """One set of weights and one temperature: rollout and trainer agree to rounding."""
    sampling = SamplingConfig(temperature=TEMPERATURE, max_new_tokens=8, slots=8, segment=4)
    requests = [Request(prompt, 4, forced=[7], stop_ids=(1,)) for prompt in ([3, 4, 5], [9, 2])]
    with jax.default_matmul_precision("highest"):
        groups = sample(initial_state().params, MODEL, requests, jax.random.key(5), sampling)
    sequences = [
        TrainingSequence(request.prompt, trajectory, Role.SELF, 1.0)
        for request, group in zip(requests, groups, strict=True)
        for trajectory in group
    ]
    batch = batch_of(sequences, OBJECTIVES["all else"], 4, SHAPE)
    filled = recomputed(batch).rows
    assert (filled.sampler_logprobs < -0.1).sum() > 16
    np.testing.assert_allclose(filled.old_logprobs, filled.sampler_logprobs, atol=1e-5)
    metrics = step("all else", batch)[1]
    assert metrics["policy/sampler_max_difference"] < 1e-5
    assert 0 <= metrics["policy/sampler_kl"] < 1e-9
