"""config.json of every family: public ones, both spellings, round trips, and what is refused."""

import dataclasses
import json
import math

import jax
import pytest
from public_configs import PUBLIC
from tiny_models import FAMILIES, TIED, UNTIED, YARN

from srft_jax.config import ModelConfig, RopeScaling, UsageError
from srft_jax.models import init_params
from srft_jax.models.hf_config import check_architecture, read_config, to_hf_config
from srft_jax.models.hf_json import write_json


@pytest.fixture
def read(tmp_path):
    """What we make of a config.json with this content."""

    def read(content, **changes):
        write_json(tmp_path / "config.json", content | changes)
        return read_config(tmp_path)

    return read


def public(name):
    return PUBLIC[name][1]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_have_their_number_of_parameters(read, name):
    expected, content = PUBLIC[name]
    config = read(content)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected
    # Numbers read as they stand, 10000 being 10000.0.
    assert config.rope_theta == content["rope_theta"]
    assert read(to_hf_config(config)) == config


def test_public_models_are_read_in_full(read):
    assert read(public("Qwen2.5-Math-7B")).sliding_window is None  # not in use
    llama = read(public("Llama-3.1-8B"))
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    gemma = read(public("gemma-3-1b-it"))
    assert gemma.full_attention_layers == (5, 11, 17, 23)
    assert (gemma.sliding_window, gemma.rope_local_theta) == (512, 10_000.0)
    assert gemma.activation == "gelu_pytorch_tanh"
    moe = read(public("Qwen3-30B-A3B"))
    assert (moe.num_experts, moe.experts_per_token, moe.norm_topk_prob) == (128, 8, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(read, family):
    assert read(to_hf_config(FAMILIES[family])) == FAMILIES[family]


@pytest.mark.parametrize("scaling", [YARN, RopeScaling("linear", 2.0), None])
def test_scalings_are_read_in_both_spellings(read, scaling):
    config = dataclasses.replace(UNTIED, rope_scaling=scaling)
    written = to_hf_config(config)
    for dropped in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        old_or_new = {key: value for key, value in written.items() if key not in dropped}
        assert read(old_or_new) == config
    if scaling:
        old = written["rope_scaling"] | {"type": scaling.kind}
        del old["rope_type"]
        del written["rope_parameters"]
        assert read(written, rope_scaling=old) == config


def test_gemma_is_read_in_both_spellings(read):
    config = FAMILIES["gemma3"]
    written = to_hf_config(config)
    new = {k: v for k, v in written.items() if k in ("rope_parameters", "layer_types")}
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    shared = {k: v for k, v in written.items() if k not in (*new, *old)}
    assert read(shared | new) == config
    pattern = {"sliding_window_pattern": 2}
    assert read(shared | {k: written[k] for k in old if k in written} | pattern) == config


def test_what_transformers_assumes(read):
    """Keys are left out; a Mistral without the key has a window, a Mistral with null has none."""
    mistral = to_hf_config(FAMILIES["mistral"])
    del mistral["sliding_window"], mistral["head_dim"]
    assert read(mistral).sliding_window == 4096
    assert read(mistral, sliding_window=None).sliding_window is None
    qwen = to_hf_config(FAMILIES["qwen2"])
    del qwen["layer_types"]
    assert read(qwen, max_window_layers=1) == FAMILIES["qwen2"]
    yarn = {"rope_type": "yarn", "factor": 4.0}
    scaling = read(to_hf_config(TIED), rope_scaling=yarn, rope_parameters=None).rope_scaling
    assert scaling == RopeScaling("yarn", 4.0, TIED.max_positions)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen3-8B", {"architectures": ["Qwen3Model"]}, "supported are Qwen2ForCausalLM"),
        ("gemma-3-1b-it", {"model_type": "gemma3"}, "only the models of text alone"),
        ("Llama-3.1-8B", {"model_type": "phi3"}, "model_type 'phi3'; supported are"),
        ("Llama-3.1-8B", {"sliding_window": 4096}, "sliding_window = 4096, unknown for .*'llama'"),
        ("Llama-3.1-8B", {"logit_scale": 0.5}, "has logit_scale = 0.5, unknown"),
        ("Llama-3.1-8B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5; only 1.0"),
        ("Llama-3.1-8B", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ("Llama-3.1-8B", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; only silu, gelu_pytorch"),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq"),
        ("Qwen3-8B", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type = 'dynamic'"),
        ("Qwen3-8B", {"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "unknown x = 1"),
        ("Qwen3-8B", {"rope_parameters": {"rope_theta": 7.0}}, "rope_theta = 7.0 and 1000000.0"),
        (
            "Llama-3.1-8B",
            {"rope_parameters": {"rope_type": "linear", "factor": 2}},
            "rope_scaling = .* and rope_parameters =",
        ),
        ("Qwen3-8B", {"layer_types": ["sliding_attention"] * 36}, "but no sliding window"),
        ("Qwen3-8B", {"layer_types": ["full_attention"]}, "1 layer_types for 36 layers"),
        ("Qwen3-8B", {"layer_types": ["chunked_attention"] * 36}, "'chunked_attention'"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2; only 1"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]; only \[\]"),
        ("Qwen3-30B-A3B", {"output_router_logits": True}, "output_router_logits = True"),
        ("Qwen3-30B-A3B", {"num_experts": None}, "lacks num_experts"),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Qwen2.5-Math-7B", {"use_mrope": True}, "use_mrope = True"),
    ],
)
def test_what_we_would_compute_wrongly(read, name, changes, message):
    with pytest.raises(UsageError, match=message):
        read(public(name), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_heads = 0, which is below 1"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers = '32', which is not of type int"),
        ({"hidden_size": 4096.0}, "hidden_size = 4096.0, which is not of type int"),
        ({"vocab_size": True}, "vocab_size = True, which is not of type int"),
        ({"num_key_value_heads": 7}, "num_kv_heads = 7, head_dim = 128; kv heads must divide"),
        ({"tie_word_embeddings": "false"}, "= 'false', which is not of type bool"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5', which is not of type float or int"),
        ({"hidden_act": ["silu"]}, r"hidden_act = \['silu'\]; only silu, gelu_pytorch_tanh"),
        ({"rope_theta": "5e5"}, "rope_theta = '5e5', which is not of type float"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0, which is not above 0 and finite"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear', which is not of type dict"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_type = \"\['linear'\]\""),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2', which is not of type"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor = 0, which is"),
    ],
)
def test_values_that_are_none(read, changes, message):
    with pytest.raises(UsageError, match=message):
        read(public("Llama-3.1-8B"), **changes)


def test_values_of_other_families_that_are_none(read):
    with pytest.raises(UsageError, match="layer_types = 'full', which is not of type list"):
        read(public("Qwen3-8B"), layer_types="full")
    with pytest.raises(UsageError, match="rope_parameters has full_attention = 3, which is not"):
        read(public("gemma-3-1b-it"), rope_parameters={"full_attention": 3})


@pytest.mark.parametrize("text", ["[]", "null", '"config"'])
def test_json_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="config.json is not a JSON object, but "):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(UsageError, match="config.json is not JSON: 'utf-8' codec"):
        read_config(tmp_path)


def test_unknown_keys_may_be_null_and_bookkeeping_is_free(read):
    config = read(public("Llama-3.1-8B"))
    assert read(public("Llama-3.1-8B"), logit_scale=None, _name_or_path="x", top_p=0.9) == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(TIED, mlp_bias=True), "mlp_bias = True; qwen2 has none"),
        (dataclasses.replace(TIED, num_experts=4), "num_experts = 4; qwen2 has none"),
        (dataclasses.replace(FAMILIES["llama"], sliding_window=4), "llama has none"),
        (dataclasses.replace(TIED, full_attention_layers=(0,)), "but no sliding_window"),
        (
            dataclasses.replace(FAMILIES["mistral"], full_attention_layers=(0,)),
            "in all layers or in none",
        ),
        (dataclasses.replace(FAMILIES["qwen2"], full_attention_layers=(2,)), "of 2 layers"),
        (dataclasses.replace(FAMILIES["gemma3"], rope_local_theta=None), "gemma3 needs one"),
        (dataclasses.replace(TIED, rope_local_theta=1.0), "qwen2 has none"),
        (dataclasses.replace(TIED, rope_scaling=RopeScaling("yarn", 2.0)), "lacks original_max"),
        (dataclasses.replace(TIED, rope_theta=math.nan), "rope_theta = nan, which is not above 0"),
        (
            dataclasses.replace(TIED, rope_scaling=RopeScaling("llama3", 8.0, 64, 4.0, 4.0)),
            "low_freq_factor = 4.0, which is not below high_freq_factor = 4.0",
        ),
        (dataclasses.replace(FAMILIES["qwen3_moe"], experts_per_token=7), "= 7 of num_experts = 6"),
    ],
)
def test_architectures_that_contradict_themselves(config: ModelConfig, message):
    with pytest.raises(UsageError, match=message):
        check_architecture(config, "the model")


def test_export_says_what_older_readers_need():
    """Top-level keys beside those of transformers 5."""
    written = to_hf_config(FAMILIES["gemma3"])
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (100_000.0, 1_000.0)
    assert json.loads(json.dumps(written)) == written
