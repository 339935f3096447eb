"""The decode side: owns sequences from arrival to their last token.

It looks in its own cache, has the rest of the prompt computed (by a prefill worker in leased blocks, else by itself),
and streams tokens. Whatever a sequence holds is released in one place, whichever way it ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from penstock import clock
from penstock.blocks import BlockHash, BlockId, chain_hashes
from penstock.cluster import Member
from penstock.errors import (
    BadRequest,
    DeadlineExceeded,
    LeaseLost,
    Overloaded,
    PenstockError,
    PromptTooLong,
    WorkerDraining,
    WorkerStalled,
)
from penstock.kv.lease import Lease, LeaseTable
from penstock.kv.prefix_cache import PrefixCache
from penstock.policy.routing import is_worth_asking
from penstock.request import Finish, FinishReason, Hop, Plan, Request, Timeline, Token
from penstock.serve.handoff import (
    Alive,
    Begin,
    Done,
    Granted,
    Lender,
    More,
    NoRoom,
    PrefillAsk,
    Wrote,
    decode_from_prefill,
)
from penstock.serve.rpc import Call, Endpoint
from penstock.serve.stepper import Run, Stepper
from penstock.transport.api import Exported

log = logging.getLogger(__name__)

BEATS_PER_LEASE = 4  # how often a prefill worker says that it lives, while it may stay silent


class GenerateAsk(msgspec.Struct, frozen=True):
    """Body of the `generate` call."""

    request: Request
    plan: Plan


class Output(msgspec.Struct, frozen=True, array_like=True):
    """Tokens since the last one, and the end of the sequence with its last.

    `so_far` comes with the first token, for clients that stop before the end.
    """

    tokens: list[Token]
    finish: Finish | None = None
    so_far: Timeline | None = None


_decode_ask = msgspec.msgpack.Decoder(GenerateAsk).decode
decode_output = msgspec.msgpack.Decoder(Output).decode


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """`lease_s` of silence loses a lease; `stall_s` without a step of its engine gives a prefill worker up."""

    lease_s: float = 5.0
    stall_s: float = 60.0
    max_queued: int = 256
    prefill_attempts: int = 2


@dataclass(slots=True)
class Counters:
    """What this worker has done since its start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    handoffs: int = 0
    handoff_failures: int = 0
    in_place_bytes: int = 0


class Sequence:
    """One request on its decode worker. `hashes` name its full blocks, the first `published` of them findable."""

    def __init__(self, request: Request, call: Call, run: Run, timeline: Timeline) -> None:
        self.request = request
        self.call = call
        self.run = run
        self.timeline = timeline
        self.arrived_s = clock.now()
        self.outputs = 0
        self.published = 0
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.hashes: list[BlockHash] = []

    def elapsed_s(self) -> float:
        return clock.now() - self.arrived_s

    def hash_blocks(self, block_tokens: int) -> None:
        """Extends `hashes` to all full blocks of the tokens so far."""
        known = len(self.hashes)
        fresh = self.run.tokens[known * block_tokens :]
        self.hashes += chain_hashes(fresh, block_tokens, self.request.salt, self.hashes[-1] if known else None)


class Decoder:
    """Serves `generate`. Owns this worker's sequences, its cache and its leases."""

    def __init__(
        self,
        member: Member,
        eos_token_ids: tuple[int, ...],
        exported: Exported,
        cache: PrefixCache,
        leases: LeaseTable,
        stepper: Stepper,
        lender: Lender,
        endpoint: Endpoint,
        options: DecodeOptions,
    ) -> None:
        self.counters = Counters()
        self.is_draining = False
        self._member = member
        self._eos = eos_token_ids
        self._exported = exported
        self._cache = cache
        self._leases = leases
        self._stepper = stepper
        self._lender = lender
        self._endpoint = endpoint
        self._options = options
        self._layout = member.layout
        self._live: dict[Sequence, None] = {}
        self._ended = asyncio.Event()
        self._lent: dict[int, Borrowing] = {}
        stepper.on_starved = self._call_off

    @property
    def live(self) -> int:
        """Sequences that have arrived and not ended."""
        return len(self._live)

    async def wait_idle(self) -> None:
        """Returns when every sequence has ended."""
        while self._live:
            self._ended.clear()
            await self._ended.wait()

    async def generate(self, call: Call) -> None:
        """Serves one request: Outputs, the last with a Finish."""
        ask = _decode_ask(call.body)
        self._check(ask.request)
        sequence = self._new_sequence(ask, call)
        self._live[sequence] = None
        try:
            async with asyncio.timeout(ask.request.timeout_s):
                await self._prefill(sequence, ask.plan)
                await sequence.finished
        except TimeoutError:
            raise DeadlineExceeded(
                f"{ask.request.id} had {sequence.outputs} tokens after its {ask.request.timeout_s:.0f} s"
            ) from None
        finally:
            del self._live[sequence]
            self._ended.set()
            self._let_go(sequence)

    def _check(self, request: Request) -> None:
        if self.is_draining:
            raise WorkerDraining(f"{self._member.worker} is draining")
        if self._stepper.waiting >= self._options.max_queued:
            raise Overloaded(f"{self._member.worker} has {self._stepper.waiting} requests queued, its limit")
        if not request.prompt:
            raise BadRequest("the prompt has no tokens", "prompt")
        limit = self._member.max_context_tokens
        if len(request.prompt) >= limit:
            raise PromptTooLong(f"the prompt has {len(request.prompt)} tokens; prompt and output share {limit}")

    def _new_sequence(self, ask: GenerateAsk, call: Call) -> Sequence:
        request = ask.request
        run = Run(
            region=self._exported.region,
            tokens=list(request.prompt),
            sampling=request.sampling,
            on_step=lambda token: self._on_step(sequence, token),
            on_error=lambda error: _fail(sequence, error),
            on_admit=lambda: self._on_admit(sequence),
        )
        timeline = Timeline(
            decode_worker=self._member.worker, why=ask.plan.why, prompt_tokens=len(request.prompt), failures=[]
        )
        sequence = Sequence(request, call, run, timeline)
        sequence.hash_blocks(self._layout.block_tokens)
        self.counters.prompt_tokens += len(request.prompt)
        return sequence

    # Prefill: elsewhere if that is worth it, else here

    async def _prefill(self, sequence: Sequence, plan: Plan) -> None:
        """Returns when the sequence is in the stepper's hands."""
        for hop in plan.prefill[: self._options.prefill_attempts]:
            if not self._is_worth_asking(sequence, plan):
                break
            sequence.timeline.prefill_attempts += 1
            try:
                if await self._prefill_at(sequence, hop):
                    return
                sequence.timeline.failures.append(f"{self._member.worker} had no room for a lease to {hop.worker}")
                break
            except PenstockError as error:
                # Another prefill worker, or this one, does it again; the client sees nothing but the time it took.
                self.counters.handoff_failures += 1
                sequence.timeline.failures.append(f"{hop.worker}: {error}")
                log.warning("prefill of %s at %s failed: %s", sequence.request.id, hop.worker, error)
        sequence.timeline.path = "local"
        sequence.timeline.prefill_worker = self._member.worker
        self._stepper.wait_for_turn(sequence.run)

    def _is_worth_asking(self, sequence: Sequence, plan: Plan) -> bool:
        cached = self._cache.count_cached(self._reusable(sequence)) * self._layout.block_tokens
        uncached = len(sequence.run.tokens) - cached
        return is_worth_asking(
            uncached, self._stepper.running, self._stepper.pace.prefill_tokens_per_s, plan.prefill_wait_s
        )

    async def _prefill_at(self, sequence: Sequence, hop: Hop) -> bool:
        """True if `hop` did it and the sequence decodes; False if there is no room for its blocks. Raises else."""
        peer = await self._endpoint.peer(hop.addresses)
        ask = PrefillAsk(
            *(sequence.request.id, sequence.run.tokens, sequence.run.sampling, self._exported.offer),
            writer=hop.incarnation,
            alive_s=self._options.lease_s / BEATS_PER_LEASE,
        )
        async with peer.call("prefill", ask) as call:
            borrowing = Borrowing(self, sequence, hop, call)
            try:
                done = await borrowing.follow()
                if done is None:
                    return False
                self._take_over(sequence, borrowing, done)
                return True
            finally:
                borrowing.end()

    def _take_over(self, sequence: Sequence, borrowing: Borrowing, done: Done) -> None:
        run, timeline = sequence.run, sequence.timeline
        run.blocks = borrowing.commit()
        run.computed = len(run.tokens)
        timeline.path = "in-place"
        timeline.prefill_worker = borrowing.hop.worker
        timeline.prefill_started_s = done.started_s - sequence.arrived_s
        timeline.prefill_ended_s = done.ended_s - sequence.arrived_s
        timeline.cached_tokens = len(run.tokens) - done.computed_tokens
        timeline.computed_tokens += done.computed_tokens
        timeline.moved_tokens = done.computed_tokens
        self.counters.cached_tokens += timeline.cached_tokens
        self.counters.handoffs += 1
        self.counters.in_place_bytes += done.computed_tokens * self._layout.token_bytes
        self._publish(sequence)
        self._emit(sequence, done.token)
        if not sequence.finished.done():
            self._stepper.join(run)

    # Leases, on behalf of Borrowing

    def lend(self, sequence: Sequence, borrowing: Borrowing, chunk_tokens: int) -> Granted | NoRoom:
        """Pins what the cache holds of the prompt and opens a lease on the rest."""
        prompt = len(sequence.run.tokens)
        borrowing.pinned = self._cache.match(self._reusable(sequence))
        start = len(borrowing.pinned) * self._layout.block_tokens
        needed = self._layout.blocks_for(prompt) - len(borrowing.pinned)
        room = self._cache.available - self._leases.promised_blocks - self._stepper.claimed_blocks
        if needed > room or len(self._lent) >= self._stepper.free_slots:
            return NoRoom()
        borrowing.lease = self._leases.open(clock.now(), borrowing.hop.incarnation, needed)
        self._lent[borrowing.lease.id] = borrowing
        return self.grow(borrowing, borrowing.lease, min(prompt, start + chunk_tokens))

    def grow(self, borrowing: Borrowing, lease: Lease, tokens: int) -> Granted:
        """Raises LeaseLost, or OutOfBlocks if decodes took what was promised."""
        total = self._layout.blocks_for(tokens) - len(borrowing.pinned)
        blocks = self._leases.grow(clock.now(), lease.id, total)
        start = len(borrowing.pinned) * self._layout.block_tokens
        return Granted(lease.id, start, [*borrowing.pinned, *blocks])

    def commit(self, lease: Lease) -> list[BlockId]:
        del self._lent[lease.id]
        return self._leases.commit(clock.now(), lease.id)

    def give_back(self, borrowing: Borrowing) -> None:
        """Ends an attempt that was not committed."""
        self._cache.release(borrowing.pinned)
        if (lease := borrowing.lease) is not None:
            self._lent.pop(lease.id, None)
            self._lender.abort(lease, borrowing.hop, borrowing.request)
        self._stepper.wake()

    def touch(self, lease: Lease, is_writing: bool) -> None:
        renew: Callable[[float, int], None] = self._leases.wrote if is_writing else self._leases.touch
        renew(clock.now(), lease.id)

    @property
    def options(self) -> DecodeOptions:
        return self._options

    def _call_off(self, lease: Lease) -> None:
        """Decodes need the blocks more than this prefill."""
        if (borrowing := self._lent.get(lease.id)) is not None:
            borrowing.call.fail(LeaseLost(f"lease {lease.id} was called off: running requests need its blocks"))

    def _reusable(self, sequence: Sequence) -> list[BlockHash]:
        """Blocks of the prompt that may come from the cache: at least its last token must be computed."""
        return sequence.hashes[: (len(sequence.run.tokens) - 1) // self._layout.block_tokens]

    # Steps

    def _on_admit(self, sequence: Sequence) -> None:
        run, timeline = sequence.run, sequence.timeline
        run.blocks = self._cache.match(self._reusable(sequence))
        run.computed = len(run.blocks) * self._layout.block_tokens
        sequence.published = len(run.blocks)
        if timeline.prefill_started_s is None:
            timeline.prefill_started_s = sequence.elapsed_s()
            timeline.cached_tokens = run.computed
            self.counters.cached_tokens += run.computed
        timeline.computed_tokens += max(0, len(sequence.request.prompt) - run.computed)

    def _on_step(self, sequence: Sequence, token: Token | None) -> None:
        self._publish(sequence)
        if token is not None:
            if sequence.outputs == 0:
                sequence.timeline.prefill_ended_s = sequence.elapsed_s()
            elif sequence.timeline.decoding_s is None:
                sequence.timeline.decoding_s = sequence.elapsed_s()
            self._emit(sequence, token)

    def _publish(self, sequence: Sequence) -> None:
        """Makes blocks that became full findable."""
        full = sequence.run.computed // self._layout.block_tokens
        if full > len(sequence.hashes):
            sequence.hash_blocks(self._layout.block_tokens)
        for index in range(sequence.published, full):
            self._cache.publish(sequence.run.blocks[index], sequence.hashes[index])
        sequence.published = max(sequence.published, full)

    def _emit(self, sequence: Sequence, token: Token) -> None:
        """Sends one token, and the end if it is the last."""
        if sequence.finished.done():  # cancelled in this very turn of the loop; it is about to be let go
            return
        sequence.run.tokens.append(token.id)
        sequence.outputs += 1
        self.counters.output_tokens += 1
        if sequence.outputs == 1:
            sequence.timeline.first_token_s = sequence.elapsed_s()
        reason = self._reason_to_end(sequence, token.id)
        so_far = sequence.timeline if sequence.outputs == 1 else None
        sequence.call.send(Output([token], self._finish(sequence, token.id, reason) if reason else None, so_far))
        if reason:
            self._stepper.leave(sequence.run, lambda: None)
            sequence.finished.set_result(None)

    def _reason_to_end(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            return "stop"
        if sequence.outputs >= sampling.max_tokens:
            return "length"
        return "length" if len(sequence.run.tokens) >= self._member.max_context_tokens else None

    def _finish(self, sequence: Sequence, token: int, reason: FinishReason) -> Finish:
        timeline = sequence.timeline
        timeline.ended_s = sequence.elapsed_s()
        timeline.output_tokens = sequence.outputs
        timeline.preemptions = sequence.run.preemptions
        return Finish(reason, timeline, token if reason == "stop" else None)

    def _let_go(self, sequence: Sequence) -> None:
        """Releases what a sequence holds, once no step touches it."""
        run = sequence.run

        def release() -> None:
            self._cache.release(run.blocks)
            run.blocks = []
            self._stepper.wake()

        self._stepper.leave(run, release)


def _fail(sequence: Sequence, error: PenstockError) -> None:
    if not sequence.finished.done():
        sequence.finished.set_exception(error)


class Borrowing:
    """One attempt to have a prompt prefilled at `hop`: the decode side of the conversation in `handoff`."""

    def __init__(self, decoder: Decoder, sequence: Sequence, hop: Hop, call: Call) -> None:
        self.hop = hop
        self.call = call
        self.lease: Lease | None = None
        self.pinned: list[BlockId] = []
        self.request = sequence.request.id
        self._decoder = decoder
        self._sequence = sequence
        self._is_committed = False
        self._steps = -1
        self._progress_s = clock.now()

    async def follow(self) -> Done | None:
        """Answers the prefill worker until it is done; None if it was told that there is no room."""
        while True:
            try:
                async with asyncio.timeout(self._decoder.options.lease_s):
                    message = await self.call.receive(decode_from_prefill)
            except TimeoutError:
                raise WorkerStalled(
                    f"{self.hop.worker} said nothing for {self._decoder.options.lease_s:.1f} s"
                ) from None
            if message is None:
                raise LeaseLost(f"{self.hop.worker} dropped the prefill")
            if isinstance(message, Done):
                return message
            if isinstance(message, Begin) and isinstance(self._begin(message), NoRoom):
                return None
            self._answer(message)

    def commit(self) -> list[BlockId]:
        """The whole block table, owned by the caller. Raises LeaseLost if the lease lapsed meanwhile."""
        if self.lease is None:
            raise LeaseLost(f"{self.hop.worker} says it is done and never borrowed a block")
        blocks = self._decoder.commit(self.lease)
        self._is_committed = True
        return [*self.pinned, *blocks]

    def end(self) -> None:
        if not self._is_committed:
            self._decoder.give_back(self)

    def _begin(self, message: Begin) -> Granted | NoRoom:
        if self.lease is not None:
            raise LeaseLost(f"{self.hop.worker} began the same prefill twice")
        answer = self._decoder.lend(self._sequence, self, message.chunk_tokens)
        self.call.send(answer)
        return answer

    def _answer(self, message: Alive | Begin | More | Wrote | Done) -> None:
        if isinstance(message, Alive):
            self._note_progress(message.steps)
        elif isinstance(message, More) and self.lease is not None:
            self.call.send(self._decoder.grow(self, self.lease, message.tokens))
        if self.lease is not None:
            self._decoder.touch(self.lease, is_writing=isinstance(message, Wrote))

    def _note_progress(self, steps: int) -> None:
        now = clock.now()
        if steps != self._steps:
            self._steps, self._progress_s = steps, now
        elif now - self._progress_s > self._decoder.options.stall_s:
            raise WorkerStalled(f"the engine of {self.hop.worker} made no step for {now - self._progress_s:.0f} s")
