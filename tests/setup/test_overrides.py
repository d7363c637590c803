"""What a run has in place of the model's own: read, given to the reference, exported."""

import dataclasses

import pytest
from tiny_runs import changed_architecture, tiny_arguments, tiny_model

from srft_jax.config import RopeScaling, UsageError, parse, to_yaml
from srft_jax.models.hf_config import read_config, to_hf_config
from srft_jax.models.hf_json import write_json
from srft_jax.setup.prepare import prepare

GIVEN = (
    "--model.rope_theta=40000",
    "--model.max_positions=16384",
    "--model.rope_scaling.kind=yarn",
    "--model.rope_scaling.factor=4",
    "--model.rope_scaling.original_max_positions=4096",
)


@pytest.fixture
def arguments(tmp_path):
    """Command line of a run from a saved model, with a KL to itself."""
    write_json(tmp_path / "config.json", to_hf_config(tiny_model()))
    start = ("--model.architecture=null", f"--model.path={tmp_path}", "--objective.preset=uft")
    return tiny_arguments(tmp_path / "run", *start)


def test_overrides_reach_the_architecture_and_its_export(arguments, tmp_path):
    config = parse([*arguments, *GIVEN])[1]
    changed = prepare(config).model_config  # no complaint about the reference, either
    scaling = RopeScaling("yarn", 4.0, 4096)
    assert changed == dataclasses.replace(
        tiny_model(), rope_theta=40_000.0, max_positions=16_384, rope_scaling=scaling
    )
    write_json(tmp_path / "config.json", to_hf_config(changed))
    assert read_config(tmp_path) == changed


def test_overrides_that_the_family_does_not_know_are_refused(arguments):
    config = parse([*arguments, "--model.rope_scaling={kind: yarn, factor: 4}"])[1]
    with pytest.raises(UsageError, match="rope_scaling of kind yarn that lacks original_max"):
        prepare(config)


def test_stored_configurations_are_parsed_again(tmp_path):
    """Paths and nested scalings."""
    gemma = changed_architecture(
        tmp_path / "gemma",
        family="gemma3",
        sliding_window=4,
        rope_local_theta=100.0,
        num_layers=2,
        full_attention_layers=(1,),
    )
    config = parse(tiny_arguments(tmp_path, gemma, *GIVEN))[1]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse([f"--config={tmp_path}/config.yaml"])[1] == config
    model_config = prepare(config).model_config
    assert (model_config.family, model_config.full_attention_layers) == ("gemma3", (1,))
    assert hash(model_config)


def test_an_architecture_is_a_file_or_its_directory(tmp_path):
    """Random weights of the same shape either way; one that is not there is named."""
    flag = changed_architecture(tmp_path / "wide", dim=32, init_std=0.5)
    for given in (flag, f"{flag}/config.json"):
        model_config = prepare(parse(tiny_arguments(tmp_path, given))[1]).model_config
        assert model_config == dataclasses.replace(tiny_model(), dim=32, init_std=0.5)
    with pytest.raises(UsageError, match="nowhere is not a directory"):
        prepare(parse(tiny_arguments(tmp_path, f"--model.architecture={tmp_path}/nowhere"))[1])
