"""What a step has sampled: groups of trajectories, and what was kept of them."""

import dataclasses
from collections.abc import Sequence

from srft_jax.batch import Trajectory
from srft_jax.data.encoding import EncodedExample
from srft_jax.experience.verified_sampling import VerifiedRollout


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt, its completions, and the demonstration that is trained on beside them.

    Attributes:
        pair: Number of the prompt in the training set, and of its demonstration at this visit.
        problem: The prompt, as text and as ids.
        trajectories: Completions that the policy drew; none for an objective without rollouts.
        demonstration: An answer given in the data, scored where rewards are used; None where the
            prompt has none, or none that this step trains on.
    """

    pair: tuple[int, int]
    problem: EncodedExample
    trajectories: Sequence[Trajectory]
    demonstration: Trajectory | None

    @property
    def rewards(self) -> list[float]:
        """Rewards with shaping; advantages add the overlong penalty."""
        return [trajectory.reward for trajectory in self.trajectories]

    @property
    def verifier_rewards(self) -> list[float]:
        """Rewards without shaping."""
        return [trajectory.verifier_reward for trajectory in self.trajectories]


@dataclasses.dataclass(frozen=True)
class Experience:
    """What one step has sampled.

    Attributes:
        sampled: Every group.
        groups: Groups to be trained on; fewer than asked for where the refills did not suffice.
        refills: Rollouts of further prompts.
        dropped: Groups left out as the verifier's rewards in them are all equal.
        rollouts: The first rollout, then the refills.
    """

    sampled: list[Group]
    groups: list[Group]
    refills: int
    dropped: int
    rollouts: list[VerifiedRollout]
