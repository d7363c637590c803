"""What a step's rollouts were like: rewards, lengths, verdicts, a few texts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from srft_jax.batch import Trajectory
from srft_jax.config import Objective
from srft_jax.experience.groups import Experience, Group
from srft_jax.experience.scoring import sample_row
from srft_jax.objectives.advantages import overlong
from srft_jax.objectives.schedules import mix_weights
from srft_jax.objectives.stages import Stage
from srft_jax.rewards.verdicts import Verdict


def rollout_metrics(
    experience: Experience, objective: Objective, *, length_cap: int
) -> dict[str, float]:
    """Return means over all completions sampled, and shares of groups; empty without rollouts.

    Args:
        experience: What the step has sampled.
        objective: Objective of the step.
        length_cap: Longest completion, for the overlong penalty.
    """
    groups = experience.sampled
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if not trajectories:
        return {}
    solved = [np.mean([one.correct for one in group.trajectories]) for group in groups]
    zero_std = [len(set(group.rewards)) == 1 for group in groups]
    verdicts = Counter(trajectory.verdict for trajectory in trajectories)
    count = len(trajectories)
    values = {
        "rollout/reward": np.mean([trajectory.reward for trajectory in trajectories]),
        "rollout/accuracy": np.mean([one.correct for one in trajectories]),
        "rollout/groups_zero_std": np.mean(zero_std),
        "rollout/groups_all_right": np.mean([share == 1 for share in solved]),
        "rollout/groups_all_wrong": np.mean([share == 0 for share in solved]),
        "rollout/groups_mixed": np.mean([0 < share < 1 for share in solved]),
    } | {f"rewards/{verdict}": verdicts[verdict] / count for verdict in get_args(Verdict)}
    if objective.drop_zero_std:
        values |= {
            "rollout/refills": experience.refills,
            "rollout/groups_dropped": experience.dropped,
        }
    values |= _shaping_metrics(trajectories)
    values |= _length_metrics(trajectories, objective, length_cap) | _time_metrics(experience)
    return {name: float(value) for name, value in values.items()}


def _shaping_metrics(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Parts of the reward before their weights; none where it is the verifier's alone."""
    kinds = [term.kind for term in trajectories[0].shaping]
    if not kinds:
        return {}
    terms = {
        f"rewards/{kind}": np.mean([one.shaping[place].reward for one in trajectories])
        for place, kind in enumerate(kinds)
    }
    return {"rewards/verifier": np.mean([one.verifier_reward for one in trajectories])} | terms


def _length_metrics(
    trajectories: Sequence[Trajectory], objective: Objective, length_cap: int
) -> dict[str, Any]:
    """Lengths of all completions, forced tokens included."""
    lengths = [len(trajectory.tokens) for trajectory in trajectories]
    values = {
        "rollout/length": np.mean(lengths),
        "rollout/length_min": min(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated": np.mean([trajectory.truncated for trajectory in trajectories]),
    }
    if objective.overlong_buffer:
        penalties = [overlong(trajectory, objective, length_cap) for trajectory in trajectories]
        values["rollout/overlong_penalty"] = np.mean(penalties)
    if objective.prefix != "none":
        prefix_lengths = [trajectory.num_forced for trajectory in trajectories]
        values["rollout/prefix_length"] = np.mean(prefix_lengths)
    return values


def _time_metrics(experience: Experience) -> dict[str, Any]:
    """Where the time of the rollouts went, refills included."""
    runs = [rollout.progress for rollout in experience.rollouts]
    return {
        "rollout/occupancy": np.mean([run.occupancy for run in runs]),
        "time/rollout_prefill": sum(run.prefill_seconds for run in runs),
        "time/rollout_decode": sum(run.decode_seconds for run in runs),
        "time/rollout_host": sum(run.host_seconds for run in runs),
        "time/reward_wait": sum(rollout.reward_wait for rollout in experience.rollouts),
        "perf/rollout_tokens_per_second": sum(run.tokens for run in runs)
        / sum(run.seconds for run in runs),
    }


def mix_metric(stage: Stage, step: int) -> dict[str, float]:
    """Return mu, the weight of demonstrations, where they share the loss with completions."""
    if stage.objective.mix == "sum":
        return {}
    return {"objective/mix": mix_weights(stage.objective, stage.stage_step(step))[0]}


def sample_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the first completion of each group, as lines of samples.jsonl."""
    return [
        sample_row("rollout", group.problem.example, group.trajectories[0])
        for group in groups
        if group.trajectories
    ]
