"""Existing OpenAI-compatible servers as a router's fleet: what they serve, how loaded they are, what their caches hold.

    silent -> asked for its models -> in the fleet: polled, its KV events followed -> gone: forgotten at once, and asked

A server in the fleet is an incarnation; one that comes back is another, with an empty cache. It counts as gone when
nobody listens at its address, when its counters go backwards, or when it fails `FAILURES` looks in a row: a server
that is busy answers late, which is no reason to forget its cache.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from penstock import config
from penstock.blocks import KvLayout
from penstock.clock import now
from penstock.cluster import Load, Member, Role, Standing
from penstock.errors import NoWorker, SetupError, UnknownModel, WireError, WorkerError
from penstock.policy.kv_feed import Change, FeedCounts, KvFeed, Message, apply
from penstock.policy.prefix_index import PrefixIndex
from penstock.policy.prefixes import GRAIN_TOKENS, incarnation
from penstock.policy.routing.roster import Roster
from penstock.serve.engine_metrics import Reading, read_metrics
from penstock.serve.upstream import Unreachable, Upstream
from penstock.wire.api import EventSource, Subscribe

log = logging.getLogger(__name__)

POLL_S = 1.0
LOOK_S = 5.0  # for one look at a server
FAILURES = 3
PIECE = 64  # messages of a replay
QUIET_S = 5.0  # after so long without a KV event the engine is asked whether there was one
AVOID_S = 5.0  # a server that failed a request gets another one only if nobody else can
ASSUMED_CACHE_TOKENS = 1 << 18  # of a server that does not say how large its cache is
BOOTSTRAP_PORT = 8998  # SGLang's default
DOMAIN = "attached"  # prefill servers reach every decode server

Kind = Literal["vllm", "sglang", "other"]


@dataclass(frozen=True, slots=True)
class Address:
    """A server, as the command line names it: URL, or URL,events=tcp://HOST:PORT,replay=tcp://HOST:PORT,...

    `rank` makes one data-parallel engine of a server a worker of its own; the URL is then named once for each.
    `bootstrap` is the port of an SGLang prefill server's bootstrap.
    """

    url: str
    events: str = ""
    replay: str = ""
    rank: int | None = None
    bootstrap: int = BOOTSTRAP_PORT

    @property
    def name(self) -> str:
        host = urlsplit(self.url).netloc
        return host if self.rank is None else f"{host}#{self.rank}"

    @property
    def host(self) -> str:
        """As other hosts reach it, with the brackets that an IPv6 address needs."""
        found = urlsplit(self.url).hostname or ""
        return f"[{found}]" if ":" in found else found


def parse_address(text: str) -> Address:
    """Raises SetupError."""
    url, _, rest = text.partition(",")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SetupError(f"{url!r} is no server: write http://HOST:PORT, with what else it needs after commas")
    given: dict[str, str] = {}
    for setting in rest.split(",") if rest else ():
        name, _, value = setting.partition("=")
        if not value or name in (*given, "url"):
            raise SetupError(f"server {url}: {setting!r} is no setting, or is there twice; write NAME=VALUE")
        given[name] = value
    return config.parse(Address, {**given, "url": url.rstrip("/").removesuffix("/v1")}, f"server {url}")


class _Card(msgspec.Struct, frozen=True):
    id: str
    parent: str | None = None  # of an adapter: the model that it adapts
    max_model_len: int | None = None
    owned_by: str = ""


class _Cards(msgspec.Struct, frozen=True):
    data: list[_Card]


class _Publisher(msgspec.Struct, frozen=True):
    endpoint: str = ""
    replay_endpoint: str | None = None


_read_cards = msgspec.json.Decoder(_Cards).decode
_read_publishers = msgspec.json.Decoder(dict[str, _Publisher]).decode


@dataclass(frozen=True, slots=True)
class About:
    """What a server told when it was asked. `models` maps the names it answers to, to the model beneath an adapter."""

    models: Mapping[str, str]
    kind: Kind
    max_context_tokens: int
    tokenizes: bool  # it has vLLM's /tokenize
    events: str = ""
    replay: str = ""


class Server:
    """One server. `standing` is None while it is not in the fleet."""

    def __init__(self, address: Address, role: Role) -> None:
        self.address = address
        self.role: Role = role
        self.about = About({}, "other", 0, False)
        self.standing: Standing | None = None
        self.epoch = 0
        self.counts = FeedCounts()
        self.indexed_blocks = 0
        self._doubted = asyncio.Event()

    @property
    def name(self) -> str:
        return self.address.name

    def doubt(self) -> None:
        """A request could not reach it: look now."""
        self._doubted.set()

    async def wait_look(self) -> None:
        """Returns when it is time to look again."""
        try:
            async with asyncio.timeout(POLL_S):
                await self._doubted.wait()
        except TimeoutError:
            pass
        self._doubted.clear()

    def come(self, about: About, reading: Reading | None) -> None:
        """It is there, with an empty cache as far as anybody knows."""
        self.epoch += 1
        self.about = about
        self.counts, self.indexed_blocks = FeedCounts(), 0
        block_tokens = reading.block_tokens if reading and reading.block_tokens else GRAIN_TOKENS
        blocks = reading.blocks if reading and reading.blocks else ASSUMED_CACHE_TOKENS // block_tokens
        member = Member(
            worker=self.name,
            epoch=self.epoch,
            role=self.role,
            model=next(iter(about.models.values())),
            addresses=(self.address.url,),
            layout=_layout(block_tokens),
            blocks=blocks,
            max_context_tokens=about.max_context_tokens,
            domain=DOMAIN if self.role != "any" else "",
            engine=about.kind,
        )
        self.standing = Standing(member, reading.load if reading else Load())

    def leave(self) -> None:
        """It is gone, and what it held with it."""
        self.standing, self.indexed_blocks = None, 0

    def report(self, reading: Reading) -> bool:
        """Its load as it is now; false if its counters went back, so that this is another incarnation."""
        assert self.standing is not None
        before, self.standing = self.standing, msgspec.structs.replace(self.standing, load=reading.load)
        return reading.load.prompt_tokens >= before.load.prompt_tokens

    def tell(self, block_tokens: int, endpoint: str) -> None:
        """Its events say from now on what it holds, in blocks of this size."""
        assert self.standing is not None
        member = self.standing.member
        tokens = member.blocks * member.layout.block_tokens
        told = msgspec.structs.replace(
            member, kv_events=endpoint, layout=_layout(block_tokens), blocks=tokens // block_tokens
        )
        self.standing = msgspec.structs.replace(self.standing, member=told)


def _layout(block_tokens: int) -> KvLayout:
    """How large KV is nobody tells; it matters only in comparison, and all servers of a model are alike."""
    return KvLayout(layers=32, kv_heads=8, head_dim=128, block_tokens=block_tokens, dtype="bfloat16")


class Attached:
    """The fleet; used as `async with`. Owns the rosters of the models that are served.

    KV events are about tokens: they are of use only where the router tokenizes, or the server can be asked to.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[Address, Role]],
        upstream: Upstream,
        subscribe: Subscribe,
        tokenizes: bool,
    ) -> None:
        self.servers = {address.name: Server(address, role) for address, role in addresses}
        if len(self.servers) < len(addresses):
            raise SetupError("a server is named twice: give each once, or its data-parallel engines as URL,rank=K")
        self._upstream = upstream
        self._subscribe = subscribe
        self._tokenizes = tokenizes
        self._rosters: dict[str, Roster] = {}
        self._avoid_until_s: dict[tuple[str, int], float] = {}
        self._attending = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Attached:
        await self._attending.__aenter__()
        self._tasks = [self._attending.create_task(self._attend(server)) for server in self.servers.values()]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await self._attending.__aexit__(kind, error, trace)

    def standings(self) -> dict[str, Standing]:
        """Servers in the fleet by name."""
        return {name: server.standing for name, server in self.servers.items() if server.standing is not None}

    def models(self) -> dict[str, int]:
        """Names that clients can ask for, adapters included, with the most tokens that a request may have."""
        found: dict[str, int] = {}
        for server in self._present():
            for name in server.about.models:
                limit = server.about.max_context_tokens
                found[name] = min(limit, found.get(name, limit))
        return found

    def find(self, model: str) -> tuple[Roster, str]:
        """The roster that serves a name, and the adapter it stands for, if any. Raises UnknownModel, NoWorker."""
        present = list(self._present())
        if not present:
            raise NoWorker("no server is there: check their addresses and whether they run")
        server = next((each for each in present if model in each.about.models), None)
        if server is None:
            raise UnknownModel(f"no server has {model[:200]!r}; there is {', '.join(self.models())}", "model")
        base = server.about.models[model]
        return self._rosters[base], "" if base == model else model

    def without(self, model: str) -> list[str]:
        """Servers that do not answer to this name, though they may serve the model beneath it."""
        return [server.name for server in self._present() if model not in server.about.models]

    def tokenizing(self, model: str) -> str | None:
        """The URL of a server that turns prompts for this model into tokens, if one does."""
        return next(
            (each.address.url for each in self._present() if model in each.about.models and each.about.tokenizes), None
        )

    def avoid(self, name: str) -> None:
        """It just failed a request: prefer others for a moment, and look whether it is still there."""
        server = self.servers[name]
        self._avoid_until_s[(name, server.epoch)] = now() + AVOID_S
        server.doubt()

    def avoided(self) -> list[str]:
        """Who failed a request a moment ago and is still the same incarnation."""
        at_s = now()
        self._avoid_until_s = {key: until_s for key, until_s in self._avoid_until_s.items() if until_s > at_s}
        return [name for name, epoch in self._avoid_until_s if self.servers[name].epoch == epoch]

    async def wait_change(self) -> None:
        """Returns when a server came, left, reported or told what it holds."""
        self._changed.clear()
        await self._changed.wait()

    def _present(self) -> Iterator[Server]:
        return (server for server in self.servers.values() if server.standing is not None)

    def _update(self) -> None:
        models: dict[str, dict[str, Standing]] = {}
        for server in self._present():
            assert server.standing is not None
            for base in dict.fromkeys(server.about.models.values()):
                models.setdefault(base, {})[server.name] = server.standing
        for model in [model for model in self._rosters if model not in models]:
            del self._rosters[model]
        for model, standings in models.items():
            self._rosters.setdefault(model, Roster(None)).update(standings, now())
        self._changed.set()

    # One task for each server

    async def _attend(self, server: Server) -> None:
        complaint: str | None = None
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    about = await self._ask_about(server.address)
                    reading = await self._look(server)
            except (WorkerError, TimeoutError, msgspec.MsgspecError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    log.warning("%s is not there: %s", server.name, complaint or f"no answer within {LOOK_S:g} s")
            else:
                complaint = None
                server.come(about, reading)
                self._update()
                log.info("%s serves %s", server.name, ", ".join(about.models))
                await self._keep(server)
                server.leave()
                self._update()
            await server.wait_look()

    async def _keep(self, server: Server) -> None:
        """Returns when the server is gone."""
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._follow(server))
            reason = await self._poll(server)
            log.warning("%s is gone: %s", server.name, reason)
            following.cancel()

    async def _poll(self, server: Server) -> str:
        """Keeps its load up to date. Returns why it is taken to be gone."""
        failures = 0
        while True:
            await server.wait_look()
            try:
                async with asyncio.timeout(LOOK_S):
                    reading = await self._look(server)
            except Unreachable as error:
                return str(error)
            except (WorkerError, TimeoutError) as error:
                failures += 1
                if failures == FAILURES:
                    return str(error) or f"no answer within {LOOK_S:g} s, {FAILURES} times"
                continue
            failures = 0
            if reading is None:
                continue
            if not server.report(reading):
                return "its counters begin anew, so it was restarted"
            self._update()

    # What a server says

    async def _ask_about(self, address: Address) -> About:
        """Raises WorkerError for a server that is not ready, MsgspecError for one that is no such server."""
        cards = _read_cards(await self._get(address, "/v1/models")).data
        if not cards:
            raise NoWorker(f"{address.name} serves no model yet")
        names = {card.id for card in cards}
        owners = {card.owned_by for card in cards}
        kind: Kind = "vllm" if "vllm" in owners else "sglang" if "sglang" in owners else "other"
        probe = msgspec.json.encode({"model": cards[0].id, "prompt": "a"})
        status, _ = await self._upstream.fetch(f"{address.url}/tokenize", probe, {"content-type": "application/json"})
        events, replay = await self._find_events(address)
        return About(
            models={card.id: card.parent if card.parent in names and card.parent else card.id for card in cards},
            kind=kind,
            max_context_tokens=min(card.max_model_len or 1 << 30 for card in cards),
            tokenizes=status == 200 and kind != "sglang",
            events=events,
            replay=replay,
        )

    async def _find_events(self, address: Address) -> tuple[str, str]:
        """Endpoints as the address gives them, else as vLLM does; empty where neither says."""
        if address.events:
            return address.events, address.replay
        status, body = await self._upstream.get(f"{address.url}/kv_event_sources")
        if status != 200:
            return "", ""
        try:
            publishers = _read_publishers(body)
        except msgspec.MsgspecError:  # something else lives at that path
            return "", ""
        if address.rank is None and len(publishers) > 1:
            log.warning(
                "%s has %d data-parallel engines, and only the first one's events are read: name it as %s,rank=0 ...",
                address.name,
                len(publishers),
                address.url,
            )
        publisher = publishers.get(str(address.rank or 0), _Publisher())
        return _seen_from_here(publisher.endpoint, address), _seen_from_here(publisher.replay_endpoint or "", address)

    async def _look(self, server: Server) -> Reading | None:
        """Whether it lives, and its load if it says. Raises WorkerError."""
        address = server.address
        status, _ = await self._upstream.get(f"{address.url}/health")
        if status not in (200, 404):
            raise WorkerError(f"{address.name}/health answers {status}")
        status, page = await self._upstream.get(f"{address.url}/metrics")
        if status != 200:
            return None
        try:
            return read_metrics(page.decode(errors="replace"), address.rank, now())
        except (ValueError, OverflowError) as error:  # no page of metrics, or numbers that are none
            log.debug("%s/metrics cannot be read: %s", address.name, error)
            return None

    async def _get(self, address: Address, path: str) -> bytes:
        status, body = await self._upstream.get(address.url + path)
        if status != 200:
            raise WorkerError(f"{address.name}{path} answers {status}")
        return body

    # What its cache holds

    async def _follow(self, server: Server) -> None:
        """Its KV events, as long as it is there."""
        about = server.about
        if not about.events:
            return
        if not (self._tokenizes or about.tokenizes):
            log.warning("%s: its KV events are not read, since nobody tokenizes; use --tokenizer", server.name)
            return
        try:
            async with self._subscribe(about.events, about.replay) as source:
                await self._follow_source(server, source)
        except (SetupError, WireError) as error:
            log.error("%s: its KV events are not read: %s", server.name, error)

    async def _follow_source(self, server: Server, source: EventSource) -> None:
        feed = KvFeed()
        server.counts = feed.counts
        await self._fill(server, feed, await source.replay(0))
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    message = await source.read()
            except TimeoutError:  # was the last message lost, or one from before the subscription reached the engine?
                await self._fill(server, feed, await source.replay(feed.expected))
                continue
            self._apply(server, feed, feed.take(*message))
            if feed.missing is not None:
                await self._fill(server, feed, await source.replay(feed.missing))

    async def _fill(self, server: Server, feed: KvFeed, replayed: Sequence[Message]) -> None:
        """Takes a replay, which can be long, in pieces: requests go on meanwhile."""
        for start in range(0, len(replayed), PIECE):
            for message in replayed[start : start + PIECE]:
                self._apply(server, feed, feed.take(*message))
            await asyncio.sleep(0)
        self._apply(server, feed, feed.fill(()))

    def _apply(self, server: Server, feed: KvFeed, changes: Sequence[Change]) -> None:
        assert server.standing is not None
        is_first = feed.block_tokens > 0 and not server.standing.member.kv_events
        if is_first:
            server.tell(feed.block_tokens, server.about.events)
            self._update()
        index, worker = self._index(server), incarnation(server.standing.member)
        if index is not None:
            if is_first:
                index.tell(worker, True)
            apply(changes, index, worker)
        server.indexed_blocks = len(feed)
        self._changed.set()

    def _index(self, server: Server) -> PrefixIndex | None:
        """Of the model whose blocks its events are about: the first it serves."""
        assert server.standing is not None
        member = server.standing.member
        return self._rosters[member.model].index(incarnation(member)) if member.kv_events else None


def _seen_from_here(endpoint: str, address: Address) -> str:
    """An endpoint that a server binds, as one to connect to."""
    host = address.host
    for everywhere in ("*", "0.0.0.0", "[::]"):
        endpoint = endpoint.replace(f"tcp://{everywhere}:", f"tcp://{host}:")
    return endpoint
