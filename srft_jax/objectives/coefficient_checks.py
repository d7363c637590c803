"""Checks of the coefficients, of each alone and of those that need each other."""

from collections.abc import Iterator

from srft_jax.config import Objective
from srft_jax.config.objective import RANGES


def _bad_values(o: Objective) -> Iterator[str]:
    """A sentence for each coefficient that is out of its range."""
    for name, allowed in RANGES.items():
        if not allowed.lowest <= vars(o)[name] <= allowed.highest:  # NaN too
            yield f"objective.{name} = {vars(o)[name]} is {allowed.mistake}"
    if not 0 <= o.clip_low <= 1 or not o.clip_high >= 0:
        yield (
            f"objective.clip_low = {o.clip_low} and objective.clip_high = {o.clip_high} do not "
            "bracket a ratio of 1"
        )
    if not o.dual_clip > 1:
        yield f"objective.dual_clip = {o.dual_clip} is not above 1, the ratio on policy"
    if not o.importance_cap > 0:
        yield f"objective.importance_cap = {o.importance_cap} is not above 0"
    if not 0 <= o.overlong_buffer < 1:
        yield (
            f"objective.overlong_buffer = {o.overlong_buffer} is not a share of the length cap "
            "from 0 to less than 1"
        )
    if not 0 < o.prefix_top_entropy <= 1:
        yield (
            f"objective.prefix_top_entropy = {o.prefix_top_entropy} is not a share of the prefix "
            "above 0 and up to 1"
        )
    if o.prefix_end > o.prefix_start:
        yield (
            f"objective.prefix_end = {o.prefix_end} is above objective.prefix_start = "
            f"{o.prefix_start}"
        )


def _bad_demonstrations(o: Objective) -> Iterator[str]:
    """A sentence for each use of demonstrations without what it rests on."""
    if o.gate != "none" and not (o.trains_demonstrations and o.self_form != "none"):
        yield (
            f"objective.gate = {o.gate} chooses demonstrations by correct completions, and the "
            "objective does not train both"
        )
    if o.gate != "none" and o.demo_source == "own":
        yield (
            f"objective.gate = {o.gate} is about a prompt's own demonstration, but "
            "objective.demo_source = own"
        )
    if o.demo_source == "own" and not o.demo_per_step:
        yield "objective.demo_source = own needs objective.demo_per_step above 0"
    if o.demo_source == "own" and o.demo_policy:
        yield (
            f"objective.demo_policy = {o.demo_policy} needs the advantage of a demonstration in "
            "its prompt's group, but objective.demo_source = own"
        )
    if o.demo_buffer and not o.trains_demonstrations:
        yield f"objective.demo_buffer = {o.demo_buffer}, but no demonstrations are trained"
    if o.demo_buffer and (o.demo_policy or o.demo_source == "own"):
        yield (
            f"objective.demo_buffer = {o.demo_buffer} trains the demonstrations of prompts by "
            f"likelihood, but objective.demo_policy = {o.demo_policy} and demo_source = "
            f"{o.demo_source}"
        )
    if o.mix == "share" and not (o.trains_demonstrations and o.self_form != "none"):
        yield "objective.mix = share needs both demonstrations and completions to be trained"


def _bad_completions(o: Objective) -> Iterator[str]:
    """One sentence per completion, prefix or KL coefficient without effect."""
    if o.drop_zero_std and o.self_form == "none":
        yield "objective.drop_zero_std needs completions, but objective.self_form = none"
    if o.max_refills and not o.drop_zero_std:
        yield (
            f"objective.max_refills = {o.max_refills} replaces groups left out, but "
            "objective.drop_zero_std = false"
        )
    if o.drop_zero_std and o.demo_nll and o.demo_source == "group" and o.advantage_group == "self":
        yield (
            "objective.drop_zero_std would leave out the demonstrations of prompts that no "
            "completion, or every one, solves; set objective.demo_source to own, or "
            "objective.advantage_group to augmented"
        )
    if o.prefix != "none" and o.self_form == "none":
        yield f"objective.prefix = {o.prefix} needs completions, but objective.self_form = none"
    for name in ("hint_nll", "prefix_policy"):
        if vars(o)[name] and o.prefix == "none":
            yield f"objective.{name} = {vars(o)[name]} trains prefixes, but objective.prefix = none"
    if o.hint_nll and o.prefix_policy:
        yield (
            f"objective.hint_nll = {o.hint_nll} and objective.prefix_policy = {o.prefix_policy}: a "
            "prefix is learned in one of these ways"
        )
    if o.surrogate == "gspo" and o.prefix_policy:
        yield (
            f"objective.prefix_policy = {o.prefix_policy} takes a ratio of each token, but "
            "objective.surrogate = gspo that of the sequence"
        )
    if o.policy_aggregation == "sequences" and o.prefix_policy:
        yield (
            f"objective.prefix_policy = {o.prefix_policy} and what follows the prefix would share "
            "one mean; set objective.policy_aggregation to another than sequences"
        )
    if o.kl and o.kl_role == "demo" and o.kl_estimator != "full":
        yield (
            f"objective.kl_estimator = {o.kl_estimator} is of tokens that the policy sampled, but "
            "objective.kl_role = demo; set objective.kl_estimator to full"
        )
    trained = o.trains_demonstrations if o.kl_role == "demo" else o.self_form != "none"
    if o.kl and not trained:
        yield f"objective.kl = {o.kl}, but nothing of objective.kl_role = {o.kl_role} is trained"


def errors(o: Objective) -> Iterator[str]:
    """One sentence, with the numbers in it, for each thing that is wrong with the coefficients."""
    yield from _bad_values(o)
    yield from _bad_demonstrations(o)
    yield from _bad_completions(o)
    if not (o.trains_demonstrations or o.uses_rollouts):
        yield "the objective trains nothing: set demo_nll, demo_policy or self_form"
