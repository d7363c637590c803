"""What a run has in place of the model's own: read, given to the reference, exported."""

import dataclasses

import pytest
from tiny_runs import tiny_arguments

from srft_jax.config import ModelConfig, RopeScaling, UsageError, parse, to_yaml
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


def model(tmp_path) -> ModelConfig:
    return parse(tiny_arguments(tmp_path))[1].model.architecture


@pytest.fixture
def arguments(tmp_path):
    """Of a run from a saved model, with a KL to itself."""
    write_json(tmp_path / "config.json", to_hf_config(model(tmp_path)))
    start = ("--model.architecture=null", f"--model.path={tmp_path}", "--objective.preset=uft")
    return tiny_arguments(tmp_path / "run", *start)


def test_overrides_reach_the_architecture_and_its_export(arguments, tmp_path):
    config = parse([*arguments, *GIVEN])[1]
    changed = prepare(config).model_config  # no complaint about the reference, either
    scaling = RopeScaling("yarn", 4.0, 4096)
    assert changed == dataclasses.replace(
        model(tmp_path), rope_theta=40_000.0, max_positions=16_384, rope_scaling=scaling
    )
    write_json(tmp_path / "config.json", to_hf_config(changed))
    assert read_config(tmp_path) == changed


def test_overrides_that_the_family_does_not_know_are_refused(arguments):
    config = parse([*arguments, "--model.rope_scaling={kind: yarn, factor: 4}"])[1]
    with pytest.raises(UsageError, match="rope_scaling of kind yarn that lacks original_max"):
        prepare(config)


def test_stored_configurations_are_parsed_again(tmp_path):
    """Tuples and nested scalings."""
    gemma = ("family=gemma3", "sliding_window=4", "rope_local_theta=100", "num_layers=2")
    flags = [f"--model.architecture.{one}" for one in gemma]
    flags += ["--model.architecture.full_attention_layers=[1]", *GIVEN]
    config = parse(tiny_arguments(tmp_path, *flags))[1]
    assert config.model.architecture.full_attention_layers == (1,)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse([f"--config={tmp_path}/config.yaml"])[1] == config
    assert hash(prepare(config).model_config)
