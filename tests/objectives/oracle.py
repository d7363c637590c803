"""The loss of every preset, written a second time: float64, plain lists, one token at a time.

From the method's description, not from the code it checks. What a stop-gradient freezes stands in
`Answer.frozen`; perturb logp, entropy and kl to differentiate the loss.
"""

import dataclasses
import math

import numpy as np

L_MAX = 6


@dataclasses.dataclass
class Answer:
    """A rollout or a demonstration, its tokens as lists of equal length."""

    demonstration: bool
    reward: float  # 0 to 1; 1 is correct
    logp: list[float]
    entropy: list[float]
    old_logp: list[float]  # of a demonstration: of whoever wrote it, 0 if unknown
    ref_logp: list[float]
    kl: list[float]  # over the whole vocabulary
    given: int = 0  # first tokens of a rollout that are a demonstration's
    weight: float = 1.0
    frozen: "Answer | None" = None  # itself, before anything is perturbed


Group = list[Answer]  # of one prompt


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    nll: str | None = None  # the demonstrations' weight, as a formula
    hint: float = 0.0  # weight of the likelihood of given first tokens
    prefix: float = 0.0  # their policy gradient's, on the top share of them by entropy
    prefix_top: float = 1.0
    rollouts: str | None = None  # "ppo", "cispo", "gspo", "likelihood"
    clip: tuple[float, float] = (0.2, 0.2)
    good: str = "1"  # weight of good rollouts, as a formula
    entropy_of_sequence: bool = False
    rho: str | None = None  # "r" or "shaped", of demonstrations
    augmented: bool = True
    std: bool = False
    beta: float = 0.0
    kl: str = "k3"
    bonus: float = 0.0
    nll_z: str = "tokens"
    policy_z: str = "tokens"


NO_CLIP = (1.0, math.inf)
GRPO = dict(rollouts="ppo", augmented=False)
LUFFY_CODE = dict(GRPO, bonus=0.001, policy_z="L_max")
SRFT = dict(nll=".5 exp(-H)", good=".1 exp(H)")
METHODS = {
    "srft": Method(**SRFT, rollouts="ppo", rho="shaped"),
    "srft_paper": Method(
        **SRFT, rollouts="likelihood", rho="r", std=True, entropy_of_sequence=True
    ),
    "srft_official": Method(
        **SRFT | dict(nll=".5 exp(H)"), rollouts="ppo", clip=NO_CLIP, rho="shaped", bonus=0.001,
        nll_z="L_max", policy_z="L_max",
    ),
    "srft_hpt": Method(
        **SRFT, rollouts="likelihood", rho="shaped", bonus=0.001, entropy_of_sequence=True,
        policy_z="L_max",
    ),
    "sft": Method(nll="1"),
    "sft_kl": Method(nll="1", beta=0.2, kl="full on demonstrations"),
    "dft": Method(nll="p"),
    "grpo": Method(**GRPO, std=True, policy_z="sequences"),
    "dr_grpo": Method(**GRPO, policy_z="n L_max"),
    "dapo": Method(**GRPO, std=True, clip=(0.2, 0.28)),
    "gspo": Method(
        **GRPO | dict(rollouts="gspo"), std=True, clip=(3e-4, 4e-4), policy_z="sequences"
    ),
    "cispo": Method(**GRPO | dict(rollouts="cispo"), std=True, clip=(1.0, 5.0)),
    "sft_rl": Method(**GRPO, std=True, policy_z="sequences"),
    "sft_plus_rl": Method(**LUFFY_CODE, nll="1"),
    "luffy": Method(**LUFFY_CODE | dict(augmented=True), clip=NO_CLIP, rho="shaped"),
    "chord": Method(**GRPO, nll="1", std=True),
    "chord_phi": Method(**GRPO, nll="p(1-p)", std=True),
    "hpt": Method(**LUFFY_CODE, nll="1"),
    "relift": Method(**LUFFY_CODE, nll="1"),
    "uft": Method(**GRPO, std=True, hint=0.001, beta=0.001, bonus=0.001),
    "prefix_rft": Method(**LUFFY_CODE, prefix=1.0, prefix_top=0.2),
    "on_policy_sft": Method(rollouts="likelihood"),
}  # fmt: skip


def advantages(group: Group, method: Method) -> list[float]:
    """R - m or (R - m) / (std + 1e-6), 0 in a group of equal rewards.

    Where prefixes have a policy gradient, m is that of the rollouts without one.
    """
    pool = [a.reward for a in group if method.augmented or not a.demonstration]
    if len(set(pool)) <= 1:
        return [0.0] * len(group)
    if method.prefix:
        pool = [a.reward for a in group if not a.demonstration and not a.given]
    if not pool:
        return [0.0] * len(group)
    mean = sum(pool) / len(pool)
    scale = 1.0
    if method.std:
        scale = 1 / (math.sqrt(sum((r - mean) ** 2 for r in pool) / (len(pool) - 1)) + 1e-6)
    return [(a.reward - mean) * scale for a in group]


def parts(answer: Answer, method: Method) -> list[str]:
    """What each token is: demonstration, self, hint, prefix, or nothing."""
    if answer.demonstration:
        return ["demonstration"] * len(answer.logp)
    start = ["hint" if method.hint else "nothing"] * answer.given
    if method.prefix and answer.given:
        ranked = sorted(range(answer.given), key=lambda t: -answer.frozen.entropy[t])
        for t in ranked[: max(1, round(method.prefix_top * answer.given))]:
            start[t] = "prefix"
    return start + ["self"] * (len(answer.logp) - answer.given)


def formula_weight(formula: str, answer: Answer, t: int, method: Method, part: str) -> float:
    entropies, p = answer.frozen.entropy, math.exp(answer.frozen.logp[t])
    h = entropies[t]
    if method.entropy_of_sequence:
        entropies_here = [
            h for h, name in zip(entropies, parts(answer, method), strict=True) if name == part
        ]
        h = float(np.mean(entropies_here))
    return {
        "1": 1.0, "p": p, "p(1-p)": p * (1 - p), ".1 exp(H)": 0.1 * math.exp(h),
        ".5 exp(H)": 0.5 * math.exp(h), ".5 exp(-H)": 0.5 * math.exp(-h),
    }[formula]  # fmt: skip


def surrogate(answer: Answer, t: int, advantage: float, method: Method) -> float:
    """What is to be made large: min(r A, clip(r) A), or sg(min(r, 1 + hi)) A logp."""
    low, high = 1 - method.clip[0], 1 + method.clip[1]
    r = math.exp(answer.logp[t] - answer.old_logp[t])
    if method.rollouts == "cispo":
        r = math.exp(answer.frozen.logp[t] - answer.old_logp[t])
        return min(r, high) * advantage * answer.logp[t]
    if method.rollouts == "gspo":
        log_ratios = [
            answer.frozen.logp[u] - answer.old_logp[u]
            for u, part in enumerate(parts(answer, method))
            if part == "self"
        ]
        r = math.exp(np.mean(log_ratios)) * math.exp(answer.logp[t] - answer.frozen.logp[t])
    return min(r * advantage, min(max(r, low), high) * advantage)


def rollout_loss(answer: Answer, t: int, advantage: float, method: Method) -> float:
    good = answer.reward >= 1.0 if method.rollouts == "likelihood" else advantage > 0
    weight = formula_weight(method.good, answer, t, method, "self") if good else 1.0
    if method.rollouts == "likelihood":
        return weight * (-answer.logp[t] if good else answer.logp[t])
    return weight * -surrogate(answer, t, advantage, method)


def demonstration_gain(answer: Answer, t: int, advantage: float, method: Method) -> float:
    r = math.exp(answer.logp[t] - answer.old_logp[t])
    return (r if method.rho == "r" else r / (r + 0.1)) * advantage


def divergence(answer: Answer, t: int, method: Method) -> float:
    if method.kl.startswith("full"):
        return answer.kl[t]
    difference = answer.ref_logp[t] - answer.logp[t]
    return math.exp(difference) - difference - 1


def aggregated(losses: list[list[float]], aggregation: str) -> float:
    """Lists of token losses, one a sequence that has any, to one number."""
    losses = [sequence for sequence in losses if sequence]
    if not losses:
        return 0.0
    if aggregation == "sequences":
        return float(np.mean([np.mean(sequence) for sequence in losses]))
    tokens = sum(map(len, losses))
    z = {"tokens": tokens, "L_max": L_MAX, "n L_max": len(losses) * L_MAX}[aggregation]
    return sum(map(sum, losses)) / z


def loss_terms(groups: list[Group], preset: str) -> dict[str, float]:
    """Each term of the loss over all groups of a step."""
    method = METHODS[preset]
    answers = [
        (answer, advantage)
        for group in groups
        for answer, advantage in zip(group, advantages(group, method), strict=True)
    ]

    def term(aggregation, counted, part, loss_of):
        """Tokens of other counted parts are zeros in the same mean."""
        return aggregated(
            [
                [
                    loss_of(answer, t, advantage) if name in part else 0.0
                    for t, name in enumerate(parts(answer, method))
                    if name in counted
                ]
                for answer, advantage in answers
            ],
            aggregation,
        )

    policy = [("self", method.rollouts), ("demonstration", method.rho), ("prefix", method.prefix)]
    policy = [part for part, is_on in policy if is_on]
    terms = {}
    if method.nll:
        terms["demo_nll"] = term(
            method.nll_z, ["demonstration"], ["demonstration"],
            lambda a, t, _: a.weight * -a.logp[t]
            * formula_weight(method.nll, a, t, method, "demonstration"),
        )  # fmt: skip
    if method.hint:
        terms["hint_nll"] = term(
            method.nll_z, ["hint"], ["hint"], lambda a, t, _: a.weight * method.hint * -a.logp[t]
        )
    if method.rho:
        terms["demo_policy"] = term(
            method.policy_z, policy, ["demonstration"],
            lambda a, t, adv: -a.weight * demonstration_gain(a, t, adv, method),
        )  # fmt: skip
    if method.prefix:
        terms["prefix_policy"] = term(
            method.policy_z, policy, ["prefix"],
            lambda a, t, adv: -a.weight * method.prefix * surrogate(a, t, adv, method),
        )  # fmt: skip
    if method.rollouts:
        terms["self"] = term(
            method.policy_z, policy, ["self"],
            lambda a, t, adv: a.weight * rollout_loss(a, t, adv, method),
        )  # fmt: skip
    if method.beta:
        part = ["demonstration" if "demonstrations" in method.kl else "self"]
        terms["kl"] = term(
            method.policy_z, part, part, lambda a, t, _: method.beta * divergence(a, t, method)
        )
    if method.bonus:
        both = ["self", "demonstration"]
        terms["entropy_bonus"] = term(
            method.policy_z, both, both, lambda a, t, _: -method.bonus * a.entropy[t]
        )
    return terms


def loss(groups: list[Group], preset: str) -> float:
    return sum(loss_terms(groups, preset).values())
