"""The router: knows the fleet, and has its policy choose a pair for each request. What follows is `stream`'s."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random

from msgspec.structs import replace

from penstock import clock
from penstock.cluster import Member, ModelCard, Standing
from penstock.discovery.api import Discovery
from penstock.errors import NoWorker, UnknownModel, WorkerDraining, WorkerStalled
from penstock.metrics import IndexMetrics, QueueMetrics
from penstock.policy.admission import ServiceLevel
from penstock.policy.constraints import ANYWHERE, Steering
from penstock.policy.forecast import Forecast, forecast
from penstock.policy.liveness import Liveness
from penstock.policy.prefix_index import Incarnation, PrefixIndex
from penstock.policy.prefixes import incarnation
from penstock.policy.routing import pairs
from penstock.policy.routing.api import Fleet, Route
from penstock.policy.routing.roster import Roster
from penstock.policy.routing.ways import Wiring
from penstock.request import Plan, Request
from penstock.serve import kv_events
from penstock.serve.admission import Admission
from penstock.serve.decisions import Decided, Decision, Journal
from penstock.serve.kv_watch import CallFeed, KvWatch, NewFeed
from penstock.serve.rpc import Endpoint
from penstock.serve.stream import Stream, StreamOptions

log = logging.getLogger(__name__)

FEEDS: Mapping[str, NewFeed] = {kv_events.CALL: CallFeed}


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`level` is what requests are admitted for; what is preferred is kept to while it costs at most `affinity_s`."""

    level: ServiceLevel = field(default_factory=ServiceLevel)
    affinity_s: float = 0.25


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
        service: ServiceOptions = ServiceOptions(),
        queued: QueueMetrics | None = None,
        feeds: Mapping[str, NewFeed] = FEEDS,
    ) -> None:
        self.options = options
        self.endpoint = endpoint
        self._discovery = discovery
        self._rng = rng
        self._policy = policy
        self._policy_name = policy.__module__.rpartition(".")[2]  # by which it is found, see `policy.routing.api`
        self._wiring = wiring
        self._admission: Admission | None = None  # where whatever comes may go
        if service.level.is_limited:
            self._admission = Admission(service.level, self._foresee, queued or QueueMetrics())
        self._steering = Steering(service.affinity_s)
        self._fleet: dict[str, Standing] = {}
        self._rosters: dict[str, Roster] = {}  # by model
        self._liveness = Liveness()
        self._journal = Journal()
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

    def stalled(self) -> Collection[str]:
        """Workers whose engines stand still: they get nothing, as long as there are others."""
        return self._liveness.stalled

    def decisions(self, request_id: str) -> list[Decided]:
        """How a request was routed, as long as that is remembered."""
        return self._journal.tell(request_id)

    def cards(self) -> dict[str, ModelCard]:
        """Models and adapters that live workers serve, by name."""
        found: dict[str, ModelCard] = {}
        for standing in self._fleet.values():
            member = standing.member
            own = ModelCard(member.model, member.max_context_tokens, member.supports)
            for card in (own, *(replace(own, name=name, base=member.model) for name in member.adapters)):
                found[card.name] = _common(found.get(card.name, card), card)
        return found

    async def wait_ready(self, workers: int) -> None:
        """Returns when `workers` workers are there."""
        while len(self._fleet) < workers:
            await self.wait_change()

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[Stream]:
        """The request's tokens; leaving the block cancels what still runs.

        Raises NoWorker, UnknownModel, and what `admitted` raises.
        """
        stream = Stream(self, request)
        try:
            await stream.start()
            self._streams[stream] = None
            yield stream
        finally:
            self._streams.pop(stream, None)
            await stream.close()

    # For Stream

    async def wait_change(self) -> None:
        """Returns when somebody came, left, or reported."""
        self._changed.clear()
        await self._changed.wait()

    def admitted(self, request: Request) -> AbstractAsyncContextManager[None]:
        """Entered when it is the request's turn, to be routed at once. Raises Overloaded, DeadlineExceeded."""
        return _NO_WAIT if self._admission is None else self._admission.admitted(request)

    def route(self, request: Request, avoid: Mapping[str, int]) -> tuple[Standing, Plan]:
        """Chooses and books. Raises NoWorker, UnknownModel."""
        roster, now, avoided = self._roster(request.model), clock.now(), self._avoided()
        fleet, policy = self._constrained(now, request, avoid, avoided)
        ask, found = roster.ask(request)
        choice = policy(now, ask, fleet, self._rng)
        if roster.corrects(ask, found, choice):
            choice = policy(now, ask, fleet, self._rng)
        roster.book(request.id, ask, found, choice, now)
        self._steering.note(request, self._fleet[choice.decode].member)
        prefill = tuple(self._fleet[name].member.hop for name in choice.prefill)
        cached = roster.cached_tokens(ask, choice.prefill[0]) if prefill else 0
        decision = Decision(
            *(now, self._policy_name, choice, ask.prompt_tokens, roster.cached_tokens(ask, choice.decode), cached),
            workers=len(fleet.names),
            passed_over=tuple(dict.fromkeys((*avoid, *self._liveness.stalled, *avoided))),
        )
        self._journal.note(request.id, decision)
        return self._fleet[choice.decode], Plan(choice.decode, prefill, choice.wait_s, cached, choice.why)

    def _usable(self, roster: Roster, now: float, tried: Collection[str], avoided: Collection[str]) -> Fleet:
        """Whom to choose from: those that stand still only where there is nobody else. Raises NoWorker."""
        if not (stalled := self._liveness.stalled):
            return roster.fleet(now, tried, avoided)
        try:
            return roster.fleet(now, (*tried, *stalled), avoided)
        except NoWorker:
            return roster.fleet(now, tried)

    def prefilled(self, request: Request) -> None:
        """The first token came."""
        self._journal.prefilled(request.id)
        if (roster := self._rosters.get(request.model)) is not None:
            roster.prefilled(request.id, clock.now())
        if self._admission is not None:
            self._admission.began(request)

    def moved(self, request: Request) -> None:
        """The second token came."""
        if (roster := self._rosters.get(request.model)) is not None:
            roster.moved(request.id)

    def release(self, request: Request) -> None:
        """The request is on no worker any more."""
        if (roster := self._rosters.get(request.model)) is not None:
            roster.release(request.id, clock.now())
        if self._admission is not None:
            self._admission.ended(request)

    def avoid(self, standing: Standing) -> None:
        """A worker just lost a request: prefer others for a moment."""
        now, member = clock.now(), standing.member
        self._avoid_until_s = {key: until_s for key, until_s in self._avoid_until_s.items() if until_s > now}
        self._avoid_until_s[(member.worker, member.epoch)] = now + self.options.avoid_s

    def _foresee(self, request: Request) -> Forecast:
        """What the request would meet if it were routed now. Raises NoWorker, UnknownModel."""
        now = clock.now()
        fleet, policy = self._constrained(now, request, (), self._avoided())
        ask, _ = self._roster(request.model).ask(request)
        return forecast(ask, fleet, policy(now, ask, fleet, self._rng))

    def _constrained(
        self, now: float, request: Request, tried: Collection[str], avoided: Collection[str]
    ) -> tuple[Fleet, Route]:
        """The workers that the request may go to, and how to choose among them. Raises NoWorker, UnknownModel."""
        roster = self._roster(request.model)
        fleet = self._usable(roster, now, tried, avoided)
        if request.constraints == ANYWHERE:
            return fleet, self._policy
        try:
            fleet = self._steering.narrowed(request, fleet, self._fleet)
        except NoWorker:  # an avoided worker is better than none
            fleet = self._steering.narrowed(request, roster.fleet(now, tried), self._fleet)
        return fleet, self._steering.keeping(self._policy, request, fleet, self._fleet)

    def _has_place(self, request: Request, leaving: Collection[str]) -> bool:
        """Whether anybody else takes the request now."""
        try:
            fleet = self._roster(request.model).fleet(clock.now(), leaving)
            self._steering.narrowed(request, fleet, self._fleet)
        except (NoWorker, UnknownModel):
            return False
        return True

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
        now = clock.now()
        self._fleet = fleet
        models: dict[str, dict[str, Standing]] = {}
        for name, standing in fleet.items():
            models.setdefault(standing.member.model, {})[name] = standing
        for model in [model for model in self._rosters if model not in models]:
            del self._rosters[model]  # bookings and all: its streams may go on, but load nobody that is there
            self._steering.forget(model)
        for model, standings in models.items():
            self._rosters.setdefault(model, Roster(self._wiring)).update(standings, now)
        self._kv_watch.update(self.indices())
        if self._admission is not None:
            self._admission.look()

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
            self._judge_progress()
            self._move_streams()

    def _judge_progress(self) -> None:
        stalled, moving = self._liveness.update(self._fleet)
        for name, seen in stalled.items():
            load = self._fleet[name].load
            log.warning(
                "%s stands still: no step for %.0f s, in a call that may take %.0f s; %d sequences run there, %d wait. "
                "It gets nothing new and its streams move where there is another worker. "
                "Look at its log and its device, and restart it if it stays so",
                *(name, seen.still_s, seen.bound_s, load.running, load.waiting),
            )
        for name, seen in moving.items():
            log.warning("%s moves again after %.0f s: it gets requests as before", name, seen.still_s)

    def _move_streams(self) -> None:
        """Streams of workers that are about to leave or stand still go on where somebody takes them."""
        leaving = {name: why for name in self._fleet if (why := self._why_leave(name)) is not None}
        if not leaving:
            return
        for stream in self._streams:
            why = leaving.get(stream.worker)
            if why is not None and self._has_place(stream.request, leaving):
                stream.move(why)

    def _why_leave(self, name: str) -> WorkerDraining | WorkerStalled | None:
        if self._fleet[name].draining:
            return WorkerDraining(f"{name} is draining")
        if (seen := self._liveness.stalled.get(name)) is not None:
            return WorkerStalled(f"{name} made no step for {seen.still_s:.0f} s, of at most {seen.bound_s:.0f} s")
        return None


_NO_WAIT = nullcontext()


def _common(one: ModelCard, other: ModelCard) -> ModelCard:
    """What workers of both kinds can do."""
    limit = min(one.max_context_tokens, other.max_context_tokens)
    supports = tuple(feature for feature in one.supports if feature in other.supports)
    return replace(one, max_context_tokens=limit, supports=supports)
