"""Checks of the configuration against model, tokenizer, devices and reference policy."""

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from srft_jax.config import ModelConfig, ModelSection, RunConfig, UsageError
from srft_jax.models import lora
from srft_jax.models.decoder import HOST_MEMORY
from srft_jax.models.hf_config import read_config
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.setup.architecture import overridden

# Fields of an architecture that do not change the function which the weights compute.
_NOT_COMPARED = {"init_std", "max_positions"}


def check_sizes(config: RunConfig, model_config: ModelConfig, mesh: Mesh) -> None:
    """Check lengths beside the architecture's, and rows beside the mesh.

    Raises:
        UsageError: with the numbers that do not go together.
    """
    longest = config.data.max_prompt_tokens + max(
        config.rollout.max_new_tokens,
        config.longest_demonstration,
        config.evaluation.max_new_tokens,
    )
    if longest > model_config.max_positions:
        raise UsageError(
            f"prompt and completion of up to {longest} tokens exceed "
            f"the model's {model_config.max_positions}"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.training.rows_per_microbatch
    if rows != "auto" and rows % ways:
        raise UsageError(
            f"training.rows_per_microbatch = {rows} does not split "
            f"over the {ways} data-parallel devices of the mesh: it must be a multiple of {ways}"
        )
    chunks = 2 * mesh.shape["context"]
    if chunks > 2 and config.training.row_length % chunks:
        raise UsageError(
            f"training.row_length = {config.training.row_length} does not split into the {chunks} "
            f"chunks that mesh.context = {chunks // 2} takes, two for each device"
        )


def check_vocabulary(tokenizer: Tokenizer, model_config: ModelConfig) -> None:
    """Check that the model has a row for each token; more rows than tokens are usual."""
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but the model's vocabulary only {model_config.vocab_size}"
        )


def check_stop_strings(stop_strings: Sequence[str], tokenizer: Tokenizer) -> None:
    """Check that the text of a completion, which has no special tokens, may hold each of these."""
    special = {id: tokenizer.spell([id]) for id in sorted(tokenizer.special_ids)}
    for stop in stop_strings:
        for id, text in special.items():
            if text not in stop:
                continue
            todo = (
                "leave it out, as this token ends completions anyway"
                if id in tokenizer.stop_ids
                else f"add its id, {id}, to eos_token_id in the generation_config.json beside "
                f"{tokenizer.source / 'tokenizer.json'}"
            )
            raise UsageError(
                f"rollout.stop_strings: {stop!r} holds the special token {text!r}, which decoding "
                f"drops, so it would never be found: {todo}"
            )


def check_offload(remat: str, mesh: Mesh, host_memory: str = HOST_MEMORY) -> None:
    """Check that the host memory is there in which `model.remat = offload` lets results wait."""
    device = mesh.local_devices[0]  # a process knows of its own devices
    kinds = [memory.kind for memory in device.addressable_memories()]
    if remat == "offload" and host_memory not in kinds:
        raise UsageError(
            f"model.remat = offload needs {host_memory} memory, but a {device.platform} device has "
            f"{', '.join(kinds)}; set model.remat to block"
        )


def check_export(config: RunConfig) -> None:
    """Check that adapters are exported alone only where there is a base to go with them."""
    if config.export.lora == "adapter" and (config.model.lora is None or config.model.path is None):
        missing = "model.lora" if config.model.lora is None else "model.path"
        raise UsageError(
            f"export.lora = adapter needs {missing}, which is not set: adapters alone are exported "
            "beside the model that they were trained on"
        )


def check_reference(
    model: ModelSection, model_config: ModelConfig, *, preset: str, kl: float
) -> None:
    """Check that an objective with a KL has a reference policy shaped like the policy.

    Args:
        model: Where policy and reference are.
        model_config: Architecture of the policy.
        preset: Name of the method, for the message.
        kl: Weight of the KL; 0 needs no reference.
    """
    if not kl or model.base_is_reference:
        return
    path = model.reference or model.path
    if path is None:
        raise UsageError(
            f"objective.preset = {preset} needs a reference policy for its "
            f"KL (objective.kl = {kl}): set model.reference or model.path"
        )
    policy = vars(lora.base(model_config))
    reference = vars(overridden(read_config(Path(path)), model))
    different = [
        f"{name} = {reference[name]} (the policy has {policy[name]})"
        for name in policy.keys() - _NOT_COMPARED
        if policy[name] != reference[name]
    ]
    if different:
        raise UsageError(f"the reference policy {path} has {', '.join(sorted(different))}")
