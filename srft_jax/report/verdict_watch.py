"""Warnings of verifiers that say nothing: most answers unread, too slow, or crashing.

That many answers are wrong is how training starts; Recorder warns where it stays so.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from srft_jax.experience.verdicts import Scored
from srft_jax.report.records import describe_sample
from srft_jax.rewards.verdicts import Verdict

MAX_SHARE = 0.2  # of a step's completions of one kind

_HINTS: dict[Verdict, str] = {
    "unparsed": "it finds no answer in them. Do the chat template and the prompts ask for the form "
    "that it demands?",
    "timeout": "they cost rewards.timeout_seconds each and a reward of 0.",
    "crash": "its first error is logged above; their reward is 0.",
}


class VerdictWatch:
    """Warns once of each kind and verdict."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, Verdict]] = set()

    def warnings(self, step: int, scored: Sequence[Scored]) -> Iterator[str]:
        """A paragraph for each verdict that has passed MAX_SHARE for the first time."""
        by_kind: defaultdict[str, list[tuple[Verdict, Scored]]] = defaultdict(list)
        for one in scored:
            by_kind[one.example.kind].append((one.verdict, one))
            for term in one.shaping:
                by_kind[term.kind].append((term.verdict, one))
        for kind, verdicts in by_kind.items():
            counts = Counter(verdict for verdict, _ in verdicts)
            for verdict, hint in _HINTS.items():
                share = counts[verdict] / len(verdicts)
                if share > MAX_SHARE and (kind, verdict) not in self._warned:
                    self._warned.add((kind, verdict))
                    example = next(one for which, one in verdicts if which == verdict)
                    yield (
                        f"WARNING: step {step}: the verdict of {kind} is {verdict} for {share:.0%} "
                        f"of its completions: {hint} One of them:\n"
                        + describe_sample(example.row("rollout"))
                    )
