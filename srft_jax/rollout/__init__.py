"""Requests in, completions with their log-probs and entropies out."""

from srft_jax.rollout.requests import Completion, Request, SamplingConfig
from srft_jax.rollout.scheduler import sample, sample_stream

__all__ = ["Completion", "Request", "SamplingConfig", "sample", "sample_stream"]
