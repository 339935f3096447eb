"""An engine that only takes time: as much as `policy.latency` says that a step takes. It reads and writes nothing.

Of decode steps that are alike it computes the times in closed form, so that they cost nothing each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.blocks import KvLayout, Region
from penstock.engine.api import EngineInfo, Slice, Step
from penstock.policy.latency.steps import StepModel, Work, chunk, decode
from penstock.request import Token
from penstock.sim.faults import Fate

TOKEN = Token(1)  # every output token


@dataclass(frozen=True, slots=True)
class Options:
    """`step_model` has the true times, and is what the worker believes until it has seen some."""

    model: str
    layout: KvLayout
    max_context_tokens: int
    step_model: StepModel


class ModelledEngine:
    """Meets the Engine port, and computes many decode steps in one call."""

    def __init__(self, options: Options, fate: Fate) -> None:
        self._options = options
        self._fate = fate
        self._span: _Span | None = None
        self._is_interrupted = False

    @property
    def info(self) -> EngineInfo:
        options = self._options
        return EngineInfo(
            name="modelled",
            model=options.model,
            layout=options.layout,
            vocab_size=1 << 32,  # whatever a workload calls a token
            max_context_tokens=options.max_context_tokens,
            eos_token_ids=(),
            device="modelled",
            shares_memory=False,
            supports=(),
            step_prior=options.step_model,
        )

    async def __aenter__(self) -> ModelledEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    def attach(self, region: Region) -> None:
        return

    def detach(self, key: tuple[str, int]) -> None:
        return

    async def step(self, step: Step) -> list[Token | None]:
        await self._fate.live_on()
        await asyncio.sleep(self._options.step_model.seconds(work_of(step.slices)))
        await self._fate.live_on()
        return [TOKEN if part.sampling else None for part in step.slices]

    async def decode(self, step: Step, steps: int) -> list[list[Token]]:
        await self._fate.live_on()
        self._span = _Span(self._options.step_model, step.slices, steps)
        try:
            if self._is_interrupted:  # before it began
                self._span.interrupt()
            await self._span.wait()
        finally:
            span, self._span, self._is_interrupted = self._span, None, False
            span.cancel()
        await self._fate.live_on()
        made = [TOKEN] * span.steps
        return [made] * len(step.slices)

    def interrupt(self) -> None:
        self._is_interrupted = True
        if self._span is not None:
            self._span.interrupt()


class _Span:
    """Decode steps under way. Step number k takes a + k * b seconds: contexts grow by one token for each sequence."""

    def __init__(self, model: StepModel, parts: Sequence[Slice], steps: int) -> None:
        sequences, contexts = len(parts), sum(part.start for part in parts)
        first_s = model.seconds(decode(sequences, contexts))
        self.steps = steps
        self._first_s = first_s
        self._growth_s = model.seconds(decode(sequences, contexts + sequences)) - first_s
        self._loop = asyncio.get_running_loop()
        self._begun_s = self._loop.time()
        self._ended = self._loop.create_future()
        self._timer = self._loop.call_at(self._end_s(steps), self._end)

    async def wait(self) -> None:
        await self._ended

    def interrupt(self) -> None:
        """Ends with the step that is being computed."""
        now = self._loop.time()
        done, most = 0, self.steps  # the first ends before now, the other does not
        while most - done > 1:
            middle = (done + most) // 2
            if self._end_s(middle) < now:
                done = middle
            else:
                most = middle
        if most < self.steps:
            self.steps = most
            self._timer.cancel()
            self._timer = self._loop.call_at(max(now, self._end_s(most)), self._end)

    def cancel(self) -> None:
        self._timer.cancel()

    def _end_s(self, steps: int) -> float:
        return self._begun_s + steps * self._first_s + self._growth_s * steps * (steps - 1) / 2

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def work_of(parts: Sequence[Slice]) -> Work:
    """What a step computes. A slice of one token is a decode."""
    work = Work()
    for part in parts:
        tokens = len(part.tokens)
        work += decode(1, part.start) if tokens == 1 else chunk(tokens, part.start)
    return work
