"""LoRA (Hu et al., 2021, arXiv:2106.09685): parameters parted in trained and frozen, and merged.

`families.parameters` lists the adapters, and the block applies them. A model without adapters is
trained whole: its frozen part is empty.
"""

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from srft_jax.config import AdaptedModelConfig, LoraConfig, ModelConfig, UsageError
from srft_jax.models import families
from srft_jax.models.decoder import Params


def adapted(config: ModelConfig, lora: LoraConfig | None) -> ModelConfig:
    """Return the architecture with adapters; without `lora`, as it is.

    Raises:
        UsageError: a target that cannot have an adapter, or a rank or alpha out of range.
    """
    if lora is None:
        return config
    _check(config, lora)
    return AdaptedModelConfig(**vars(config), lora=lora)


def base(config: ModelConfig) -> ModelConfig:
    """Return the architecture without adapters."""
    fields = {name: value for name, value in vars(config).items() if name != "lora"}
    return ModelConfig(**fields)


def _check(config: ModelConfig, lora: LoraConfig) -> None:
    for name, value in (("rank", lora.rank), ("alpha", lora.alpha)):
        if not value > 0:  # NaN too
            raise UsageError(f"model.lora.{name} = {value} is not above 0")
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise UsageError(f"model.lora.targets = {list(lora.targets)} must name matrices, each once")
    in_block = {entry.name: entry for entry in families.parameters(config) if entry.stacked}
    for target in lora.targets:
        # Norms and biases have one axis, experts three: neither has an adapter.
        if target not in in_block or len(in_block[target].axes) != 2:
            raise UsageError(
                f"model.lora.targets has {target}, of which the family {config.family} has no "
                "single matrix in each block"
            )
        shape = families.shape(in_block[target], config)
        if lora.rank > min(shape):
            raise UsageError(
                f"model.lora.rank = {lora.rank} exceeds the smaller side of {target}, which is "
                f"{shape[0]} x {shape[1]}; lower it or leave {target} out of model.lora.targets"
            )


def trained(tree: Params, config: ModelConfig) -> Params:
    """Return the trained part of a tree shaped as the parameters: adapters, or all of it.

    In: {"layers": {"query": W, "query_lora_a": A, ...}, ...}.  Out: {"layers": {"query_lora_a": A}}
    """
    return _part(tree, config, with_adapters=True)


def frozen(tree: Params, config: ModelConfig) -> Params:
    """Return the frozen part of such a tree, which is empty without adapters."""
    return _part(tree, config, with_adapters=False)


def _part(tree: Params, config: ModelConfig, with_adapters: bool) -> Params:
    if not isinstance(config, AdaptedModelConfig):
        return tree if with_adapters else {}
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    part = [entry for entry in families.parameters(config) if entry.is_adapter == with_adapters]
    return families.by_path({entry.path: flat[entry.path] for entry in part})


def whole(frozen: Params, trained: Params) -> Params:
    """Join both parts to the policy's parameters; nothing is copied."""
    parts = [flax.traverse_util.flatten_dict(part, sep="/") for part in (frozen, trained)]
    return families.by_path(parts[0] | parts[1])


def merged(
    matrix: Float[Array, "in out"],
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    scale: float,
) -> Float[Array, "in out"]:
    """Return W + scale A B, in float32."""
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return matrix.astype(jnp.float32) + scale * product
