"""One preset per method. A method is a row of coefficients here, never a branch in the trainer."""

import dataclasses
import math

from srft_jax.config import Objective, ObjectiveConfig, UsageError
from srft_jax.objectives.coefficient_checks import errors

_SRFT = Objective(
    demo_nll=0.5,
    demo_nll_entropy=-1,
    demo_policy=1.0,
    self_form="policy_gradient",
    self_positive=0.1,
    self_positive_entropy=1,
)
_GRPO = Objective(
    self_form="policy_gradient",
    advantage_group="self",
    advantage_std=True,
    policy_aggregation="sequences",
)
# The lineage of LUFFY's code: A = R - mean, an entropy bonus, sums divided by the length cap.
_LUFFY_RL = dataclasses.replace(
    _GRPO, advantage_std=False, entropy_bonus=0.001, policy_aggregation="length_cap"
)
# DAPO's token mean, without its filters.
_TOKEN_GRPO = dataclasses.replace(_GRPO, policy_aggregation="tokens")

PRESETS: dict[str, Objective] = {
    # The default form of SRFT: token-scoped entropy, clipped policy gradient, advantage R - mean.
    "srft": _SRFT,
    # Equations 8 to 13 of the paper (arXiv 2506.19767) as printed.
    "srft_paper": dataclasses.replace(
        _SRFT,
        self_form="likelihood",
        entropy_scope="sequence",
        advantage_std=True,
        demo_ratio_gamma=0.0,
    ),
    # Second-hand notes on the authors' code: the demonstrations' exponent has the other sign, and
    # the policy gradient r A has no clip.
    "srft_official": dataclasses.replace(
        _SRFT,
        demo_nll_entropy=1,
        clip_low=1.0,
        clip_high=math.inf,
        entropy_bonus=0.001,
        demo_aggregation="length_cap",
        policy_aggregation="length_cap",
    ),
    # The re-implementation in TsinghuaC3I/Unify-Post-Training.
    "srft_hpt": dataclasses.replace(
        _SRFT,
        self_form="likelihood",
        entropy_scope="sequence",
        entropy_bonus=0.001,
        policy_aggregation="length_cap",
    ),
    "sft": Objective(demo_nll=1.0),
    # Exact KL to the base on the demonstrations' tokens, which are no samples of the policy.
    "sft_kl": Objective(demo_nll=1.0, kl=0.2, kl_estimator="full", kl_role="demo"),
    "dft": Objective(demo_nll=1.0, demo_nll_probability="p"),
    "grpo": _GRPO,
    "dr_grpo": dataclasses.replace(_GRPO, advantage_std=False, policy_aggregation="sequence_caps"),
    "dapo": dataclasses.replace(
        _TOKEN_GRPO,
        clip_high=0.28,
        drop_zero_std=True,
        max_refills=3,
        overlong_buffer=0.2,
    ),
    "gspo": dataclasses.replace(_GRPO, surrogate="gspo", clip_low=3e-4, clip_high=4e-4),
    "cispo": dataclasses.replace(_TOKEN_GRPO, surrogate="cispo", clip_low=1.0, clip_high=5.0),
    # Two stages, each with an optimizer of its own. Any other row takes `sft_steps` as well.
    "sft_rl": dataclasses.replace(_GRPO, sft_steps=100),
    "sft_plus_rl": dataclasses.replace(_LUFFY_RL, demo_nll=1.0),
    "luffy": dataclasses.replace(
        _LUFFY_RL,
        demo_policy=1.0,
        advantage_group="augmented",
        clip_low=1.0,
        clip_high=math.inf,
    ),
    "chord": dataclasses.replace(
        _TOKEN_GRPO,
        demo_nll=1.0,
        demo_source="own",
        demo_per_step=32,
        mix="share",
        mix_start=0.9,
        mix_end=0.05,
        mix_steps=200,
    ),
    "chord_phi": dataclasses.replace(
        _TOKEN_GRPO,
        demo_nll=1.0,
        demo_nll_probability="p(1-p)",
        demo_source="own",
        demo_per_step=32,
        mix="share",
        mix_start=0.1,
        mix_end=0.1,
    ),
    "hpt": dataclasses.replace(_LUFFY_RL, demo_nll=1.0, gate="either"),
    "relift": dataclasses.replace(_LUFFY_RL, demo_nll=1.0, gate="demonstrations", demo_buffer=128),
    "uft": dataclasses.replace(
        _TOKEN_GRPO,
        prefix="all",
        prefix_steps=300,
        prefix_until=300,
        prefix_chunks=5,
        hint_nll=0.001,
        kl=0.001,
        entropy_bonus=0.001,
    ),
    "prefix_rft": dataclasses.replace(
        _LUFFY_RL,
        prefix="one",
        prefix_steps=500,
        prefix_until=500,
        prefix_policy=1.0,
        prefix_top_entropy=0.2,
    ),
    # Rejection sampling: only completions that are right and ended by themselves are imitated.
    "on_policy_sft": Objective(self_form="likelihood", keep="correct"),
}


def expand(config: ObjectiveConfig) -> Objective:
    """Return the preset's row, with the coefficients that the configuration sets.

    Raises:
        UsageError: the coefficients make no sense; it names every mistake.
    """
    if config.expanded_from not in (None, config.preset):
        raise UsageError(
            f"objective.preset = {config.preset}, but the file holds all coefficients of "
            f"{config.expanded_from}; start from a configuration that names only the preset"
        )
    names = [field.name for field in dataclasses.fields(Objective)]
    replaced = {name: vars(config)[name] for name in names if vars(config)[name] is not None}
    objective = dataclasses.replace(PRESETS[config.preset], **replaced)
    if found := list(errors(objective)):
        raise UsageError("; ".join(found))
    return objective
