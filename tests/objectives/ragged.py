"""Groups of the oracle, as hypothesis draws them and as batches of ours with made-up statistics."""

import copy

import numpy as np
from hypothesis import strategies as st
from made_sequences import made_sequence
from oracle import L_MAX, Answer, Group

from srft_jax.batch import Batch, Role
from srft_jax.config import Objective, TrainingConfig
from srft_jax.objectives.advantages import group_advantages
from srft_jax.objectives.rows import TrainingSequence, make_batch
from srft_jax.objectives.schedules import top_entropy
from srft_jax.ops.head import ReferencedStats, TokenStats

NUM_MICROBATCHES = 6
TRAINING = TrainingConfig(row_length=12, rows_per_microbatch=2)
JUNK = -3.0  # log-prob, entropy: of tokens that are not trained; not to be seen in any result
KINKS = np.log([0.8, 1.2, 1.28, 6.0, 1 - 3e-4, 1 + 4e-4])  # where a clip gives two slopes


def answer(demonstration, reward, logp, entropy, old=None, **others) -> Answer:
    """With what it freezes; by default on policy, and its completions reference."""
    zeros = [0.0] * len(logp)
    old = old or list(zeros if demonstration else logp)
    made = Answer(demonstration, reward, logp, entropy, old, list(logp), zeros, **others)
    made.frozen = copy.deepcopy(made)
    return made


@st.composite
def answers(draw: st.DrawFn, demonstration: bool, prefixed: bool, mixed: bool) -> Answer:
    """Hypothesis chooses what can break (lengths, rewards); the numbers are merely random."""
    size = draw(st.integers(1, L_MAX))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    logp, entropy = random.uniform(-4.0, -0.01, size), random.uniform(0.0, 3.0, size)
    spread = draw(st.sampled_from([0.5, 2.0, 1e-4]))  # the last is within the bounds of gspo
    log_ratio = random.uniform(-spread, spread, size)
    log_ratio[np.abs(log_ratio[:, None] - KINKS).min(axis=1) < 3e-5] = 0.0
    old = logp - log_ratio
    if demonstration and draw(st.booleans()):
        old = np.zeros(size)  # nobody knows
    drawn = Answer(
        demonstration,
        draw(st.sampled_from([0.0, 0.5, 1.0])),
        *(x.tolist() for x in (logp, entropy, old, logp - random.uniform(-1.0, 1.0, size))),
        kl=random.uniform(0.0, 2.0, size).tolist(),
        given=draw(st.integers(0, size - 1)) if prefixed and not demonstration else 0,
        weight=draw(st.sampled_from([0.1, 0.9])) if mixed else 1.0,
    )
    drawn.frozen = copy.deepcopy(drawn)
    return drawn


def groups(objective: Objective, max_groups: int = 3) -> st.SearchStrategy[list[Group]]:
    """Ragged: some without rollouts, demonstrations, anything; of one token, of equal rewards."""
    kind = dict(prefixed=objective.prefix != "none", mixed=objective.mix == "share")
    rollouts = st.lists(answers(demonstration=False, **kind), max_size=3)
    demonstrations = st.lists(answers(demonstration=True, **kind), max_size=1)
    group = st.builds(lambda a, b: a + b, rollouts, demonstrations)
    return st.lists(group, max_size=max_groups)


def roles(answer: Answer, objective: Objective) -> list[Role]:
    """As the run's rollouts assign them."""
    if answer.demonstration:
        return [Role.DEMONSTRATION] * len(answer.logp)
    start = [Role.HINT if objective.hint_nll else Role.NONE] * answer.given
    if objective.prefix_policy and answer.given:
        top = top_entropy(answer.entropy[: answer.given], objective.prefix_top_entropy)
        start = [Role.PREFIX if chosen else Role.NONE for chosen in top]
    return start + [Role.SELF] * (len(answer.logp) - answer.given)


def group_sequences(
    group: Group, objective: Objective, first: int, prompt_length: int
) -> list[TrainingSequence]:
    """Every token is a number of its completions, counted from `first`."""
    completions = [a for a in group if not a.demonstration]
    demonstrations = [a for a in group if a.demonstration]
    a_self, a_demo = group_advantages(
        [a.reward for a in completions],
        [a.reward for a in demonstrations],
        augmented=objective.advantage_group == "augmented",
        divide_by_std=objective.advantage_std,
        baseline=[not a.given for a in completions] if objective.prefix_policy else None,
    )
    by_answer = {
        id(a): x for a, x in zip(completions + demonstrations, [*a_self, *a_demo], strict=True)
    }
    sequences = []
    for answer in group:
        sequences.append(
            made_sequence(
                prompt=[0] * prompt_length,
                completion=range(first, first + len(answer.logp)),
                role=roles(answer, objective),
                advantage=by_answer[id(answer)],
                correct=answer.reward >= 1.0,
                old_logprobs=answer.old_logp,
                weight=answer.weight,
            )
        )
        first += len(answer.logp)
    return sequences


def to_batch(
    groups: list[Group], objective: Objective, prompt_length: int = 2
) -> tuple[Batch, TokenStats | ReferencedStats]:
    """The batch that a step would see, and [M, B, T] statistics.

    A trained token finds its statistics by its number, wherever it was packed.
    """
    everything = [answer for group in groups for answer in group]
    tables = [
        [JUNK] + [value for answer in everything for value in getattr(answer, name)]
        for name in ("logp", "entropy", "ref_logp", "kl")
    ]
    sequences, first = [], 1
    for group in groups:
        sequences += group_sequences(group, objective, first, prompt_length)
        first += sum(len(answer.logp) for answer in group)
    batch = make_batch(
        sequences, objective, TRAINING, num_microbatches=NUM_MICROBATCHES, length_cap=L_MAX
    )
    stats = [np.asarray(table, np.float32)[batch.rows.targets] for table in tables]
    return batch, ReferencedStats(*stats) if objective.kl else TokenStats(*stats[:2])
