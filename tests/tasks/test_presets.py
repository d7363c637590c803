"""Every method through the command line: three steps of the real thing, on a tiny model."""

import jax
import numpy as np
import pytest
from tiny_runs import metrics_lines, run_in_process, scored_by_parity, tiny_config, tiny_model

from srft_jax.models import init_params, save_hf
from srft_jax.models.tokenizer import load_tokenizer
from srft_jax.objectives.methods import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

# Preset -> the terms of its loss that metrics must show, and what the run is given besides.
TERMS = {
    "srft": ("demo_nll demo_policy self", {"training.gradient_norms_every": 2}),
    "srft_paper": ("demo_nll demo_policy self", {}),
    "srft_official": ("demo_nll demo_policy self entropy_bonus", {}),
    "srft_hpt": ("demo_nll demo_policy self entropy_bonus", {}),
    "sft": ("demo_nll", {}),
    "sft_kl": ("demo_nll kl", {}),
    "dft": ("demo_nll", {}),
    "grpo": ("self", {}),
    "dr_grpo": ("self", {}),
    "dapo": ("self", {}),
    "gspo": ("self", {}),
    "cispo": ("self", {}),
    "sft_rl": ("demo_nll self", {"objective.sft_steps": 2}),
    "sft_plus_rl": ("demo_nll self entropy_bonus", {}),
    "luffy": ("demo_policy self entropy_bonus", {}),
    "chord": ("demo_nll self", {"objective.demo_per_step": 3}),
    "chord_phi": ("demo_nll self", {"objective.demo_per_step": 3}),
    "hpt": ("demo_nll self entropy_bonus", {}),
    "relift": ("demo_nll self entropy_bonus", {"objective.demo_buffer": 1}),
    "uft": ("hint_nll self kl entropy_bonus", {}),
    "prefix_rft": ("prefix_policy self entropy_bonus", {}),
    # Few random completions end by themselves: a step without one makes no update.
    "on_policy_sft": ("self", {"rollout.completions_per_prompt": 16}),
}
ALL_TERMS = set("demo_nll hint_nll demo_policy prefix_policy self kl entropy_bonus".split())


def test_every_preset_is_here():
    assert TERMS.keys() == PRESETS.keys()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Prompts that all have a demonstration, and a reference policy."""
    path = tmp_path_factory.mktemp("presets")
    config = tiny_config(path)
    params = init_params(tiny_model(), jax.random.key(9))
    tokenizer = load_tokenizer(config.model.tokenizer)
    save_hf(path / "reference", tiny_model(), params, tokenizer)
    return [
        *scored_by_parity(path),
        f"--model.reference={path}/reference",
        "--rewards.workers=1",
        "--objective.entropy_scope=null",
        "--training.num_steps=3",
        "--training.rows_per_microbatch=4",
    ]


@pytest.mark.parametrize("preset", TERMS)
def test_it_trains(preset, arguments, tmp_path):
    terms, more = TERMS[preset]
    flags = [f"--{name}={value}" for name, value in more.items()]
    assert run_in_process(tmp_path, *arguments, f"--objective.preset={preset}", *flags) == 0
    rows = metrics_lines(tmp_path)
    steps = [row for row in rows if "optimizer/updates" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    used = [row for row in steps if row["optimizer/updates"]]
    assert used if preset == "on_policy_sft" else used == steps
    logged = {name.partition("/")[2] for row in steps for name in row if name.startswith("loss/")}
    assert logged & ALL_TERMS == set(terms.split())
    assert all(row["loss/gradient_norm"] > 0 and row["loss/skipped"] == 0 for row in used)
    assert any("buffered/loss/demo_nll" in row for row in steps) == (preset == "relift")
    measured = [row["step"] for row in steps if "loss/self_gradient_norm" in row]
    assert measured == ([2] if preset == "srft" else [])
