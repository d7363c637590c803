"""What the sampler says of its completions is what the trainer will say, in every family."""

import dataclasses

import jax
import numpy as np
import pytest
from sampler_models import PROMPTS, TWO_LAYERS, UNTIED, complete, random_params, trainer_view

from srft_jax.config import RopeScaling
from srft_jax.ops import attention_splash
from srft_jax.rollout import Request

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

# Windows end in the prompt at first, then among a row's own tokens.
FAMILIES = {
    "gemma3": dataclasses.replace(
        TWO_LAYERS,
        family="gemma3",
        activation="gelu_pytorch_tanh",
        logit_softcap=3.0,
        attention_softcap=2.0,
        sliding_window=5,
        full_attention_layers=(1,),
        rope_local_theta=100.0,
    ),
    "qwen3_moe": dataclasses.replace(
        UNTIED, family="qwen3_moe", mlp_dim=16, num_experts=4, experts_per_token=2
    ),
    "mistral": dataclasses.replace(UNTIED, family="mistral", sliding_window=5),
    "qwen2": dataclasses.replace(TWO_LAYERS, sliding_window=4, full_attention_layers=(0,)),
    "qwen3": dataclasses.replace(UNTIED, family="qwen3", rope_scaling=RopeScaling("yarn", 4.0, 16)),
    "llama": dataclasses.replace(
        UNTIED, family="llama", mlp_bias=True, rope_scaling=RopeScaling("llama3", 8.0, 16)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_entropies_are_the_trainers(family):
    assert_of_the_trainer(FAMILIES[family], "xla")


def test_log_probs_are_the_trainers_by_splash_too(monkeypatch):
    """Interpreted; in layers of both kinds, of which the device takes one kernel each."""
    made, make = [], attention_splash.splash.make_splash_mha

    def interpreted(*args, **options):
        made.append(args)
        return make(*args, **options | {"interpret": True})

    monkeypatch.setattr(attention_splash.splash, "make_splash_mha", interpreted)
    assert_of_the_trainer(FAMILIES["gemma3"], "splash")
    assert len(made) == 4  # with the window and without, of the prefill and of the trainer


def assert_of_the_trainer(config, attention):
    # Gentler than other tests' weights, at which rounding is more than 1e-5 of an expert's output.
    params = jax.tree.map(lambda x: 0.6 * x, random_params(config))
    requests = [Request(prompt, group_size=4) for prompt in PROMPTS]
    groups = complete(requests, params=params, config=config, temperature=0.7, attention=attention)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            logprobs, entropies, _ = trainer_view(
                prompt, completion.tokens, 0.7, params=params, config=config, attention=attention
            )
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
            np.testing.assert_allclose(completion.entropies, entropies, atol=1e-5)
            assert completion.logprobs.std() > 0.05
