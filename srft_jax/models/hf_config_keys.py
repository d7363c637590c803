"""For each family, which key of its config.json is which field of ModelConfig.

Three kinds of keys are known: keys of fields; keys of features that we do not compute, at the only
value we accept; and bookkeeping that does not change the function. Any other key is refused.
"""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The keys of one model_type.

    Attributes:
        architecture: Name of the class in transformers.
        model_type: Key of transformers' registry.
        fields: Field of ModelConfig -> key.
        defaults: Key -> transformers' value if it is left out or null; other keys are required.
        neutral: Keys of features we do not compute -> the only value we accept.
        windows: Layers that slide if there is a window: none, all, those that `layer_types` lists,
            or those from `max_window_layers` on.
        window_default: transformers' value of `sliding_window` if it is left out.
        gated_window: Whether there is a window only if `use_sliding_window` is true.
        ignored: Keys without effect in this family alone.
        aliases: Key of transformers 5 -> its earlier name, which we write.
    """

    architecture: str
    model_type: str
    fields: dict[str, str]
    defaults: dict[str, Any]
    neutral: dict[str, Any]
    windows: Literal["none", "all", "layer_types", "max_window_layers"] = "none"
    window_default: int | None = None
    gated_window: bool = False
    ignored: tuple[str, ...] = ()
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def has_local_rope(self) -> bool:
        """Whether layers that slide have rotary frequencies of their own."""
        return self.windows == "layer_types"


_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
    "init_std": "initializer_range",
    "activation": "hidden_act",
}
_BIASED = _FIELDS | {"attention_bias": "attention_bias"}

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_bias": False,
}

_NEUTRAL = {"attention_dropout": 0.0, "partial_rotary_factor": 1.0, "quantization_config": None}

_QWEN2 = Spelling(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    fields=_FIELDS,
    defaults=_DEFAULTS,
    neutral=_NEUTRAL | {"use_mrope": False},
    windows="max_window_layers",
    window_default=4096,
    gated_window=True,
)

SPELLINGS = {
    "qwen2": _QWEN2,
    "qwen3": dataclasses.replace(
        _QWEN2,
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        fields=_BIASED,
        defaults=_DEFAULTS | {"head_dim": 128},
        neutral=_NEUTRAL,
    ),
    "llama": Spelling(
        architecture="LlamaForCausalLM",
        model_type="llama",
        fields=_BIASED | {"mlp_bias": "mlp_bias"},
        defaults=_DEFAULTS | {"max_position_embeddings": 2048, "mlp_bias": False},
        neutral=_NEUTRAL,
        ignored=("pretraining_tp",),
    ),
    "mistral": Spelling(
        architecture="MistralForCausalLM",
        model_type="mistral",
        fields=_FIELDS,
        defaults=_DEFAULTS | {"max_position_embeddings": 131072},
        neutral=_NEUTRAL,
        windows="all",
        window_default=4096,
    ),
    "gemma3": Spelling(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        fields=_BIASED
        | {
            "activation": "hidden_activation",
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "attention_softcap": "attn_logit_softcapping",
            "logit_softcap": "final_logit_softcapping",
        },
        defaults=_DEFAULTS
        | {
            "head_dim": 256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        neutral=_NEUTRAL | {"use_bidirectional_attention": False},
        windows="layer_types",
        window_default=4096,
        ignored=("hidden_act",),  # written by some tools beside hidden_activation, which is read
    ),
    "qwen3_moe": Spelling(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        fields=_BIASED
        | {
            "mlp_dim": "moe_intermediate_size",
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "norm_topk_prob": "norm_topk_prob",
        },
        defaults=_DEFAULTS | {"norm_topk_prob": False},
        # The router's balance loss is not computed; only `output_router_logits` would add it.
        neutral=_NEUTRAL
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False},
        windows="all",
        window_default=4096,
        gated_window=True,
        # Keys of dense layers, which no such model has, and of the balance loss.
        ignored=("intermediate_size", "router_aux_loss_coef", "max_window_layers"),
        aliases={"num_local_experts": "num_experts"},
    ),
}

# Keys of any config.json that say nothing about the function that the weights compute.
BOOKKEEPING = frozenset(
    (
        "_attn_implementation _attn_implementation_autoset _experts_implementation _name_or_path "
        "architectures attn_implementation bos_token_id cache_implementation "
        "chunk_size_feed_forward decoder_start_token_id do_sample dtype eos_token_id id2label "
        "is_decoder is_encoder_decoder label2id max_length model_type num_labels "
        "output_attentions output_hidden_states pad_token_id prefix problem_type return_dict "
        "sep_token_id task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p "
        "torch_dtype torchscript transformers_version unsloth_fixed unsloth_version use_bfloat16 "
        "use_cache"
    ).split()
)
