"""The attention kernel of a run, and what is refused before anything compiles."""

import dataclasses

import pytest

from srft_jax.config import ModelConfig, UsageError
from srft_jax.setup.attention_kernel import resolve_attention

TIED = ModelConfig(
    vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
)
CAPPED = dataclasses.replace(TIED, attention_softcap=50.0)
WIDE, UNEVEN = (dataclasses.replace(TIED, head_dim=size) for size in (256, 20))


@pytest.mark.parametrize(
    ("platform", "config", "dtype", "kernel"),
    [
        ("cpu", TIED, "bfloat16", "xla"),
        ("tpu", CAPPED, "float32", "splash"),
        ("gpu", TIED, "bfloat16", "cudnn"),
        ("gpu", TIED, "float32", "xla"),
        ("gpu", CAPPED, "bfloat16", "xla"),
        ("gpu", WIDE, "bfloat16", "xla"),
    ],
)
def test_auto_takes_the_best_that_can_run(platform, config, dtype, kernel):
    assert resolve_attention("auto", platform, config, dtype) == kernel
    assert resolve_attention(kernel, platform, config, dtype) == kernel
    assert resolve_attention("xla", platform, config, dtype) == "xla"


@pytest.mark.parametrize(
    ("name", "platform", "config", "dtype", "message"),
    [
        ("splash", "cpu", TIED, "bfloat16", "splash runs on devices of kind tpu, .* of kind cpu"),
        ("splash", "gpu", TIED, "bfloat16", "of kind gpu: set auto or xla"),
        ("cudnn", "tpu", TIED, "bfloat16", "cudnn runs on devices of kind gpu"),
        ("cudnn", "gpu", CAPPED, "bfloat16", "the model's attention_softcap is 50.0"),
        ("cudnn", "gpu", TIED, "float32", "needs model.dtype = bfloat16, which is float32"),
        ("cudnn", "gpu", WIDE, "bfloat16", "a head_dim up to 128 .* is 256"),
        ("cudnn", "gpu", UNEVEN, "bfloat16", "divisible by 8, but the model's is 20"),
    ],
)
def test_what_cannot_run_is_refused(name, platform, config, dtype, message):
    with pytest.raises(UsageError, match=message):
        resolve_attention(name, platform, config, dtype)
