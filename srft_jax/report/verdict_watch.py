"""Warnings of verifiers that do not judge: answers unread, too slow, or crashing.

Wrong answers are normal early on; `Recorder` warns where the reward stays the same.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from srft_jax.batch import Trajectory
from srft_jax.data.examples import Example
from srft_jax.experience.groups import Group
from srft_jax.experience.scoring import sample_row
from srft_jax.report.records import describe_sample
from srft_jax.rewards.verdicts import Verdict

MAX_SHARE = 0.2  # share of a step's completions of one kind, above which a verdict is warned of

_HINTS: dict[Verdict, str] = {
    "unparsed": "it finds no answer in them. Do the chat template and the prompts ask for the form "
    "that it demands?",
    "timeout": "they cost rewards.timeout_seconds each and a reward of 0.",
    "crash": "its first error is logged above; their reward is 0.",
}


class VerdictWatch:
    """Warns once of each kind of verifier and verdict."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def warnings(self, step: int, groups: Sequence[Group]) -> Iterator[str]:
        """Yield a paragraph for each verdict that has passed MAX_SHARE for the first time.

        Args:
            step: Number of the step, from 1.
            groups: Groups that the step has sampled.
        """
        for kind, answers in _by_kind(groups).items():
            counts = Counter(verdict for verdict, _, _ in answers)
            for verdict, hint in _HINTS.items():
                share = counts[verdict] / len(answers)
                if share > MAX_SHARE and (kind, verdict) not in self._warned:
                    self._warned.add((kind, verdict))
                    _, example, trajectory = next(
                        answer for answer in answers if answer[0] == verdict
                    )
                    yield (
                        f"WARNING: step {step}: the verdict of {kind} is {verdict} for {share:.0%} "
                        f"of its completions: {hint} One of them:\n"
                        + describe_sample(sample_row("rollout", example, trajectory))
                    )


_Answer = tuple[str, Example, Trajectory]  # verdict, and what it is about


def _by_kind(groups: Sequence[Group]) -> dict[str, list[_Answer]]:
    """Verdicts by the kind of verifier: each prompt's own, and those of shaping terms."""
    by_kind: defaultdict[str, list[_Answer]] = defaultdict(list)
    for group in groups:
        example = group.problem.example
        for trajectory in group.trajectories:
            by_kind[example.kind].append((trajectory.verdict, example, trajectory))
            for term in trajectory.shaping:
                by_kind[term.kind].append((term.verdict, example, trajectory))
    return by_kind
