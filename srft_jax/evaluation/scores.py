"""Greedy pass@1: complete, verify, average."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from srft_jax.config import EvaluationConfig, ModelConfig
from srft_jax.data.encoding import EncodedExample
from srft_jax.data.examples import Example
from srft_jax.evaluation.verdicts import Decoder, verify_groups
from srft_jax.models.decoder import Params
from srft_jax.rewards import RewardPool
from srft_jax.rollout.requests import Request, SamplingConfig
from srft_jax.rollout.scheduler import sample

# Of each set, the first so many completions are kept for the report.
SAMPLES_PER_SET = 16


def evaluate(
    params: Params,
    model_config: ModelConfig,
    sets: Mapping[str, tuple[Sequence[Example], Sequence[EncodedExample]]],
    tokenizer: Decoder,
    pool: RewardPool,
    config: EvaluationConfig,
    *,
    dtype: str,
    threshold: float,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Greedy pass@1 of each set, sampled in one go.

    Args:
        params: Of the policy.
        model_config: Architecture.
        sets: Name -> problems, as text and as ids; an empty set is left out.
        tokenizer: For the stop id and the text.
        pool: Verifiers.
        config: Lengths and slots.
        dtype: Of the forward pass.
        threshold: A reward that reaches it counts as correct.

    Returns:
        `eval/<set>/pass@1` in [0, 1] and `eval/<set>/length` in tokens; the first rows of each set.
    """
    names = [name for name, (examples, _) in sets.items() for _ in examples]
    examples = [example for texts, _ in sets.values() for example in texts]
    encoded = [example for _, ids in sets.values() for example in ids]
    requests = [Request(example.prompt, stop_ids=(tokenizer.eos_id,)) for example in encoded]
    sampling = SamplingConfig(
        temperature=0.0,
        max_new_tokens=config.max_new_tokens,
        slots=config.slots,
        segment=config.max_new_tokens,
        dtype=dtype,
    )
    groups = sample(params, model_config, requests, jax.random.key(0), sampling)
    completions = [group[0] for group in groups]
    scored = [group[0] for group in verify_groups(pool, examples, groups, tokenizer)]

    metrics, rows = {}, []
    for name in dict.fromkeys(names):
        members = [i for i, other in enumerate(names) if other == name]
        correct = [scored[i].reward >= threshold for i in members]
        metrics[f"eval/{name}/pass@1"] = float(np.mean(correct))
        metrics[f"eval/{name}/length"] = float(
            np.mean([len(completions[i].tokens) for i in members])
        )
        rows += [scored[i].row(name) for i in members[:SAMPLES_PER_SET]]
    return metrics, rows
