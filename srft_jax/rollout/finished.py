"""Rows that have ended become trajectories; stop strings say where a row's text ends."""

import bisect
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from srft_jax.batch import Trajectory
from srft_jax.rollout.slots import ActiveRow


class Detokenizer(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, tokens: Sequence[int]) -> str: ...


def finished_trajectory(
    row: ActiveRow, finished: bool, cut: int | None, version: int
) -> Trajectory:
    """Return what a row that has ended holds.

    Args:
        row: With all that it has drawn.
        finished: It ended by a stop id or a stop string.
        cut: Drawn tokens that a stop string leaves; None leaves all.
        version: Number of the update whose parameters drew it.
    """
    prompt, completion = row.prompt, row.completion
    drawn = np.concatenate([tokens for tokens, _ in row.chunks])[:cut]
    drawn_stats = np.concatenate([stats for _, stats in row.chunks], axis=1)[:, :cut]
    logprobs, entropies = np.concatenate([prompt.forced_stats, drawn_stats], axis=1)
    tokens = np.concatenate([np.asarray(prompt.forced, np.int32), drawn])
    return Trajectory(
        key=prompt.key,
        tokens=tokens,
        sampled=np.arange(len(tokens)) >= prompt.num_forced,
        logprobs=logprobs,
        entropies=entropies,
        version=version,
        finished=finished,
        group=completion.group,
        member=completion.member,
    )


def stop_string_cut(row: ActiveRow, num_new: int, tokenizer: Detokenizer | None) -> int | None:
    """Return how many drawn tokens are kept; None if their text contains no stop string.

    Args:
        row: With all that it has drawn.
        num_new: Tokens of the last segment.
        tokenizer: From ids to text; without one nothing is cut.
    """
    stop_strings = row.completion.request.stop_strings
    if not stop_strings or tokenizer is None:
        return None
    tokens = np.concatenate([tokens for tokens, _ in row.chunks])

    def stops(count: int) -> bool:
        text = tokenizer.decode(tokens[:count].tolist())
        return any(stop in text for stop in stop_strings)

    if not stops(len(tokens)):
        return None
    first = len(tokens) - num_new  # before this segment it did not stop
    return first + 1 + bisect.bisect_left(range(first + 1, len(tokens)), True, key=stops)
