"""The router: knows the fleet, has its policy choose a pair for each request, and follows it on its decode worker.

Until the first token it may try another worker without anybody noticing; after that a lost worker is an error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import msgspec

from penstock import clock
from penstock.cluster import ModelCard, Standing
from penstock.discovery.api import Discovery
from penstock.errors import (
    ConnectionLost,
    NoWorker,
    Overloaded,
    PenstockError,
    UnknownModel,
    WorkerDraining,
    WorkerLost,
)
from penstock.policy.routing import pairs
from penstock.policy.routing.api import Route, Wiring
from penstock.policy.routing.roster import Roster
from penstock.request import Finish, Plan, Request, Timeline, Token
from penstock.serve.decode import GenerateAsk, Output, decode_output
from penstock.serve.rpc import Call, Endpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """`attempts` workers are tried before the first token; a worker that lost a request is avoided for `avoid_s`."""

    attempts: int = 3
    avoid_s: float = 2.0


_TIMES = ("prefill_started_s", "prefill_ended_s", "first_token_s", "decoding_s", "ended_s")


class Router:
    """Used as `async with`; then `generate` for each request. Owns the roster of each model's workers.

    `wiring` prices transfers between the devices that workers name; without it all that are possible cost the same.
    """

    def __init__(
        self,
        discovery: Discovery,
        endpoint: Endpoint,
        rng: Random,
        policy: Route = pairs.route,
        options: RouterOptions = RouterOptions(),
        wiring: Wiring | None = None,
    ) -> None:
        self.options = options
        self.endpoint = endpoint
        self._discovery = discovery
        self._rng = rng
        self._policy = policy
        self._wiring = wiring
        self._fleet: dict[str, Standing] = {}
        self._rosters: dict[str, Roster] = {}  # by model
        self._avoid_until_s: dict[tuple[str, int], float] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Router:
        """Raises SetupError if the discovery cannot be watched."""
        fleets = self._discovery.watch()
        self._update(await anext(fleets))
        self._watcher = self.endpoint.spawn(self._watch(fleets))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])

    def standings(self) -> Mapping[str, Standing]:
        """Live workers by name."""
        return self._fleet

    def cards(self) -> dict[str, ModelCard]:
        """Models that live workers serve, by name."""
        found: dict[str, ModelCard] = {}
        for standing in self._fleet.values():
            member = standing.member
            limit, supports = member.max_context_tokens, member.supports
            if (known := found.get(member.model)) is not None:
                limit = min(limit, known.max_context_tokens)
                supports = tuple(feature for feature in known.supports if feature in supports)
            found[member.model] = ModelCard(member.model, limit, supports)
        return found

    async def wait_ready(self, workers: int) -> None:
        """Returns when `workers` workers are there."""
        while len(self._fleet) < workers:
            self._changed.clear()
            await self._changed.wait()

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[Stream]:
        """The request's tokens; leaving the block cancels what still runs. Raises NoWorker, UnknownModel."""
        stream = Stream(self, request)
        try:
            await stream.start()
            yield stream
        finally:
            await stream.close()

    # For Stream

    def route(self, request: Request, avoid: Mapping[str, None]) -> tuple[Standing, Plan]:
        """Chooses and books. Raises NoWorker, UnknownModel."""
        roster = self._roster(request.model)
        fleet = roster.fleet(avoid, self._avoided())
        ask, hashes = roster.ask(request)
        choice = self._policy(clock.now(), ask, fleet, self._rng)
        roster.book(request.id, ask, hashes, choice)
        prefill = tuple(self._fleet[name].member.hop for name in choice.prefill)
        cached = roster.cached_tokens(ask, choice.prefill[0]) if prefill else 0
        return self._fleet[choice.decode], Plan(choice.decode, prefill, choice.wait_s, cached, choice.why)

    def prefilled(self, request: Request) -> None:
        """The first token came."""
        if (roster := self._rosters.get(request.model)) is not None:
            roster.ledger.prefilled(request.id)

    def release(self, request: Request) -> None:
        """The request is on no worker any more."""
        if (roster := self._rosters.get(request.model)) is not None:
            roster.ledger.release(request.id)

    def avoid(self, standing: Standing) -> None:
        """A worker just lost a request: prefer others for a moment."""
        now, member = clock.now(), standing.member
        self._avoid_until_s = {key: until_s for key, until_s in self._avoid_until_s.items() if until_s > now}
        self._avoid_until_s[(member.worker, member.epoch)] = now + self.options.avoid_s

    def _roster(self, model: str) -> Roster:
        if self._fleet and model not in self._rosters:
            raise UnknownModel(f"no worker serves {model!r}; there is {', '.join(self.cards())}", "model")
        return self._rosters.get(model) or Roster(self._wiring)

    def _avoided(self) -> list[str]:
        """Workers that lost a request a moment ago, as long as they are the same incarnation."""
        now, fleet = clock.now(), self._fleet
        return [
            name
            for (name, epoch), until_s in self._avoid_until_s.items()
            if until_s > now and name in fleet and fleet[name].member.epoch == epoch
        ]

    def _update(self, fleet: dict[str, Standing]) -> None:
        self._fleet = fleet
        models: dict[str, dict[str, Standing]] = {}
        for name, standing in fleet.items():
            models.setdefault(standing.member.model, {})[name] = standing
        for model in [model for model in self._rosters if model not in models]:
            del self._rosters[model]  # bookings and all: its streams may go on, but load nobody that is there
        for model, standings in models.items():
            self._rosters.setdefault(model, Roster(self._wiring)).update(standings)

    async def _watch(self, fleets: AsyncIterator[dict[str, Standing]]) -> None:
        # Who vanishes here gets nothing new. What it has goes on: only its own connection tells whether it lives.
        async for fleet in fleets:
            before = self._fleet
            self._update(fleet)
            self._changed.set()
            for name, standing in before.items():
                if name not in fleet or fleet[name].member.epoch != standing.member.epoch:
                    log.warning("%s (epoch %d) has left, or stopped reporting", name, standing.member.epoch)


class Stream:
    """One request on its way; see `Router.generate`."""

    _standing: Standing  # set by _choose, as is _plan
    _plan: Plan

    def __init__(self, router: Router, request: Request) -> None:
        self._router = router
        self._request = request
        self._arrived_s = clock.now()
        self._sent_s = 0.0
        self._call: Call | None = None
        self._tried: dict[str, None] = {}
        self._failures: list[str] = []
        self._has_token = False
        self.timeline: Timeline | None = None
        self.over_s = 0.0  # the time over which the tokens read last were sampled, up to now

    async def start(self) -> None:
        """Opens the call on the chosen worker, or the next one that can be reached."""
        self._choose()
        await self._open()

    async def read(self) -> tuple[list[Token], Finish | None]:
        """Waits for tokens, and the end with the last of them. Raises PenstockError if the request failed."""
        while True:
            try:
                return self._take(await self._receive())
            except (ConnectionLost, WorkerLost, WorkerDraining, Overloaded) as error:
                if self._has_token:
                    raise WorkerLost(f"{self._worker} was lost in mid-stream: {error}") from error
                await self.close()
                self._choose_another(error)
                await self._open()

    async def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._router.release(self._request)
        if self._call is not None:
            call, self._call = self._call, None
            await call.__aexit__(None, None, None)

    @property
    def _worker(self) -> str:
        return self._standing.member.worker

    def _choose(self) -> None:
        self._standing, self._plan = self._router.route(self._request, self._tried)

    def _choose_another(self, error: PenstockError) -> None:
        """Raises `error` if nobody is left to try."""
        self._router.avoid(self._standing)
        self._tried[self._worker] = None
        self._failures.append(f"{self._worker}: {error}")
        if len(self._failures) >= self._router.options.attempts:
            raise error
        try:
            self._choose()
        except (NoWorker, UnknownModel):
            raise error from None
        log.info("trying %s at %s: %s", self._request.id, self._worker, error)

    async def _open(self) -> None:
        while self._call is None:
            try:
                peer = await self._router.endpoint.peer(self._standing.member.addresses)
                self._call = peer.call("generate", GenerateAsk(self._request, self._plan))
                self._sent_s = clock.now()
            except ConnectionLost as error:
                self._choose_another(error)

    async def _receive(self) -> list[Output]:
        if self._call is None:
            raise WorkerLost(f"{self._request.id} is on no worker")
        outputs = await self._call.receive_all(decode_output)
        if not outputs:
            raise WorkerLost(f"{self._worker} ended the request without saying why")
        return outputs

    def _take(self, outputs: list[Output]) -> tuple[list[Token], Finish | None]:
        if not self._has_token:
            self._has_token = True
            self._router.prefilled(self._request)
        self.over_s = sum(output.over_s for output in outputs)
        if (so_far := outputs[0].so_far) is not None:
            self.timeline = self._shift(so_far)
        if (finish := outputs[-1].finish) is not None:
            self.timeline = self._shift(finish.timeline)
            finish = msgspec.structs.replace(finish, timeline=self.timeline)
        return [token for output in outputs for token in output.tokens], finish

    def _shift(self, timeline: Timeline) -> Timeline:
        """The worker's timeline on the frontend's clock: seconds since the request's arrival here."""
        by_s = self._sent_s - self._arrived_s
        times = {name: value + by_s for name in _TIMES if (value := getattr(timeline, name)) is not None}
        failures = [*self._failures, *timeline.failures]
        return msgspec.structs.replace(timeline, **times, reached_worker_s=by_s, failures=failures)
