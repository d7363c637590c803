"""All coefficients of the loss, and of what a step is made of."""

import dataclasses
import math
from typing import Literal

from srft_jax.config import Aggregation


@dataclasses.dataclass(frozen=True)
class Objective:
    """The coefficients of the loss, all of them; `ObjectiveConfig` says what each means.

    The defaults train nothing: a row of `methods.PRESETS` switches its terms on.
    """

    demo_nll: float = 0.0
    demo_nll_entropy: Literal[-1, 0, 1] = 0
    demo_nll_probability: Literal["none", "p", "p(1-p)"] = "none"
    demo_policy: float = 0.0
    demo_ratio_gamma: float = 0.1
    demo_source: Literal["group", "own"] = "group"
    demo_per_step: int = 0
    demo_buffer: int = 0
    gate: Literal["none", "demonstrations", "either"] = "none"
    gate_solved: int = 0
    sft_steps: int = 0
    mix: Literal["sum", "share"] = "sum"
    mix_start: float = 0.0
    mix_end: float = 0.0
    mix_steps: int = 0
    self_form: Literal["none", "policy_gradient", "likelihood"] = "none"
    self_positive: float = 1.0
    self_positive_entropy: Literal[-1, 0, 1] = 0
    self_negative: float = 1.0
    surrogate: Literal["ppo", "cispo", "gspo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = math.inf
    old_logprobs: Literal["sampler", "trainer"] = "sampler"
    importance_cap: float = 2.0
    keep: Literal["all", "correct"] = "all"
    mask_truncated: bool = False
    overlong_buffer: float = 0.0
    drop_zero_std: bool = False
    max_refills: int = 0
    prefix: Literal["none", "one", "all"] = "none"
    prefix_start: float = 0.95
    prefix_end: float = 0.05
    prefix_steps: int = 0
    prefix_until: int = 0
    prefix_chunks: int = 0
    hint_nll: float = 0.0
    prefix_policy: float = 0.0
    prefix_top_entropy: float = 1.0
    entropy_scope: Literal["token", "sequence", "batch"] = "token"
    advantage_group: Literal["self", "augmented"] = "augmented"
    advantage_std: bool = False
    kl: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k3"
    kl_role: Literal["self", "demo"] = "self"
    entropy_bonus: float = 0.0
    demo_aggregation: Aggregation = "tokens"
    policy_aggregation: Aggregation = "tokens"

    @property
    def uses_demonstrations(self) -> bool:
        """The training set must hold demonstrations."""
        return bool(self.demo_nll or self.demo_policy or self.sft_steps or self.prefix != "none")

    @property
    def trains_demonstrations(self) -> bool:
        """Whole demonstrations are rows of the batch."""
        return bool(self.demo_nll or self.demo_policy)

    @property
    def uses_rollouts(self) -> bool:
        """Completions are trained on, or the advantage of demonstrations is taken over them."""
        return self.self_form != "none" or bool(self.demo_policy)

    @property
    def uses_reference(self) -> bool:
        return bool(self.kl)

    @property
    def is_elementwise(self) -> bool:
        """A token's loss needs its own log-prob and entropy only, not those of its sequence.

        Then the head can form its gradient in the sweep that computes them.
        """
        return self.entropy_scope != "sequence" and self.surrogate != "gspo"
