"""The pytrees that rooms hand to each other.

Dimension key: B rows, P prompts, R rows of the sampler, G completions per prompt, T query length,
S key length, C and U lengths of a cache's own and recent part, L layers, D model, F mlp, N query
heads, K kv heads, H head dim, V vocabulary, M microbatches.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

GIVEN = -1  # `Trajectory.version` of a text that no policy of this run drew


class Role(enum.IntEnum):
    """What a token is to the objective. Prompt tokens and padding have no role, hence no loss."""

    NONE = 0
    SELF = 1  # sampled by the policy itself
    DEMONSTRATION = 2  # written by somebody else
    HINT = 3  # start of a completion taken from a demonstration, learned by likelihood
    PREFIX = 4  # start of a completion taken from a demonstration, learned by policy gradient


def prompt_key(tokens: Sequence[int] | np.ndarray) -> str:
    """Return the identity of a prompt: a hash of its content, 16 hexadecimal digits.

    Prompts of the same tokens have the same key.
    """
    content = np.asarray(tokens, np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """What one term of rewards.shaping gives a trajectory, before its weight."""

    kind: str
    weight: float
    reward: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One answer to a prompt, drawn by the policy or given in the data.

    It goes from the sampler to the loss. The sampler fills in the fields up to `member`,
    verification adds the rest to the same record.

    Attributes:
        key: Identity of its prompt, see `prompt_key`.
        tokens: Ids, int32 [n]: forced ones first, EOS included where the answer ended by itself.
        sampled: Which tokens the policy drew, bool [n]; forced and given ones are not.
        logprobs: Log-prob of each token, float32 [n]: under the whole tempered policy for sampled
            and forced tokens, under its author for a demonstration; None where the author's are
            not known.
        entropies: Entropy of the whole tempered policy at each token, float32 [n]; None in a
            demonstration.
        version: Number of the update whose parameters drew it, 0 before the first; GIVEN for a
            demonstration.
        finished: It ended by a stop id or a stop string, not by its length limit.
        group: Number of its group within one rollout; each refill counts from 0.
        member: Its number within the group.
        text: The answer as verifiers read it.
        verifier_reward: What the prompt's own verifier gives.
        correct: The verifier's reward reaches rewards.correct_threshold; shaping does not count.
        verdict: What that verifier says: right, wrong, unparsed, timeout or crash.
        shaping: Further terms of the reward, from rewards.shaping.
    """

    key: str
    tokens: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray | None
    entropies: np.ndarray | None
    version: int
    finished: bool
    group: int = 0
    member: int = 0
    text: str = ""
    verifier_reward: float = 0.0
    correct: bool = False
    verdict: str = ""
    shaping: tuple[RewardTerm, ...] = ()

    @property
    def truncated(self) -> bool:
        """It was cut at its length limit."""
        return not self.finished

    @property
    def reward(self) -> float:
        """The verifier's reward and the weighted shaping terms."""
        return self.verifier_reward + sum(term.weight * term.reward for term in self.shaping)

    @property
    def num_forced(self) -> int:
        """Tokens at its start that the policy did not draw; all of a demonstration's."""
        return int(len(self.tokens) - np.count_nonzero(self.sampled))


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
    correct: Bool[Array, "*lead"]  # of the whole answer, see `Trajectory`
    weight: Float[Array, "*lead"]  # of likelihood and policy gradient, e.g. CHORD's mu
    # Log-probs under the policy that the ratio is taken to. On demonstrations: under the policy
    # that wrote them, or 0 (p = 1) where that is not known.
    old_logprobs: Float[Array, "*lead"]
    sampler_logprobs: Float[Array, "*lead"]  # as returned with the rollouts; 0 on demonstrations
    inverse_length: Float[Array, "*lead"]  # 1 / trained tokens of the sequence


def role_mask(rows: Rows, *roles: Role) -> Bool[Array, "*lead"]:
    """Return which tokens are trained and have one of these roles."""
    return rows.loss_mask & jnp.isin(rows.role, jnp.array(roles))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normalisers:
    """Denominators of a whole update, over microbatches and devices; 0 where nothing is counted."""

    demonstration: Float[Array, ""]  # divides the NLL of demonstrations and hints
    # Divides the terms over completions, and the policy gradient of demonstrations and prefixes.
    policy: Float[Array, ""]
    kl: Float[Array, ""]  # divides the KL, over the tokens of its role
    entropy: Float[Array, ""]  # divides the entropy bonus, over SELF and DEMONSTRATION
    # The rest counts trained tokens, for metrics.
    self_tokens: Float[Array, ""]
    positive_tokens: Float[Array, ""]  # completions' tokens that `self_positive` weighs
    demonstration_tokens: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One update, static in shape; only the first `num_microbatches` are computed."""

    rows: Rows  # [M, B, T]
    normalisers: Normalisers
    num_microbatches: Int[Array, ""]
    # Every trained trajectory was drawn by the parameters that this update starts from: the ratio
    # p / p_old is 1, and only its gradient counts. A step is compiled for each value that occurs.
    on_policy: bool = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values while R rows complete P prompts; each tuple has one entry a layer.

    A prompt is stored once and read once for all of its rows, at most G: each is one of the
    prompt's lanes. A row's own tokens are in two places. All rows write the token at hand to the
    same column of the recent part, which costs no scatter; before the next segment of decode steps
    `rollout.cache.settle` moves that part behind the row's older tokens. A row with a prompt of 3
    that has drawn 5 tokens, 2 of them in this segment:

        prompt  p p p . . .    own  a b c .    recent  d e . .

    Keys have their tokens in the last axis: the product with a query then reads them in order.
    Where rows are split over devices, so are prompts, and lanes and rows are numbered within one
    device.
    """

    prompt_keys: tuple[Float[Array, "P K H S"], ...]
    prompt_values: tuple[Float[Array, "P K S H"], ...]
    keys: tuple[Float[Array, "R K H C"], ...]
    values: tuple[Float[Array, "R K C H"], ...]
    recent_keys: tuple[Float[Array, "R K H U"], ...]
    recent_values: tuple[Float[Array, "R K U H"], ...]
    prompt_lengths: Int[Array, " P"]
    lengths: Int[Array, " R"]  # of the own part, once settled
    num_recent: Int[Array, ""]
    row_of_lane: Int[Array, "P G"]  # any row where the lane is empty
    lane_of_row: Int[Array, " R"]  # p G + g


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes, and all that a checkpoint must hold of the model."""

    # Updates tried so far, skipped ones too; `training.state.updates_made` counts one optimizer's
    # own.
    step: Int[Array, ""]
    params: Any
    optimizer_states: dict[str, Any]  # "policy", and "demonstration" where steps are on those alone
    entropy_self: Float[Array, ""]  # token mean of the previous update, for batch-scoped weights
    entropy_demonstration: Float[Array, ""]


Metrics = dict[str, jax.Array]
