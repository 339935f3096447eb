"""Plays sessions against a server: each at its time, whatever the server does, or so many at a time.

    async with Http(url, headers) as http:
        await Generator(http, asking, recorder, on_end).open(workload)

An open loop sends a request when it is due, and tells the Recorder when that was: one that is late because this process
was busy is seen as such. A closed loop has clients of which each waits for its answer before it asks again. Cancelling
it hangs up; requests under way then have no end in the record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

from penstock.clock import now
from penstock.load.answer import Answer, refusal
from penstock.load.http import Http, NoReply
from penstock.load.prompts import Endpoint, Prompts, encode, path
from penstock.load.record import UNKNOWN, Recorder
from penstock.workloads.workload import Session, Turn, Workload, start_each


@dataclass(frozen=True, slots=True)
class Asking:
    """What all requests have in common. `more` are fields of the body that the server is sent too; null drops one."""

    model: str
    endpoint: Endpoint
    prompts: Prompts
    timeout_s: float
    has_ignore_eos: bool = True
    more: Mapping[str, object] = field(default_factory=dict)

    def body(self, prompt: Mapping[str, object], output_tokens: int) -> bytes:
        fields: dict[str, object] = {
            "model": self.model,
            **prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.has_ignore_eos:
            fields["ignore_eos"] = True
        return encode({name: value for name, value in (fields | dict(self.more)).items() if value is not None})


class Generator:
    """One measurement, or the warm-up before it."""

    def __init__(self, http: Http, asking: Asking, recorder: Recorder, on_end: Callable[[], None]) -> None:
        """`on_end` is called when a request has ended."""
        self._http = http
        self._asking = asking
        self._recorder = recorder
        self._on_end = on_end
        self._path = http.base + path(asking.endpoint)
        self._numbers = count()
        self._end_s = float("inf")

    async def open(self, workload: Workload, duration_s: float | None) -> None:
        """Every session from its start on; after `duration_s` nothing is sent any more, but answers are waited for."""
        begun_s = now()
        self._limit(begun_s, duration_s)
        some = workload if duration_s is None else workload.until(duration_s)
        await start_each(some, lambda session: self._live(session, begun_s + session.start_s))

    async def closed(self, sessions: Iterable[Session], clients: int, duration_s: float | None) -> None:
        """So many sessions at a time, one after the other, whenever they would have started."""
        self._limit(now(), duration_s)
        rest = iter(sessions)
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(rest), name=f"client {number}")

    def _limit(self, begun_s: float, duration_s: float | None) -> None:
        if duration_s is not None:
            self._end_s = begun_s + duration_s

    async def _client(self, sessions: Iterator[Session]) -> None:
        for session in sessions:
            if now() >= self._end_s:
                return
            await self._live(session, None)

    async def _live(self, session: Session, due_s: float | None) -> None:
        """A session's turns. The first is due then, if at all; each other one some time after the answer before it."""
        talk = self._asking.prompts.talk(next(self._numbers))
        for place, turn in enumerate(session.turns):
            if place:
                due_s = now() + turn.after_s
                await asyncio.sleep(turn.after_s)
            if now() >= self._end_s:
                return
            body = self._asking.body(talk.say(turn), turn.output_tokens)
            answer = await self._ask(turn, body, due_s, keeps_text=len(session.turns) > 1)
            if answer is None:
                return
            told = answer.usage.output_tokens
            talk.hear(answer.text, turn.output_tokens if told == UNKNOWN else told)

    async def _ask(self, turn: Turn, body: bytes, due_s: float | None, keeps_text: bool) -> Answer | None:
        """The answer, if it is whole."""
        recorder = self._recorder
        row = recorder.send(now(), due_s, turn.output_tokens)
        answer = Answer(lambda at_s: recorder.event(row, at_s), keeps_text)
        try:
            async with asyncio.timeout(self._asking.timeout_s):
                reply = await self._http.ask("POST", self._path, body, answer.feed)
            error = answer.error if reply.status == 200 else refusal(reply.status, reply.body)
        except TimeoutError:
            error = "timeout"
        except NoReply as failure:
            error = str(failure)
        recorder.end(row, now(), answer.usage, error)
        self._on_end()
        return None if error else answer
