"""The section `objective`: a preset of objectives/methods.py, and what replaces its coefficients.

Each coefficient is declared once, in `Objective`; `ObjectiveConfig` is made from it.
"""

import dataclasses
import inspect
import math
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_type_hints

# Divisor of a sum over tokens, see objectives/rows.py.
Aggregation = Literal["tokens", "sequences", "length_cap", "sequence_caps"]

# Rows of the table of methods, objectives/methods.py.
Preset = Literal[
    "srft",
    "srft_paper",
    "srft_official",
    "srft_hpt",
    "sft",
    "sft_kl",
    "dft",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "sft_rl",
    "sft_plus_rl",
    "luffy",
    "chord",
    "chord_phi",
    "hpt",
    "relift",
    "uft",
    "prefix_rft",
    "on_policy_sft",
]


class Range(NamedTuple):
    """The values that a coefficient may have.

    Attributes:
        lowest: Smallest value allowed.
        highest: Largest value allowed.
        mistake: What is wrong with a value outside: "objective.kl = -1 is <mistake>".
    """

    lowest: float
    highest: float
    mistake: str


WEIGHT = Range(0.0, sys.float_info.max, "not a finite weight of at least 0")
NOT_NEGATIVE = Range(0.0, math.inf, "below 0")
SHARE = Range(0.0, 1.0, "outside 0 to 1")

_T = TypeVar("_T")
_RANGE = "range"  # key of a field's metadata


def coefficient(default: _T, within: Range) -> _T:
    """Return a dataclass field whose values have a range of their own."""
    return dataclasses.field(default=default, metadata={_RANGE: within})


@dataclasses.dataclass(frozen=True)
class Objective:
    """The coefficients of the loss; its formula stands in objectives/loss.py.

    The defaults train nothing: a row of `PRESETS` in objectives/methods.py switches its terms on.

    Args:
        demo_nll: Weight a of the demonstrations' negative log-likelihood.
        demo_nll_entropy: Sign s in a * exp(s * H); 0 leaves the entropy out.
        demo_nll_probability: Factor of a, without gradient: none, p, or p(1-p).
        demo_policy: Weight of the demonstrations' policy gradient.
        demo_ratio_gamma: Shaping in rho = r / (r + gamma) with r = p / p_behavior; 0 gives rho = r.
        demo_source: Each prompt's group brings its own demonstration, or demonstrations come from
            an iterator of their own.
        demo_per_step: Demonstrations a step from that iterator.
        demo_buffer: Above 0, demonstrations wait until this many are there, and are then trained on
            in a step of their own, by training.demonstration_optimizer.
        gate: Prompts that give a demonstration: every prompt (`none`); prompts with at most
            gate_solved correct completions (`demonstrations`); or those give their demonstration
            alone and all other prompts their completions alone (`either`).
        gate_solved: Correct completions of a prompt, up to which its demonstration is used.
        sft_steps: Steps of plain SFT before the first rollout, by training.demonstration_optimizer.
        mix: Terms of demonstrations and completions are summed, or weighted mu and 1 - mu.
        mix_start: mu of the first step.
        mix_end: mu from step mix_steps on; a cosine in between.
        mix_steps: Length of that cosine.
        self_form: How completions enter: not at all, by policy gradient, or by likelihood (up if
            correct, down if not).
        self_positive: Weight of completions with A > 0 (policy_gradient), correct ones
            (likelihood).
        self_positive_entropy: Sign s in self_positive * exp(s * H); 0 leaves the entropy out.
        self_negative: Weight of all other completions.
        surrogate: The policy gradient of completions: PPO's clip; CISPO, whose clipped ratio takes
            no gradient; or GSPO, whose ratio is the whole sequence's.
        clip_low: Ratio clipped from below at 1 - clip_low.
        clip_high: Ratio clipped from above at 1 + clip_high.
        dual_clip: For A < 0 the loss is at most dual_clip * -A; inf is off.
        old_logprobs: Log-probs in the ratio's denominator: the sampler's, or computed again by the
            trainer before the first update of a rollout.
        importance_cap: With the trainer's, p_old / p_sampler weighs a token, cut at this.
        keep: Train on all completions, or on the correct ones that ended by themselves.
        mask_truncated: Leave out completions that were cut at the length cap.
        overlong_buffer: The reward falls linearly to -1 more over this last share of the length
            cap; 0 is off.
        drop_zero_std: Leave out groups whose rewards are all equal.
        max_refills: Rollouts of further prompts a step to replace the groups left out.
        prefix: Completions of a group that start with a part of the demonstration.
        prefix_start: Largest share of the demonstration.
        prefix_end: Share to which it falls by a cosine; with prefix_chunks = 0 it is the lower
            bound that falls.
        prefix_steps: Length of that cosine.
        prefix_until: Steps after which there are no prefixes.
        prefix_chunks: The share is Binomial(chunks, share) / chunks; 0 draws it uniformly between
            the falling lower bound and prefix_start.
        hint_nll: Weight of the prefix's negative log-likelihood.
        prefix_policy: Weight of the prefix's policy gradient.
        prefix_top_entropy: Share of the prefix's tokens that it takes, by highest entropy.
        entropy_scope: H of the token, its sequence's mean, or the previous step's mean of its role,
            which is 0 before the first step.
        advantage_group: Mean and std over completions alone, or over completions and demonstration.
        advantage_std: Divide the advantage by the group's std.
        kl: Weight beta of the KL to model.reference.
        kl_estimator: k1, k2, k3 of the sampled token, or the exact KL over the whole vocabulary.
        kl_role: On completions or on demonstrations.
        entropy_bonus: Weight d of -H on tokens of completions and whole demonstrations.
        demo_aggregation: Normaliser of likelihoods of given text, see objectives/rows.py.
        policy_aggregation: Normaliser of every other term.
    """

    # Demonstrations.
    demo_nll: float = coefficient(0.0, WEIGHT)
    demo_nll_entropy: Literal[-1, 0, 1] = 0
    demo_nll_probability: Literal["none", "p", "p(1-p)"] = "none"
    demo_policy: float = coefficient(0.0, WEIGHT)
    demo_ratio_gamma: float = coefficient(0.1, NOT_NEGATIVE)
    demo_source: Literal["group", "own"] = "group"
    demo_per_step: int = coefficient(0, NOT_NEGATIVE)
    demo_buffer: int = coefficient(0, NOT_NEGATIVE)
    gate: Literal["none", "demonstrations", "either"] = "none"
    gate_solved: int = coefficient(0, NOT_NEGATIVE)
    sft_steps: int = coefficient(0, NOT_NEGATIVE)
    mix: Literal["sum", "share"] = "sum"
    mix_start: float = coefficient(0.0, SHARE)
    mix_end: float = coefficient(0.0, SHARE)
    mix_steps: int = coefficient(0, NOT_NEGATIVE)
    # Completions.
    self_form: Literal["none", "policy_gradient", "likelihood"] = "none"
    self_positive: float = coefficient(1.0, WEIGHT)
    self_positive_entropy: Literal[-1, 0, 1] = 0
    self_negative: float = coefficient(1.0, WEIGHT)
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
    max_refills: int = coefficient(0, NOT_NEGATIVE)
    # Completions that start with a part of a demonstration.
    prefix: Literal["none", "one", "all"] = "none"
    prefix_start: float = coefficient(0.95, SHARE)
    prefix_end: float = coefficient(0.05, SHARE)
    prefix_steps: int = coefficient(0, NOT_NEGATIVE)
    prefix_until: int = coefficient(0, NOT_NEGATIVE)
    prefix_chunks: int = coefficient(0, NOT_NEGATIVE)
    hint_nll: float = coefficient(0.0, WEIGHT)
    prefix_policy: float = coefficient(0.0, WEIGHT)
    prefix_top_entropy: float = 1.0
    # All tokens.
    entropy_scope: Literal["token", "sequence", "batch"] = "token"
    advantage_group: Literal["self", "augmented"] = "augmented"
    advantage_std: bool = False
    kl: float = coefficient(0.0, WEIGHT)
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k3"
    kl_role: Literal["self", "demo"] = "self"
    entropy_bonus: float = coefficient(0.0, WEIGHT)
    demo_aggregation: Aggregation = "tokens"
    policy_aggregation: Aggregation = "tokens"

    @property
    def uses_demonstrations(self) -> bool:
        """Whether the training set must hold demonstrations."""
        return bool(self.demo_nll or self.demo_policy or self.sft_steps or self.prefix != "none")

    @property
    def trains_demonstrations(self) -> bool:
        """Whether whole demonstrations are rows of the batch."""
        return bool(self.demo_nll or self.demo_policy)

    @property
    def uses_rollouts(self) -> bool:
        """Whether completions are trained on, or the demonstrations' advantage is over them."""
        return self.self_form != "none" or bool(self.demo_policy)

    @property
    def uses_reference(self) -> bool:
        """Whether the loss has a KL to the reference policy."""
        return bool(self.kl)

    @property
    def is_elementwise(self) -> bool:
        """Whether a token's loss needs only its own log-prob and entropy, not its sequence's.

        Then the head can form its gradient in the sweep that computes them.
        """
        return self.entropy_scope != "sequence" and self.surrogate != "gspo"


# Coefficient -> its range, for those whose values are checked one by one.
RANGES: dict[str, Range] = {
    field.name: field.metadata[_RANGE]
    for field in dataclasses.fields(Objective)
    if _RANGE in field.metadata
}

_DOC = """The loss: a preset, and the coefficients that replace its own. None: as the preset says.

The presets stand in objectives/methods.py, the formula in objectives/loss.py.

Args:
    preset: Row of the table of methods.
    expanded_from: Written by a run beside the coefficients of its preset: naming another preset
        on top of a stored configuration is refused, as it would change nothing.
"""

if TYPE_CHECKING:

    class ObjectiveConfig:
        """What a type checker is told of the class below."""

        preset: Preset
        expanded_from: str | None

        def __init__(
            self, preset: Preset = ..., expanded_from: str | None = ..., **coefficients: Any
        ) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    ObjectiveConfig = dataclasses.make_dataclass(
        "ObjectiveConfig",
        [
            ("preset", Preset, "srft"),
            ("expanded_from", str | None, None),
            *((name, kind | None, None) for name, kind in get_type_hints(Objective).items()),
        ],
        frozen=True,
        namespace={
            "__module__": __name__,  # so that pickle finds it
            "__doc__": _DOC + inspect.getdoc(Objective).partition("Args:\n")[2],
        },
    )
