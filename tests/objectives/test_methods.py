"""The table of methods: expansion, overriding, errors."""

import dataclasses
import math
import typing

import pytest

from srft_jax.config import Objective, ObjectiveConfig, UsageError
from srft_jax.objectives.methods import PRESETS, expand


def test_every_preset_is_a_choice_of_the_configuration_and_expands_to_its_row():
    choices = typing.get_args(typing.get_type_hints(ObjectiveConfig)["preset"])
    assert set(choices) == set(PRESETS)
    for name, row in PRESETS.items():
        assert expand(ObjectiveConfig(preset=name)) == row


# One other value of each coefficient, and the preset that it fits on.
OTHERS = {
    "srft": dict(
        demo_nll=0.3, demo_nll_entropy=0, demo_nll_probability="p", demo_policy=0.9,
        demo_ratio_gamma=0.2, demo_per_step=4, gate="either", gate_solved=2,
        sft_steps=3, mix="share", mix_start=0.5, mix_end=0.5, mix_steps=9, self_form="none",
        self_positive=0.4, self_positive_entropy=-1, self_negative=0.6, surrogate="cispo",
        clip_low=0.0, clip_high=0.5, dual_clip=3.0, old_logprobs="trainer", importance_cap=1.5,
        keep="correct", mask_truncated=True, overlong_buffer=0.1, drop_zero_std=True,
        prefix="one", prefix_start=0.8, prefix_end=0.1, prefix_steps=7, prefix_until=8,
        prefix_chunks=3, prefix_top_entropy=0.5, entropy_scope="batch", advantage_group="self",
        advantage_std=True, kl=0.1, kl_estimator="full", kl_role="demo", entropy_bonus=0.01,
        demo_aggregation="sequences", policy_aggregation="sequence_caps",
    ),
    "dapo": dict(max_refills=2),
    "sft_plus_rl": dict(demo_buffer=8),
    "chord": dict(demo_source="group"),
    "uft": dict(hint_nll=0.2),
    "prefix_rft": dict(prefix_policy=0.3),
}  # fmt: skip


def test_every_coefficient_can_be_overridden():
    names = [field.name for field in dataclasses.fields(Objective)]
    assert names == [field.name for field in dataclasses.fields(ObjectiveConfig)][2:]
    assert sorted(name for others in OTHERS.values() for name in others) == sorted(names)
    for preset, others in OTHERS.items():
        for name, value in others.items():
            expected = dataclasses.replace(PRESETS[preset], **{name: value})
            assert expected != PRESETS[preset], name
            assert expand(ObjectiveConfig(preset=preset, **{name: value})) == expected


def test_zero_overrides_a_preset():
    assert expand(ObjectiveConfig(preset="srft", demo_policy=0.0)).demo_policy == 0.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(clip_low=-0.1), r"clip_low = -0.1 .* do not bracket a ratio of 1"),
        (dict(clip_low=1.1), r"clip_low = 1.1 .* do not bracket a ratio of 1"),
        (dict(clip_high=-0.1), r"clip_high = -0.1 do not bracket a ratio of 1"),
        (dict(clip_high=math.nan), r"clip_high = nan do not bracket a ratio of 1"),
        (dict(dual_clip=1.0), r"dual_clip = 1.0 is not above 1"),
        (dict(importance_cap=0.0), r"importance_cap = 0.0 is not above 0"),
        (dict(demo_ratio_gamma=-1.0), r"demo_ratio_gamma = -1.0 is below 0"),
        (dict(demo_ratio_gamma=math.nan), r"demo_ratio_gamma = nan is below 0"),
        (dict(gate="either", gate_solved=-1), r"gate_solved = -1 is below 0"),
        (dict(demo_per_step=-1), r"demo_per_step = -1 is below 0"),
        (dict(demo_buffer=-1), r"demo_buffer = -1 is below 0"),
        (dict(sft_steps=-1), r"sft_steps = -1 is below 0"),
        (dict(max_refills=-1), r"max_refills = -1 is below 0"),
        (dict(mix_steps=-1), r"mix_steps = -1 is below 0"),
        (dict(prefix_steps=-1), r"prefix_steps = -1 is below 0"),
        (dict(prefix_until=-1), r"prefix_until = -1 is below 0"),
        (dict(prefix_chunks=-1), r"prefix_chunks = -1 is below 0"),
        (dict(kl=-0.1), r"kl = -0.1 is not a finite weight"),
        (dict(demo_nll=-0.5), r"demo_nll = -0.5 is not a finite weight"),
        (dict(entropy_bonus=math.nan), r"entropy_bonus = nan is not a finite weight"),
        (dict(self_negative=math.inf), r"self_negative = inf is not a finite weight"),
        (dict(max_refills=1), r"max_refills = 1 replaces groups left out"),
        (dict(preset="hpt", drop_zero_std=True), r"would leave out the demonstrations of prompts"),
        (dict(preset="sft_kl", kl_estimator="k3"), r"kl_estimator = k3 is of tokens that the"),
        (
            dict(preset="prefix_rft", policy_aggregation="sequences"),
            r"what follows the prefix would share one mean",
        ),
        (dict(mix_start=1.5), r"mix_start = 1.5 is outside 0 to 1"),
        (dict(mix_end=-0.5), r"mix_end = -0.5 is outside 0 to 1"),
        (dict(prefix_start=1.5), r"prefix_start = 1.5 is outside 0 to 1"),
        (dict(prefix_end=-0.5), r"prefix_end = -0.5 is outside 0 to 1"),
        (dict(prefix_end=0.9, prefix_start=0.2), r"prefix_end = 0.9 is above .*start = 0.2"),
        (dict(prefix_top_entropy=0.0), r"prefix_top_entropy = 0.0 is not a share"),
        (dict(overlong_buffer=1.0), r"overlong_buffer = 1.0 is not a share of the length cap"),
        (dict(preset="grpo", gate="either"), r"gate = either .* does not train both"),
        (dict(preset="sft", gate="either"), r"gate = either .* does not train both"),
        (dict(preset="chord", gate="demonstrations"), r"gate = demonstrations .*demo_source = own"),
        (dict(preset="chord", demo_per_step=0), r"demo_source = own needs .*demo_per_step above 0"),
        (dict(preset="luffy", demo_source="own", demo_per_step=2), r"demo_policy = 1.0 needs"),
        (dict(preset="grpo", demo_buffer=8), r"demo_buffer = 8, but no demonstrations"),
        (
            dict(preset="luffy", demo_buffer=8),
            r"demo_buffer = 8 .*demo_policy = 1.0",
        ),
        (dict(preset="grpo", mix="share"), r"mix = share needs both"),
        (dict(preset="sft", drop_zero_std=True), r"drop_zero_std needs completions"),
        (dict(preset="sft", prefix="one"), r"prefix = one needs completions"),
        (dict(hint_nll=0.1), r"hint_nll = 0.1 trains prefixes, but objective.prefix = none"),
        (dict(prefix_policy=0.1), r"prefix_policy = 0.1 trains prefixes, but objective.prefix"),
        (dict(preset="uft", prefix_policy=0.1), r"hint_nll = 0.001 and .*prefix_policy = 0.1"),
        (dict(preset="prefix_rft", surrogate="gspo"), r"prefix_policy = 1.0 .* gspo"),
        (
            dict(preset="grpo", kl=0.1, kl_role="demo", kl_estimator="full"),
            r"kl = 0.1, but nothing of .*role = demo",
        ),
        (
            dict(preset="sft", importance_cap=0.0, prefix="one"),
            r"cap = 0.0 .*; .*prefix = one needs",
        ),
        (dict(preset="sft", kl=0.1), r"kl = 0.1, but nothing of objective.kl_role = self"),
        (dict(preset="sft", demo_nll=0.0), r"the objective trains nothing"),
        (dict(preset="grpo", self_form="none"), r"the objective trains nothing"),
        (dict(preset="sft_rl", self_form="none"), r"the objective trains nothing"),
    ],
)
def test_what_makes_no_sense_is_an_error(config, message):
    with pytest.raises(UsageError, match=message) as error:
        expand(ObjectiveConfig(**config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        dict(preset="grpo", kl=0.1, kl_estimator="full"),
        dict(preset="grpo", prefix_chunks=5),
        dict(preset="grpo", sft_steps=10),
        dict(preset="dapo", mask_truncated=True, dual_clip=3.0),
    ],
)
def test_what_makes_sense_is_none(config):
    expand(ObjectiveConfig(**config))


def test_what_a_preset_needs():
    needs = {n: (row.uses_demonstrations, row.uses_rollouts) for n, row in PRESETS.items()}
    of = {kind: {name for name in needs if needs[name] == kind} for kind in set(needs.values())}
    assert of.pop((True, False)) == {"sft", "sft_kl", "dft"}
    assert of.pop((False, True)) == {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "on_policy_sft"}
    assert set(of) == {(True, True)}
    assert Objective(demo_policy=1.0).uses_rollouts  # its advantage is taken over completions
    assert {n for n, row in PRESETS.items() if row.uses_reference} == {"sft_kl", "uft"}
    assert {n for n, row in PRESETS.items() if not row.is_elementwise} == {
        "srft_paper",
        "srft_hpt",
        "gspo",
    }


def test_another_preset_on_top_of_stored_coefficients_is_refused():
    stored = ObjectiveConfig(preset="grpo", expanded_from="srft")
    with pytest.raises(UsageError, match="holds all coefficients of srft"):
        expand(stored)
    assert expand(ObjectiveConfig(preset="srft", expanded_from="srft")) == PRESETS["srft"]
