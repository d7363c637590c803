"""One tiny policy for all tests of the sampler, with few shapes: compiling is what takes time."""

import functools

import jax
import numpy as np

from srft_jax.config import ModelConfig
from srft_jax.models import forward, init_params, output_head
from srft_jax.ops.head import token_stats
from srft_jax.rollout import SamplingConfig, sample

CONFIG = ModelConfig(
    vocab_size=24,
    dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    rope_theta=10_000.0,
)
# A matrix of this scale makes distributions that are neither flat nor certain.
PARAMS = jax.tree.map(lambda x: 6.0 * x, init_params(CONFIG, jax.random.key(7)))
KEY = jax.random.key(11)
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2], [3])


def sampling(**changes):
    return SamplingConfig(**(dict(max_new_tokens=16, slots=8, segment=8) | changes))


def complete(requests, key=KEY, tokenizer=None, params=PARAMS, **changes):
    """Completions by request, from the one policy, at full precision."""
    with jax.default_matmul_precision("highest"):
        return sample(params, CONFIG, requests, key, sampling(**changes), tokenizer=tokenizer)


@functools.partial(jax.jit, static_argnames=("temperature",))
def _teacher_forced(tokens, positions, segment_ids, targets, temperature):
    hidden = forward(PARAMS, CONFIG, tokens, positions, segment_ids).hidden
    head = output_head(PARAMS, CONFIG)
    stats = token_stats(hidden[0], head, targets, temperature=temperature)
    return stats, hidden[0] @ head


def trainer_view(prompt, completion, temperature=1.0, width=32):
    """Log-probs, entropies and logits of the completion, in one forward pass like the trainer's."""
    sequence = np.array([*prompt, *completion], np.int32)
    size = len(sequence) - 1
    tokens, targets = (np.zeros(width, np.int32) for _ in range(2))
    tokens[:size], targets[:size] = sequence[:-1], sequence[1:]
    slots = np.arange(width, dtype=np.int32)
    segment_ids = (slots < size).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        stats, logits = _teacher_forced(
            tokens[None], slots[None], segment_ids[None], targets, temperature
        )
    of_completion = slice(len(prompt) - 1, size)
    return tuple(np.asarray(x)[of_completion] for x in (*stats, logits))
