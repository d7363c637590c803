"""Grouped-query attention over packed rows: of training, and of prompts before decoding."""

from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops.attention_chunks import chunked_attention
from srft_jax.ops.attention_cudnn import cudnn_attention
from srft_jax.ops.attention_loop import looped_attention
from srft_jax.ops.attention_terms import (
    Extent,
    Kernel,
    Part,
    ScoreOptions,
    grouped,
    sight_of,
    ungrouped,
)

# Rows up to here go in a few chunks of queries: what is made of T^2 is small yet.
_SHORT = 1024


def packed_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    segment_ids: Int[Array, "B T"],
    options: ScoreOptions,
    window: int | None = None,
    *,
    slides: Bool[Array, ""] | None = None,
    part: Part | None = None,
    kernel: Kernel = "xla",
) -> Float[Array, "B T N H"]:
    """softmax(score) v, where query t sees key s if s <= t and both are of one segment.

    Scores and softmax are float32; query head n reads kv head n // (N / K). No score is kept for
    the backward pass, which computes them again from the output and each query's log-sum-exp.
    In: segment_ids [1, 1, 2].  Out: queries see keys [1, 0, 0], [1, 1, 0], [0, 0, 1].

    Args:
        query: Of the tokens here.
        key: Of whole rows.
        value: Of whole rows.
        segment_ids: Of the queries.
        options: Scale and cap of the scores.
        window: With it a query sees t - s < window only, of tokens that stand side by side.
        slides: Whether the window holds, where that is known on the device only; by default it
            does.
        part: Of split rows, which part the queries are; by default S = T and rows are whole.
        kernel: How it is computed: by XLA, by jax's splash kernel for TPU, or by cuDNN. The last
            two are of one device alone.
    """
    if kernel == "splash":
        # Here, since it takes 0.4 s, in every process.
        from srft_jax.ops.attention_splash import splash_attention

        return splash_attention(
            *(query, key, value, segment_ids, options), window=window, slides=slides, part=part
        )
    sight = sight_of(segment_ids, window, slides, part)
    extent = Extent(whole=part is None, window=window if slides is None else None)
    if kernel == "cudnn":
        return cudnn_attention(query, key, value, sight, options, extent)
    by_head = grouped(query, key.shape[1])
    if key.shape[2] <= _SHORT:
        mixed = chunked_attention(options, extent, by_head, key, value, sight)
    else:
        mixed = looped_attention(options, by_head, key, value, sight)
    return ungrouped(mixed, query.shape[1])
