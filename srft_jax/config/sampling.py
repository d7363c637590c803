"""Which tokens may be drawn: the knobs of rollouts and of the verb `generate`."""

import dataclasses
from typing import ClassVar

from srft_jax.config.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Limits on which tokens are drawn, applied in this order, each to what the last one left.

    The loss does not know of them: its ratios are to the whole distribution.

    Args:
        top_k: Only this many of the likeliest tokens are drawn, and those as likely as the last of
            them; 0 is off.
        top_p: Only the likeliest tokens are drawn that together hold this probability; 1 is off.
        min_p: Only tokens at least this share as likely as the likeliest are drawn; 0 is off.
    """

    PREFIX: ClassVar[str] = ""  # before the names of the keys, in messages

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise UsageError(f"{self.PREFIX}top_k must be 0 (off) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:  # NaN too
            raise UsageError(
                f"{self.PREFIX}top_p must be above 0 and at most 1 (off), not {self.top_p}"
            )
        if not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"{self.PREFIX}min_p must be between 0 (off) and 1, not {self.min_p}")

    @property
    def truncation(self) -> "Truncation":
        """These three knobs alone, out of a section that has more."""
        return Truncation(self.top_k, self.top_p, self.min_p)
