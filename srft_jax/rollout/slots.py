"""Who decodes where: the host's table of rows and prompts, and the queue of what waits.

A completion takes a row and one of its prompt's lanes, a prompt takes a slot of the cache, row and
prompt on the same shard (the part of the cache that one device, or one group of devices along
`tensor`, holds). So a prompt is prefilled once, and its rows find it without any exchange.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from srft_jax.rollout.requests import Request, SamplingConfig, limit_of


@dataclasses.dataclass(frozen=True)
class Job:
    """One completion to be made.

    Attributes:
        request: Index of its request.
        member: Its number within the group.
        limit: Tokens it may have, forced ones included.
        stop_ids: Tokens that end it.
        number: Of its request, to draw by.
    """

    request: int
    member: int
    limit: int
    stop_ids: Sequence[int]
    number: int


@dataclasses.dataclass
class Prompt:
    """A distinct prompt with its forced tokens, and its completions that have no row yet."""

    tokens: tuple[int, ...]
    num_forced: int
    waiting: deque[Job]
    # Log-probs, entropies and once more log-probs of the forced tokens, float32 [3, num_forced].
    forced_floats: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((3, 0), "f4"))

    @property
    def forced(self) -> tuple[int, ...]:
        return self.tokens[len(self.tokens) - self.num_forced :]


@dataclasses.dataclass
class Row:
    """A completion that is being made.

    A chunk is what a segment has drawn: tokens, and their log-probs, entropies and log-probs under
    the truncated distribution, [3, n].
    """

    job: Job
    prompt: Prompt
    prompt_slot: int
    lane: int
    count: int  # tokens so far, forced ones included
    chunks: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def num_own(self) -> int:
        """Tokens in the row's own part of the cache."""
        return self.count - self.prompt.num_forced


@dataclasses.dataclass(frozen=True)
class Placement:
    """A prompt that must be prefilled."""

    shard: int
    slot: int
    prompt: Prompt


def distinct_prompts(requests: Sequence[Request], config: SamplingConfig) -> list[Prompt]:
    """Requests of the same prompt and forced tokens share one; the longest limits come first.

    What starts late and runs long keeps all others waiting, so the longest start first.
    """
    prompts: dict[tuple[tuple[int, ...], int], Prompt] = {}
    for index, request in enumerate(requests):
        tokens = (*map(int, request.prompt), *map(int, request.forced))
        prompt = prompts.setdefault(
            (tokens, len(request.forced)), Prompt(tokens, len(request.forced), deque())
        )
        limit = limit_of(request, config)
        number = index if request.number is None else request.number
        prompt.waiting.extend(
            Job(index, member, limit, request.stop_ids, number)
            for member in range(request.group_size)
        )
    wanted = [prompt for prompt in prompts.values() if prompt.waiting]
    return sorted(wanted, key=lambda prompt: -max(job.limit for job in prompt.waiting))


def power_of_two(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()


class Slots:
    """Rows and prompts of this process, `shards` times as many as given."""

    def __init__(
        self, prompts: Sequence[Prompt], *, shards: int, rows: int, prompt_slots: int, lanes: int
    ) -> None:
        self.lanes = lanes
        self.rows: list[list[Row | None]] = [[None] * rows for _ in range(shards)]
        self.prompts: list[list[Prompt | None]] = [[None] * prompt_slots for _ in range(shards)]
        self._queue = deque(prompts)  # those in no slot

    @property
    def num_rows(self) -> int:
        return len(self.rows) * len(self.rows[0])

    @property
    def running(self) -> list[Row]:
        return [row for shard in self.rows for row in shard if row is not None]

    @property
    def waiting(self) -> bool:
        """Some completion has no row yet."""
        resident = (prompt for shard in self.prompts for prompt in shard if prompt is not None)
        return bool(self._queue) or any(prompt.waiting for prompt in resident)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is or will be completed from its slot."""
        used = [row.prompt for row in self.running]
        used += [p for shard in self.prompts for p in shard if p is not None and p.waiting]
        return max((len(prompt.tokens) for prompt in used), default=0)

    @property
    def longest_own(self) -> int:
        return max((row.num_own for row in self.running), default=0)

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Running rows by their number within the process."""
        for number, row in enumerate(row for shard in self.rows for row in shard):
            if row is not None:
                yield number, row

    def retire(self, number: int) -> None:
        shard, row = divmod(number, len(self.rows[0]))
        self.rows[shard][row] = None

    def admit(self) -> list[Placement]:
        """Gives rows to waiting completions, to those of resident prompts first.

        Returns:
            Prompts that were given a slot, whose rows must not be decoded before a prefill.
        """
        placements: list[Placement] = []
        open_shards = set(range(len(self.rows)))
        while open_shards:
            shard = max(open_shards, key=lambda s: (self.rows[s].count(None), -s))
            slot = self._slot_to_serve(shard)
            if slot is None:
                open_shards.remove(shard)
                continue
            prompt = self.prompts[shard][slot]
            if prompt is None or not prompt.waiting:
                prompt = self.prompts[shard][slot] = self._queue.popleft()
                placements.append(Placement(shard, slot, prompt))
            self._fill(shard, slot, prompt)
        return placements

    def _slot_to_serve(self, shard: int) -> int | None:
        """A prompt slot whose next completion a free row can take, None if there is none."""
        if None not in self.rows[shard]:
            return None
        used = [0] * len(self.prompts[shard])
        for row in self.rows[shard]:
            if row is not None:
                used[row.prompt_slot] += 1
        free = None
        for slot, prompt in enumerate(self.prompts[shard]):
            if prompt is not None and prompt.waiting:
                if used[slot] < self.lanes:
                    return slot
            elif not used[slot] and free is None:
                free = slot
        return free if self._queue else None

    def _fill(self, shard: int, slot: int, prompt: Prompt) -> None:
        """Rows for as many of a prompt's completions as there are rows and lanes."""
        rows = self.rows[shard]
        taken = {row.lane for row in rows if row is not None and row.prompt_slot == slot}
        free_lanes = [lane for lane in range(self.lanes) if lane not in taken]
        free_rows = [number for number, row in enumerate(rows) if row is None]
        for number, lane in zip(free_rows, free_lanes, strict=False):
            if not prompt.waiting:
                return
            job = prompt.waiting.popleft()
            rows[number] = Row(job, prompt, slot, lane, prompt.num_forced)

    def index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """prompt_lengths, lengths, row_of_lane and lane_of_row of a `KVCache`."""
        shards, per_shard = len(self.rows), len(self.rows[0])
        prompt_slots = len(self.prompts[0])
        prompt_lengths = np.zeros((shards, prompt_slots), np.int32)
        lengths, lane_of_row = (np.zeros((shards, per_shard), np.int32) for _ in range(2))
        row_of_lane = np.zeros((shards, prompt_slots, self.lanes), np.int32)
        for shard, rows in enumerate(self.rows):
            for number, row in enumerate(rows):
                if row is not None:
                    prompt_lengths[shard, row.prompt_slot] = len(row.prompt.tokens)
                    lengths[shard, number] = row.num_own
                    row_of_lane[shard, row.prompt_slot, row.lane] = number
                    lane_of_row[shard, number] = row.prompt_slot * self.lanes + row.lane
        lanes = row_of_lane.reshape(-1, self.lanes)
        return prompt_lengths.ravel(), lengths.ravel(), lanes, lane_of_row.ravel()
