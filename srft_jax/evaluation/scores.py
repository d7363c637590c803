"""Greedy pass@1: complete, verify, average."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from srft_jax.data.encoding import EncodedExample
from srft_jax.experience.scoring import Scorer, sample_row
from srft_jax.experience.verified_sampling import sample_verified
from srft_jax.rollout import Observer, Request, Sampler

# Completions of each set that are kept for the report: the first so many.
SAMPLES_PER_SET = 16


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """What a policy is scored on, and how.

    Attributes:
        sets: Problems by the set's name; an empty set is left out.
        scorer: Verifiers; shaping is not looked at.
        stop_ids: Token ids that end a completion.
        stop_strings: Texts that end a completion.
        max_new_tokens: Longest completion; None takes the sampler's.
        slots: Most completions decoded side by side; None takes the sampler's.
    """

    sets: Mapping[str, Sequence[EncodedExample]]
    scorer: Scorer
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    slots: int | None = None


def measure_pass_at_1(
    sampler: Sampler, evaluations: Evaluations, observer: Observer | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure greedy pass@1 of each set, all sets sampled in one go.

    Args:
        sampler: Holds the policy's parameters.
        evaluations: What is measured, and how.
        observer: Called with the sampler's progress.

    Returns:
        `eval/<set>/pass@1` in [0, 1] and `eval/<set>/length` in tokens; samples of each set.
    """
    sets, scorer = evaluations.sets, dataclasses.replace(evaluations.scorer, shaping=())
    names = [name for name, problems in sets.items() for _ in problems]
    problems = [problem for problems in sets.values() for problem in problems]
    requests = [
        Request(
            problem.prompt,
            max_new_tokens=evaluations.max_new_tokens,
            stop_ids=evaluations.stop_ids,
            stop_strings=evaluations.stop_strings,
            temperature=0.0,
            group=number,
        )
        for number, problem in enumerate(problems)
    ]
    examples = [problem.example for problem in problems]
    key = jax.random.key(0)  # greedy: nothing is drawn
    rollout = sample_verified(
        sampler, requests, examples, key, scorer, observer, slots=evaluations.slots
    )
    metrics, rows = {}, []
    for name in dict.fromkeys(names):
        answers = [
            (example, group[0])
            for example, group, set_name in zip(examples, rollout.groups, names, strict=True)
            if set_name == name
        ]
        correct = [answer.correct for _, answer in answers]
        metrics[f"eval/{name}/pass@1"] = float(np.mean(correct))
        metrics[f"eval/{name}/length"] = float(np.mean([len(one.tokens) for _, one in answers]))
        rows += [sample_row(name, *answer) for answer in answers[:SAMPLES_PER_SET]]
    return metrics, rows
