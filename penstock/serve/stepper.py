"""The loop that drives an engine: plan a step, compute it, hand out its results.

Two kinds of sequences share it. Own ones live in this worker's region, take blocks as they grow and may be preempted.
Guests are prefills for other workers, in their regions mapped here, with blocks granted by their owners. One step
touches one region; own and guest steps take turns.

While every sequence only decodes, one step is like the next. An engine that can is then asked for as many of them as
will certainly be alike; whatever happens meanwhile ends them with the step in progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from penstock import clock
from penstock.blocks import BlockId, Region
from penstock.cluster import StepPrices
from penstock.engine.api import Engine, MultiStepEngine, Past, ScoringEngine, SequencesFailed, Slice, Step
from penstock.errors import EngineFailed, OutOfBlocks, PenstockError
from penstock.kv.lease import Lease, LeaseTable
from penstock.kv.prefix_cache import PrefixCache
from penstock.policy.batching import Batch, Limits, Want, plan_step
from penstock.policy.latency.steps import StepFit, StepModel, Work, chunk, decode
from penstock.request import Sampling, Token
from penstock.tokens import Tokens

T = TypeVar("T")

_PACE_OBSERVATIONS = 16  # between two looks at what the fit has learned
_UNSURE = 0.5  # a rate that may be off by more than this part of it is not reported
_LEAST_CALL_S = 1e-3  # that a call is said to take: none at all would mean that there is no call


@dataclass(slots=True, eq=False)
class Run:
    """One sequence being computed here. Changed by the stepper; by its owner only while it is not in a step.

    `on_step` is called after the steps it was in, with the tokens sampled, if any were. `on_admit` is called when an
    own sequence starts or restarts, and may bring blocks with tokens that are computed already. `on_preempt` is called
    when it has lost its blocks, and waits for its turn again. While there are `scores`, `on_scored` is called before
    `on_step` with the prompt's tokens that follow those computed, and so many of the likeliest in their places.
    """

    region: Region
    past: Past  # its tokens are the sequence, to which its owner appends what is sampled
    sampling: Sampling
    on_step: Callable[[Sequence[Token]], None]
    on_error: Callable[[PenstockError], None]
    on_admit: Callable[[], None] | None = None  # None: a guest
    on_preempt: Callable[[], None] | None = None
    on_scored: Callable[[Sequence[Token]], None] | None = None
    scores: int | None = None
    most_tokens: int = 0  # an own sequence ends with this many tokens at the latest
    may_stop: bool = True  # some token may end it earlier
    computed: int = 0
    blocks: list[BlockId] = field(default_factory=list)  # its block table, with holes where nothing is read any more
    preemptions: int = 0

    @property
    def tokens(self) -> Tokens:
        return self.past.tokens

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast this worker is as far as it knows: alone with a prompt, and with what decodes here now. 0: unknown."""

    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    step_prices: StepPrices | None = None


class Stepper:
    """Owns what runs on one engine. `run` is its life; everything else is called from the same loop."""

    def __init__(
        self,
        engine: Engine,
        region: Region,
        cache: PrefixCache,
        leases: LeaseTable,
        limits: Limits,
        fit: StepFit,
    ) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.span_s = 0.0  # from the end of the first of the last steps to that of the last
        self.preemptions = 0
        self.computed_tokens = 0  # of prompts
        self.prefills = 0
        self.on_starved: Callable[[Lease], None] = lambda lease: None  # the decoder calls the youngest lease off
        self._engine = engine
        self._multi_step = engine if isinstance(engine, MultiStepEngine) else None
        self._scoring = engine if isinstance(engine, ScoringEngine) else None
        self._region = region
        self._has_windows = region.layout.has_windows
        self._cache = cache
        self._leases = leases
        self._limits = limits
        self._fit = fit
        self._free_s = 0.0  # when the engine was last done, or asked to begin
        self._pace, self._pace_due = Pace(), 0  # known from so many observations on
        self._running: list[Run] = []  # by arrival
        self._waiting: list[Run] = []
        self._guests: list[Run] = []
        self._in_step: list[Run] = []
        self._call: tuple[list[tuple[Run, int]], int] | None = None  # what it computes, in how many steps at most
        self._after_step: list[Callable[[], None]] = []
        self._guests_turn = False
        self._step_tokens = 0  # of prompts, in the step in progress
        self._is_multi_step = False
        self._wake = asyncio.Event()

    @property
    def pace(self) -> Pace:
        """As learned from this worker's own steps, a few steps ago."""
        if self._fit.observations >= self._pace_due:
            self._pace, self._pace_due = self._estimate(), self._fit.observations + _PACE_OBSERVATIONS
        return self._pace

    @property
    def call_s(self) -> float:
        """What the engine's call in progress should take, from its beginning to its end; 0: there is none.

        `steps` stands still for as long, since it counts all steps of a call when they have been made.
        """
        if self._call is None:
            return 0.0
        chosen, steps = self._call
        prices = self.pace.step_prices
        predicted_s = StepModel.of(prices).seconds(_work_of(chosen, steps)) if prices else 0.0
        mean_s = self.busy_s / self.steps if self.steps else 0.0
        return max(_LEAST_CALL_S, steps * max(predicted_s, mean_s))

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._guests)

    @property
    def free_slots(self) -> int:
        """Own sequences that may join or be admitted."""
        return self._limits.slots - len(self._running)

    @property
    def claimed_blocks(self) -> int:
        """Blocks that own sequences take next: those that run, one of each group or what their prompt lacks; the first
        in line, all.

        Leases leave them alone, or a long prompt would wait for as long as short ones come.
        """
        layout, width = self._region.layout, len(self._region.layout.keeps)
        next_up = (*self._running, *self._waiting[:1])
        lacking = [layout.entries_for(len(run.tokens)) - len(run.blocks) for run in next_up]
        if self._has_windows:
            lacking = [min(pair) for pair in zip(lacking, map(self._most_at_a_time, next_up), strict=True)]
        return sum(max(width, blocks) for blocks in lacking)

    @property
    def spare_blocks(self) -> int:
        """Blocks that neither leases nor own sequences claim; less than none if claims exceed what there is."""
        return self._cache.available - self._leases.promised_blocks - self.claimed_blocks

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens yet to be computed here. Those of the step in progress count as done as far as it should be."""
        prefilling = (run.pending for run in (*self._running, *self._waiting, *self._guests))
        queued = sum(pending for pending in prefilling if pending > 1)
        if not self._step_tokens:
            return queued
        done = min(1.0, (clock.now() - self._free_s) / self._fit.model.seconds(chunk(self._step_tokens)))
        return max(0, queued - int(done * self._step_tokens))

    def wait_for_turn(self, run: Run) -> None:
        """Queues an own sequence that holds no blocks."""
        self._waiting.append(run)
        self._look_again()

    def join(self, run: Run) -> None:
        """Takes in an own sequence whose blocks hold its prompt already."""
        self._running.append(run)
        self._look_again()

    def host(self, run: Run) -> None:
        """Takes in a guest. Its owner wakes the stepper when more blocks are granted."""
        self._guests.append(run)
        self._look_again()

    def wake(self) -> None:
        """Blocks were granted or freed: look again, if somebody waits for some."""
        if self._waiting or self._guests or not self._in_step:
            self._look_again()

    def leave(self, run: Run, then: Callable[[], None]) -> None:
        """Takes `run` out for good; `then` is called once no step touches its blocks any more. Idempotent per run."""
        self._remove(run)
        if run in self._in_step:
            self._after_step.append(then)
            self._look_again()
        else:
            then()

    def _remove(self, run: Run) -> None:
        for queue in (self._running, self._waiting, self._guests):
            if run in queue:
                queue.remove(run)

    async def run(self) -> None:
        """Steps until cancelled; then waits for the step that is being computed."""
        self._free_s = clock.now()
        while True:
            if not self._wake.is_set():
                await self._wake.wait()
                self._free_s = clock.now()
            self._wake.clear()
            if chosen := self._next_step():
                await self._compute(chosen)
                self._wake.set()

    def _look_again(self) -> None:
        """Something changed: steps that were to be alike end with the one in progress."""
        self._wake.set()
        if self._multi_step is not None and self._is_multi_step:
            self._multi_step.interrupt()

    def _next_step(self) -> list[tuple[Run, int]]:
        plans = [self._plan_own, self._plan_guests]
        if self._guests_turn:
            plans.reverse()
        for plan in plans:
            if chosen := plan():
                self._guests_turn = plan == self._plan_own
                return chosen
        return []

    def _plan_own(self) -> list[tuple[Run, int]]:
        if not self._running and not self._waiting:
            return []
        lease = self._leases.youngest_open()
        batch = plan_step(
            [_want(run) for run in self._running],
            map(_want, self._waiting),
            self._cache.available,
            self._leases.promised_blocks,
            self._region.layout,
            self._limits,
            may_preempt=lease is None,
        )
        if batch.starved and lease is not None:
            self.on_starved(lease)  # who decodes outranks a lease that is not yet complete; it wakes us when it ends
        return self._apply(batch)

    def _apply(self, batch: Batch) -> list[tuple[Run, int]]:
        for run in [self._running[index] for index in batch.preempt]:
            self._preempt(run)
        advance = [(self._running[index], tokens) for index, tokens in batch.advance]
        admitted = [(self._waiting[index], tokens) for index, tokens in batch.admit]
        for run, _ in admitted:
            self._waiting.remove(run)
            self._running.append(run)
            if run.on_admit is not None:
                run.on_admit()
        return [(run, n) for run, tokens in advance + admitted if (n := self._give_blocks(run, tokens)) > 0]

    def _preempt(self, run: Run) -> None:
        self._cache.release(run.blocks)
        run.blocks, run.computed = [], 0
        run.preemptions += 1
        self.preemptions += 1
        self._running.remove(run)
        self._waiting.insert(0, run)
        if run.on_preempt is not None:
            run.on_preempt()

    def _most_at_a_time(self, run: Run) -> int:
        """Blocks that a run takes, beyond those that it has, until its tokens are computed, if it gives back others."""
        layout = self._region.layout
        held = len(run.blocks) - layout.holes(run.computed)
        return layout.blocks_for(len(run.tokens), self._limits.step_tokens) - held

    def _give_blocks(self, run: Run, tokens: int) -> int:
        """Makes room for the next `tokens` tokens; returns how many can be computed, 0 if blocks ran out."""
        tokens = min(tokens, run.pending)
        need = self._region.layout.entries_for(run.computed + tokens) - len(run.blocks)
        if need <= 0:
            return tokens
        try:
            run.blocks += self._cache.take(need)
        except OutOfBlocks:  # a preempted sequence shared its blocks, so fewer came free than were counted
            return 0
        return tokens

    def _plan_guests(self) -> list[tuple[Run, int]]:
        ready = [run for run in self._guests if _granted(run) > 0]
        if not ready:
            return []
        together = [run for run in ready if run.region is ready[0].region]
        batch = plan_step([_want(run) for run in together], [], 0, 0, ready[0].region.layout, self._limits)
        return [(together[index], tokens) for index, tokens in batch.advance]

    def _count_alike(self, chosen: list[tuple[Run, int]]) -> int:
        """How many steps from this one on will be like it, and have blocks. Takes these blocks."""
        if self._multi_step is None or self._guests or len(chosen) < len(self._running):
            return 1
        if self.steps == 0:  # one has to be seen, to know how long several may take
            return 1
        steps = min(1 if run.may_stop or run.pending > 1 else run.most_tokens - len(run.tokens) for run, _ in chosen)
        room = self._cache.available - self._leases.promised_blocks
        layout = self._region.layout
        if self._has_windows:  # they give back only between calls
            steps = min(steps, layout.block_tokens)
        while steps > 1:
            lacking = [max(0, layout.entries_for(run.computed + steps) - len(run.blocks)) for run, _ in chosen]
            if sum(lacking) <= room:
                for (run, _), need in zip(chosen, lacking, strict=True):
                    if need:
                        run.blocks += self._cache.take(need)
                return steps
            steps //= 2
        return 1

    async def _compute(self, chosen: list[tuple[Run, int]]) -> None:
        steps = self._count_alike(chosen)
        self._in_step, self._call = [run for run, _ in chosen], (chosen, steps)
        self._step_tokens = sum(tokens for _, tokens in chosen if tokens > 1)
        step = Step(chosen[0][0].region, [_slice(*each) for each in chosen])
        try:
            is_scored = any(part.scores is not None for part in step.slices)
            results = await (self._score(chosen, step) if is_scored else self._ask_engine(step, steps))
        except (PenstockError, SequencesFailed) as error:
            self._land()
            self._drop(chosen, error)
            return
        except BaseException:  # cancelled, or a bug of the engine: who waits for the end of this step may go on
            self._land()
            raise
        made = len(results[0]) if steps > 1 else 1
        # From the end of the step before, if that came at once: planning and handing out results take time as well.
        started_s, self._free_s = self._free_s, clock.now()
        self.computed_tokens += self._step_tokens
        self._measure(chosen, made, self._free_s - started_s)
        left = self._land()
        for (run, tokens), sampled in zip(chosen, results, strict=True):
            if run not in left:
                run.computed += tokens + made - 1
                run.on_step(sampled)

    def _drop(self, chosen: list[tuple[Run, int]], error: PenstockError | SequencesFailed) -> None:
        """Takes out whose step failed, before the next one is planned; others are where they were before it."""
        self._free_s = clock.now()
        for run, _ in chosen:
            why = error.errors.get(run.past.sequence) if isinstance(error, SequencesFailed) else error
            if why is not None:
                self._remove(run)
                run.on_error(why)

    async def _ask_engine(self, step: Step, steps: int) -> list[list[Token]]:
        """What was sampled for each slice."""
        if self._multi_step is not None and steps > 1:
            self._is_multi_step = True
            try:
                return await _finish(self._multi_step.decode(step, steps))
            finally:
                self._is_multi_step = False
        return [[token] if token is not None else [] for token in await _finish(self._engine.step(step))]

    async def _score(self, chosen: list[tuple[Run, int]], step: Step) -> list[list[Token]]:
        """What was sampled for each slice. Log probabilities of prompts have been handed out. Raises EngineFailed."""
        if self._scoring is None:
            raise EngineFailed("this engine cannot tell log probabilities of prompts")
        results = await _finish(self._scoring.score(step))
        for (run, _), scored in zip(chosen, results, strict=True):
            if run.on_scored is not None and scored.prompt:
                run.on_scored(scored.prompt)
        return [[scored.sampled] if scored.sampled is not None else [] for scored in results]

    def _land(self) -> list[Run]:
        """The step is over: runs that left meanwhile let go of their blocks. Returns those runs."""
        present = (*self._running, *self._waiting, *self._guests)
        left = [run for run in self._in_step if run not in present] if self._after_step else []
        self._in_step, self._call, self._step_tokens = [], None, 0
        callbacks, self._after_step = self._after_step, []
        for then in callbacks:
            then()
        return left

    def _measure(self, chosen: list[tuple[Run, int]], steps: int, seconds: float) -> None:
        """Learns what the mean of these steps took."""
        self.steps += steps
        self.busy_s += seconds
        self.span_s = seconds * (steps - 1) / steps
        self.prefills += sum(tokens > 1 and tokens == run.pending for run, tokens in chosen)
        self._fit.observe(_work_of(chosen, steps), seconds / steps)

    def _estimate(self) -> Pace:
        model = self._fit.model
        tokens, batch = self._limits.step_tokens, max(1, len(self._running))
        depth = sum(run.computed for run in self._running)
        prefill, step = model.estimate(chunk(tokens)), model.estimate(decode(batch, depth))
        return Pace(
            tokens / prefill.seconds if prefill.error_s < _UNSURE * prefill.seconds else 0.0,
            step.seconds if step.error_s < _UNSURE * step.seconds else 0.0,
            model.prices,
        )


def _work_of(chosen: Sequence[tuple[Run, int]], steps: int) -> Work:
    """The mean of as many steps, which are alike but for contexts that grow."""
    later = (steps - 1) / 2
    return _work([(tokens, run.computed + later) for run, tokens in chosen])


def _work(parts: Sequence[tuple[int, float]]) -> Work:
    """Of a step in which sequences compute (tokens, after how many)."""
    contexts = [context for tokens, context in parts if tokens == 1]
    work = decode(len(contexts), sum(contexts))
    for tokens, context in parts:
        if tokens > 1:
            work += chunk(tokens, context)
    return work


def _granted(run: Run) -> int:
    layout = run.region.layout
    return min(run.pending, len(run.blocks) // len(layout.keeps) * layout.block_tokens - run.computed)


def _want(run: Run) -> Want:
    return Want(run.pending, run.computed, len(run.blocks), may_take=run.on_admit is not None)


def _slice(run: Run, tokens: int) -> Slice:
    end = run.computed + tokens
    sampling = run.sampling if end == len(run.tokens) else None
    return Slice(run.tokens[run.computed : end], run.computed, run.blocks, sampling, run.past, run.scores)


async def _finish(step: Coroutine[None, None, T]) -> T:
    """Awaits a step even if cancelled meanwhile: memory is being written until it returns."""
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
