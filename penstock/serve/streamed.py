"""Prefills that are computed in this worker's own blocks, and written through into the asker's.

It keeps what it computed in its own cache. Each finished block leaves while the next ones are computed, so that with a
link faster than the computation only the last chunk is waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from msgspec.structs import replace

from penstock import clock
from penstock.blocks import HOLE, BlockId, Region
from penstock.errors import ConnectionLost, Refused
from penstock.kv.prefix_cache import PrefixCache
from penstock.request import Token
from penstock.serve.handoff import Begin
from penstock.serve.job import Job
from penstock.serve.paths import Conduit, Pairs, Paths
from penstock.serve.resident import Resident
from penstock.serve.stepper import Run, Stepper

log = logging.getLogger(__name__)


class Streamer:
    """Serves such jobs for one worker."""

    def __init__(
        self, region: Region, cache: PrefixCache, paths: Paths, stepper: Stepper, writer: str, chunk_tokens: int
    ) -> None:
        self._region = region
        self._cache = cache
        self._paths = paths
        self._stepper = stepper
        self._writer = writer
        self._chunk_tokens = chunk_tokens

    async def compute(self, job: Job) -> None:
        """Returns when the asker has all KV, or has no room for it."""
        listening = asyncio.ensure_future(job.listen())
        try:
            await self._compute(job)
        finally:
            listening.cancel()

    async def _compute(self, job: Job) -> None:
        admitted = asyncio.Event()

        def on_admit() -> None:
            resident.begin()
            admitted.set()

        def on_step(sampled: Sequence[Token]) -> None:
            resident.publish()  # before the next step is planned: who is admitted to it may begin with these blocks
            if sampled:
                self._stepper.leave(run, lambda: None)  # it keeps its blocks, and nobody may preempt it now
            job.on_step(sampled)

        run = Run(self._region, job.past(), job.ask.sampling, on_step, job.on_error, on_admit, job.progress.set)
        resident = Resident(run, self._cache, self._region.layout, job.ask.salt)
        fetched = await self._fetch(job, resident)
        job.run = run
        through = _WriteThrough(job, resident, self._cache)
        stopped = asyncio.get_running_loop().create_future()
        self._stepper.wait_for_turn(run)
        try:
            await admitted.wait()
            job.started_s, cached = clock.now(), run.computed
            # Connected before anything is granted, so that the owner knows of every writer.
            async with self._connect(job, "push", self._region.layout.blocks_for(len(run.tokens) + 1)) as conduit:
                job.call.send(Begin(self._chunk_tokens, conduit.transfer))
                if not await job.wait_granted():
                    return
                await self._stream(job, through, conduit)
        finally:
            through.release()
            resident.leave(self._stepper, lambda: stopped.set_result(None))
            await outlast(stopped)
        done = job.done(len(run.tokens) - cached, fetched)
        moved_bytes = through.blocks * self._region.layout.block_bytes
        moved_s, transport = conduit.moved.seconds, conduit.transport
        job.call.send(replace(done, moved_bytes=moved_bytes, moved_s=moved_s, transport=transport))

    def _connect(self, job: Job, purpose: str, blocks: int) -> AbstractAsyncContextManager[Conduit]:
        transfer = f"{job.ask.request}/{purpose}"
        offers, progress = job.ask.offers, job.progress.set
        return self._paths.connect(offers, self._region, self._writer, transfer, blocks, job.switch, progress)

    async def _stream(self, job: Job, through: _WriteThrough, conduit: Conduit) -> None:
        """Returns when all KV is in place there."""
        run = through.resident.run
        while job.first is None:
            through.push(conduit)
            job.ask_ahead(run, self._chunk_tokens)
            await self._wait_progress(job, run, conduit)
            if not run.blocks:  # preempted: what it held for the pipe may be what it lacks to start again
                await conduit.flush()
                through.release()
                self._stepper.wake()
        job.tell_first()
        while not (through.push(conduit) and conduit.is_at_rest):  # blocks are granted later than they are computed
            job.ask_ahead(run, self._chunk_tokens)
            await self._wait_progress(job, run, conduit)
        await conduit.flush()

    async def _wait_progress(self, job: Job, run: Run, conduit: Conduit) -> None:
        await job.wait_progress()
        conduit.check()
        job.tell_progress(run.computed, conduit.moved_blocks)

    # A prefix that the asker alone holds

    async def _fetch(self, job: Job, resident: Resident) -> int:
        """Has the asker's cached prefix copied into this worker's cache, if that is quicker; returns its tokens.

        Where that fails the prefix is computed.
        """
        layout, size = self._region.layout, self._region.layout.block_tokens
        mine, held = resident.cached_tokens() // size, job.ask.held_tokens // size
        if held <= mine or not self._is_worth_fetching(job, held - mine):
            return 0
        found = resident.match()
        wanted = layout.kept(range(len(found), layout.entries_for(held * size)), held * size)
        taken = self._cache.take(max(0, min(len(wanted), self._stepper.spare_blocks)))
        try:
            pinned = await job.hold()
            fetched = [
                (entry, (block, pinned[entry]))
                for entry, block in zip(wanted, taken, strict=False)
                if entry < len(pinned) and pinned[entry] != HOLE
            ]
            async with self._connect(job, "fetch", len(fetched)) as conduit:
                conduit.read([pair for _, pair in fetched])
                await conduit.flush()
            await job.release()
            for entry, (block, _) in fetched:
                resident.publish_block(entry, block)
            return (1 + fetched[-1][0] // len(layout.keeps)) * size - mine * size if fetched else 0
        except (ConnectionLost, Refused) as error:
            log.info("a prefix of %s is computed, since it cannot be fetched: %s", job.ask.request, error)
            return 0
        finally:
            self._cache.release([*found, *taken])
            self._stepper.wake()

    def _is_worth_fetching(self, job: Job, blocks: int) -> bool:
        """Whether the link is expected to beat the engine, for so many blocks of each group."""
        tokens_per_s = self._stepper.pace.prefill_tokens_per_s
        compute_s = blocks * self._region.layout.block_tokens / tokens_per_s if tokens_per_s else 0.0
        return self._paths.expect_s(job.ask.offers, blocks * len(self._region.layout.keeps)) < compute_s


class _WriteThrough:
    """What of a prompt's KV was handed to a pipe. It holds these blocks, whatever becomes of the run."""

    def __init__(self, job: Job, resident: Resident, cache: PrefixCache) -> None:
        self.resident = resident
        self.blocks = 0
        self._job = job
        self._cache = cache
        self._held: list[BlockId] = []
        self._next: int | None = None  # entry of the block table

    def push(self, conduit: Conduit) -> bool:
        """Hands over what is computed, granted and not yet handed over; True if that was the rest.

        All of the prompt's blocks, once its first token is there; before that those that are full.
        """
        job, run, granted = self._job, self.resident.run, self._job.granted
        if granted is None:
            return False
        size, width = run.region.layout.block_tokens, len(run.region.layout.keeps)
        first = granted.start // size * width if self._next is None else self._next
        ready = len(run.blocks) if job.first is not None else run.computed // size * width
        end = max(first, min(ready, len(granted.blocks)))
        if end > first:
            self._write(conduit, list(zip(run.blocks[first:end], granted.blocks[first:end], strict=True)))
        self._next = end
        return job.first is not None and end == len(run.blocks)

    def _write(self, conduit: Conduit, entries: Pairs) -> None:
        """Hands over what is not a hole there."""
        pairs = [pair for pair in entries if pair[1] != HOLE]
        if pairs:
            held = [here for here, _ in pairs]
            self._cache.hold(held)
            self._held += held
            self.blocks += len(pairs)
            conduit.write(pairs)

    def release(self) -> None:
        """Once the pipe is flushed or left."""
        self._cache.release(self._held)
        self._held = []


async def outlast(stopped: asyncio.Future[None]) -> None:
    """Waits for `stopped` even if cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not stopped.done():
        try:
            await asyncio.shield(stopped)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
