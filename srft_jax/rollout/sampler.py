"""The sampler: requests in, trajectories out, by continuous batching.

    waiting completions take free rows -> new prompts are prefilled -> a segment of decode steps
        -> what has finished is handed out, while the next segment runs

Shapes are static: rows, prompts and lanes are sized when work begins and can grow, each capacity is
one of a few sizes. Several processes each bring requests of their own and decode in lock step; a
process that does not consume its stream keeps the others waiting.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence

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
from srft_jax.rollout.lock_step import Agreement, agree
from srft_jax.rollout.programs import Drawn, Statics
from srft_jax.rollout.progress import Observer, ProgressAccount
from srft_jax.rollout.request import (
    Request,
    SamplingConfig,
    resolved,
    validate_request,
)
from srft_jax.rollout.row_table import PrefillJob, RowTable
from srft_jax.rollout.sizes import cache_budget_mib, demand_on, grown_sizes, sampler_sizes

# A segment ends early when this share of the rows has finished and others wait for a row.
_SHARE_FINISHED = 1 / 8


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
        table: Who decodes where, and who waits.
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
        self._model_config, self._config, self._tokenizer = model_config, sampling_config, tokenizer
        if mesh is None and not jax.sharding.get_mesh().empty:
            mesh = jax.sharding.get_mesh()
        self._trainer_mesh = mesh
        self._mesh = None if mesh is None else decode_mesh(mesh, sampling_config.tensor)
        runtime = Runtime(dtype=sampling_config.dtype, attention=sampling_config.attention)
        self._statics = Statics(model_config, runtime, sampling_config.truncation)
        self._version = 0
        self._params: Params | None = None
        self._layout: Params | None = None  # made of `_params` when it is first needed
        self._budget_mib: int | None = None  # asked once: other memory would be other shapes
        self.engine: Engine | None = None
        self._become_idle()

    def update(self, params: Params, version: int = 0) -> None:
        """Sample from these parameters from now on.

        Args:
            params: As the trainer has them; not to be donated before `release` or the next update.
            version: Number of the update that made them; trajectories carry it.

        Raises:
            RuntimeError: completions of the parameters before are still being made.
        """
        if self._work.total or self.engine is not None:
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

        A submission that does not fit beside what runs waits until nothing runs. Then the engine is
        made anew with other sizes, for which programs compile.

        Args:
            requests: Completion m of group g draws from fold_in(fold_in(threefry, g), m), whatever
                else is asked for. Several processes each bring their own requests.
            key: PRNG key of any kind. Its random bits are the threefry key above: other generators'
                draws depend on what is drawn beside them.
            slots: Most completions decoded side by side while these are made; None takes the
                config's.

        Raises:
            UsageError: see `request.validate_request`.
        """
        full = [resolved(index, request, self._config) for index, request in enumerate(requests)]
        for index, request in enumerate(full):
            validate_request(
                f"request {index}",
                request,
                self._model_config,
                has_tokenizer=self._tokenizer is not None,
            )
        key_bits = np.asarray(jax.random.bits(key, (2,), "uint32"))
        self.table.add(full, key_bits)
        work = self._work
        work.total += sum(request.group_size for request in full)
        work.max_rows = max(work.max_rows, self._config.slots if slots is None else slots)
        work.with_forced |= any(len(request.forced) for request in full)
        work.needs_sizing = True

    def stream(self, observer: Observer | None = None) -> Iterator[Trajectory]:
        """Yield trajectories in the order in which they finish, until nothing is left.

        What the caller does with them goes on beside the next segment of decode steps. All
        processes must iterate. Leaving early gives up what still runs.

        Args:
            observer: Called after every segment.

        Raises:
            UsageError: there is no memory for a single row.
        """
        account, work = ProgressAccount(), self._work
        if work.is_streamed:
            raise RuntimeError("a stream of this sampler is running already")
        work.is_streamed = True
        try:
            finished: list[Trajectory] = []
            while True:
                running = self._start_segment(account)
                began = time.monotonic()
                for trajectory in finished:
                    yield trajectory
                    if self._work is not work:
                        return  # the caller has released the sampler
                if running is None:
                    # The caller may have submitted more on seeing the last trajectories.
                    if largest_of_processes(work.needs_sizing) == (0,):
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
                    observer(account.progress(work.total))
                    if self._work is not work:
                        return  # the observer has released the sampler
        finally:
            # After a release, the sampler may have other work by now.
            if self._work is work:
                self._become_idle()

    def _start_segment(self, account: ProgressAccount) -> Drawn | None:
        """Let waiting completions in and start decode steps; None where nothing is left."""
        work, table = self._work, self.table
        # What the engine was not sized for must not come in.
        jobs = [] if work.needs_sizing else table.admit()
        agreed = self._agree(jobs)
        if agreed.needs_sizing:
            if self._make_room(is_running=bool(agreed.running)):
                jobs += table.admit()
                agreed = self._agree(jobs)
        if not agreed.running:
            return None
        assert self.engine is not None  # completions have rows
        began = time.monotonic()
        self.engine.prefill(jobs, agreed)
        account.prefill_seconds += time.monotonic() - began

        account.num_rows, account.some_wait = table.num_rows, table.some_wait
        began = time.monotonic()
        num_rows = self.engine.sizes.rows * self.engine.sizes.shards
        # Where nobody waits, or may come in before all have ended, a free row is of no use.
        can_refill = agreed.waiting and not agreed.needs_sizing
        enough = max(1, int(_SHARE_FINISHED * num_rows)) if can_refill else num_rows
        running = self.engine.start(table, agreed, enough)
        account.decode_seconds += time.monotonic() - began
        return running

    def _agree(self, jobs: Sequence[PrefillJob]) -> Agreement:
        work = self._work
        return agree(self.table, jobs, needs_sizing=work.needs_sizing, with_forced=work.with_forced)

    def _make_room(self, *, is_running: bool) -> bool:
        """Size the engine for what any process has submitted; whether completions may come in.

        Where memory has no room for it beside what runs, nothing comes in until nothing runs. Then
        the engine is made anew, with other sizes.
        """
        demand = demand_on(self.table, self._work.max_rows)
        if demand.completions:
            prefill_params, layout = self._laid_out()  # first: the cache takes what they leave
            if self._budget_mib is None:
                self._budget_mib = cache_budget_mib(self._config)
            arguments = (self._model_config, demand, self._config, self._mesh, self._budget_mib)
            sizes = None if self.engine is None else grown_sizes(self.engine.sizes, *arguments)
            if sizes is None and is_running:
                self._work.needs_sizing = True  # also where another process has submitted
                return False
            if self.engine is not None and sizes is not None:
                self.engine.grow(sizes)
            else:
                self.engine = None  # its memory is free before the next one takes it
                self.table.vacate()
                sizes = sampler_sizes(*arguments)
                self.engine = Engine(
                    prefill_params,
                    layout,
                    self._statics,
                    sizes,
                    segment=self._config.segment,
                    mesh=self._mesh,
                )
            self.table.grow(rows=sizes.rows, prompt_slots=sizes.prompts, lanes=sizes.lanes)
        self._work.needs_sizing = False
        return True

    def _laid_out(self) -> tuple[Params, Params]:
        """Parameters for the prefill, with the trainer's layers, and for decode steps."""
        if self._params is None:
            raise RuntimeError("the sampler has no parameters: call update first")
        if self._layout is None:
            with jax.set_mesh(self._trainer_mesh):
                self._layout = decode_params(
                    self._params, self._model_config, self._config.dtype, self._mesh
                )
        return self._layout | {"layers": self._params["layers"]}, self._layout

    def _take_finished(self, drawn: Drawn) -> list[Trajectory]:
        """Note what rows have drawn; take out those that have ended."""
        tokens, counts = np.asarray(drawn.tokens), np.asarray(drawn.counts)
        stats = np.stack([drawn.logprobs, drawn.entropies])  # [2, R, U]
        finished = []
        for number, row in list(self.table.numbered()):
            count = int(counts[number])
            row.chunks.append((tokens[number, :count], stats[:, number, :count]))
            row.count += count
            stopped = bool(drawn.stopped[number])
            cut = stop_string_cut(row, count, self._tokenizer)
            # A stop id, or a stop string, has ended it; or it has all tokens that it may have.
            ended = stopped or cut is not None
            if ended or row.count >= row.completion.request.max_new_tokens:
                self.table.retire(number)
                finished.append(finished_trajectory(row, ended, cut, self._version))
        return finished

    def _become_idle(self) -> None:
        shards = 1 if self._mesh is None else row_shards(self._mesh) // jax.process_count()
        self.table, self._work = RowTable(shards=shards), _Work()
        self.engine = None


@dataclasses.dataclass
class _Work:
    """What was submitted since the sampler was last idle.

    Attributes:
        total: Completions.
        max_rows: Largest limit on rows of the submissions.
        with_forced: Some request has forced tokens.
        needs_sizing: Something came after the engine was sized.
        is_streamed: A stream completes it.
    """

    total: int = 0
    max_rows: int = 0
    with_forced: bool = False
    needs_sizing: bool = False
    is_streamed: bool = False


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
    names = []  # group and member of each completion, by request
    for index, request in enumerate(requests):
        group = resolved(index, request, sampling_config).group
        names.append([(group, request.first_member + n) for n in range(request.group_size)])
    for name, count in collections.Counter(itertools.chain(*names)).items():
        if count > 1:
            raise UsageError(
                f"{count} completions are member {name[1]} of group {name[0]}; requests of one "
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
    by_name = {(trajectory.group, trajectory.member): trajectory for trajectory in stream}
    return [[by_name[name] for name in group] for group in names]
