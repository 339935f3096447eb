"""The decode side: owns sequences from arrival to their last token.

It looks in its own cache, has the rest of the prompt computed (by a prefill worker in leased blocks, else by itself),
and streams tokens. Whatever a sequence holds is released in one place, whichever way it ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import count

import msgspec
import numpy as np

from penstock import clock
from penstock.cluster import Member
from penstock.engine.api import Past
from penstock.errors import (
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    PenstockError,
    PromptTooLong,
    Unsupported,
    WorkerDraining,
)
from penstock.kv.prefix_cache import PrefixCache
from penstock.policy.routing import is_worth_asking
from penstock.request import Finish, FinishReason, Hop, Plan, Request, Timeline, Token
from penstock.serve.handoff import Done, PrefillAsk
from penstock.serve.lend import Borrowing, Lender
from penstock.serve.paths import Shared
from penstock.serve.resident import Resident
from penstock.serve.rpc import Call, Endpoint
from penstock.serve.stepper import Run, Stepper
from penstock.tokens import pack, unpack

log = logging.getLogger(__name__)

MOST_PROMPT_LOGPROBS = 1 << 21  # that are told of one prompt: half of what fits into a frame
BEATS_PER_LEASE = 4  # how often a prefill worker says that it lives, while it may stay silent


class GenerateAsk(msgspec.Struct, frozen=True):
    """Body of the `generate` call."""

    request: Request
    plan: Plan


class Output(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Tokens since the last one, and the end of the sequence with its last.

    `so_far` comes with the first token, and once the KV of the whole prompt was read: for streams that stop before the
    end, or move. Tokens of several steps were sampled at even paces over the last `over_s` seconds. `prompt_logprobs`
    come with the first token, if they were asked for.
    """

    tokens: list[Token]
    finish: Finish | None = None
    so_far: Timeline | None = None
    over_s: float = 0.0
    prompt_logprobs: list[Token] | None = None  # of the prompt's tokens but the first


_decode_ask = msgspec.msgpack.Decoder(GenerateAsk).decode
decode_output = msgspec.msgpack.Decoder(Output).decode


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """`max_queued` sequences may wait; `prefill_attempts` workers are asked before this one prefills by itself."""

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
    copied_bytes: int = 0


class Sequence:
    """One request on its decode worker."""

    def __init__(self, request: Request, call: Call, resident: Resident, timeline: Timeline) -> None:
        self.request = request
        self.call = call
        self.resident = resident
        self.run = resident.run
        self.timeline = timeline
        self.arrived_s = clock.now()
        self.outputs = request.progress.count
        self.is_first_due = True  # the next token is the first from here
        self.prompt_logprobs: list[Token] = []  # those told so far of those wanted
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def elapsed_s(self) -> float:
        return clock.now() - self.arrived_s


class Decoder:
    """Serves `generate`. Owns this worker's sequences."""

    def __init__(
        self,
        member: Member,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        shared: Shared,
        cache: PrefixCache,
        stepper: Stepper,
        lender: Lender,
        endpoint: Endpoint,
        options: DecodeOptions,
    ) -> None:
        self.counters = Counters()
        self.is_draining = False
        self._member = member
        self._eos = eos_token_ids
        self._vocab_size = vocab_size
        self._shared = shared
        self._cache = cache
        self._stepper = stepper
        self._lender = lender
        self._endpoint = endpoint
        self._options = options
        self._layout = member.layout
        self._live: dict[Sequence, None] = {}
        self._ended = asyncio.Event()
        self._attempts = count()

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
            sequence.resident.leave(self._stepper)

    def _check(self, request: Request) -> None:
        if self.is_draining:
            raise WorkerDraining(f"{self._member.worker} is draining")
        if self._stepper.waiting >= self._options.max_queued:
            raise Overloaded(f"{self._member.worker} has {self._stepper.waiting} requests queued, its limit")
        if not request.prompt:
            raise BadRequest("the prompt has no tokens", "prompt")
        limit = self._member.max_context_tokens
        if request.sequence_tokens >= limit:
            raise PromptTooLong(f"the prompt has {request.sequence_tokens} tokens; prompt and output share {limit}")
        if (largest := np.frombuffer(request.prompt, "<u4").max()) >= self._vocab_size:  # tokenizers may know more
            raise BadRequest(f"the prompt has token {largest}; the model's last is {self._vocab_size - 1}", "prompt")
        if request.sampling.guide is not None:
            self._check_supports("guide")
        if (top := request.sampling.prompt_logprobs) is not None and not request.progress.count:
            self._check_supports("prompt_logprobs")
            self._check_scores(request.prompt_tokens, top)

    def _check_supports(self, feature: str) -> None:
        if feature not in self._member.supports:
            raise Unsupported(f"the engine of {self._member.worker} has no {feature}", feature)

    def _check_scores(self, prompt_tokens: int, top: int) -> None:
        if prompt_tokens * (1 + top) > MOST_PROMPT_LOGPROBS:
            most = MOST_PROMPT_LOGPROBS // prompt_tokens - 1
            raise BadRequest(f"prompt_logprobs of {prompt_tokens} tokens can be {most} at most", "prompt_logprobs")

    def _new_sequence(self, ask: GenerateAsk, call: Call) -> Sequence:
        request, tokens = ask.request, unpack(ask.request.sequence)
        sampling = request.sampling
        run = Run(
            region=self._shared.region,
            past=Past(request.id, tokens, request.prompt_tokens),
            sampling=sampling,
            on_step=lambda sampled: self._on_step(sequence, sampled),
            on_error=lambda error: _fail(sequence, error),
            on_admit=lambda: self._on_admit(sequence),
            most_tokens=min(request.prompt_tokens + sampling.max_tokens, self._member.max_context_tokens),
            may_stop=bool(sampling.stop_token_ids) or (bool(self._eos) and not sampling.ignore_eos),
            on_scored=lambda scored: sequence.prompt_logprobs.extend(scored),
            scores=None if request.progress.count else sampling.prompt_logprobs,  # they came with the first output
        )
        timeline = Timeline(
            decode_worker=self._member.worker, why=ask.plan.why, prompt_tokens=request.prompt_tokens, failures=[]
        )
        self.counters.prompt_tokens += len(tokens)
        resident = Resident(run, self._cache, self._layout, request.salt)
        sequence = Sequence(request, call, resident, timeline)
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
        if sequence.finished.done():  # by the first token alone, before its KV was lost
            return
        sequence.timeline.path = "local"
        sequence.timeline.prefill_worker = self._member.worker
        self._stepper.wait_for_turn(sequence.run)

    def _is_worth_asking(self, sequence: Sequence, plan: Plan) -> bool:
        if sequence.finished.done() or sequence.run.scores is not None:  # only who computes a prompt can score it
            return False
        tokens = len(sequence.run.tokens)
        here = there = tokens - sequence.resident.cached_tokens()
        if not self._member.memory:  # a prefill worker cannot read what this cache holds
            there = tokens - plan.prefill_cached_tokens
        others = len(self._live) - 1
        return is_worth_asking(here, there, others, self._stepper.pace.prefill_tokens_per_s, plan.prefill_wait_s)

    async def _prefill_at(self, sequence: Sequence, hop: Hop) -> bool:
        """True if `hop` did it and the sequence decodes; False if there is no room for its blocks. Raises else."""
        peer = await self._endpoint.peer(hop.addresses)
        request = sequence.request
        ask = PrefillAsk(
            *(f"{request.id}/{next(self._attempts)}", pack(sequence.run.tokens), request.sampling, self._shared.offers),
            writer=hop.incarnation,
            alive_s=self._lender.options.lease_s / BEATS_PER_LEASE,
            salt=request.salt,
            output_tokens=sequence.outputs,
            held_tokens=sequence.resident.cached_tokens(),
        )
        async with peer.call("prefill", ask) as call:
            borrowing = Borrowing(
                self._lender, sequence.resident, ask.request, hop, call, lambda token: self._on_first(sequence, token)
            )
            try:
                done = await borrowing.follow()
                if done is None:
                    return False
                self._take_over(sequence, borrowing, done)
                return True
            finally:
                borrowing.end()

    def _on_first(self, sequence: Sequence, token: Token) -> None:
        """The client has it before the KV is here."""
        if not sequence.finished.done():
            self._emit(sequence, [token], over_s=0.0)

    def _take_over(self, sequence: Sequence, borrowing: Borrowing, done: Done) -> None:
        run, timeline, now = sequence.run, sequence.timeline, sequence.elapsed_s()
        run.blocks = borrowing.commit()
        run.computed = borrowing.tokens
        timeline.path = "streamed" if done.moved_bytes else "in-place"
        timeline.prefill_worker = borrowing.hop.worker
        timeline.prefill_started_s = now - done.started_ago_s
        timeline.prefill_ended_s = now - done.ended_ago_s
        timeline.cached_tokens = borrowing.tokens - done.computed_tokens
        timeline.computed_tokens += done.computed_tokens
        timeline.moved_tokens = borrowing.tokens - borrowing.start_tokens
        timeline.copied_bytes = done.moved_bytes
        timeline.transport, timeline.moving_s = done.transport, done.moved_s
        timeline.fetched_tokens = done.fetched_tokens
        self.counters.cached_tokens += timeline.cached_tokens
        self.counters.handoffs += 1
        self.counters.copied_bytes += done.moved_bytes
        if not done.moved_bytes:
            self.counters.in_place_bytes += timeline.moved_tokens * self._layout.token_bytes
        sequence.resident.publish()
        if not sequence.finished.done():
            self._stepper.join(run)

    # Steps

    def _on_admit(self, sequence: Sequence) -> None:
        run, timeline = sequence.run, sequence.timeline
        sequence.resident.begin()
        sequence.prompt_logprobs.clear()
        if timeline.prefill_started_s is None:
            timeline.prefill_started_s = sequence.elapsed_s()
            timeline.cached_tokens = run.computed
            self.counters.cached_tokens += run.computed
        timeline.computed_tokens += max(0, sequence.request.sequence_tokens - run.computed)

    def _on_step(self, sequence: Sequence, sampled: Many[Token]) -> None:
        if sequence.finished.done():  # cancelled in this very turn of the loop; it is about to be let go
            return
        if sampled:
            timeline, now = sequence.timeline, sequence.elapsed_s()
            is_read = not sequence.is_first_due and timeline.decoding_s is None
            if sequence.is_first_due:
                timeline.prefill_ended_s = now
            elif is_read:
                timeline.decoding_s = now - self._stepper.span_s
            self._emit(sequence, sampled, self._stepper.span_s, has_news=is_read)
        sequence.resident.publish()

    def _emit(self, sequence: Sequence, sampled: Many[Token], over_s: float, has_news: bool = False) -> None:
        """Sends tokens of as many steps, the timeline if it has news, and the end if they are the last."""
        sequence.run.tokens.extend([token.id for token in sampled])
        is_first, sequence.is_first_due = sequence.is_first_due, False
        sequence.outputs += len(sampled)
        self.counters.output_tokens += len(sampled)
        if is_first:
            sequence.timeline.first_token_s = sequence.elapsed_s()
        last = sampled[-1].id
        finish = self._finish(sequence, last, reason) if (reason := self._reason_to_end(sequence, last)) else None
        so_far = sequence.timeline if is_first or has_news else None
        sequence.call.send(Output(list(sampled), finish, so_far, over_s, _take_scores(sequence)))
        if finish:
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


def _take_scores(sequence: Sequence) -> list[Token] | None:
    """The prompt's log probabilities, once."""
    if sequence.run.scores is None:
        return None
    sequence.run.scores, scored, sequence.prompt_logprobs = None, sequence.prompt_logprobs, []
    return scored


def _fail(sequence: Sequence, error: PenstockError) -> None:
    if not sequence.finished.done():
        sequence.finished.set_exception(error)
