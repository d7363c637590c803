"""The attention kernel of a run, by its devices, its model and what the configuration asks for."""

from typing import Literal

from srft_jax.config import ModelConfig, UsageError
from srft_jax.ops.attention import Kernel

# Platform -> the fastest kernel there; elsewhere XLA's own operations.
_BEST: dict[str, Kernel] = {"tpu": "splash", "gpu": "cudnn"}

# cuDNN's flash attention takes heads up to this width on every GPU that has it, in this dtype.
_CUDNN_HEAD_DIM, _CUDNN_DTYPE = 128, "bfloat16"


def resolve_attention(
    name: Literal["auto"] | Kernel, platform: str, model_config: ModelConfig, dtype: str
) -> Kernel:
    """Return the kernel that `model.attention` means on a platform: tpu, gpu or cpu.

    Raises:
        UsageError: the kernel asked for cannot run on the platform or for this model.
    """
    if name == "auto":
        best = _BEST.get(platform, "xla")
        return "xla" if _hindrance(best, platform, model_config, dtype) else best
    if hindrance := _hindrance(name, platform, model_config, dtype):
        raise UsageError(f"model.attention = {name} {hindrance}: set auto or xla")
    return name


def _hindrance(kernel: Kernel, platform: str, model_config: ModelConfig, dtype: str) -> str | None:
    """Why the kernel cannot be used, as the end of a sentence; None if it can."""
    if kernel == "xla":
        return None
    home = "tpu" if kernel == "splash" else "gpu"
    if platform != home:
        return f"runs on devices of kind {home}, but those of the run are of kind {platform}"
    if kernel == "splash":
        return None
    softcap = model_config.attention_softcap
    if softcap is not None:
        return f"has no cap on scores, but the model's attention_softcap is {softcap}"
    if dtype != _CUDNN_DTYPE:
        return f"needs model.dtype = {_CUDNN_DTYPE}, which is {dtype}"
    if model_config.head_dim > _CUDNN_HEAD_DIM or model_config.head_dim % 8:
        return (
            f"needs a head_dim up to {_CUDNN_HEAD_DIM} and divisible by 8, but the model's is "
            f"{model_config.head_dim}"
        )
    return None
