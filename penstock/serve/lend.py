"""Lending blocks to prefill workers: opening leases, following who writes, and getting the blocks back.

A `Borrowing` is the decode side of the conversation in `handoff`. Aborted blocks are not reused before the writer was
fenced off, has confirmed that it stopped, died, or was killed for being stuck.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from penstock import clock
from penstock.blocks import HOLE, BlockId
from penstock.errors import LeaseLost, PenstockError, WorkerStalled
from penstock.kv.lease import Lease, LeaseTable
from penstock.kv.prefix_cache import PrefixCache
from penstock.policy.liveness import Patience, Watch, watch
from penstock.request import Hop, Token
from penstock.serve.handoff import (
    Alive,
    Begin,
    Done,
    Fetch,
    Fetched,
    First,
    FromPrefill,
    Granted,
    Held,
    Kept,
    More,
    NoRoom,
    SettleAsk,
    Switch,
    Switched,
    Wrote,
    decode_from_prefill,
)
from penstock.serve.paths import Shared
from penstock.serve.resident import Resident
from penstock.serve.rpc import Call, Endpoint
from penstock.serve.stepper import Stepper

log = logging.getLogger(__name__)

_SIDE_BY_SIDE = 2  # writers that may share what is on its way

_METER_S = 0.1
_PEAK_HALVES_S = 60.0
_FULL = 0.8

_decode_nothing = msgspec.msgpack.Decoder(None).decode


@dataclass(frozen=True, slots=True)
class LendOptions:
    """`lease_s` of silence loses a lease; a prefill worker whose engine tries `patience` is given up.

    A writer is asked every `settle_retry_s` whether it stopped, and killed after `kill_after_s` without an answer.
    While about `incoming_bytes` are on their way here, of all writers together, no more blocks are granted for copies:
    enough to keep a fast link busy, and so little that those who lack least are soon done.
    """

    lease_s: float = 5.0
    patience: Patience = field(default_factory=lambda: Patience(idle_s=60.0))
    settle_retry_s: float = 0.5
    kill_after_s: float = 30.0
    incoming_bytes: int = 512 << 20


class Lender:
    """Owns what is lent of this worker's blocks."""

    def __init__(
        self,
        cache: PrefixCache,
        leases: LeaseTable,
        stepper: Stepper,
        shared: Shared,
        endpoint: Endpoint,
        options: LendOptions,
    ) -> None:
        self.options = options
        self.shared = shared
        self._cache = cache
        self._leases = leases
        self._stepper = stepper
        self._reclaimer = Reclaimer(leases, shared, endpoint, options, stepper.wake)
        self.layout = shared.region.layout
        self._window_blocks = options.incoming_bytes // self.layout.block_bytes
        self._lent: dict[int, Borrowing] = {}
        self.arrivals = Meter()
        stepper.on_starved = self._call_off

    def lend(self, borrowing: Borrowing, chunk_tokens: int) -> bool:
        """Pins what the cache holds of the prompt, opens a lease on the rest, and grants or will grant the first chunk.

        False if there is no room for it.
        """
        borrowing.pinned = borrowing.resident.match()
        layout, start = self.layout, borrowing.start_tokens
        fresh = range(len(borrowing.pinned), layout.entries_for(borrowing.tokens))
        if borrowing.transfer:  # what windows leave behind in the prompt is not sent
            borrowing.entries = layout.kept(fresh, borrowing.tokens)
            needed = len(borrowing.entries)
        else:  # who computes here reads it first; two chunks are granted at a time, see `job.ask_ahead`
            borrowing.entries = fresh
            needed = layout.blocks_for(borrowing.tokens, 2 * chunk_tokens, after=start)
        if needed > self._stepper.spare_blocks or len(self._lent) >= self._stepper.free_slots:
            return False
        borrowing.lease = self._leases.open(clock.now(), borrowing.hop.incarnation, needed)
        self._lent[borrowing.lease.id] = borrowing
        self.grow(borrowing, borrowing.lease, min(borrowing.tokens, start + chunk_tokens))
        return True

    def grow(self, borrowing: Borrowing, lease: Lease, tokens: int) -> None:
        """Grants blocks for the first `tokens` tokens: those that are copied here when it is their turn.

        Raises LeaseLost, or OutOfBlocks if decodes took what was promised.
        """
        # One at least: for the first grant the writer waits, whatever may be sent of these tokens.
        borrowing.wanted_blocks = max(1, borrowing.blocks_up_to(tokens))
        if borrowing.transfer:
            self.share_out()
        else:
            self._grant(borrowing, lease, borrowing.wanted_blocks)

    def share_out(self) -> None:
        """Grants what writers over the wire wait for, as far as there is room on it: who lacks least comes first.

        Nobody has more than a part of the room ahead of what is here, and nobody waits for writers that are slow for
        reasons of their own: only while as much arrives as ever did. Who lacks less than a part does not wait at all.
        """
        line = sorted((each for each in self._lent.values() if each.transfer), key=lambda each: each.ungranted_blocks)
        incoming = sum(borrowing.incoming_blocks for borrowing in line)
        most = self._window_blocks
        part = max(1, most // min(_SIDE_BY_SIDE, max(1, len(line))))
        is_full = self.arrivals.is_at_peak(clock.now())
        for borrowing in line:
            more, before = borrowing.wanted_blocks - borrowing.granted_blocks, borrowing.incoming_blocks
            if borrowing.lacking_blocks > part:
                room = most - incoming if is_full and incoming else part
                more = min(more, room, part - borrowing.granted_blocks + borrowing.moved_blocks)
            if borrowing.lease is None or more <= 0:
                continue
            try:
                self._grant(borrowing, borrowing.lease, borrowing.granted_blocks + more)
            except PenstockError as error:
                borrowing.call.fail(error)
            incoming += borrowing.incoming_blocks - before

    def _grant(self, borrowing: Borrowing, lease: Lease, blocks: int) -> None:
        """Raises LeaseLost, or OutOfBlocks if decodes took what was promised."""
        self._leases.grow(clock.now(), lease.id, blocks)
        borrowing.call.send(Granted(lease.id, borrowing.start_tokens, borrowing.table(lease.blocks)))

    def commit_behind(self, borrowing: Borrowing, lease: Lease, tokens: int) -> None:
        """The first `tokens` tokens are computed in place: takes over what was lent and no later token reads.

        The writer will not touch it again. Others may find it, until its room is needed. Raises LeaseLost.
        """
        gone = dict.fromkeys(self.layout.forgotten(borrowing.committed_tokens, tokens))
        if not gone:
            return
        borrowing.committed_tokens = tokens
        done = [pair for pair in zip(borrowing.entries, lease.blocks, strict=False) if pair[0] in gone]
        blocks = [block for _, block in done]
        self._leases.commit_some(clock.now(), lease.id, blocks)
        borrowing.entries = [entry for entry in borrowing.entries if entry not in gone]
        borrowing.wanted_blocks -= len(blocks)
        for entry, block in done:
            borrowing.resident.publish_block(entry, block)
        self.release(blocks)
        if borrowing.wanted_blocks > len(lease.blocks):
            self._grant(borrowing, lease, borrowing.wanted_blocks)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Those that are neither lent nor read any more."""
        self._cache.release(blocks)
        self._stepper.wake()

    def commit(self, lease: Lease) -> list[BlockId]:
        """Raises LeaseLost if the lease lapsed meanwhile."""
        del self._lent[lease.id]
        self.share_out()
        return self._leases.commit(clock.now(), lease.id)

    def give_back(self, borrowing: Borrowing) -> None:
        """Ends an attempt that was not committed; what its writer may still write comes back when that is safe."""
        self._cache.release(borrowing.pinned)
        if (lease := borrowing.lease) is not None:
            self._lent.pop(lease.id, None)
            self._reclaimer.abort(lease, borrowing.hop, borrowing.request, borrowing.transfer)
            self.share_out()
        self._stepper.wake()

    def touch(self, lease: Lease, is_writing: bool) -> None:
        """The writer lives. Raises LeaseLost."""
        renew: Callable[[float, int], None] = self._leases.wrote if is_writing else self._leases.touch
        renew(clock.now(), lease.id)

    def _call_off(self, lease: Lease) -> None:
        """Decodes need the blocks more than this prefill."""
        if (borrowing := self._lent.get(lease.id)) is not None:
            borrowing.call.fail(LeaseLost(f"lease {lease.id} was called off: running requests need its blocks"))


class Meter:
    """How fast KV arrives here, of all writers together, and how fast it ever did, of which some is forgotten."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._blocks = 0
        self._peak = 0.0  # blocks per second

    def note(self, now: float, blocks: int) -> None:
        """So many more are here."""
        self._blocks += blocks
        if (passed_s := now - self._since_s) >= _METER_S:
            kept = 0.5 ** (passed_s / _PEAK_HALVES_S)
            self._peak = max(self._peak * kept, self._blocks / passed_s)
            self._since_s, self._blocks = now, 0

    def is_at_peak(self, now: float) -> bool:
        """Whether it could hardly be faster, as far as is known."""
        return self._blocks >= _FULL * self._peak * (now - self._since_s - _METER_S)


class Reclaimer:
    """Gets aborted blocks back: fences the writer off, else asks it to confirm, and kills it if it is stuck."""

    def __init__(
        self,
        leases: LeaseTable,
        shared: Shared,
        endpoint: Endpoint,
        options: LendOptions,
        on_blocks_freed: Callable[[], None],
    ) -> None:
        self._leases = leases
        self._shared = shared
        self._endpoint = endpoint
        self._options = options
        self._on_blocks_freed = on_blocks_freed

    def abort(self, lease: Lease, hop: Hop, request: str, transfer: str) -> None:
        """Nothing written under `lease` counts any more; its blocks come back when that is safe. Called once."""
        self._leases.abort(lease.id)
        if lease.blocks:
            self._endpoint.spawn(self._reclaim(lease, hop, request, transfer))

    async def _reclaim(self, lease: Lease, hop: Hop, request: str, transfer: str) -> None:
        asking = asyncio.ensure_future(self._ask_until_settled(lease, hop, request))
        gone = asyncio.ensure_future(self._shared.fence(lease.writer, transfer))
        try:
            done, _ = await asyncio.wait(
                (asking, gone), timeout=self._options.kill_after_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                log.warning(
                    "%s neither confirmed nor died %.0f s after lease %d was aborted; killing it",
                    *(lease.writer, self._options.kill_after_s, lease.id),
                )
                self._shared.kill(lease.writer)
                done, _ = await asyncio.wait((asking, gone), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # what raises proves nothing
            await self._shared.fence_off(lease.writer, transfer)  # it stopped, but bytes may still be on their way
        finally:
            asking.cancel()
            gone.cancel()
        self._leases.settle(lease.id)
        self._on_blocks_freed()

    async def _ask_until_settled(self, lease: Lease, hop: Hop, request: str) -> None:
        region = self._shared.region
        ask = SettleAsk(lease.writer, request, region.owner, region.epoch)
        while True:
            try:
                async with asyncio.timeout(self._options.kill_after_s):
                    peer = await self._endpoint.peer(hop.addresses)
                    async with peer.call("settle", ask) as call:
                        await call.receive(_decode_nothing)
                return
            except (PenstockError, TimeoutError) as error:
                log.info("lease %d is not settled yet by %s: %s", lease.id, lease.writer, error)
            await asyncio.sleep(self._options.settle_retry_s)


class Borrowing:
    """One attempt to have a prompt prefilled at `hop`. `on_first` gets the token after it as soon as that is there."""

    _watch: asyncio.TimerHandle  # for silence; set by _watch_from

    def __init__(
        self,
        lender: Lender,
        resident: Resident,
        request: str,
        hop: Hop,
        call: Call,
        on_first: Callable[[Token], None],
    ) -> None:
        self.resident = resident
        self.request = request
        self.hop = hop
        self.call = call
        self.tokens = len(resident.run.tokens)  # to prefill
        self.lease: Lease | None = None
        self.pinned: list[BlockId] = []
        self.entries: Sequence[int] = ()  # of the block table, that blocks are or will be lent for
        self.transfer = ""  # that may write; none: the writer computes in place
        self.wanted_blocks = 0  # under the lease
        self.committed_tokens = 0  # what no token after them reads is not lent any more
        self.computed_blocks = 0  # of those wanted
        self.moved_blocks = 0
        self.held: list[BlockId] = []  # to be read
        self._lender = lender
        self._on_first = on_first
        self._is_committed = False
        self._engine: Watch | None = None  # the prefill worker's

    @property
    def start_tokens(self) -> int:
        """That the cache holds."""
        layout = self._lender.layout
        return len(self.pinned) // len(layout.keeps) * layout.block_tokens

    @property
    def granted_blocks(self) -> int:
        return len(self.lease.blocks) if self.lease is not None else 0

    @property
    def lacking_blocks(self) -> int:
        """Of the whole prompt, not here yet."""
        return len(self.entries) - self.moved_blocks

    @property
    def ungranted_blocks(self) -> int:
        """Of the whole prompt. Who has the fewest keeps its lead, while blocks arrive from all in turn."""
        return len(self.entries) - self.granted_blocks

    @property
    def incoming_blocks(self) -> int:
        """On their way: granted, computed, and not in place."""
        return max(0, min(self.granted_blocks, self.computed_blocks) - self.moved_blocks)

    def blocks_up_to(self, tokens: int) -> int:
        """Of those that are or will be lent."""
        return bisect_left(self.entries, self._lender.layout.entries_for(tokens))

    async def follow(self) -> Done | None:
        """Answers the prefill worker until it is done; None if it was told that there is no room."""
        self._watch_from(self.call.heard_s)
        try:
            while (message := await self.call.receive(decode_from_prefill)) is not None:
                if isinstance(message, Done):
                    return message
                if isinstance(message, Begin) and not self._begin(message):
                    return None
                await self._answer(message)
            raise LeaseLost(f"{self.hop.worker} dropped the prefill")
        finally:
            self._watch.cancel()

    def commit(self) -> list[BlockId]:
        """The whole block table, its blocks owned by the caller. Raises LeaseLost if the lease lapsed meanwhile."""
        if self.lease is None:
            raise LeaseLost(f"{self.hop.worker} says it is done and never borrowed a block")
        blocks = self._lender.commit(self.lease)
        self._is_committed = True
        return self.table(blocks)

    def table(self, lent: Sequence[BlockId]) -> list[BlockId]:
        """The block table as far as `lent` reaches."""
        is_part = len(lent) < len(self.entries)
        length = self.entries[len(lent)] if is_part else self._lender.layout.entries_for(self.tokens)
        if length == len(self.pinned) + len(lent):
            return [*self.pinned, *lent]
        table = [*self.pinned, *[HOLE] * (length - len(self.pinned))]
        for entry, block in zip(self.entries, lent, strict=False):
            table[entry] = block
        return table

    def end(self) -> None:
        self._release_held()
        if not self._is_committed:
            self._lender.give_back(self)

    def _watch_from(self, heard_s: float) -> None:
        """Looks once that is `lease_s` ago: one timer for all that is said meanwhile."""
        delay_s = heard_s + self._lender.options.lease_s - clock.now()
        self._watch = asyncio.get_running_loop().call_later(delay_s, self._check_heard_since, heard_s)

    def _check_heard_since(self, heard_s: float) -> None:
        if self.call.heard_s > heard_s:
            self._watch_from(self.call.heard_s)
        else:
            self.call.fail(WorkerStalled(f"{self.hop.worker} said nothing for {self._lender.options.lease_s:.1f} s"))

    def _begin(self, message: Begin) -> bool:
        if self.lease is not None:
            raise LeaseLost(f"{self.hop.worker} began the same prefill twice")
        self.transfer = message.transfer
        has_room = self._lender.lend(self, message.chunk_tokens)
        if not has_room:
            self.call.send(NoRoom())
        return has_room

    async def _answer(self, message: FromPrefill) -> None:
        match message:
            case Alive():
                self._note_beat(message)
            case More() if self.lease is not None:
                self._lender.grow(self, self.lease, message.tokens)
            case Wrote() if self.lease is not None:
                self._note_moved(message)
            case First():
                self._on_first(message.token)
            case Fetch() if not self.held:
                self.held = self.resident.match()
                self.call.send(Held(self.held))
            case Fetched():
                self._release_held()
                self.call.send(Kept())
            case Switch():
                await self._switch(message)
        if self.lease is not None:
            self._lender.touch(self.lease, is_writing=isinstance(message, Wrote))

    async def _switch(self, message: Switch) -> None:
        """From now on another transfer may write, and the one before may not."""
        await self._lender.shared.fence_off(self.hop.incarnation, message.left)
        if self.transfer:
            self.transfer = message.transfer
        self.call.send(Switched())

    def _note_moved(self, message: Wrote) -> None:
        if not self.transfer and self.lease is not None:
            self._lender.commit_behind(self, self.lease, min(message.tokens, self.tokens))
        self.computed_blocks = self.blocks_up_to(message.tokens)
        if message.moved > self.moved_blocks:
            self._lender.arrivals.note(clock.now(), message.moved - self.moved_blocks)
            self.moved_blocks = message.moved
            self._engine = None  # blocks arrive: it waits for the wire
            self._lender.share_out()

    def _release_held(self) -> None:
        held, self.held = self.held, []
        if held:
            self._lender.release(held)

    def _note_beat(self, beat: Alive) -> None:
        """It lives; raises WorkerStalled if its engine does not."""
        patience = self._lender.options.patience
        self._engine = seen = watch(self._engine, clock.now(), beat.steps, beat.step_s, patience)
        if seen.is_stalled:
            still = f"made no step for {seen.still_s:.0f} s, of at most {seen.bound_s:.0f} s"
            raise WorkerStalled(f"the engine of {self.hop.worker} {still}")
