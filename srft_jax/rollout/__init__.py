"""Requests in, trajectories with their log-probs and entropies out."""

from srft_jax.rollout.finished import Detokenizer
from srft_jax.rollout.progress import Observer, RolloutProgress
from srft_jax.rollout.request import Request, SamplingConfig
from srft_jax.rollout.sampler import Sampler, sample, sample_stream

__all__ = [
    "Detokenizer",
    "Observer",
    "Request",
    "RolloutProgress",
    "Sampler",
    "SamplingConfig",
    "sample",
    "sample_stream",
]
