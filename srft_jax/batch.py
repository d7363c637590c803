"""The pytrees that rooms hand to each other.

Dimension key: B rows, P prompts, G completions per prompt, T query length, S key length, L layers,
D model, F mlp, N query heads, K kv heads, H head dim, V vocabulary, M microbatches.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Role(enum.IntEnum):
    """What a token is to the objective. Prompt tokens and padding have no role, hence no loss."""

    NONE = 0
    SELF = 1  # sampled by the policy itself
    DEMONSTRATION = 2  # written by somebody else
    HINT = 3  # start of a completion taken from a demonstration, learned by likelihood
    PREFIX = 4  # start of a completion taken from a demonstration, learned by policy gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed tokens: every field is [M, B, T] in a batch and [B, T] in a microbatch.

    A row holds several sequences one after the other. For the prompt `1+1=` and the completion
    `2$`, then padding:

        tokens        1 + 1 = 2 $ .      targets      + 1 = 2 $ . .      (what the next token is)
        segment_ids   1 1 1 1 1 1 0      loss_mask    0 0 0 1 1 0 0      (is the *target* trained)
    """

    tokens: Int[Array, "*lead"]
    targets: Int[Array, "*lead"]
    positions: Int[Array, "*lead"]
    segment_ids: Int[Array, "*lead"]  # 0 is padding; a token attends to its own segment only
    sequence_ids: Int[Array, "*lead"]  # numbers the sequences of one microbatch from 0
    role: Int[Array, "*lead"]
    loss_mask: Bool[Array, "*lead"]
    advantage: Float[Array, "*lead"]
    # The verifier's reward of the whole sequence reached the threshold.
    correct: Bool[Array, "*lead"]
    weight: Float[Array, "*lead"]  # of likelihood and policy gradient, e.g. CHORD's mu
    # Of the policy that the ratio is taken to. On demonstrations: of whoever wrote them, 0 (p = 1)
    # where that is not known.
    old_logprobs: Float[Array, "*lead"]
    sampler_logprobs: Float[Array, "*lead"]  # as returned with the rollouts; 0 on demonstrations
    inverse_length: Float[Array, "*lead"]  # 1 / trained tokens of the sequence


def of_role(rows: Rows, *roles: Role) -> Bool[Array, "*lead"]:
    """Trained tokens of these roles."""
    return rows.loss_mask & jnp.isin(rows.role, jnp.array(roles))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normalisers:
    """Denominators of a whole step, over microbatches and devices; 0 where nothing is counted."""

    demonstration: Float[Array, ""]  # of the NLL of demonstrations and hints
    # Of the terms over completions, and of the policy gradient of demonstrations and prefixes.
    policy: Float[Array, ""]
    kl: Float[Array, ""]  # of the KL, over the tokens of its role
    entropy: Float[Array, ""]  # of the entropy bonus, over SELF and DEMONSTRATION
    # Trained tokens, for metrics.
    self_tokens: Float[Array, ""]
    positive_tokens: Float[Array, ""]  # completions' tokens that `self_positive` weighs
    demonstration_tokens: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One optimizer step, static in shape; only the first `num_microbatches` are computed."""

    rows: Rows  # [M, B, T]
    normalisers: Normalisers
    num_microbatches: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, one slot a token, the same slot in every row.

    Prompts are padded on the left, so that all rows write the next token to slot `length`:

        segment_ids   0 0 1 1 1 1 . .     row with a prompt of 4
                      1 1 1 1 1 1 . .     row with a prompt of 6; length = 6, capacity S = 8
    """

    keys: tuple[Float[Array, "B K S H"], ...]  # one entry a layer
    values: tuple[Float[Array, "B K S H"], ...]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        return self.segment_ids.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an optimizer step changes, and all that a checkpoint must hold of the model."""

    step: Int[Array, ""]
    params: Any
    optimizer_states: dict[str, Any]  # "policy", and "demonstration" where steps are on those alone
    entropy_self: Float[Array, ""]  # token mean of the previous step, for batch-scoped weights
    entropy_demonstration: Float[Array, ""]


Metrics = dict[str, jax.Array]
