"""How far a sampler's stream is, and the account that says so."""

import dataclasses
import time
from collections.abc import Callable

from srft_jax.rollout.programs import Drawn


@dataclasses.dataclass(frozen=True)
class RolloutProgress:
    """How far a sampler's stream is. Seconds are wall time of the calling thread.

    Attributes:
        finished: Completions that have ended.
        total: Completions asked for.
        tokens: Tokens drawn so far.
        steps: Decode steps so far.
        occupancy: Share of rows that drew a token, mean over the steps at which completions were
            waiting for a row; 1 where none ever was.
        prefill_seconds: Running prompts.
        decode_seconds: Running decode steps, what the caller did meanwhile included.
        host_seconds: Everything else: choosing what comes next, taking completions apart.
    """

    finished: int
    total: int
    tokens: int
    steps: int
    occupancy: float
    prefill_seconds: float
    decode_seconds: float
    host_seconds: float

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds + self.host_seconds


Observer = Callable[[RolloutProgress], None]


class ProgressAccount:
    """What `RolloutProgress` reports of one stream.

    Attributes:
        num_rows: Rows of this process in the segment that runs.
        some_wait: Completions waited for a row when that segment began.
    """

    def __init__(self) -> None:
        self.num_rows, self.some_wait = 0, False
        self._began = time.monotonic()
        self.finished = self.tokens = self.steps = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self._full_steps = self._full_tokens = 0  # counted while completions waited for a row

    def note_segment(self, drawn: Drawn) -> None:
        """Add the tokens and steps of a segment that has ended."""
        tokens = int(drawn.counts.sum())
        self.tokens += tokens
        self.steps += int(drawn.steps)
        if self.some_wait:
            self._full_steps += int(drawn.steps) * self.num_rows
            self._full_tokens += tokens

    def progress(self, total: int) -> RolloutProgress:
        """Return how far the stream is, of `total` completions submitted."""
        seconds = time.monotonic() - self._began
        return RolloutProgress(
            finished=self.finished,
            total=total,
            tokens=self.tokens,
            steps=self.steps,
            occupancy=self._full_tokens / self._full_steps if self._full_steps else 1.0,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            host_seconds=seconds - self.prefill_seconds - self.decode_seconds,
        )
