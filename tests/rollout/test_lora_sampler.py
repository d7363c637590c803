"""With adapters the sampler says of its tokens what the trainer's forward pass says, unmerged."""

import jax
import numpy as np
import pytest
from sampler_models import CONFIG, KEY, PROMPTS, random_params, sampling, trainer_view

from srft_jax.config import LoraConfig
from srft_jax.models import lora
from srft_jax.rollout import Request, sample
from srft_jax.rollout.decode_layout import decode_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

ADAPTED = lora.adapted(CONFIG, LoraConfig(rank=2, alpha=2.0))
PARAMS = jax.tree.map(np.asarray, random_params(ADAPTED))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_log_probs_are_the_trainers(dtype, tolerance):
    """The frozen base is in bfloat16."""
    base = jax.tree.map(lambda x: x.astype("bfloat16"), lora.frozen(PARAMS, ADAPTED))
    params = lora.whole(base, lora.trained(PARAMS, ADAPTED))
    with jax.default_matmul_precision("highest"):
        groups = sample(
            params, ADAPTED, [Request(p, 4) for p in PROMPTS], KEY, sampling(dtype=dtype)
        )
    differences, without = [], []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            adapted, plain = (
                trainer_view(prompt, completion.tokens, params=policy, config=config, dtype=dtype)
                for policy, config in ((params, ADAPTED), (base, CONFIG))
            )
            differences.append(np.abs(completion.logprobs - adapted[0]))
            without.append(np.abs(completion.logprobs - plain[0]))
    assert np.concatenate(differences).max() <= tolerance
    assert np.concatenate(differences).mean() <= 2e-3
    assert np.concatenate(without).mean() > 0.3  # the adapters matter


def test_adapters_stand_beside_joined_matrices():
    layer = decode_params(PARAMS, ADAPTED, "bfloat16", None)["layers"][0]
    factors = {name for name in layer if "_lora_" in name}
    assert factors == lora.trained(PARAMS, ADAPTED)["layers"].keys()
    plain = decode_params(lora.frozen(PARAMS, ADAPTED), CONFIG, "bfloat16", None)["layers"][0]
    assert layer.keys() - factors == plain.keys() and "query_key_value" in plain
    jax.tree.map(np.testing.assert_array_equal, {name: layer[name] for name in plain}, plain)
