"""Grouped-query attention over packed rows, for training and for prompts before decoding.

`packed_attention` is the one door; the files attention_*.py hold its kernels. docs/kernels.md
compares them.
"""

from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops.attention_chunks import chunked_attention
from srft_jax.ops.attention_cudnn import cudnn_attention
from srft_jax.ops.attention_loop import looped_attention
from srft_jax.ops.attention_terms import (
    Extent,
    Kernel,
    Part,
    ScoreOptions,
    TileSizes,
    grouped,
    make_sight,
    ungrouped,
)


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
    tiles: TileSizes = TileSizes(),
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return softmax(score) v, where query t sees key s if s <= t and both are of one segment.

    Scores and softmax are float32; query head n reads kv head n // (N / K). No score is kept for
    the backward pass, which computes them again from the output and each query's log-sum-exp.
    In: segment_ids [1, 1, 2].  Out: queries see keys [1, 0, 0], [1, 1, 0], [0, 0, 1].

    Args:
        query: Queries of the tokens that are here.
        key: Keys of whole rows.
        value: Values of whole rows.
        segment_ids: Segment ids of the queries.
        options: Scale and cap of the scores.
        window: A query sees only tokens with t - s < window; tokens stand side by side. None
            lets it see all.
        slides: Whether the window holds, where only the device knows; by default it holds.
        part: Which part of split rows the queries are; by default S = T and rows are whole.
        kernel: Who computes it: XLA, jax's splash kernel for TPU, or cuDNN. The last two run on one
            device alone.
        tiles: How many tokens kernels take at a time.
        interpret: Run what the kernel does on any device, slowly; for tests.
    """
    if kernel == "splash":
        # Imported here, since the import takes 0.4 s in every process.
        from srft_jax.ops.attention_splash import splash_attention

        return splash_attention(
            *(query, key, value, segment_ids, options),
            window=window,
            slides=slides,
            part=part,
            most_tokens=tiles.splash,
            interpret=interpret,
        )
    sight = make_sight(segment_ids, window, slides, part)
    extent = Extent(whole=part is None, window=window if slides is None else None)
    if kernel == "cudnn":
        return cudnn_attention(
            *(query, key, value, sight, options, extent),
            chunk_size=tiles.cudnn_queries,
            implementation="xla" if interpret else "cudnn",
        )
    by_head = grouped(query, key.shape[1])
    if key.shape[2] <= tiles.short_keys:
        mixed = chunked_attention(options, extent, tiles, by_head, key, value, sight)
    else:
        mixed = looped_attention(options, tiles, by_head, key, value, sight)
    return ungrouped(mixed, query.shape[1])
