"""One preset per method. A method is a row of coefficients here, never a branch in the trainer."""

import dataclasses
import math
from typing import Any, Literal

from srft_jax.config import ObjectiveConfig, UsageError


@dataclasses.dataclass(frozen=True)
class Objective:
    """The coefficients of the loss, all of them; `ObjectiveConfig` says what each means.

    The defaults train nothing: a row of the table below switches its terms on.
    """

    demo_nll: float = 0.0
    demo_nll_entropy: Literal[-1, 0, 1] = 0
    demo_policy: float = 0.0
    demo_ratio_gamma: float = 0.1
    self_form: Literal["none", "policy_gradient", "likelihood"] = "none"
    self_positive: float = 1.0
    self_positive_entropy: Literal[-1, 0, 1] = 0
    self_negative: float = 1.0
    entropy_scope: Literal["token", "sequence", "batch"] = "token"
    advantage_group: Literal["self", "augmented"] = "augmented"
    advantage_std: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_bonus: float = 0.0
    demo_aggregation: Literal["tokens", "sequences", "length_cap"] = "tokens"
    policy_aggregation: Literal["tokens", "sequences", "length_cap"] = "tokens"

    @property
    def uses_demonstrations(self) -> bool:
        """Demonstrations are trained on."""
        return bool(self.demo_nll or self.demo_policy)

    @property
    def uses_rollouts(self) -> bool:
        """Completions are trained on, or the advantage of demonstrations is taken over them."""
        return self.self_form != "none" or bool(self.demo_policy)


_SRFT = Objective(
    demo_nll=0.5,
    demo_nll_entropy=-1,
    demo_policy=1.0,
    self_form="policy_gradient",
    self_positive=0.1,
    self_positive_entropy=1,
)

PRESETS: dict[str, Objective] = {
    # Our default form of SRFT: token-scoped entropy, clipped policy gradient, advantage R - mean.
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
    # As re-implemented in TsinghuaC3I/Unify-Post-Training.
    "srft_hpt": dataclasses.replace(
        _SRFT,
        self_form="likelihood",
        entropy_scope="sequence",
        entropy_bonus=0.001,
        policy_aggregation="length_cap",
    ),
    "sft": Objective(demo_nll=1.0),
    "grpo": Objective(
        self_form="policy_gradient",
        advantage_group="self",
        advantage_std=True,
        policy_aggregation="sequences",
    ),
}


def expand(config: ObjectiveConfig) -> Objective:
    """The preset's row, with what the configuration sets in its place.

    Raises:
        UsageError: the coefficients make no sense.
    """
    if config.expanded_from not in (None, config.preset):
        raise UsageError(
            f"objective.preset = {config.preset}, but the file holds all coefficients of "
            f"{config.expanded_from}; start from a configuration that names only the preset"
        )
    coefficients = vars(config).keys() - {"preset", "expanded_from"}
    own: dict[str, Any] = {k: v for k, v in vars(config).items() if k in coefficients}
    own = {name: value for name, value in own.items() if value is not None}
    objective = dataclasses.replace(PRESETS[config.preset], **own)
    if not 0 <= objective.clip_low <= 1 or objective.clip_high < 0:
        raise UsageError(
            f"objective.clip_low = {objective.clip_low} and objective.clip_high = "
            f"{objective.clip_high} do not bracket a ratio of 1"
        )
    if objective.demo_ratio_gamma < 0:
        raise UsageError(f"objective.demo_ratio_gamma = {objective.demo_ratio_gamma} is below 0")
    if not (objective.uses_demonstrations or objective.uses_rollouts):
        raise UsageError("the objective trains nothing: set demo_nll, demo_policy or self_form")
    return objective
