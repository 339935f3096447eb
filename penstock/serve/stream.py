"""One request, followed from worker to worker until its end.

If its worker is lost, leaves or refuses, another one takes over; in mid-stream it continues from the prompt and what
the client has been given. Since a token is a function of what comes before it, the request and its position, the client
sees nothing of that but the time it takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from penstock import clock
from penstock.cluster import Standing
from penstock.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NoWorker,
    Overloaded,
    PenstockError,
    PromptTooLong,
    UnknownModel,
    Unsupported,
    WorkerDraining,
    WorkerLost,
    WorkerStalled,
)
from penstock.request import Finish, Plan, Progress, Request, Timeline, Token
from penstock.serve.decode import GenerateAsk, Output, decode_output
from penstock.serve.rpc import Call, Endpoint
from penstock.tokens import pack

log = logging.getLogger(__name__)

NO_EPOCH = -1

_ITS_OWN = (WorkerDraining, Unsupported, PromptTooLong)  # why a worker that is well refuses what another may take

_TIMES = ("prefill_started_s", "prefill_ended_s", "first_token_s", "decoding_s", "ended_s")


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """`attempts` workers are tried for the next token; a worker that lost a request is avoided for `avoid_s`.

    In mid-stream a request waits up to `wait_s` for a worker that takes it, and is moved `moves` times at most.
    """

    attempts: int = 3
    avoid_s: float = 2.0
    wait_s: float = 15.0
    moves: int = 32


class Choices(Protocol):
    """What a stream needs of its router."""

    options: StreamOptions
    endpoint: Endpoint

    def admitted(self, request: Request) -> AbstractAsyncContextManager[None]:
        """Entered when it is the request's turn, to be routed at once. Raises Overloaded, DeadlineExceeded."""
        ...

    def route(self, request: Request, avoid: Mapping[str, int]) -> tuple[Standing, Plan]:
        """Chooses and books. Raises NoWorker, UnknownModel."""
        ...

    def prefilled(self, request: Request) -> None:
        """The first token came."""
        ...

    def moved(self, request: Request) -> None:
        """The second token came."""
        ...

    def release(self, request: Request) -> None:
        """The request is on no worker any more."""
        ...

    def avoid(self, standing: Standing) -> None:
        """A worker just lost a request: prefer others for a moment."""
        ...

    def standings(self) -> Mapping[str, Standing]:
        """Live workers by name."""
        ...

    async def wait_change(self) -> None:
        """Returns when somebody came, left, or reported."""
        ...


class Stream:
    """See `Router.generate`."""

    _standing: Standing  # set by _choose, as is _plan
    _plan: Plan

    def __init__(self, router: Choices, request: Request) -> None:
        self._router = router
        self._request = request
        self._output = bytearray()  # packed; what `read` has returned
        self._arrived_s = clock.now()
        self._sent_s = 0.0
        self._call: Call | None = None
        self._tried: dict[str, int] = {}  # epochs of workers that failed at the next token
        self._attempts = 0  # at it, that failed
        self._failures: list[str] = []
        self._moves = 0
        self._frames = 0  # of tokens, from the present worker
        self._first: Timeline | None = None  # as it was when the worker that gave the first token was lost
        self.timeline: Timeline | None = None
        self.prompt_logprobs: list[Token] | None = None  # of the prompt's tokens but the first, with the first output
        self.over_s = 0.0  # the time over which the tokens read last were sampled, up to now

    @property
    def request(self) -> Request:
        """As it came."""
        return self._request

    @property
    def worker(self) -> str:
        """Its decode worker."""
        return self._standing.member.worker

    async def start(self) -> None:
        """Waits for its turn, and opens the call on the chosen worker, or the next one that can be reached."""
        async with self._router.admitted(self._request):
            self._choose()
        await self._open()

    async def read(self) -> tuple[list[Token], Finish | None]:
        """Waits for tokens, and the end with the last of them. Raises PenstockError if the request failed."""
        while True:
            try:
                return self._take(await self._receive())
            except (ConnectionLost, WorkerLost, WorkerStalled, Overloaded, *_ITS_OWN) as error:
                await self.close()
                await self._replace(error)
                await self._open()

    async def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._router.release(self._request)
        if self._call is not None:
            call, self._call = self._call, None
            await call.__aexit__(None, None, None)

    def move(self, why: WorkerDraining | WorkerStalled) -> None:
        """Another worker is there, and this one is about to leave, or stands still."""
        if self._call is not None:
            self._call.fail(why)

    def _choose(self) -> None:
        self._standing, self._plan = self._router.route(self._so_far(), self._tried)

    def _so_far(self) -> Request:
        """What is left to do."""
        left_s = self._request.timeout_s - (clock.now() - self._arrived_s)
        if left_s <= 0:
            raise DeadlineExceeded(f"{self._request.id} was not done after its {self._request.timeout_s:.0f} s")
        progress = Progress(bytes(self._output))
        return msgspec.structs.replace(self._request, timeout_s=left_s, progress=progress)

    async def _replace(self, error: PenstockError) -> None:
        """Chooses another worker. Raises what made that necessary if nobody is left to try."""
        self._note_loss(error)
        if not self._output:
            self._choose_another(error)
            return
        try:
            async with asyncio.timeout(self._router.options.wait_s):
                while not self._finds_another():
                    await self._router.wait_change()
                    self._forgive()
        except TimeoutError:
            lost = f"{self._failures[-1]}; no other worker took it over within {self._router.options.wait_s:.0f} s"
            raise WorkerLost(lost) from error
        self._moves += 1
        self._first = self._first or self.timeline
        log.info("%s goes on at %s: %s", self._request.id, self.worker, error)

    def _note_loss(self, error: PenstockError) -> None:
        """Raises `error`, or for a stream that has begun WorkerLost, if that was one time too many."""
        self._failures.append(f"{self.worker}: {error}")
        self._tried[self.worker] = self._standing.member.epoch
        if isinstance(error, Overloaded) and self._output:
            self._tried[self.worker] = NO_EPOCH  # asked again when something has changed
        elif not isinstance(error, _ITS_OWN):
            self._router.avoid(self._standing)
            self._attempts += 1
        options = self._router.options
        if self._attempts < options.attempts and self._moves < options.moves:
            return
        if self._output:
            raise WorkerLost(f"{self.worker} was lost in mid-stream, and others before it: {error}") from error
        raise error

    def _forgive(self) -> None:
        """Those that are gone: if they come back, they have recovered or are others. And those that had no room."""
        fleet = self._router.standings()
        self._tried = {
            name: epoch for name, epoch in self._tried.items() if name in fleet and fleet[name].member.epoch == epoch
        }

    def _choose_another(self, error: PenstockError) -> None:
        try:
            self._choose()
        except (NoWorker, UnknownModel):
            raise error from None
        log.info("trying %s at %s: %s", self._request.id, self.worker, error)

    def _finds_another(self) -> bool:
        try:
            self._choose()
        except (NoWorker, UnknownModel):
            return False
        return True

    async def _open(self) -> None:
        while self._call is None:
            try:
                peer = await self._router.endpoint.peer(self._standing.member.addresses)
                self._call = peer.call("generate", GenerateAsk(self._so_far(), self._plan))
                self._sent_s, self._frames = clock.now(), 0
            except ConnectionLost as error:
                self._router.release(self._request)
                await self._replace(error)

    async def _receive(self) -> list[Output]:
        if self._call is None:
            raise WorkerLost(f"{self._request.id} is on no worker")
        outputs = await self._call.receive_all(decode_output)
        if not outputs:
            raise WorkerLost(f"{self.worker} ended the request without saying why")
        return outputs

    def _take(self, outputs: list[Output]) -> tuple[list[Token], Finish | None]:
        if self._frames == 0:
            self._router.prefilled(self._request)
        elif self._frames == 1:
            self._router.moved(self._request)
        self._frames += 1
        tokens = [token for output in outputs for token in output.tokens]
        self._output += pack([token.id for token in tokens])
        self._attempts = 0
        self._tried.clear()
        self.over_s = sum(output.over_s for output in outputs)
        for output in outputs:
            if output.prompt_logprobs is not None:
                self.prompt_logprobs = output.prompt_logprobs
            if output.so_far is not None:
                self.timeline = self._shift(output.so_far)
        if (finish := outputs[-1].finish) is not None:
            self.timeline = self._shift(finish.timeline)
            finish = msgspec.structs.replace(finish, timeline=self.timeline)
        return tokens, finish

    def _shift(self, timeline: Timeline) -> Timeline:
        """The worker's timeline on the frontend's clock: seconds since the request's arrival here.

        How the first token came about was told by the worker that gave it.
        """
        by_s = self._sent_s - self._arrived_s
        times = {name: value + by_s for name in _TIMES if (value := getattr(timeline, name)) is not None}
        failures = [*self._failures, *timeline.failures]
        shifted = msgspec.structs.replace(timeline, **times, reached_worker_s=by_s, failures=failures)
        if self._first is None:
            return shifted
        return msgspec.structs.replace(
            self._first,
            decode_worker=timeline.decode_worker,
            moves=self._moves,
            computed_tokens=self._first.computed_tokens + timeline.computed_tokens,
            output_tokens=timeline.output_tokens,
            preemptions=self._first.preemptions + timeline.preemptions,
            ended_s=shifted.ended_s,
            failures=failures,
        )
