"""Log-probs of a batch under given parameters, by the trainer's own forward pass."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from srft_jax.batch import Batch, Role, role_mask
from srft_jax.models.decoder import Params
from srft_jax.ops.head import token_stats
from srft_jax.ops.rounding import ROUND_AS_WRITTEN
from srft_jax.training.microbatch import ForwardOptions, hidden_and_head, in_batch_order, rows_of


def make_old_logprobs(options: ForwardOptions) -> Callable[[Params, Batch], Batch]:
    """Return a compiled `(params, batch) -> batch` whose `old_logprobs` are those under `params`
    on the tokens of completions and prefixes; all other tokens keep theirs. `params` are all of the
    policy's, adapters and frozen ones together."""
    model_config = options.model_config

    def old_logprobs(params: Params, batch: Batch) -> Batch:
        def fill_microbatch(i: Array, filled: Array) -> Array:
            rows = rows_of(batch, i)
            flat = jax.tree.map(lambda x: x.reshape(-1), rows)
            recomputed = role_mask(flat, Role.SELF, Role.PREFIX)
            logprob = token_stats(
                *hidden_and_head(params, model_config, rows, options.runtime),
                flat.targets,
                mask=recomputed,
                temperature=options.temperature,
                softcap=model_config.logit_softcap,
                transposed=model_config.tie_embeddings,
                logits_bytes=options.logits_mib * 2**20,
            ).logprob
            logprob = jnp.where(recomputed, logprob, flat.old_logprobs)
            return filled.at[i].set(in_batch_order(logprob, batch))

        # Microbatches that are not in use hold padding, which keeps its zeros.
        filled = jax.lax.fori_loop(
            0, batch.num_microbatches, fill_microbatch, batch.rows.old_logprobs
        )
        return dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, old_logprobs=filled))

    return jax.jit(old_logprobs, compiler_options=ROUND_AS_WRITTEN)
