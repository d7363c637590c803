"""Groups of the oracle, as hypothesis draws them and as batches of ours with made-up statistics."""

import numpy as np
from hypothesis import strategies as st
from oracle import Answer, Group

from srft_jax.batch import Batch, Role
from srft_jax.config import ObjectiveConfig, TrainingConfig
from srft_jax.objectives.advantages import group_advantages
from srft_jax.objectives.rows import TrainingSequence, make_batch
from srft_jax.ops.head import TokenStats

LENGTH_CAP = 6
NUM_MICROBATCHES = 6
TRAINING = TrainingConfig(row_length=12, rows_per_microbatch=2)
JUNK = -3.0  # log-prob, entropy: of tokens that are not trained; not to be seen in any result


@st.composite
def answers(draw: st.DrawFn, demonstration: bool) -> Answer:
    """Hypothesis chooses what can break (lengths, rewards); the numbers are merely random."""
    size = draw(st.integers(1, LENGTH_CAP))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    logp, entropy = random.uniform(-4.0, -0.01, size), random.uniform(0.0, 3.0, size)
    log_ratio = random.uniform(-0.5, 0.5, size)
    for bound in np.log([0.8, 1.2]):  # on the bounds themselves the loss has two slopes
        log_ratio[np.abs(log_ratio - bound) < 1e-3] = 0.0
    reward = draw(st.sampled_from([0.0, 0.5, 1.0]))
    lists = (x.tolist() for x in (logp, entropy, entropy, logp - log_ratio))
    return Answer(demonstration, reward, *lists)


def groups(max_groups: int = 3) -> st.SearchStrategy[list[Group]]:
    """Ragged: some without rollouts, demonstrations, anything; of one token, of equal rewards."""
    rollouts = st.lists(answers(demonstration=False), max_size=3)
    demonstrations = st.lists(answers(demonstration=True), max_size=1)
    group = st.builds(lambda a, b: a + b, rollouts, demonstrations)
    return st.lists(group, max_size=max_groups)


def to_batch(
    groups: list[Group], objective: ObjectiveConfig, prompt_length: int = 2
) -> tuple[Batch, TokenStats]:
    """The batch that a step would see, and [M, B, T] statistics.

    Every trained token is a number of its own, by which it finds its log-prob and entropy wherever
    it was packed.
    """
    tables, sequences = [[JUNK], [JUNK]], []
    for group in groups:
        given = [answer.demonstration for answer in group]
        rewards = np.array([answer.reward for answer in group])
        own, demo = group_advantages(
            rewards[~np.array(given, bool)],
            rewards[np.array(given, bool)],
            augmented=objective.advantage_group == "augmented",
            divide_by_std=objective.advantage_std,
        )
        of_role = {False: iter(own), True: iter(demo)}
        for answer in group:
            first = len(tables[0])
            tables[0] += answer.logp
            tables[1] += answer.entropy
            sequences.append(
                TrainingSequence(
                    prompt=[0] * prompt_length,
                    completion=range(first, len(tables[0])),
                    role=Role.DEMONSTRATION if answer.demonstration else Role.SELF,
                    advantage=next(of_role[answer.demonstration]),
                    correct=answer.reward >= 1.0,
                    old_logprobs=None if answer.demonstration else answer.old_logp,
                )
            )
    batch = make_batch(
        sequences, objective, TRAINING, num_microbatches=NUM_MICROBATCHES, length_cap=LENGTH_CAP
    )
    stats = (np.asarray(table, np.float32)[batch.rows.targets] for table in tables)
    return batch, TokenStats(*stats)
