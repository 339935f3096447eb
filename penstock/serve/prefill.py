"""The prefill side: computes prompts for decode workers, in their memory.

A job waits for its turn, maps the asker's region, borrows blocks chunk by chunk and writes into nothing else. It ends
with the first token, or when the asker leaves; `settle` answers once a lease's blocks are certainly not being written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from penstock import clock
from penstock.blocks import BlockId, Region
from penstock.cluster import Member
from penstock.engine.api import Engine
from penstock.errors import BadRequest, LeaseLost, Overloaded, PenstockError, StaleEpoch, WorkerDraining
from penstock.request import Token
from penstock.serve.handoff import (
    Alive,
    Begin,
    Done,
    Granted,
    More,
    PrefillAsk,
    Wrote,
    decode_from_decode,
    decode_prefill_ask,
    decode_settle_ask,
)
from penstock.serve.rpc import Call
from penstock.serve.stepper import Run, Stepper
from penstock.transport.api import Attached, Offer, Transport


@dataclass(frozen=True, slots=True)
class PrefillOptions:
    """`active` prompts of a decode worker hold leases at a time: the one that is computed, and the next.

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
    ended_s: float = 0.0  # of the last chunk so far
    error: PenstockError | None = None
    asked_tokens: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


class Prefiller:
    """Serves `prefill` and `settle`. Owns the mapped regions of peers."""

    def __init__(
        self, member: Member, engine: Engine, transport: Transport, stepper: Stepper, options: PrefillOptions
    ) -> None:
        self.is_draining = False
        self._member = member
        self._engine = engine
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
        """Prompt tokens of jobs whose turn has not come."""
        return sum(len(job.ask.tokens) for job in self._jobs if job.run is None)

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
            async with self._regions.mapped(ask.offer) as region:
                await self._compute(job, region)
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

    def _check_writer(self, meant: str) -> None:
        """The asker knows by this name who maps its memory, and who must die before it reuses a block."""
        if meant != self._incarnation:
            raise StaleEpoch(f"this is {self._incarnation}, not {meant}")

    async def _say_alive(self, job: Job) -> None:
        while True:
            await asyncio.sleep(job.ask.alive_s)
            job.call.send(Alive(self._stepper.steps))

    async def _compute(self, job: Job, region: Region) -> None:
        job.call.send(Begin(self._options.chunk_tokens))
        granted = await job.call.receive(decode_from_decode)
        if not isinstance(granted, Granted):
            return
        started_s = clock.now()
        job.run = run = self._admit(job, region, granted)
        listening = asyncio.ensure_future(self._take_grants(job, run))
        try:
            self._ask_ahead(job, run)
            while job.first is None:
                await job.progress.wait()
                job.progress.clear()
                if job.error is not None:
                    raise job.error
                job.call.send(Wrote(run.computed))
                self._ask_ahead(job, run)
        finally:
            listening.cancel()
            await self._stop(run)
        computed = len(job.ask.tokens) - granted.start
        job.call.send(Done(job.first, computed, started_s, job.ended_s))

    def _admit(self, job: Job, region: Region, granted: Granted) -> Run:
        def on_step(token: Token | None) -> None:
            job.first, job.ended_s = token, clock.now()
            job.progress.set()

        def on_error(error: PenstockError) -> None:
            job.error = error
            job.progress.set()

        run = Run(region, list(job.ask.tokens), job.ask.sampling, on_step, on_error)
        run.computed = granted.start
        run.blocks = [BlockId(block) for block in granted.blocks]
        self._stepper.host(run)
        return run

    async def _stop(self, run: Run) -> None:
        """Returns when no step touches the run's blocks, even if cancelled meanwhile."""
        stopped = asyncio.get_running_loop().create_future()
        self._stepper.leave(run, lambda: stopped.set_result(None))
        cancelled: asyncio.CancelledError | None = None
        while not stopped.done():
            try:
                await asyncio.shield(stopped)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def _ask_ahead(self, job: Job, run: Run) -> None:
        """Asks for the blocks of the chunk after the next one, so that the answer is here before it is needed."""
        wanted = min(len(run.tokens), run.computed + 2 * self._options.chunk_tokens)
        held = len(run.blocks) * run.region.layout.block_tokens
        if wanted > max(held, job.asked_tokens):
            job.asked_tokens = wanted
            job.call.send(More(wanted))

    async def _take_grants(self, job: Job, run: Run) -> None:
        try:
            while (grant := await job.call.receive(decode_from_decode)) is not None:
                if not isinstance(grant, Granted):
                    raise LeaseLost(f"{job.ask.offer.owner} took its blocks back")
                run.blocks = [BlockId(block) for block in grant.blocks]
                self._stepper.wake()
        except PenstockError as error:
            job.error = error
            job.progress.set()


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
