"""The sampler: requests in, trajectories out, by continuous batching.

    waiting completions take free rows -> new prompts are prefilled -> a segment of decode steps
        -> what has finished is handed out, while the next segment runs

Shapes are static: rows, prompts and lanes are sized when work begins and can grow, each capacity is
one of a few sizes. Several processes each bring requests of their own and decode in lock step; a
process that does not consume its stream keeps the others waiting.
"""

import collections
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from srft_jax.batch import Trajectory
from srft_jax.config import ModelConfig, UsageError
from srft_jax.mesh import decode_mesh, largest_of_processes, row_shards
from srft_jax.models.decoder import Params, Runtime
from srft_jax.rollout.decode_layout import decode_params
from srft_jax.rollout.engine import Engine
from srft_jax.rollout.finished import Detokenizer, finished_trajectory, stop_string_cut
from srft_jax.rollout.programs import Drawn, Statics
from srft_jax.rollout.request import (
    Request,
    RolloutProgress,
    SamplingConfig,
    resolved,
    validate_request,
)
from srft_jax.rollout.sizes import (
    Demand,
    SamplerSizes,
    cache_budget_mib,
    demand_on,
    grown_sizes,
    sampler_sizes,
)
from srft_jax.rollout.slots import Slots

# A segment ends early when this share of the rows has finished and others wait for a row.
_SHARE_FINISHED = 1 / 8


Observer = Callable[[RolloutProgress], None]


class Sampler:
    """Completes requests by the policy's current parameters; made once for a run.

        sampler = Sampler(model_config, sampling_config, mesh)
        sampler.update(params, version=0)
        sampler.submit(requests, key)            # also while others run
        for trajectory in sampler.stream():      # in the order in which they finish
            ...
        sampler.release()                        # its memory is free for the update

    Parameters are laid out for decoding once per `update`, when the first request needs them. The
    cache exists while something runs. Programs compile for few shapes: after the first steps of a
    run nothing compiles.

    Args:
        model_config: Architecture.
        sampling_config: Precision, memory, and what requests do not say themselves.
        mesh: Devices as the trainer has them; None takes the mesh in context at this call. Without
            either, everything runs on the default device, whichever mesh is in context later.
        tokenizer: Needed where requests have stop strings.

    Attributes:
        slots: Who decodes where, and who waits.
        engine: The device's side; None while nothing runs.

    Raises:
        UsageError: the mesh cannot be laid out as `sampling_config.tensor` asks.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        sampling_config: SamplingConfig,
        mesh: Mesh | None = None,
        *,
        tokenizer: Detokenizer | None = None,
    ) -> None:
        self.model_config, self.config, self._tokenizer = model_config, sampling_config, tokenizer
        if mesh is None and not jax.sharding.get_mesh().empty:
            mesh = jax.sharding.get_mesh()
        self._trainer_mesh = mesh
        self.mesh = None if mesh is None else decode_mesh(mesh, sampling_config.tensor)
        runtime = Runtime(dtype=sampling_config.dtype, attention=sampling_config.attention)
        self._statics = Statics(model_config, runtime, sampling_config.truncation)
        self._version = 0
        self._params: Params | None = None
        self._layout: Params | None = None  # made of `_params` when it is first needed
        self._budget_mib: int | None = None  # asked once: other memory would be other shapes
        self.engine: Engine | None = None
        self.slots = self._empty_slots()
        self._stream: object | None = None  # the stream that runs
        self._total = 0  # completions submitted since the sampler was last idle
        self._is_new = False  # something was submitted that the sizes do not know of yet
        self._most_rows = 0  # largest limit on rows of the submissions since then
        self._with_forced = False

    def update(self, params: Params, version: int = 0) -> None:
        """Sample from these parameters from now on.

        Args:
            params: As the trainer has them; not to be donated before `release` or the next update.
            version: Number of the update that made them; trajectories carry it.

        Raises:
            RuntimeError: completions of the parameters before are still being made.
        """
        if self._total or self.engine is not None:
            raise RuntimeError("the sampler still completes requests by other parameters")
        self._params, self._version, self._layout = params, version, None

    def release(self) -> None:
        """Forget parameters, cache and requests: their memory is free. A stream that runs ends."""
        self._params = self._layout = None
        self._become_idle()

    def submit(
        self, requests: Sequence[Request], key: jax.Array, *, slots: int | None = None
    ) -> None:
        """Queue requests; `stream` completes them, also one that runs already.

        Args:
            requests: Completion m of group g draws from fold_in(fold_in(key, g), m), whatever else
                is asked for. Several processes each bring their own requests.
            key: PRNG key.
            slots: Most completions decoded side by side while these are made; None takes the
                config's.

        Raises:
            UsageError: see `request.validate_request`.
        """
        full = [resolved(index, request, self.config) for index, request in enumerate(requests)]
        for index, request in enumerate(full):
            validate_request(
                f"request {index}",
                request,
                self.model_config,
                has_tokenizer=self._tokenizer is not None,
            )
        key_bits = np.asarray(jax.random.bits(key, (2,), "uint32"))
        self.slots.add(full, key_bits)
        self._total += sum(request.group_size for request in full)
        self._is_new = True
        self._most_rows = max(self._most_rows, self.config.slots if slots is None else slots)
        self._with_forced |= any(len(request.forced) for request in full)

    def stream(self, observer: Observer | None = None) -> Iterator[Trajectory]:
        """Yield trajectories in the order in which they finish, until nothing is left.

        What the caller does with them goes on beside the next segment of decode steps. All
        processes must iterate. Leaving early gives up what still runs.

        Args:
            observer: Called after every segment.

        Raises:
            UsageError: there is no memory for a single row.
        """
        if self._stream is not None:
            raise RuntimeError("a stream of this sampler is running already")
        account, this_stream = _Account(), object()
        self._stream = this_stream
        try:
            finished: list[Trajectory] = []
            while True:
                running = self._start_segment(account)
                began = time.monotonic()
                for trajectory in finished:
                    yield trajectory
                    if self._stream is not this_stream:
                        return  # the caller has released the sampler
                if running is None:
                    # The caller may have submitted more on seeing the last trajectories.
                    if largest_of_processes(self._is_new) == (0,):
                        return
                    finished = []
                    continue
                assert self.engine is not None  # it has started the segment
                drawn = self.engine.finish(running)
                account.decode_seconds += time.monotonic() - began

                account.note_segment(drawn)
                finished = self._take_finished(drawn)
                account.finished += len(finished)
                if observer is not None:
                    observer(account.progress(self._total))
        finally:
            # After a release, the sampler may belong to another stream by now.
            if self._stream is this_stream:
                self._become_idle()

    def _start_segment(self, account: "_Account") -> Drawn | None:
        """Let waiting completions in and start decode steps; None where nothing is left."""
        has_room = self._make_room()
        if self.engine is None:
            return None
        slots, sizes = self.slots, self.engine.sizes
        placements = slots.admit() if has_room else []
        began = time.monotonic()
        (with_forced,) = largest_of_processes(self._with_forced)
        self.engine.prefill(slots, placements, bool(with_forced))
        account.prefill_seconds += time.monotonic() - began

        busy, waiting = largest_of_processes(bool(slots.running), slots.waiting)
        if not busy:
            return None
        account.num_rows, account.some_wait = slots.num_rows, slots.waiting
        began = time.monotonic()
        num_rows = sizes.rows * sizes.shards
        # While nobody waits a segment goes on until all have ended.
        enough = max(1, int(_SHARE_FINISHED * num_rows)) if waiting else num_rows
        running = self.engine.start(slots, enough)
        account.decode_seconds += time.monotonic() - began
        return running

    def _make_room(self) -> bool:
        """Size the engine for what was submitted since the last segment, by any process.

        False where memory has no room for it beside what runs: what waits may start once nothing
        runs, in an engine of other sizes.
        """
        if largest_of_processes(self._is_new) == (0,):
            return True
        demand = demand_on(self.slots)
        if not demand.completions:
            self._is_new = False
            return True
        prefill_params, layout = self._laid_out()  # first: what they take is not left for the cache
        sizes = self._sizes_for(demand)
        if sizes is None:
            return False
        if self.engine is None:
            self.engine = Engine(
                prefill_params,
                layout,
                self._statics,
                sizes,
                segment=self.config.segment,
                mesh=self.mesh,
            )
        else:
            self.engine.grow(sizes)
        self.slots.grow(rows=sizes.rows, prompt_slots=sizes.prompts, lanes=sizes.lanes)
        self._is_new = False
        return True

    def _sizes_for(self, demand: Demand) -> SamplerSizes | None:
        """Sizes for the demand, which the engine can grow to; None where it must first end."""
        if self._budget_mib is None:
            self._budget_mib = cache_budget_mib(self.config)
        (most_rows,) = largest_of_processes(self._most_rows)
        arguments = (self.model_config, demand, self.config, self.mesh)
        budget = self._budget_mib
        if self.engine is not None:
            sizes = grown_sizes(
                self.engine.sizes, *arguments, budget_mib=budget, max_rows=most_rows
            )
            if sizes is not None or largest_of_processes(bool(self.slots.running)) == (1,):
                return sizes
            self.engine = None
            self.slots.vacate()
        return sampler_sizes(*arguments, budget_mib=budget, max_rows=most_rows)

    def _laid_out(self) -> tuple[Params, Params]:
        """Parameters for the prefill, with the trainer's layers, and for decode steps."""
        if self._params is None:
            raise RuntimeError("the sampler has no parameters: call update first")
        if self._layout is None:
            with jax.set_mesh(self._trainer_mesh):
                self._layout = decode_params(
                    self._params, self.model_config, self.config.dtype, self.mesh
                )
        return self._layout | {"layers": self._params["layers"]}, self._layout

    def _take_finished(self, drawn: Drawn) -> list[Trajectory]:
        """Note what rows have drawn; take out those that have ended."""
        tokens, counts = np.asarray(drawn.tokens), np.asarray(drawn.counts)
        stats = np.stack([drawn.logprobs, drawn.entropies])  # [2, R, U]
        finished = []
        for number, row in list(self.slots.numbered()):
            count = int(counts[number])
            row.chunks.append((tokens[number, :count], stats[:, number, :count]))
            row.count += count
            stopped = bool(drawn.stopped[number])
            cut = stop_string_cut(row, count, self._tokenizer)
            if stopped or cut is not None or row.count >= row.completion.limit:
                self.slots.retire(number)
                ended = stopped or cut is not None
                finished.append(finished_trajectory(row, ended, cut, self._version))
        return finished

    def _become_idle(self) -> None:
        self.engine, self.slots = None, self._empty_slots()
        self._stream, self._total, self._most_rows = None, 0, 0
        self._is_new = self._with_forced = False

    def _empty_slots(self) -> Slots:
        shards = 1 if self.mesh is None else row_shards(self.mesh) // jax.process_count()
        return Slots(shards=shards)


def sample_stream(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    key: jax.Array,
    sampling_config: SamplingConfig,
    *,
    tokenizer: Detokenizer | None = None,
    observer: Observer | None = None,
) -> Iterator[Trajectory]:
    """Return an iterator over trajectories in the order in which they finish.

    A `Sampler` of its own, on the mesh in context at this call, completes the requests; see there
    for arguments and errors. Mistakes in requests are raised at this call.
    """
    sampler = Sampler(model_config, sampling_config, tokenizer=tokenizer)
    sampler.update(params)
    sampler.submit(requests, key)
    return sampler.stream(observer)


def sample(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    key: jax.Array,
    sampling_config: SamplingConfig,
    *,
    tokenizer: Detokenizer | None = None,
    observer: Observer | None = None,
) -> list[list[Trajectory]]:
    """Return what `sample_stream` yields in the order of requests and of group members.

    Raises:
        UsageError: see `request.validate_request`; two completions have one group and member.
    """
    places = [
        [
            (index if request.group is None else request.group, request.first_member + number)
            for number in range(request.group_size)
        ]
        for index, request in enumerate(requests)
    ]
    for place, count in collections.Counter(itertools.chain(*places)).items():
        if count > 1:
            raise UsageError(
                f"{count} completions are member {place[1]} of group {place[0]}; requests of one "
                "group need a first_member each"
            )
    stream = sample_stream(
        params,
        model_config,
        requests,
        key,
        sampling_config,
        tokenizer=tokenizer,
        observer=observer,
    )
    by_place = {(trajectory.group, trajectory.member): trajectory for trajectory in stream}
    return [[by_place[place] for place in group] for group in places]


class _Account:
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
        tokens = int(drawn.counts.sum())
        self.tokens += tokens
        self.steps += int(drawn.steps)
        if self.some_wait:
            self._full_steps += int(drawn.steps) * self.num_rows
            self._full_tokens += tokens

    def progress(self, total: int) -> RolloutProgress:
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
