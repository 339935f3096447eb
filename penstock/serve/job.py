"""A prefill for another worker, as this one has it: what was asked, what was granted, how far it is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from penstock import clock
from penstock.blocks import BlockId
from penstock.engine.api import Past
from penstock.errors import LeaseLost, PenstockError
from penstock.request import Token
from penstock.serve.handoff import (
    Done,
    Fetch,
    Fetched,
    First,
    Granted,
    Held,
    Kept,
    More,
    NoRoom,
    PrefillAsk,
    Switch,
    Switched,
    Wrote,
    decode_from_decode,
)
from penstock.serve.rpc import Call
from penstock.serve.stepper import Run
from penstock.tokens import count, unpack

T = TypeVar("T")

ANSWER_S = 10.0  # that the asker may take for an answer to a question


@dataclass(slots=True, eq=False)
class Job:
    """Changed by the task that serves it, and by its `listen`."""

    ask: PrefillAsk
    call: Call
    run: Run | None = None
    first: Token | None = None
    started_s: float = 0.0
    ended_s: float = 0.0  # of the last chunk so far
    error: PenstockError | None = None
    asked_tokens: int = 0
    granted: Granted | None = None
    told: Wrote | None = None
    is_first_told: bool = False
    is_refused: bool = False
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    answers: asyncio.Queue[Held | Kept | Switched] = field(default_factory=asyncio.Queue)

    @property
    def prompt_tokens(self) -> int:
        return count(self.ask.tokens)

    def past(self) -> Past:
        """The sequence so far, with room to grow."""
        return Past(self.ask.request, unpack(self.ask.tokens), self.prompt_tokens - self.ask.output_tokens)

    def on_step(self, sampled: Sequence[Token]) -> None:
        if sampled:
            self.first = sampled[0]
        self.ended_s = clock.now()
        self.progress.set()

    def on_error(self, error: PenstockError) -> None:
        self.error = error
        self.progress.set()

    async def listen(self) -> None:
        """Takes what the asker says, until the end of the call, which whoever serves it sees as well."""
        try:
            while (message := await self.call.receive(decode_from_decode)) is not None:
                match message:
                    case Granted():
                        self.granted = message
                    case NoRoom():
                        self.is_refused = True
                    case _:
                        self.answers.put_nowait(message)
                self.progress.set()
        except PenstockError as error:
            self.on_error(error)

    async def wait_progress(self) -> None:
        """Returns after a chunk, a grant of blocks, a block that has arrived, or a preemption.

        Raises what went wrong meanwhile.
        """
        await self.progress.wait()
        self.progress.clear()
        if self.error is not None:
            raise self.error

    async def wait_granted(self) -> bool:
        """The first grant after Begin; False if there is none, since the asker has no room."""
        while self.granted is None and not self.is_refused:
            await self.wait_progress()
            self.tell_first()
        return self.granted is not None

    def tell_first(self) -> None:
        """Sends the first token as soon as it is there, once."""
        if self.first is not None and not self.is_first_told:
            self.is_first_told = True
            self.call.send(First(self.first))

    def tell_progress(self, tokens: int, moved_blocks: int = 0) -> None:
        """Says how far it is, if that has changed."""
        wrote = Wrote(tokens, moved_blocks)
        if wrote != self.told:
            self.told = wrote
            self.call.send(wrote)

    def ask_ahead(self, run: Run, chunk_tokens: int) -> None:
        """Asks for the blocks of the chunk after the next one, so that the answer is here before it is needed."""
        wanted = min(self.prompt_tokens, run.computed + 2 * chunk_tokens)
        layout = run.region.layout
        held = len(self.granted.blocks) // len(layout.keeps) * layout.block_tokens if self.granted else 0
        if wanted > max(held, self.asked_tokens):
            self.asked_tokens = wanted
            self.call.send(More(wanted))

    async def hold(self) -> list[BlockId]:
        """The asker's blocks that hold the prompt's beginning, pinned there until `release`."""
        return [BlockId(block) for block in (await self._question(Fetch(), Held)).blocks]

    async def release(self) -> None:
        """Returns if they have been pinned up to now."""
        await self._question(Fetched(), Kept)

    async def switch(self, left: str, transfer: str) -> None:
        """Has the asker fence off the first transfer, and expect the second one."""
        await self._question(Switch(left, transfer), Switched)

    def done(self, computed_tokens: int, fetched_tokens: int = 0) -> Done:
        now = clock.now()
        return Done(computed_tokens, now - self.started_s, now - self.ended_s, fetched_tokens=fetched_tokens)

    async def _question(self, question: Fetch | Fetched | Switch, kind: type[T]) -> T:
        """Raises LeaseLost unless it is answered in time."""
        self.call.send(question)
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await self.answers.get()
        except TimeoutError:
            raise LeaseLost(f"{self.ask.region[0]} did not answer {question} within {ANSWER_S:.0f} s") from None
        if not isinstance(answer, kind):
            raise LeaseLost(f"{self.ask.region[0]} answered {question} with {answer}")
        return answer
