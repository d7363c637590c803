"""The loss of every preset, written a second time: float64, plain lists, one token at a time.

From the method's description, not from the code it checks. Per token it is given logp, H (of the
entropy bonus) and what a stop-gradient freezes: the H of the weights and logp_old. Perturb logp and
H to differentiate it.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Answer:
    """A rollout or a demonstration, its tokens as lists of equal length."""

    demonstration: bool
    reward: float  # 0 to 1; 1 is correct
    logp: list[float]
    entropy: list[float]
    weight_entropy: list[float]  # frozen
    old_logp: list[float]  # frozen


Group = list[Answer]  # of one prompt


@dataclasses.dataclass(frozen=True)
class Method:
    """A column of the table of variants."""

    nll_sign: int | None  # of H in .5 exp(sign H); None: no weight, 1
    nll: bool = True
    entropy_of_sequence: bool = False
    rollouts: str = (
        "none"  # "ppo" with A, "gradient": r A without clip, or "likelihood" up and down
    )
    positive_weighted: bool = True  # good rollouts by .1 exp(H)
    demonstration_ratio: str | None = None  # "p" or "shaped"
    augmented: bool = True
    std: bool = False
    bonus: float = 0.0
    nll_z: str = "tokens"
    policy_z: str = "tokens"


METHODS = {
    "srft": Method(-1, rollouts="ppo", demonstration_ratio="shaped"),
    "srft_paper": Method(
        -1, rollouts="likelihood", demonstration_ratio="p", std=True, entropy_of_sequence=True
    ),
    "srft_official": Method(
        +1,
        rollouts="gradient",
        demonstration_ratio="shaped",
        bonus=0.001,
        nll_z="length_cap",
        policy_z="length_cap",
    ),
    "srft_hpt": Method(
        -1,
        rollouts="likelihood",
        demonstration_ratio="shaped",
        bonus=0.001,
        entropy_of_sequence=True,
        policy_z="length_cap",
    ),
    "sft": Method(None),
    "grpo": Method(
        None,
        nll=False,
        rollouts="ppo",
        positive_weighted=False,
        augmented=False,
        std=True,
        policy_z="sequences",
    ),
}


def advantages(group: Group, method: Method) -> list[float]:
    """A of each answer: (R - m) or (R - m) / (std + 1e-6); 0 where all rewards are equal."""
    pool = [a.reward for a in group if method.augmented or not a.demonstration]
    if len(set(pool)) <= 1:
        return [0.0] * len(group)
    mean = sum(pool) / len(pool)
    std = math.sqrt(sum((r - mean) ** 2 for r in pool) / (len(pool) - 1))
    return [(a.reward - mean) / (std + 1e-6 if method.std else 1.0) for a in group]


def weighting_entropies(answer: Answer, method: Method) -> list[float]:
    if not method.entropy_of_sequence:
        return answer.weight_entropy
    return [float(np.mean(answer.weight_entropy))] * len(answer.logp)


def demonstration_nll(answer: Answer, method: Method) -> list[float]:
    entropies = weighting_entropies(answer, method)
    weights = [
        1.0 if method.nll_sign is None else 0.5 * math.exp(method.nll_sign * h) for h in entropies
    ]
    return [w * -logp for w, logp in zip(weights, answer.logp, strict=True)]


def demonstration_gain(answer: Answer, method: Method, advantage: float) -> list[float]:
    p = [math.exp(logp) for logp in answer.logp]
    return [(x if method.demonstration_ratio == "p" else x / (x + 0.1)) * advantage for x in p]


def rollout_loss(answer: Answer, method: Method, advantage: float) -> list[float]:
    good = answer.reward >= 1.0 if method.rollouts == "likelihood" else advantage > 0
    losses = []
    for t, entropy in enumerate(weighting_entropies(answer, method)):
        weight = 0.1 * math.exp(entropy) if good and method.positive_weighted else 1.0
        ratio = math.exp(answer.logp[t] - answer.old_logp[t])
        if method.rollouts == "likelihood":
            losses.append(weight * (-answer.logp[t] if good else answer.logp[t]))
        elif method.rollouts == "gradient":
            losses.append(weight * -ratio * advantage)
        else:
            clipped = min(max(ratio, 0.8), 1.2)
            losses.append(weight * -min(ratio * advantage, clipped * advantage))
    return losses


def aggregated(losses: list[list[float]], aggregation: str, length_cap: int) -> float:
    """Lists of token losses, one a sequence, to one number."""
    if not losses:
        return 0.0
    if aggregation == "sequences":
        return float(np.mean([np.mean(sequence) for sequence in losses]))
    total = sum(map(sum, losses))
    return total / (sum(map(len, losses)) if aggregation == "tokens" else length_cap)


def loss_terms(groups: list[Group], preset: str, length_cap: int) -> dict[str, float]:
    """Each term of the loss over all groups of a step.

    The policy terms of rollouts and demonstrations share one normaliser, so they are aggregated
    together and the other's tokens count as zeros.
    """
    method = METHODS[preset]
    answers = [
        (answer, advantage)
        for group in groups
        for answer, advantage in zip(group, advantages(group, method), strict=True)
    ]
    trained = [
        (answer, advantage)
        for answer, advantage in answers
        if (method.rollouts != "none" and not answer.demonstration)
        or (method.demonstration_ratio and answer.demonstration)
    ]

    def policy_term(losses_of) -> float:
        return aggregated([losses_of(*one) for one in trained], method.policy_z, length_cap)

    def of_rollouts(answer, advantage):
        if answer.demonstration:
            return [0.0] * len(answer.logp)
        return rollout_loss(answer, method, advantage)

    def of_demonstrations(answer, advantage):
        if not answer.demonstration:
            return [0.0] * len(answer.logp)
        return [-gain for gain in demonstration_gain(answer, method, advantage)]

    terms = {}
    if method.nll:
        losses = [
            demonstration_nll(answer, method) for answer, _ in answers if answer.demonstration
        ]
        terms["demo_nll"] = aggregated(losses, method.nll_z, length_cap)
    if method.demonstration_ratio:
        terms["demo_policy"] = policy_term(of_demonstrations)
    if method.rollouts != "none":
        terms["self"] = policy_term(of_rollouts)
    if method.bonus:
        terms["entropy_bonus"] = -method.bonus * policy_term(lambda answer, _: answer.entropy)
    return terms


def loss(groups: list[Group], preset: str, length_cap: int) -> float:
    return sum(loss_terms(groups, preset, length_cap).values())
