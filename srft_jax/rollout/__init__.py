"""Requests in, trajectories with their log-probs and entropies out."""

from srft_jax.rollout.request import Request, RolloutProgress, SamplingConfig
from srft_jax.rollout.sampler import Detokenizer, Observer, Sampler, sample, sample_stream
from srft_jax.rollout.truncation import Truncation

__all__ = [
    "Detokenizer",
    "Observer",
    "Request",
    "RolloutProgress",
    "Sampler",
    "SamplingConfig",
    "Truncation",
    "sample",
    "sample_stream",
]
