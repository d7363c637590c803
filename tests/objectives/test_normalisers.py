"""What every role's tokens are divided by."""

import dataclasses

import pytest
from made_sequences import made_sequence

from srft_jax.batch import Role
from srft_jax.config import Objective
from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.rows import normalisers

NONE, SELF, DEMO, HINT, PREFIX = Role

# Rollouts of 2 and 4 tokens, demonstrations of 3, 1 and 1, a rollout of 1 token after a hint of 2,
# one of 3 after a prefix of 3, of which one is not trained; the longest allowed 8.
COUNTED = [
    (2, SELF), (4, SELF), (3, DEMO), (1, DEMO), (1, DEMO), (3, [HINT, HINT, SELF]),
    (6, [PREFIX, NONE, PREFIX, SELF, SELF, SELF]),
]  # fmt: skip


def counted(**coefficients):
    sequences = [
        made_sequence([1, 2], range(length), role, 0.5 - n, correct=n % 2 == 0)
        for n, (length, role) in enumerate(COUNTED)
    ]
    return normalisers(sequences, Objective(**coefficients), length_cap=8)


AGGREGATIONS = pytest.mark.parametrize(
    ("aggregation", "of"),
    [
        ("tokens", lambda tokens, sequences: tokens),
        ("sequences", lambda tokens, sequences: sequences),
        ("length_cap", lambda tokens, sequences: 8),
        ("sequence_caps", lambda tokens, sequences: 8 * sequences),
    ],
)


@AGGREGATIONS
def test_a_role_counts_in_the_policy_terms_where_it_has_one(aggregation, of):
    completion, demo, prefix = (
        dict(self_form="likelihood"),
        dict(demo_policy=1.0),
        dict(prefix_policy=1.0),
    )
    for coefficients, tokens, sequences in [
        (completion, 10, 4),
        (demo, 5, 3),
        (completion | demo, 15, 7),
        (completion | prefix, 12, 4),
        (prefix, 2, 1),
        (completion | demo | prefix, 17, 7),
    ]:
        counts = counted(**coefficients, policy_aggregation=aggregation)
        assert counts.policy == of(tokens, sequences)
        assert counts.entropy == of(15, 7)  # of completions and demonstrations, whatever is on
        assert counts.demonstration == counts.kl == 0


@AGGREGATIONS
def test_a_role_counts_in_the_likelihoods_where_it_has_one(aggregation, of):
    for coefficients, tokens, sequences in [
        (dict(demo_nll=1.0), 5, 3),
        (dict(hint_nll=1.0), 2, 1),
        (dict(demo_nll=1.0, hint_nll=1.0), 7, 4),
    ]:
        counts = counted(**coefficients, demo_aggregation=aggregation)
        assert counts.demonstration == of(tokens, sequences)
        assert counts.policy == 0


@AGGREGATIONS
def test_the_kl_counts_its_own_role(aggregation, of):
    for role, tokens, sequences in [("self", 10, 4), ("demo", 5, 3)]:
        counts = counted(kl=0.1, kl_role=role, policy_aggregation=aggregation, demo_policy=1.0)
        assert counts.kl == of(tokens, sequences)


def test_counts_for_metrics():
    """Sequences of even number are correct; the advantage of the first alone is above 0."""
    for form, positive in [("none", 0), ("likelihood", 2 + 3), ("policy_gradient", 2)]:
        counts = counted(demo_nll=1.0, self_form=form)
        assert (counts.self_tokens, counts.demonstration_tokens) == (10, 5)
        assert counts.positive_tokens == positive


def test_nothing_counts_as_zero():
    counts = normalisers([], PRESETS["srft"], length_cap=8)
    assert dataclasses.astuple(counts) == (0, 0, 0, 0, 0, 0, 0)
    capped = Objective(self_form="likelihood", policy_aggregation="length_cap")
    assert normalisers([made_sequence([1], [2, 3], DEMO)], capped, length_cap=8).policy == 0
