"""The architecture of a decoder, whatever its family: read from a Hugging Face config.json."""

import dataclasses
from typing import Literal

from srft_jax.config.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for sequences longer than a model was trained on.

    Args:
        kind: All frequencies slower (linear), slow ones slower (llama3), or slow ones slower and
            scores sharper (yarn).
        factor: How much slower the slowest frequency turns.
        original_max_positions: Longest sequence that the model was trained on; llama3 and yarn need
            it.
        low_freq_factor: llama3: wavelengths above original_max_positions / this are scaled whole.
        high_freq_factor: llama3: wavelengths below original_max_positions / this are left alone.
        beta_fast: yarn: frequencies of more turns than this within original_max_positions are left
            alone.
        beta_slow: yarn: frequencies of fewer turns than this are scaled whole.
        attention_factor: yarn: factor of cosines and sines; by default what mscale and
            mscale_all_dim give, or without them 0.1 log(factor) + 1.
        mscale: yarn: numerator's coefficient in (0.1 mscale log(factor) + 1) / (the same of
            mscale_all_dim).
        mscale_all_dim: yarn: the denominator's coefficient.
        truncate: yarn: round the bounds of the ramp between the two betas to whole dimensions.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder, in the words of a Hugging Face config.json.

    Args:
        family: Key of the parameter table in models/families.py.
        vocab_size: Rows of the embedding, V.
        dim: Width of the residual stream, D.
        num_layers: Decoder blocks, L.
        num_heads: Query heads, N.
        num_kv_heads: Key and value heads, K; divides num_heads.
        head_dim: Width of one head, H; even.
        mlp_dim: Hidden width of the gated MLP, or of one expert, F.
        rope_theta: Base of the rotary frequencies.
        norm_epsilon: Added to the mean square in RMSNorm.
        tie_embeddings: Use the embedding, transposed, as the output head.
        max_positions: Longest sequence the model is declared for.
        init_std: Standard deviation of random initial matrices.
        activation: Activation of the gated MLP.
        attention_bias: Biases of query, key, value and output projections; qwen2 always has the
            first three.
        mlp_bias: Biases of the MLP's projections.
        query_pre_attn_scalar: Scores are divided by its square root; by default it is head_dim.
        attention_softcap: Scores become c tanh(score / c).
        logit_softcap: Logits become c tanh(logit / c).
        sliding_window: A token sees itself and this many tokens less one before it, in the layers
            that slide: all but `full_attention_layers`.
        full_attention_layers: Numbers of the layers without the window, from 0.
        rope_local_theta: Base of the rotary frequencies in layers that slide; by default
            `rope_theta`. Then only layers that do not slide are scaled.
        rope_scaling: How the rotary frequencies are changed; None leaves them.
        num_experts: MLPs of a layer, E, of which each token is given to a few.
        experts_per_token: Number of experts that each token is given to.
        norm_topk_prob: Let the weights of a token's experts sum to 1.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1_000_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    max_positions: int = 4096
    init_std: float = 0.02
    family: Literal["qwen2", "qwen3", "llama", "mistral", "gemma3", "qwen3_moe"] = "qwen2"
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    query_pre_attn_scalar: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    rope_local_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    norm_topk_prob: bool = False

    @property
    def untied(self) -> bool:
        return not self.tie_embeddings

    @property
    def attention_scale(self) -> float:
        """Factor of the scores, before the softmax."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def slides(self) -> tuple[bool, ...]:
        """Whether each layer sees no further than the window, [L]."""
        full = self.full_attention_layers if self.sliding_window else range(self.num_layers)
        return tuple(layer not in full for layer in range(self.num_layers))


@dataclasses.dataclass(frozen=True)
class AdaptedModelConfig(ModelConfig):
    """The same decoder with low-rank adapters beside its matrices.

    It is no section of a file: `models.lora.adapted` makes it from an architecture and
    `model.lora`.
    """

    lora: LoraConfig = LoraConfig()
