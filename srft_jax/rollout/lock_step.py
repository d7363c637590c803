"""What processes that decode together agree on before each segment of decode steps.

Each process brings requests of its own, and all run the same programs in the same order. So each
takes part in every exchange: one before each segment (`agree`), further ones where something was
submitted (`sizes.demand_on`, the memory there is, `agree` once more for what came in) or where
prompts are new (`packing.pack_prompts`), and one before a stream ends.
"""

import dataclasses
from collections.abc import Sequence

from srft_jax.mesh import largest_of_processes
from srft_jax.rollout.row_table import PrefillJob, RowTable


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The largest number of any process; what may be true is 1 where it is for some process.

    Attributes:
        needs_sizing: Something was submitted that the engine is not sized for.
        with_forced: Some request has forced tokens, whose log-probs a prefill then computes.
        longest_prompt: Tokens of the longest prompt that is or will be completed from its slot.
        longest_new: Tokens of the longest prompt to be prefilled; 0 where there is none.
        longest_own: Most tokens in a row's own part of the cache.
        running: Some completion has a row.
        waiting: Some completion has none yet.
    """

    needs_sizing: int
    with_forced: int
    longest_prompt: int
    longest_new: int
    longest_own: int
    running: int
    waiting: int


def agree(
    table: RowTable, jobs: Sequence[PrefillJob], *, needs_sizing: bool, with_forced: bool
) -> Agreement:
    """Return what all processes know of each other; all must call this, after `table.admit`."""
    return Agreement(
        *largest_of_processes(
            needs_sizing,
            with_forced,
            table.longest_prompt,
            max((len(job.prompt.tokens) for job in jobs), default=0),
            table.longest_own,
            bool(table.running),
            table.some_wait,
        )
    )
