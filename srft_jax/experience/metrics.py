"""What a step's rollouts were like: rewards, lengths, verdicts, a few texts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from srft_jax.config import Objective
from srft_jax.experience.rollouts import Experience, Group, overlong
from srft_jax.experience.verdicts import Scored
from srft_jax.objectives.schedules import mix_weights
from srft_jax.objectives.stages import Stage
from srft_jax.rewards.verdicts import Verdict
from srft_jax.setup.prepare import Setup


def rollout_metrics(setup: Setup, stage: Stage, experience: Experience) -> dict[str, float]:
    """Means over all completions sampled, and shares of groups; empty without rollouts."""
    groups, objective = experience.sampled, stage.objective
    scored = [one for group in groups for one in group.scored]
    if not scored:
        return {}
    threshold = setup.config.rewards.correct_threshold
    solved = [np.mean(np.asarray(group.accuracies) >= threshold) for group in groups]
    zero_std = [len(set(group.rewards)) == 1 for group in groups]
    verdicts = Counter(one.verdict for one in scored)
    values = {
        "rollout/reward": np.mean([one.reward for one in scored]),
        "rollout/accuracy": np.mean([one.accuracy >= threshold for one in scored]),
        "rollout/groups_zero_std": np.mean(zero_std),
        "rollout/groups_all_right": np.mean([share == 1 for share in solved]),
        "rollout/groups_all_wrong": np.mean([share == 0 for share in solved]),
        "rollout/groups_mixed": np.mean([0 < share < 1 for share in solved]),
    } | {f"rewards/{verdict}": verdicts[verdict] / len(scored) for verdict in get_args(Verdict)}
    if objective.drop_zero_std:
        values |= {
            "rollout/refills": experience.refills,
            "rollout/groups_dropped": experience.dropped,
        }
    values |= _shaping_metrics(scored)
    values |= _length_metrics(setup, objective, groups) | _time_metrics(experience)
    return {name: float(value) for name, value in values.items()}


def _shaping_metrics(scored: Sequence[Scored]) -> dict[str, Any]:
    """Parts of the reward before their weights; none where it is the verifier's alone."""
    kinds = [term.kind for term in scored[0].shaping]
    if not kinds:
        return {}
    terms = {
        f"rewards/{kind}": np.mean([one.shaping[place].reward for one in scored])
        for place, kind in enumerate(kinds)
    }
    return {"rewards/verifier": np.mean([one.accuracy for one in scored])} | terms


def _length_metrics(setup: Setup, objective: Objective, groups: Sequence[Group]) -> dict[str, Any]:
    """Of all completions, forced tokens included."""
    completions = [one for group in groups for one in group.completions]
    lengths = [len(one.tokens) for one in completions]
    values = {
        "rollout/length": np.mean(lengths),
        "rollout/length_min": min(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated": np.mean([one.truncated for one in completions]),
    }
    if objective.overlong_buffer:
        penalties = [overlong(setup, objective, one) for one in completions]
        values["rollout/overlong_penalty"] = np.mean(penalties)
    if objective.prefix != "none":
        values["rollout/prefix_length"] = np.mean([one.num_forced for one in completions])
    return values


def _time_metrics(experience: Experience) -> dict[str, Any]:
    """Where the time of the rollouts went, refills included."""
    runs = [rollout.progress for rollout in experience.rollouts]
    return {
        "rollout/occupancy": np.mean([one.occupancy for one in runs]),
        "time/rollout_prefill": sum(one.prefill_seconds for one in runs),
        "time/rollout_decode": sum(one.decode_seconds for one in runs),
        "time/rollout_host": sum(one.host_seconds for one in runs),
        "time/reward_wait": sum(rollout.reward_wait for rollout in experience.rollouts),
        "perf/rollout_tokens_per_second": sum(one.tokens for one in runs)
        / sum(one.seconds for one in runs),
    }


def mix_metric(stage: Stage, step: int) -> dict[str, float]:
    """mu, the weight of demonstrations, where they share the loss with completions."""
    if stage.objective.mix == "sum":
        return {}
    return {"objective/mix": mix_weights(stage.objective, stage.number(step))[0]}


def sample_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The first completion of each group, as lines of samples.jsonl."""
    return [group.scored[0].row("rollout") for group in groups if group.scored]
