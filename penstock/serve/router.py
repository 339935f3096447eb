"""The router: knows the fleet, and has its policy choose a pair for each request. What follows is `stream`'s."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random

from penstock import clock
from penstock.cluster import Member, ModelCard, Standing
from penstock.discovery.api import Discovery
from penstock.errors import UnknownModel
from penstock.metrics import IndexMetrics
from penstock.policy.prefix_index import Incarnation, PrefixIndex
from penstock.policy.prefixes import incarnation
from penstock.policy.routing import pairs
from penstock.policy.routing.api import Route, Wiring
from penstock.policy.routing.roster import Roster
from penstock.request import Plan, Request
from penstock.serve import kv_events
from penstock.serve.kv_watch import CallFeed, KvWatch, NewFeed
from penstock.serve.rpc import Endpoint
from penstock.serve.stream import Stream, StreamOptions

log = logging.getLogger(__name__)

FEEDS: Mapping[str, NewFeed] = {kv_events.CALL: CallFeed}


class Router:
    """Used as `async with`; then `generate` for each request. Owns the roster of each model's workers.

    `wiring` prices transfers between the devices that workers name; without it all that are possible cost the same.
    `feeds` are ways to hear of workers' caches, see `KvWatch`.
    """

    def __init__(
        self,
        discovery: Discovery,
        endpoint: Endpoint,
        rng: Random,
        policy: Route = pairs.route,
        options: StreamOptions = StreamOptions(),
        wiring: Wiring | None = None,
        feeds: Mapping[str, NewFeed] = FEEDS,
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
        self._streams: dict[Stream, None] = {}
        self._kv_watch = KvWatch(endpoint, feeds)

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
        await self._kv_watch.close()

    def standings(self) -> Mapping[str, Standing]:
        """Live workers by name."""
        return self._fleet

    def index_metrics(self) -> IndexMetrics:
        """What workers told of their prefix caches."""
        metrics = self._kv_watch.metrics
        metrics.blocks = {
            worker: index.digest((worker, epoch))[0] for (worker, epoch), (_, index) in self.indices().items()
        }
        return metrics

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
            await self.wait_change()

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[Stream]:
        """The request's tokens; leaving the block cancels what still runs. Raises NoWorker, UnknownModel."""
        stream = Stream(self, request)
        self._streams[stream] = None
        try:
            await stream.start()
            yield stream
        finally:
            del self._streams[stream]
            await stream.close()

    # For Stream

    async def wait_change(self) -> None:
        """Returns when somebody came, left, or reported."""
        self._changed.clear()
        await self._changed.wait()

    def route(self, request: Request, avoid: Mapping[str, int]) -> tuple[Standing, Plan]:
        """Chooses and books. Raises NoWorker, UnknownModel."""
        roster = self._roster(request.model)
        fleet = roster.fleet(avoid, self._avoided())
        ask, found = roster.ask(request)
        choice = self._policy(clock.now(), ask, fleet, self._rng)
        if roster.corrects(ask, found, choice):
            choice = self._policy(clock.now(), ask, fleet, self._rng)
        roster.book(request.id, ask, found, choice)
        prefill = tuple(self._fleet[name].member.hop for name in choice.prefill)
        cached = roster.cached_tokens(ask, choice.prefill[0]) if prefill else 0
        return self._fleet[choice.decode], Plan(choice.decode, prefill, choice.wait_s, cached, choice.why)

    def prefilled(self, request: Request) -> None:
        """The first token came."""
        if (roster := self._rosters.get(request.model)) is not None:
            roster.prefilled(request.id, clock.now())

    def release(self, request: Request) -> None:
        """The request is on no worker any more."""
        if (roster := self._rosters.get(request.model)) is not None:
            roster.release(request.id, clock.now())

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
        self._kv_watch.update(self.indices())

    def indices(self) -> dict[Incarnation, tuple[Member, PrefixIndex]]:
        """Where what workers tell of their caches is entered, for those who tell anything."""
        seats: dict[Incarnation, tuple[Member, PrefixIndex]] = {}
        for member in [standing.member for standing in self._fleet.values()]:
            worker = incarnation(member)
            if member.kv_events and (index := self._rosters[member.model].index(worker)) is not None:
                seats[worker] = member, index
        return seats

    async def _watch(self, fleets: AsyncIterator[dict[str, Standing]]) -> None:
        # Who vanishes here gets nothing new. What it has goes on: only its own connection tells whether it lives.
        async for fleet in fleets:
            before = self._fleet
            self._update(fleet)
            self._changed.set()
            for name, standing in before.items():
                if name not in fleet or fleet[name].member.epoch != standing.member.epoch:
                    log.warning("%s (epoch %d) has left, or stopped reporting", name, standing.member.epoch)
            self._move_from_draining()

    def _move_from_draining(self) -> None:
        """Streams of workers that are about to leave go on elsewhere, where there is somebody who takes them."""
        models = {each.member.model: None for each in self._fleet.values() if not each.draining}
        for stream in self._streams:
            standing = self._fleet.get(stream.worker)
            if standing is not None and standing.draining and standing.member.model in models:
                stream.move()
