"""Rows that have ended become trajectories; stop strings say where a row's text ends."""

import bisect
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from srft_jax.batch import Trajectory
from srft_jax.rollout.row_table import ActiveRow

_MOST_CHANGED = 8  # characters that may differ where decoding starts in the middle of a text
_PART_OF_CHARACTER = "\ufffd"


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
        group=completion.request.group,
        member=completion.member,
    )


def stop_string_cut(row: ActiveRow, num_new: int, tokenizer: Detokenizer | None) -> int | None:
    """Return how many drawn tokens are kept; None if their text contains no stop string.

    The text is that of the drawn tokens alone, as the tokenizer decodes them: a stop string that
    begins in forced tokens, or that is a special token which the tokenizer skips, is not seen.

    Args:
        row: With all that it has drawn; no stop string in what it had drawn before.
        num_new: Tokens of the last segment.
        tokenizer: From ids to text; without one nothing is cut.
    """
    stop_strings = row.completion.request.stop_strings
    if not stop_strings or tokenizer is None:
        return None
    tokens = np.concatenate([tokens for tokens, _ in row.chunks]).tolist()
    first = len(tokens) - num_new

    def stops(count: int, start: int = 0) -> bool:
        text = tokenizer.decode(tokens[start:count])
        return any(stop in text for stop in stop_strings)

    start = _context_start(tokens[:first], max(map(len, stop_strings)), tokenizer)
    # What is found behind the context is looked for again in the whole text, which decides.
    if not stops(len(tokens), start) or not stops(len(tokens)):
        return None
    return first + 1 + bisect.bisect_left(range(first + 1, len(tokens)), True, key=stops)


def _context_start(tokens: Sequence[int], length: int, tokenizer: Detokenizer) -> int:
    """Where to decode from, to see each string of `length` that ends in what follows `tokens`.

    The whole text would be decoded anew after every segment. Decoding from the middle of a text may
    change its first characters (a stripped blank) and yields U+FFFD for a part of a character; a
    tokenizer with byte tokens may give it for all bytes of a run. What is behind that is the same.
    """
    start, count = len(tokens), length + _MOST_CHANGED
    while start > 0:
        start, count = max(0, start - count), 4 * count
        text = tokenizer.decode(tokens[start:])
        if len(text) >= length + _MOST_CHANGED and _PART_OF_CHARACTER not in text[-length:]:
            break
    return start
