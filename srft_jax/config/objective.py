"""The section `objective`: a preset of objectives/methods.py, and what departs from it."""

import dataclasses
from typing import Literal

# What a sum over tokens is divided by, see objectives/rows.py.
Aggregation = Literal["tokens", "sequences", "length_cap", "sequence_caps"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: a preset, and what departs from it. None means: as the preset says.

    The presets stand in objectives/methods.py, the formula in objectives/loss.py.

    Args:
        preset: Row of the table of methods.
        expanded_from: Written by a run beside the coefficients of its preset: naming another preset
            on top of a stored configuration is refused, as it would change nothing.
        demo_nll: Weight a of the demonstrations' negative log-likelihood.
        demo_nll_entropy: Sign s in a * exp(s * H); 0 leaves the entropy out.
        demo_nll_probability: Factor of a, without gradient: none, p, or p(1-p).
        demo_policy: Weight of the demonstrations' policy gradient.
        demo_ratio_gamma: Shaping in rho = r / (r + gamma) with r = p / p_behavior; 0 gives rho = r.
        demo_source: Each prompt's group brings its own demonstration, or demonstrations come from
            an iterator of their own.
        demo_per_step: Demonstrations a step from that iterator.
        demo_buffer: Above 0, demonstrations wait until so many are there, and are then trained on
            in a step of their own, by training.demonstration_optimizer.
        gate: Which prompts give a demonstration: every one; those of at most gate_solved correct
            completions (`demonstrations`); or these their demonstration alone and the others their
            completions alone (`either`).
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
            no gradient; or GSPO, whose ratio is that of the whole sequence.
        clip_low: Ratio clipped from below at 1 - clip_low.
        clip_high: Ratio clipped from above at 1 + clip_high.
        dual_clip: For A < 0 the loss is at most dual_clip * -A; inf is off.
        old_logprobs: Behind the ratio: the sampler's, or computed again by the trainer before the
            first update of a rollout.
        importance_cap: With the trainer's, p_old / p_sampler weighs a token, cut at this.
        keep: Train on all completions, or on the correct ones that ended by themselves.
        mask_truncated: Leave out completions that were cut at the length cap.
        overlong_buffer: The reward falls linearly to -1 more over this last share of the length
            cap; 0 is off.
        drop_zero_std: Leave out groups whose rewards are all equal.
        max_refills: Rollouts of further prompts a step to replace the groups left out.
        prefix: Which completions of a group start with a part of the demonstration.
        prefix_start: Largest share of the demonstration.
        prefix_end: Where it, or with prefix_chunks = 0 its lower bound, has fallen to by a cosine.
        prefix_steps: Length of that cosine.
        prefix_until: Steps after which there are no prefixes.
        prefix_chunks: The share is Binomial(chunks, share) / chunks; 0 draws it uniformly between
            the falling lower bound and prefix_start.
        hint_nll: Weight of the prefix's negative log-likelihood.
        prefix_policy: Weight of the prefix's policy gradient.
        prefix_top_entropy: Share of the prefix's tokens, those of highest entropy, that it takes.
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

    preset: Literal[
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
    ] = "srft"
    expanded_from: str | None = None
    # Demonstrations.
    demo_nll: float | None = None
    demo_nll_entropy: Literal[-1, 0, 1] | None = None
    demo_nll_probability: Literal["none", "p", "p(1-p)"] | None = None
    demo_policy: float | None = None
    demo_ratio_gamma: float | None = None
    demo_source: Literal["group", "own"] | None = None
    demo_per_step: int | None = None
    demo_buffer: int | None = None
    gate: Literal["none", "demonstrations", "either"] | None = None
    gate_solved: int | None = None
    sft_steps: int | None = None
    mix: Literal["sum", "share"] | None = None
    mix_start: float | None = None
    mix_end: float | None = None
    mix_steps: int | None = None
    # Completions.
    self_form: Literal["none", "policy_gradient", "likelihood"] | None = None
    self_positive: float | None = None
    self_positive_entropy: Literal[-1, 0, 1] | None = None
    self_negative: float | None = None
    surrogate: Literal["ppo", "cispo", "gspo"] | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    old_logprobs: Literal["sampler", "trainer"] | None = None
    importance_cap: float | None = None
    keep: Literal["all", "correct"] | None = None
    mask_truncated: bool | None = None
    overlong_buffer: float | None = None
    drop_zero_std: bool | None = None
    max_refills: int | None = None
    # Completions that start with a part of a demonstration.
    prefix: Literal["none", "one", "all"] | None = None
    prefix_start: float | None = None
    prefix_end: float | None = None
    prefix_steps: int | None = None
    prefix_until: int | None = None
    prefix_chunks: int | None = None
    hint_nll: float | None = None
    prefix_policy: float | None = None
    prefix_top_entropy: float | None = None
    # All.
    entropy_scope: Literal["token", "sequence", "batch"] | None = None
    advantage_group: Literal["self", "augmented"] | None = None
    advantage_std: bool | None = None
    kl: float | None = None
    kl_estimator: Literal["k1", "k2", "k3", "full"] | None = None
    kl_role: Literal["self", "demo"] | None = None
    entropy_bonus: float | None = None
    demo_aggregation: Aggregation | None = None
    policy_aggregation: Aggregation | None = None
