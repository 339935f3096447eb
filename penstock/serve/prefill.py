"""The prefill side: computes prompts for decode workers.

Where it reaches the decode worker's memory, it computes there, in place: a job waits for its turn, borrows blocks chunk
by chunk and writes into nothing else. Elsewhere it computes in its own memory, keeps what it computed in its own cache,
and has each finished block written through while it computes the next. A job ends when all KV is in place, or when the
asker leaves; `settle` answers once a lease's blocks are certainly not being written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from penstock import clock
from penstock.blocks import BlockId, Region
from penstock.cluster import Member
from penstock.engine.api import Engine
from penstock.errors import BadRequest, LeaseLost, Overloaded, PenstockError, StaleEpoch, WorkerDraining
from penstock.kv.prefix_cache import PrefixCache
from penstock.request import Token
from penstock.serve.handoff import (
    Alive,
    Begin,
    Done,
    First,
    Granted,
    More,
    PrefillAsk,
    Wrote,
    decode_from_decode,
    decode_prefill_ask,
    decode_settle_ask,
)
from penstock.serve.resident import Resident
from penstock.serve.rpc import Call
from penstock.serve.stepper import Run, Stepper
from penstock.tokens import count, unpack
from penstock.transport.api import Attached, Offer, Pipe, Transport


@dataclass(frozen=True, slots=True)
class PrefillOptions:
    """In place, `active` prompts of a decode worker hold leases at a time: the one that is computed, and the next.

    Per decode worker, so that one that is stuck and grants nothing holds up its own prompts only.
    """

    active: int = 2
    max_queued: int = 256
    chunk_tokens: int = 512


@dataclass(slots=True, eq=False)
class Job:
    """One prefill for somebody else."""

    ask: PrefillAsk
    call: Call
    run: Run | None = None
    first: Token | None = None
    started_s: float = 0.0
    ended_s: float = 0.0  # of the last chunk so far
    error: PenstockError | None = None
    asked_tokens: int = 0
    granted: Granted | None = None
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def prompt_tokens(self) -> int:
        return count(self.ask.tokens)

    def on_step(self, sampled: Sequence[Token]) -> None:
        if sampled:
            self.first = sampled[0]
        self.ended_s = clock.now()
        self.progress.set()

    def on_error(self, error: PenstockError) -> None:
        self.error = error
        self.progress.set()

    async def wait_progress(self) -> None:
        """Returns after a chunk, a grant of blocks or a preemption. Raises what went wrong meanwhile."""
        await self.progress.wait()
        self.progress.clear()
        if self.error is not None:
            raise self.error

    def ask_ahead(self, run: Run, chunk_tokens: int) -> None:
        """Asks for the blocks of the chunk after the next one, so that the answer is here before it is needed."""
        wanted = min(self.prompt_tokens, run.computed + 2 * chunk_tokens)
        held = len(self.granted.blocks) * run.region.layout.block_tokens if self.granted else 0
        if wanted > max(held, self.asked_tokens):
            self.asked_tokens = wanted
            self.call.send(More(wanted))

    async def wait_granted(self) -> bool:
        """The first grant after Begin; False if there is none, since the asker has no room or has left."""
        granted = await self.call.receive(decode_from_decode)
        self.granted = granted if isinstance(granted, Granted) else None
        return self.granted is not None

    async def take_grants(self) -> None:
        """Every later grant; an end of the call is seen by whoever serves it."""
        try:
            while (grant := await self.call.receive(decode_from_decode)) is not None:
                if not isinstance(grant, Granted):
                    raise LeaseLost(f"{self.ask.offer.owner} took its blocks back")
                self.granted = grant
                self.progress.set()
        except PenstockError as error:
            self.on_error(error)

    def done(self, computed_tokens: int, moved_bytes: int) -> Done:
        now = clock.now()
        return Done(computed_tokens, now - self.started_s, now - self.ended_s, moved_bytes)


class Prefiller:
    """Serves `prefill` and `settle`. Owns the mapped regions of peers."""

    def __init__(
        self,
        member: Member,
        engine: Engine,
        region: Region,
        cache: PrefixCache,
        transport: Transport,
        stepper: Stepper,
        options: PrefillOptions,
    ) -> None:
        self.is_draining = False
        self._member = member
        self._engine = engine
        self._region = region
        self._cache = cache
        self._transport = transport
        self._stepper = stepper
        self._options = options
        self._incarnation = member.hop.incarnation
        self._jobs: dict[Job, None] = {}
        self._ended = asyncio.Event()
        self._regions = Mappings(engine, transport, self._incarnation, options.active)

    @property
    def live(self) -> int:
        """Jobs that have arrived and not ended."""
        return len(self._jobs)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of jobs that the stepper does not know yet."""
        return sum(job.prompt_tokens for job in self._jobs if job.run is None)

    @property
    def queued(self) -> int:
        return sum(1 for job in self._jobs if job.run is None)

    async def wait_idle(self) -> None:
        """Returns when every job has ended."""
        while self._jobs:
            self._ended.clear()
            await self._ended.wait()

    async def prefill(self, call: Call) -> None:
        """Serves one prefill; see `handoff` for the conversation."""
        ask = decode_prefill_ask(call.body)
        self._check(ask)
        job = Job(ask, call)
        self._jobs[job] = None
        beat = asyncio.ensure_future(self._say_alive(job))
        try:
            if self._transport.is_in_place:
                async with self._regions.mapped(ask.offer) as region:
                    await self._compute_there(job, region)
            else:
                await self._compute_here(job)
        finally:
            beat.cancel()
            del self._jobs[job]
            self._ended.set()
            job.stopped.set()

    async def settle(self, call: Call) -> None:
        """Returns when nothing is written for the request; cancels its job, if that is still here."""
        ask = decode_settle_ask(call.body)
        self._check_writer(ask.writer)
        asked = (ask.request, ask.owner, ask.epoch)
        for job in [job for job in self._jobs if (job.ask.request, *job.ask.offer.key) == asked]:
            if job.call.task is not None:
                job.call.task.cancel()
            await job.stopped.wait()

    async def release_regions(self) -> None:
        """Unmaps what no job uses and whose owner is gone. Called now and then."""
        await self._regions.release_orphans()

    async def close(self) -> None:
        await self._regions.close()

    def _check(self, ask: PrefillAsk) -> None:
        self._check_writer(ask.writer)
        if self.is_draining:
            raise WorkerDraining(f"{self._member.worker} is draining")
        if len(self._jobs) >= self._options.max_queued:
            raise Overloaded(f"{self._member.worker} has {len(self._jobs)} prefills queued, its limit")
        if ask.offer.layout != self._member.layout:
            raise BadRequest(
                f"{ask.offer.owner} keeps KV as {ask.offer.layout}, {self._member.worker} as {self._member.layout}; "
                "start both with the same model, dtype and block size"
            )
        if not self._transport.is_in_place and count(ask.tokens) > self._member.max_context_tokens:
            limit = self._member.max_context_tokens
            raise BadRequest(
                f"{count(ask.tokens)} tokens are more than the {limit} that {self._member.worker} has room for"
            )

    def _check_writer(self, meant: str) -> None:
        """The asker knows by this name who maps its memory, and who must die before it reuses a block."""
        if meant != self._incarnation:
            raise StaleEpoch(f"this is {self._incarnation}, not {meant}")

    async def _say_alive(self, job: Job) -> None:
        while True:
            await asyncio.sleep(job.ask.alive_s)
            job.call.send(Alive(self._stepper.steps))

    # In place

    async def _compute_there(self, job: Job, region: Region) -> None:
        """Computes in the asker's own blocks."""
        job.call.send(Begin(self._options.chunk_tokens))
        if not await job.wait_granted():
            return
        job.started_s = clock.now()
        job.run = run = self._host(job, region)
        start = run.computed
        listening = asyncio.ensure_future(job.take_grants())
        try:
            while job.first is None:
                job.ask_ahead(run, self._options.chunk_tokens)
                await job.wait_progress()
                self._use_grants(job, run)
                job.call.send(Wrote(run.computed))
            job.call.send(First(job.first))
        finally:
            listening.cancel()
            await self._stop(run)
        job.call.send(job.done(len(run.tokens) - start, moved_bytes=0))

    def _host(self, job: Job, region: Region) -> Run:
        run = Run(region, unpack(job.ask.tokens), job.ask.sampling, job.on_step, job.on_error)
        self._use_grants(job, run)
        if job.granted is not None:
            run.computed = job.granted.start
        self._stepper.host(run)
        return run

    def _use_grants(self, job: Job, run: Run) -> None:
        if job.granted is not None and len(job.granted.blocks) > len(run.blocks):
            run.blocks = [BlockId(block) for block in job.granted.blocks]
            self._stepper.wake()

    async def _stop(self, run: Run) -> None:
        """Returns when no step touches the run's blocks, even if cancelled meanwhile."""
        stopped = asyncio.get_running_loop().create_future()
        self._stepper.leave(run, lambda: stopped.set_result(None))
        await _outlast(stopped)

    # Streamed

    async def _compute_here(self, job: Job) -> None:
        """Computes in own blocks, and has them written through into the asker's."""
        admitted = asyncio.Event()

        def on_admit() -> None:
            resident.begin()
            admitted.set()

        def on_step(sampled: Sequence[Token]) -> None:
            resident.publish()  # before the next step is planned: who is admitted to it may begin with these blocks
            if sampled:
                self._stepper.leave(run, lambda: None)  # it keeps its blocks, and nobody may preempt it now
            job.on_step(sampled)

        tokens, sampling = unpack(job.ask.tokens), job.ask.sampling
        job.run = run = Run(self._region, tokens, sampling, on_step, job.on_error, on_admit, job.progress.set)
        resident = Resident(run, self._cache, self._member.layout, job.ask.salt)
        through = _WriteThrough(job, resident, self._cache)
        stopped = asyncio.get_running_loop().create_future()
        self._stepper.wait_for_turn(run)
        try:
            await admitted.wait()
            job.started_s, cached = clock.now(), run.computed
            # Connected before anything is granted, so that the owner knows of every writer.
            async with self._transport.connect(job.ask.offer, self._region, self._incarnation) as pipe:
                job.call.send(Begin(self._options.chunk_tokens))
                if not await job.wait_granted():
                    return
                await self._stream(job, through, pipe)
        finally:
            through.release()
            resident.leave(self._stepper, lambda: stopped.set_result(None))
            await _outlast(stopped)
        job.call.send(job.done(len(run.tokens) - cached, through.blocks * self._member.layout.block_bytes))

    async def _stream(self, job: Job, through: _WriteThrough, pipe: Pipe) -> None:
        """Returns when all KV is in place there."""
        run = through.resident.run
        listening = asyncio.ensure_future(job.take_grants())
        try:
            while job.first is None:
                through.push(pipe)
                job.ask_ahead(run, self._options.chunk_tokens)
                await job.wait_progress()
                job.call.send(Wrote(run.computed))
                if not run.blocks:  # preempted: what it held for the pipe may be what it lacks to start again
                    await pipe.flush()
                    through.release()
                    self._stepper.wake()
            job.call.send(First(job.first))
            while not through.push(pipe):  # blocks are granted later than they are computed
                job.ask_ahead(run, self._options.chunk_tokens)
                await job.wait_progress()
            await pipe.flush()
        finally:
            listening.cancel()


class _WriteThrough:
    """What of a prompt's KV was handed to a pipe. It holds these blocks, whatever becomes of the run."""

    def __init__(self, job: Job, resident: Resident, cache: PrefixCache) -> None:
        self.resident = resident
        self.blocks = 0
        self._job = job
        self._cache = cache
        self._held: list[BlockId] = []
        self._next: int | None = None  # block of the table, counted from the first

    def push(self, pipe: Pipe) -> bool:
        """Hands over what is computed, granted and not yet handed over; True if that was the rest.

        All of the prompt's blocks, once its first token is there; before that those that are full.
        """
        job, run, granted = self._job, self.resident.run, self._job.granted
        if granted is None:
            return False
        size = run.region.layout.block_tokens
        first = granted.start // size if self._next is None else self._next
        ready = len(run.blocks) if job.first is not None else run.computed // size
        end = max(first, min(ready, len(granted.blocks)))
        fresh = run.blocks[first:end]
        if fresh:
            self._cache.hold(fresh)
            self._held += fresh
            self.blocks += len(fresh)
            pipe.write(list(zip(fresh, granted.blocks[first:end], strict=True)))
        self._next = end
        return job.first is not None and end == len(run.blocks)

    def release(self) -> None:
        """Once the pipe is flushed or left."""
        self._cache.release(self._held)
        self._held = []


async def _outlast(stopped: asyncio.Future[None]) -> None:
    """Waits for `stopped` even if cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not stopped.done():
        try:
            await asyncio.shield(stopped)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class Mappings:
    """Regions of peers, mapped here and attached to the engine while somebody uses them or their owner lives."""

    def __init__(self, engine: Engine, transport: Transport, writer: str, active: int) -> None:
        self._engine = engine
        self._transport = transport
        self._writer = writer
        self._active = active
        self._mappings: dict[tuple[str, int], _Mapping] = {}

    @asynccontextmanager
    async def mapped(self, offer: Offer) -> AsyncIterator[Region]:
        """The offered region, to compute in while inside the block; at most `active` are at a time.

        Raises StaleEpoch, Refused or ConnectionLost.
        """
        mapping = self._mappings.get(offer.key)
        if mapping is None:
            mapping = self._mappings[offer.key] = _Mapping(asyncio.Semaphore(self._active))
        mapping.users += 1
        try:
            async with mapping.lock:  # one per region: an owner that does not answer holds up nobody else
                attached = mapping.attached or await self._attach(mapping, offer)
            if attached.is_owner_gone:
                raise StaleEpoch(f"{offer.owner} of epoch {offer.epoch} is gone")
            async with mapping.slots:
                yield attached.region
        finally:
            mapping.users -= 1

    async def release_orphans(self) -> None:
        """Lets go of what nobody uses and whose owner is gone, or never handed it over."""
        for key, mapping in list(self._mappings.items()):
            if mapping.users == 0 and (mapping.attached is None or mapping.attached.is_owner_gone):
                del self._mappings[key]
                await mapping.stack.aclose()

    async def close(self) -> None:
        for mapping in self._mappings.values():
            await mapping.stack.aclose()
        self._mappings.clear()

    async def _attach(self, mapping: _Mapping, offer: Offer) -> Attached:
        async with AsyncExitStack() as stack:
            attached = await stack.enter_async_context(self._transport.attach(offer, self._writer))
            self._engine.attach(attached.region)
            stack.callback(self._engine.detach, attached.region.key)
            mapping.attached, mapping.stack = attached, stack.pop_all()
        return attached


@dataclass(slots=True, eq=False)
class _Mapping:
    """One region. `attached` once its owner handed it over; `stack` lets go of it."""

    slots: asyncio.Semaphore
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    attached: Attached | None = None
    users: int = 0
