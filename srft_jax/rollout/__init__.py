"""Requests in, completions with their log-probs and entropies out."""

from srft_jax.rollout.requests import Completion, Progress, Request, SamplingConfig
from srft_jax.rollout.scheduler import Observer, sample, sample_stream
from srft_jax.rollout.truncation import Truncation

__all__ = [
    "Completion",
    "Observer",
    "Progress",
    "Request",
    "SamplingConfig",
    "Truncation",
    "sample",
    "sample_stream",
]
