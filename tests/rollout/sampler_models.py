"""One tiny policy for all tests of the sampler, and few shapes: compiling is what takes time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from srft_jax.config import ModelConfig
from srft_jax.models import Runtime, forward, init_params, output_head
from srft_jax.ops.head import token_stats
from srft_jax.ops.rounding import ROUND_AS_WRITTEN
from srft_jax.rollout import Request, Sampler, SamplingConfig, sample

CONFIG = ModelConfig(
    vocab_size=24,
    dim=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    rope_theta=10_000.0,
)
TWO_LAYERS = dataclasses.replace(CONFIG, num_layers=2)
UNTIED = dataclasses.replace(TWO_LAYERS, tie_embeddings=False)


def random_params(config):
    """Matrices at a scale that makes distributions neither flat nor certain; biases are not 0."""
    params = init_params(config, jax.random.key(7))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    noisy = [
        4.0 * leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


PARAMS = random_params(CONFIG)
KEY = jax.random.key(11)
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2], [3])


def sampling(**changes):
    return SamplingConfig(**(dict(max_new_tokens=16, slots=8, segment=8) | changes))


def complete(requests, key=KEY, tokenizer=None, params=PARAMS, config=CONFIG, **changes):
    """Completions by request at full precision."""
    with jax.default_matmul_precision("highest"):
        return sample(params, config, requests, key, sampling(**changes), tokenizer=tokenizer)


def watched(requests, note, params=PARAMS, config=CONFIG, **changes):
    """Completions by request, and what `note(sampler)` says after each segment."""
    sampler, noted = Sampler(config, sampling(**changes)), []
    sampler.update(params)
    sampler.submit(requests, KEY)
    with jax.default_matmul_precision("highest"):
        finished = list(sampler.stream(lambda _: noted.append(note(sampler))))
    return in_groups(finished, len(requests)), noted


def in_groups(trajectories, number):
    """Trajectories in the order of groups and of their members."""
    groups = [[] for _ in range(number)]
    for trajectory in sorted(trajectories, key=lambda t: (t.group, t.member)):
        groups[trajectory.group].append(trajectory)
    return groups


def capacity(sampler):
    """Tokens of their own that rows have room for."""
    return sampler.engine.state.cache.values[0].shape[2]


def complete_some(requests, **settings):
    """`complete` beside others, so that there are four prompts, groups of four and eight rows.

    All such calls share programs. At most four requests; if four, one of them of four completions.
    """
    others = [Request([20 + i], 4, max_new_tokens=1) for i in range(4 - len(requests))]
    return complete([*requests, *others], **settings)[: len(requests)]


def greedy(prompts, **request):
    """The first of four completions of each prompt, which are all equal."""
    requests = [Request(prompt, 4, **request) for prompt in prompts]
    groups = complete_some(requests, temperature=0.0)
    for first, *others in groups:
        assert all(other.tokens.tolist() == first.tokens.tolist() for other in others)
    return [group[0] for group in groups]


def assert_same(groups, others):
    flat, other_flat = ([t for group in g for t in group] for g in (groups, others))
    for trajectory, other in zip(flat, other_flat, strict=True):
        assert trajectory.tokens.tolist() == other.tokens.tolist()
        assert trajectory.sampled.tolist() == other.sampled.tolist()
        assert trajectory.finished == other.finished and trajectory.key == other.key
        np.testing.assert_allclose(trajectory.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(trajectory.entropies, other.entropies, atol=1e-5)


@functools.partial(
    jax.jit, static_argnames=("config", "runtime"), compiler_options=ROUND_AS_WRITTEN
)
def _teacher_forced(params, tokens, targets, temperature, *, config, runtime):
    positions = jnp.arange(tokens.shape[1])[None]
    # No padding: what is right of a token does not reach it.
    hidden = forward(
        params, config, tokens, positions, jnp.ones_like(tokens), runtime=runtime
    ).hidden
    head = output_head(params, config)
    stats = token_stats(
        hidden[0], head, targets, temperature=temperature, softcap=config.logit_softcap
    )
    return stats, hidden[0] @ head.astype(hidden.dtype)


def trainer_view(
    prompt,
    completion,
    temperature=1.0,
    *,
    params=PARAMS,
    config=CONFIG,
    dtype="float32",
    attention="xla",
    width=32,
):
    """Log-probs, entropies and logits of the completion, in one forward pass like the trainer's."""
    sequence = np.array([*prompt, *completion], np.int32)
    size = len(sequence) - 1
    tokens, targets = (np.zeros(width, np.int32) for _ in range(2))
    tokens[:size], targets[:size] = sequence[:-1], sequence[1:]
    runtime = Runtime(dtype, attention=attention)
    with jax.default_matmul_precision("highest"):
        stats, logits = _teacher_forced(
            params, tokens[None], targets, temperature, config=config, runtime=runtime
        )
    answer = slice(len(prompt) - 1, size)
    return tuple(np.asarray(x)[answer] for x in (*stats, logits))


def argmax_loop(prompt, limit, **model):
    """What greedy decoding is: one whole forward pass a token, and no cache."""
    tokens = []
    for _ in range(limit):
        logits = trainer_view(prompt, [*tokens, 0], width=64, **model)[2]
        tokens.append(int(logits[-1].argmax()))
    return tokens
