"""Who decodes where: the host's table of rows and prompts, and the queue of what waits.

A completion takes a row and one of its prompt's lanes. A prompt takes a slot of the cache. Row and
prompt are on one shard: the part of the cache that one device holds, or one group of devices along
`tensor`. So a prompt is prefilled once, and its rows find it without any exchange.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from srft_jax.batch import prompt_key
from srft_jax.rollout.request import ResolvedRequest


@dataclasses.dataclass(frozen=True)
class PendingCompletion:
    """One completion to be made.

    Attributes:
        request: What asks for it.
        member: Its number within the group.
        draw_key: Threefry key that its draws are folded from, uint32 [2].
    """

    request: ResolvedRequest
    member: int
    draw_key: np.ndarray


@dataclasses.dataclass
class PromptEntry:
    """A distinct prompt with its forced tokens, and its completions that have no row yet.

    Attributes:
        tokens: Ids of the prompt, then the forced ones.
        num_forced: Forced tokens at the end of `tokens`.
        temperature: Temperature that forced tokens are scored at.
        key: Identity of the prompt without forced tokens.
        waiting: Completions that have no row yet.
        forced_stats: Log-probs and entropies of the forced tokens, float32 [2, num_forced].
    """

    tokens: tuple[int, ...]
    num_forced: int
    temperature: float
    key: str = ""
    waiting: deque[PendingCompletion] = dataclasses.field(default_factory=deque)
    forced_stats: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0), "f4"))

    @property
    def forced(self) -> tuple[int, ...]:
        return self.tokens[len(self.tokens) - self.num_forced :]


@dataclasses.dataclass
class ActiveRow:
    """A completion that is being made.

    Attributes:
        completion: What it is.
        prompt: Its prompt.
        prompt_slot: Where that is kept on the row's shard.
        lane: Which of the prompt's lanes the row is.
        count: Tokens so far, forced ones included.
        chunks: What each segment has drawn: tokens [n], and their log-probs and entropies [2, n].
    """

    completion: PendingCompletion
    prompt: PromptEntry
    prompt_slot: int
    lane: int
    count: int
    chunks: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def num_own(self) -> int:
        """Tokens in the row's own part of the cache."""
        return self.count - self.prompt.num_forced


@dataclasses.dataclass(frozen=True)
class PrefillJob:
    """A prompt that must be prefilled, and the prompt slot on a shard that takes it."""

    shard: int
    prompt_slot: int
    prompt: PromptEntry


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


class RowTable:
    """Rows and prompts of this process on each of its shards, and the queue before them."""

    def __init__(self, *, shards: int) -> None:
        self.lanes = 0
        self.rows: list[list[ActiveRow | None]] = [[] for _ in range(shards)]
        self.prompts: list[list[PromptEntry | None]] = [[] for _ in range(shards)]
        self._queue: deque[PromptEntry] = deque()  # prompts that have no slot

    def add(self, requests: Sequence[ResolvedRequest], draw_key: np.ndarray) -> None:
        """Queue the completions of requests.

        Requests of one prompt with the same forced tokens share an entry, which is prefilled once,
        also where it is queued or in use already. A resident prompt that nobody uses any more is
        not taken up again: the cache may have shrunk to shorter ones since.
        """
        in_use = (*self.unfinished, *(row.prompt for row in self.running))
        known = {_identity(entry): entry for entry in in_use}
        for request in requests:
            tokens = (*map(int, request.prompt), *map(int, request.forced))
            # Without forced tokens no log-prob depends on the temperature of the prompt's entry.
            temperature = request.temperature if len(request.forced) else 1.0
            entry = PromptEntry(tokens, len(request.forced), temperature)
            if _identity(entry) in known:
                entry = known[_identity(entry)]
            elif request.group_size:
                entry.key = prompt_key(request.prompt)
                known[_identity(entry)] = entry
                self._queue.append(entry)
            first = request.first_member
            entry.waiting.extend(
                PendingCompletion(request, member, draw_key)
                for member in range(first, first + request.group_size)
            )
        self._queue_longest_limit_first(self._queue)

    def _queue_longest_limit_first(self, entries: Iterable[PromptEntry]) -> None:
        """A completion that starts late and runs long keeps everybody waiting."""
        self._queue = deque(sorted(entries, key=_longest_limit_first))

    def vacate(self) -> None:
        """Take all prompts out of their slots, back into the queue if they wait; no row runs."""
        assert not self.running
        self._queue_longest_limit_first(self.unfinished)
        self.lanes = 0
        self.rows = [[] for _ in self.rows]
        self.prompts = [[] for _ in self.prompts]

    def grow(self, *, rows: int, prompt_slots: int, lanes: int) -> None:
        """Make room; nothing moves, new rows and slots come last on their shard."""
        self.lanes = lanes
        for shard in self.rows:
            shard.extend([None] * (rows - len(shard)))
        for entries in self.prompts:
            entries.extend([None] * (prompt_slots - len(entries)))

    def _entries(self) -> list[PromptEntry]:
        resident = [entry for shard in self.prompts for entry in shard if entry is not None]
        return [*self._queue, *resident]

    @property
    def unfinished(self) -> list[PromptEntry]:
        """Prompts with completions that wait for a row."""
        return [entry for entry in self._entries() if entry.waiting]

    @property
    def num_rows(self) -> int:
        return sum(len(shard) for shard in self.rows)

    @property
    def running(self) -> list[ActiveRow]:
        return [row for shard in self.rows for row in shard if row is not None]

    @property
    def some_wait(self) -> bool:
        """Whether some completion has no row yet."""
        return any(entry.waiting for entry in self._entries())

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is or will be completed from its slot."""
        used = [row.prompt for row in self.running]
        used += [p for shard in self.prompts for p in shard if p is not None and p.waiting]
        return max((len(prompt.tokens) for prompt in used), default=0)

    @property
    def longest_own(self) -> int:
        return max((row.num_own for row in self.running), default=0)

    def numbered(self) -> Iterator[tuple[int, ActiveRow]]:
        """Running rows by their number within the process."""
        for number, row in enumerate(row for shard in self.rows for row in shard):
            if row is not None:
                yield number, row

    def retire(self, number: int) -> None:
        shard, row = divmod(number, len(self.rows[0]))
        self.rows[shard][row] = None

    def admit(self) -> list[PrefillJob]:
        """Give rows to waiting completions, to those of resident prompts first.

        Returns:
            Prompts that were given a slot, whose rows must not be decoded before a prefill.
        """
        jobs: list[PrefillJob] = []
        open_shards = set(range(len(self.rows)))
        while open_shards:
            # The shard with the most free rows, the first of equals: shards are filled evenly.
            shard = max(open_shards, key=lambda s: (self.rows[s].count(None), -s))
            slot = self._slot_to_serve(shard)
            if slot is None:
                open_shards.remove(shard)
                continue
            prompt = self.prompts[shard][slot]
            # The slot is empty, or all of its prompt's completions have had their rows.
            if prompt is None or not prompt.waiting:
                prompt = self.prompts[shard][slot] = self._queue.popleft()
                jobs.append(PrefillJob(shard, slot, prompt))
            self._fill(shard, slot, prompt)
        return jobs

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
                # A resident prompt goes on as long as it has a lane.
                if used[slot] < self.lanes:
                    return slot
            elif not used[slot] and free is None:
                # Nobody completes this prompt any more: its slot can take the next in the queue.
                free = slot
        return free if self._queue else None

    def _fill(self, shard: int, slot: int, prompt: PromptEntry) -> None:
        """Give rows to as many of a prompt's completions as there are free rows and lanes."""
        rows = self.rows[shard]
        taken = {row.lane for row in rows if row is not None and row.prompt_slot == slot}
        free_lanes = [lane for lane in range(self.lanes) if lane not in taken]
        free_rows = [number for number, row in enumerate(rows) if row is None]
        for number, lane in zip(free_rows, free_lanes, strict=False):
            if not prompt.waiting:
                return
            completion = prompt.waiting.popleft()
            rows[number] = ActiveRow(completion, prompt, slot, lane, prompt.num_forced)

    def cache_index(self) -> dict[str, np.ndarray]:
        """Return the host's fields of a `KVCache`, int32, of all shards of this process.

        prompt_lengths [P], lengths [R], row_of_lane [P, G] and lane_of_row [R]; the last two number
        rows and lanes within a shard.
        """
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
        return {
            "prompt_lengths": prompt_lengths.ravel(),
            "lengths": lengths.ravel(),
            "row_of_lane": row_of_lane.reshape(-1, self.lanes),
            "lane_of_row": lane_of_row.ravel(),
        }


def _identity(entry: PromptEntry) -> tuple[tuple[int, ...], int, float]:
    return entry.tokens, entry.num_forced, entry.temperature


def _longest_limit_first(entry: PromptEntry) -> int:
    return -max(completion.request.max_new_tokens for completion in entry.waiting)
