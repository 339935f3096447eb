"""The prefill side: computes prompts for decode workers.

Where it reaches the decode worker's memory, it computes there, in place: a job waits for its turn, borrows blocks chunk
by chunk and writes into nothing else. Elsewhere it computes in its own memory and has it copied, see `streamed`. A job
ends when all KV is in place, or when the asker leaves; `settle` answers once a lease's blocks are certainly not being
written.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from penstock import clock
from penstock.blocks import BlockId, Region
from penstock.cluster import Member
from penstock.engine.api import Engine
from penstock.errors import BadRequest, Overloaded, StaleEpoch, Unsupported, WorkerDraining
from penstock.kv.prefix_cache import PrefixCache
from penstock.serve.handoff import Alive, Begin, PrefillAsk, decode_prefill_ask, decode_settle_ask
from penstock.serve.job import Job
from penstock.serve.mappings import Mappings
from penstock.serve.paths import Paths
from penstock.serve.rpc import Call
from penstock.serve.stepper import Run, Stepper
from penstock.serve.streamed import Streamer, outlast
from penstock.tokens import count


@dataclass(frozen=True, slots=True)
class PrefillOptions:
    """In place, `active` prompts of a decode worker hold leases at a time: the one that is computed, and the next.

    Per decode worker, so that one that is stuck and grants nothing holds up its own prompts only.
    """

    active: int = 2
    max_queued: int = 256
    chunk_tokens: int = 512


class Prefiller:
    """Serves `prefill` and `settle`. Owns the mapped regions of peers."""

    def __init__(
        self,
        member: Member,
        engine: Engine,
        region: Region,
        cache: PrefixCache,
        paths: Paths,
        stepper: Stepper,
        options: PrefillOptions,
    ) -> None:
        self.is_draining = False
        self._member = member
        self._paths = paths
        self._stepper = stepper
        self._options = options
        self._incarnation = member.hop.incarnation
        self._jobs: dict[Job, None] = {}
        self._ended = asyncio.Event()
        self._regions = Mappings(engine, paths, self._incarnation, options.active)
        self._streamer = Streamer(region, cache, paths, stepper, self._incarnation, options.chunk_tokens)

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
        in_place = self._paths.find_in_place(ask.offers)
        self._check(ask, is_copied=in_place is None)
        job = Job(ask, call)
        self._jobs[job] = None
        beat = asyncio.ensure_future(self._say_alive(job))
        try:
            if in_place is not None:
                async with self._regions.mapped(in_place) as region:
                    await self._compute_there(job, region)
            else:
                await self._streamer.compute(job)
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
        for job in [job for job in self._jobs if (job.ask.request, *job.ask.region) == asked]:
            if job.call.task is not None:
                job.call.task.cancel()
            await job.stopped.wait()

    async def release_regions(self) -> None:
        """Unmaps what no job uses and whose owner is gone. Called now and then."""
        await self._regions.release_orphans()

    async def close(self) -> None:
        await self._regions.close()

    def _check(self, ask: PrefillAsk, is_copied: bool) -> None:
        self._check_writer(ask.writer)
        if self.is_draining:
            raise WorkerDraining(f"{self._member.worker} is draining")
        if len(self._jobs) >= self._options.max_queued:
            raise Overloaded(f"{self._member.worker} has {len(self._jobs)} prefills queued, its limit")
        if ask.sampling.guide is not None and "guide" not in self._member.supports:  # or all is computed for nothing
            raise Unsupported(f"the engine of {self._member.worker} has no guide", "guide")
        if not ask.offers:
            raise BadRequest(f"{self._member.worker} was asked to prefill into no region")
        if ask.offers[0].layout != self._member.layout:
            raise BadRequest(
                f"{ask.offers[0].owner} keeps KV as {ask.offers[0].layout}, {self._member.worker} as "
                f"{self._member.layout}; start both with the same model, dtype and block size"
            )
        if is_copied and count(ask.tokens) > self._member.max_context_tokens:
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
            job.call.send(Alive(self._stepper.steps, self._stepper.call_s))

    # In place

    async def _compute_there(self, job: Job, region: Region) -> None:
        """Computes in the asker's own blocks."""
        listening = asyncio.ensure_future(job.listen())
        try:
            job.call.send(Begin(self._options.chunk_tokens))
            if await job.wait_granted():
                await self._fill(job, region)
        finally:
            listening.cancel()

    async def _fill(self, job: Job, region: Region) -> None:
        job.started_s = clock.now()
        job.run = run = self._host(job, region)
        start = run.computed
        try:
            while job.first is None:
                job.ask_ahead(run, self._options.chunk_tokens)
                await job.wait_progress()
                self._use_grants(job, run)
                job.tell_progress(run.computed)
            job.tell_first()
        finally:
            await self._stop(run)
        job.call.send(job.done(len(run.tokens) - start))

    def _host(self, job: Job, region: Region) -> Run:
        run = Run(region, job.past(), job.ask.sampling, job.on_step, job.on_error)
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
        await outlast(stopped)
