"""What the step reports is what its names say, computed from all logits in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from test_step import with_nan
from tiny_training import (
    OBJECTIVES,
    OPTIONS,
    gradient_keeper,
    initial_state,
    naive_logprobs,
    reference_params,
    split,
    step,
    target_logprobs,
)

from srft_jax.batch import Role
from srft_jax.models.decoder import Runtime
from srft_jax.objectives.methods import PRESETS
from srft_jax.training.microbatch import FixedParams, StepInputs
from srft_jax.training.step import make_gradient_norms, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def spread(name, values):
    return {name: values.mean(), f"{name}_min": values.min(), f"{name}_max": values.max()}


def observed_batch():
    """The largest difference to the sampler is that of a forced token."""
    batch = split("srft")
    batch.rows.sampler_logprobs[batch.rows.role == Role.HINT] = -9.0
    return batch


@pytest.fixture(scope="module")
def observed():
    """Statistics of the first microbatch, all else by role, under the initial parameters."""
    batch = observed_batch()
    everything = naive_logprobs(batch, initial_state().params)
    rows = jax.tree.map(lambda x: x[0], batch.rows)
    roles = np.where(rows.loss_mask, rows.role, Role.NONE)
    return (
        rows,
        roles,
        target_logprobs(everything, batch),
        -(np.exp(everything) * everything).sum(-1),
    )


def test_metrics_are_what_they_are_called(observed):
    rows, roles, logprob, entropy = observed
    self_tokens, demo = roles == Role.SELF, roles == Role.DEMONSTRATION
    positive = self_tokens & (rows.advantage > 0)
    log_ratio = (logprob - rows.sampler_logprobs)[np.isin(roles, [1, 3, 4])]
    self_difference, advantage = (
        (logprob - rows.sampler_logprobs)[self_tokens],
        rows.advantage[self_tokens],
    )
    ratio = np.exp(self_difference)
    low, high = (advantage < 0) & (ratio < 0.8), (advantage > 0) & (ratio > 1.2)
    sft = rows.weight[demo] * 0.5 * np.exp(-entropy[demo])
    expected = {
        "policy/entropy_self": entropy[self_tokens].mean(),
        "policy/entropy_demo": entropy[demo].mean(),
        "policy/logprob_demo": logprob[demo].mean(),
        "policy/sampler_kl": (ratio - 1 - self_difference).mean(),
        "policy/sampler_max_difference": np.abs(log_ratio).max(),
        "policy/clip_fraction": (low | high).mean(),
        "policy/clip_fraction_low": low.mean(),
        "policy/clip_fraction_high": high.mean(),
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_min": ratio.min(),
        "policy/ratio_max": ratio.max(),
        **spread("weights/sft", sft),
        **spread("weights/rl", rows.weight[positive] * 0.1 * np.exp(entropy[positive])),
        "loss/demo_nll": (sft * -logprob[demo]).mean(),
        "loss/skipped": 0.0,
    }
    _, metrics, gradient = step("srft", observed_batch())
    expected["loss/gradient_norm"] = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
    assert (
        0 < low.mean() != high.mean() > 0
        and np.abs(log_ratio).max() > np.abs(self_difference).max()
    )
    for name, value in expected.items():
        np.testing.assert_allclose(metrics.pop(name), value, rtol=1e-4, err_msg=name)
    total = metrics.pop("loss/total")
    assert metrics.keys() == {"loss/demo_policy", "loss/self"}
    np.testing.assert_allclose(expected["loss/demo_nll"] + sum(metrics.values()), total, rtol=1e-4)


@pytest.mark.slow
def test_importance_weights(observed):
    """min(p_old / p_sampler, 2) with old log-probs of the trainer's own."""
    rows, roles, *_ = observed
    self_tokens, batch = roles == Role.SELF, split("all else")
    difference = np.random.default_rng(3).uniform(-1.0, 1.0, self_tokens.shape).astype(np.float32)
    batch.rows.old_logprobs[0] += np.where(self_tokens, difference, 0.0)
    expected = np.minimum(np.exp(difference[self_tokens]), 2.0).mean()
    metrics = step("all else", batch)[1]
    np.testing.assert_allclose(metrics["weights/importance"], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "role"), [("uft", Role.SELF), ("sft_kl", Role.DEMONSTRATION)])
def test_the_reference_kl_is_that_over_the_whole_vocabulary(name, role):
    batch = split(name)
    logp = naive_logprobs(batch, initial_state().params)
    difference = logp - naive_logprobs(batch, reference_params())
    role_tokens = batch.rows.loss_mask[0] & (batch.rows.role[0] == role)
    expected = (np.exp(logp) * difference).sum(-1)[role_tokens].mean()
    assert expected > 1e-3
    metrics = step(name, batch)[1]
    np.testing.assert_allclose(metrics["policy/reference_kl"], expected, rtol=1e-4)


@pytest.mark.slow
def test_of_itself_a_policy_has_no_kl():
    train_step = make_train_step(OPTIONS, OBJECTIVES["sft_kl"], gradient_keeper())
    fixed = FixedParams(reference=initial_state().params)
    metrics = train_step(initial_state(), split("sft_kl"), fixed)[1]
    assert abs(metrics["policy/reference_kl"]) < 1e-6 and abs(metrics["loss/kl"]) < 1e-6


@pytest.fixture(scope="module")
def norms_of():
    norms = make_gradient_norms(OPTIONS, OBJECTIVES["srft"])
    return lambda batch: norms(StepInputs(initial_state(), batch, FixedParams()))


@pytest.mark.slow
def test_gradient_norms_are_those_of_each_term_alone(norms_of):
    """As the step has it when the other weights are 0, and the normalisers, being data, stay."""
    batch = split("srft", rows_per_microbatch=4)
    norms = norms_of(batch)
    names = ("demo_nll", "demo_policy", "self")
    assert norms.keys() == {f"loss/{name}_gradient_norm" for name in names}
    alone = dataclasses.replace(OBJECTIVES["srft"], demo_nll=0.0, demo_policy=0.0)
    train_step = make_train_step(OPTIONS, alone, gradient_keeper())
    expected = train_step(initial_state(), batch)[1]["loss/gradient_norm"]
    np.testing.assert_allclose(norms["loss/self_gradient_norm"], expected, rtol=1e-5)


def test_in_bfloat16_the_norm_of_the_only_term_is_the_steps():
    """Both round as written: what XLA would leave out differs from program to program."""
    runtime = Runtime(dtype="bfloat16", remat="block")
    options = dataclasses.replace(OPTIONS, runtime=runtime)
    batch, objective = split("srft", rows_per_microbatch=4), PRESETS["sft"]
    (norm,) = make_gradient_norms(options, objective)(
        StepInputs(initial_state(), batch, FixedParams())
    ).values()
    train_step = make_train_step(options, objective, gradient_keeper())
    assert norm == train_step(initial_state(), batch)[1]["loss/gradient_norm"] > 0


@pytest.mark.slow
def test_a_broken_term_leaves_the_norm_of_another(norms_of):
    sound = norms_of(split("srft", rows_per_microbatch=4))
    broken = norms_of(with_nan(split("srft", rows_per_microbatch=4)))
    assert np.isnan(broken["loss/self_gradient_norm"])
    assert broken["loss/demo_nll_gradient_norm"] == sound["loss/demo_nll_gradient_norm"] > 0
