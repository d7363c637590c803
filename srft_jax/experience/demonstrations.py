"""Demonstrations as trajectories: given instead of drawn, and verified like completions."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from srft_jax.batch import GIVEN, Trajectory
from srft_jax.data.encoding import EncodedExample
from srft_jax.data.examples import row_name
from srft_jax.experience.scoring import Scorer
from srft_jax.mesh import gathered

# By number of the prompt in the training set, and number of the demonstration among the prompt's.
Demonstrations = dict[tuple[int, int], Trajectory]


def given_trajectory(problem: EncodedExample, number: int) -> Trajectory:
    """Return a prompt's demonstration of this number as a trajectory without a verdict."""
    tokens = problem.demonstrations[number]
    return Trajectory(
        key=problem.key,
        tokens=tokens,
        sampled=np.zeros(len(tokens), bool),
        logprobs=problem.behavior_logprobs[number],
        entropies=None,
        version=GIVEN,
        finished=True,
        member=number,
    )


def all_demonstrations(train: Sequence[EncodedExample]) -> Demonstrations:
    """Return every demonstration of the training set, without verdicts."""
    return {
        (index, number): given_trajectory(problem, number)
        for index, problem in enumerate(train)
        for number in range(len(problem.demonstrations))
    }


def verified(
    demonstrations: Demonstrations, train: Sequence[EncodedExample], scorer: Scorer
) -> Demonstrations:
    """Return the demonstrations with their verdicts.

    What is verified is what is trained on, decoded like a completion. Each process verifies its
    share, and has all verdicts afterwards.
    """
    pairs = list(demonstrations)
    here = pairs[jax.process_index() :: jax.process_count()]
    scored = scorer.score(
        [train[index].example for index, _ in here], [demonstrations[pair] for pair in here]
    )
    everywhere = dict(itertools.chain(*gathered(list(zip(here, scored, strict=True)))))
    return {pair: everywhere[pair] for pair in pairs}


def describe_demonstrations(
    demonstrations: Demonstrations, train: Sequence[EncodedExample]
) -> list[str]:
    """Return lines that say how many demonstrations are right, and which one is not.

    A wrong one is trained on all the same.
    """
    wrong = [where for where, one in demonstrations.items() if not one.correct]
    right = len(demonstrations) - len(wrong)
    lines = [f"demonstrations verified right: {right} of {len(demonstrations)}"]
    if wrong:
        index, number = wrong[0]
        example, verdict = train[index].example, demonstrations[wrong[0]].verdict
        lines.append(
            f"WARNING: {row_name(example, 'train', index + 1)}: the verdict of {example.kind} on "
            f"demonstration {number + 1} is {verdict} (answer {example.answer!r}); such rows are "
            "trained on all the same"
        )
    return lines if demonstrations else []
