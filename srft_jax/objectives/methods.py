"""One preset per method: what it sets in `ObjectiveConfig`. A method is a row here, never a branch in the trainer."""

import dataclasses
from typing import Any

from srft_jax.config import ObjectiveConfig, UsageError

# What a row does not mention. The plain likelihood-free, demonstration-free objective.
_BASE: dict[str, Any] = dict(
    demo_nll=0.0,
    demo_nll_entropy=0,
    demo_policy=0.0,
    demo_ratio_gamma=0.1,
    self_form="none",
    self_positive=1.0,
    self_positive_entropy=0,
    self_negative=1.0,
    entropy_scope="token",
    advantage_group="augmented",
    advantage_std=False,
    clip_low=0.2,
    clip_high=0.2,
    entropy_bonus=0.0,
    demo_aggregation="tokens",
    policy_aggregation="tokens",
)

_SRFT = _BASE | dict(
    demo_nll=0.5,
    demo_nll_entropy=-1,
    demo_policy=1.0,
    self_form="policy_gradient",
    self_positive=0.1,
    self_positive_entropy=1,
)

PRESETS: dict[str, dict[str, Any]] = {
    # Single-stage SRFT in the form that we train by default: token-scoped entropy, clipped policy gradient.
    "srft": _SRFT,
    # The paper's equations 8 to 13 as printed (arXiv 2506.19767).
    "srft_paper": _SRFT
    | dict(
        self_form="likelihood", entropy_scope="sequence", advantage_std=True, demo_ratio_gamma=0.0
    ),
    # Second-hand notes on the authors' code: the demonstrations' exponent has the other sign.
    "srft_official": _SRFT
    | dict(
        demo_nll_entropy=1,
        entropy_bonus=0.001,
        demo_aggregation="length_cap",
        policy_aggregation="length_cap",
    ),
    # The re-implementation in TsinghuaC3I/Unify-Post-Training.
    "srft_hpt": _SRFT
    | dict(
        self_form="likelihood",
        entropy_scope="sequence",
        entropy_bonus=0.001,
        policy_aggregation="length_cap",
    ),
    "sft": _BASE | dict(demo_nll=1.0),
    "grpo": _BASE
    | dict(
        self_form="policy_gradient",
        advantage_group="self",
        advantage_std=True,
        policy_aggregation="sequences",
    ),
}


def expand(config: ObjectiveConfig) -> ObjectiveConfig:
    """The same objective with every None replaced by the preset's value.

    Raises:
        UsageError: clip bounds or weights that make no sense.
    """
    own = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    full = ObjectiveConfig(**(PRESETS[config.preset] | own))
    if not 0 <= full.clip_low < 1 or full.clip_high < 0:
        raise UsageError(
            f"objective.clip_low={full.clip_low} and clip_high={full.clip_high} do not bracket a ratio of 1"
        )
    if full.demo_ratio_gamma < 0:
        raise UsageError(f"objective.demo_ratio_gamma={full.demo_ratio_gamma} is below 0")
    if not (uses_demonstrations(full) or uses_rollouts(full)):
        raise UsageError(
            "the objective trains nothing: demo_nll and demo_policy are 0 and self_form is none"
        )
    return full


def uses_demonstrations(objective: ObjectiveConfig) -> bool:
    """Whether demonstrations are trained on."""
    return bool(objective.demo_nll or objective.demo_policy)


def uses_rollouts(objective: ObjectiveConfig) -> bool:
    """Whether completions must be sampled: they are trained on, or the demonstrations' advantage compares with them."""
    return objective.self_form != "none" or bool(objective.demo_policy)
