"""Greedy pass@1: complete, verify, average."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from srft_jax.config import ModelConfig
from srft_jax.data.encoding import EncodedExample
from srft_jax.data.examples import Example
from srft_jax.experience.verdicts import Decoder
from srft_jax.experience.verified import sample_verified
from srft_jax.models.decoder import Params
from srft_jax.rewards import RewardPool
from srft_jax.rollout import Observer, Request, SamplingConfig

# Of each set, the first so many completions are kept for the report.
SAMPLES_PER_SET = 16


def evaluate(
    params: Params,
    model_config: ModelConfig,
    sets: Mapping[str, tuple[Sequence[Example], Sequence[EncodedExample]]],
    tokenizer: Decoder,
    pool: RewardPool,
    sampling: SamplingConfig,
    *,
    threshold: float,
    observer: Observer | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Greedy pass@1 of each set, sampled in one go.

    Args:
        params: Of the policy.
        model_config: Architecture.
        sets: Name -> problems, as text and as ids; an empty set is left out.
        tokenizer: For the stop ids and the text.
        pool: Verifiers.
        sampling: Greedy, as pass@1 is.
        threshold: A verifier's reward that reaches it counts as correct.
        observer: Called with the sampler's progress.

    Returns:
        `eval/<set>/pass@1` in [0, 1] and `eval/<set>/length` in tokens; the first rows of each set.
    """
    names = [name for name, (examples, _) in sets.items() for _ in examples]
    examples = [example for texts, _ in sets.values() for example in texts]
    encoded = [example for _, ids in sets.values() for example in ids]
    requests = [Request(example.prompt, stop_ids=tokenizer.stop_ids) for example in encoded]
    key = jax.random.key(0)  # greedy: nothing is drawn
    rollout = sample_verified(
        params, model_config, requests, examples, key, sampling, tokenizer, pool, observer
    )
    metrics, rows = {}, []
    for name in dict.fromkeys(names):
        members = [
            group[0] for group, other in zip(rollout.groups, names, strict=True) if other == name
        ]
        correct = [scored.accuracy >= threshold for _, scored in members]
        metrics[f"eval/{name}/pass@1"] = float(np.mean(correct))
        metrics[f"eval/{name}/length"] = float(np.mean([len(one.tokens) for one, _ in members]))
        rows += [scored.row(name) for _, scored in members[:SAMPLES_PER_SET]]
    return metrics, rows
