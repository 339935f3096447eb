"""The router alone: OpenAI's API in front of existing servers. A policy chooses one, or a pair; bytes pass as they are.

    read the body -> tokenize, look up -> choose and book -> ask the server -> its head and first bytes -> the client

Until the first byte has left for the client another server can be asked: if this one dies, is full (429, 503), or
cannot be reached. After that a failure ends the stream with an error event. However a request ends, its booking is
released, and a server whose client left is hung up on at once.

    POST /v1/chat/completions  /v1/completions  /v1/embeddings
    GET  /v1/models  /health  /live  /ready  /metrics

Responses carry `x-penstock-server`, the server that answered, and `x-penstock-prefill`, the one that prefilled for it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from random import Random

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from penstock import __version__, metrics
from penstock.clock import now, wall_s
from penstock.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    MethodNotAllowed,
    NotFound,
    NoWorker,
    Overloaded,
    PenstockError,
    Unauthorized,
    WorkerDraining,
    WorkerError,
)
from penstock.policy.kv_feed import salt_of
from penstock.policy.routing.api import Ask, Choice, Route, handing_over
from penstock.policy.routing.roster import Roster
from penstock.request import Request, Sampling
from penstock.serve import openai, two_calls
from penstock.serve.attached import Attached, Server
from penstock.serve.frontend import LAST_WORDS_S, OPEN_PATHS
from penstock.serve.http import Exchange, Receive, Scope, Send
from penstock.serve.prompts import Prompts, Wanted, read_wanted
from penstock.serve.pulse import Pulse
from penstock.serve.upstream import HOP_BY_HOP, Reply, Upstream

log = logging.getLogger(__name__)

FULL = (429, 503)  # another server may have room
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """As `FrontendOptions` has them. `passes_key`: servers get the client's own key, since this router has none."""

    api_key: str = field(default="", repr=False)
    inflight: int = 4096
    body_bytes: int = 64 << 20
    timeout_s: float = 600.0
    slow_client_s: float = 30.0

    @property
    def passes_key(self) -> bool:
        return not self.api_key


@dataclass(slots=True, eq=False)
class _Passage:
    """One request on its way."""

    exchange: Exchange
    body: bytes
    wanted: Wanted
    request: Request  # as a policy and the index see it
    roster: Roster
    arrived_s: float
    tried: dict[str, int]  # servers that failed it, or were full
    prefill: str = ""  # the server that prefilled
    blamed: str = ""  # the server that failed the last attempt, if not the one that should have answered


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What a full server said, for the client if all others are full too."""

    status: int
    kind: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Proxy:
    """An ASGI application, used as `async with`."""

    def __init__(
        self,
        attached: Attached,
        upstream: Upstream,
        prompts: Prompts,
        policy: Route,
        rng: Random,
        options: ProxyOptions = ProxyOptions(),
    ) -> None:
        self.metrics = metrics.Metrics()
        self._attached = attached
        self._upstream = upstream
        self._prompts = prompts
        self._policy = policy
        self._rng = rng
        self._options = options
        self._answers: dict[str, int] = {}  # by server
        self._deadlines: dict[asyncio.Timeout, None] = {}
        self._closes_s = math.inf
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._since = int(wall_s())
        self._pulse = Pulse(0.1)
        self._pulse_task: asyncio.Task[None] | None = None
        self._routes: dict[str, tuple[str, Callable[[Exchange], Awaitable[None]]]] = {
            "/v1/chat/completions": ("POST", self._pass),
            "/v1/completions": ("POST", self._pass),
            EMBEDDINGS: ("POST", self._pass),
            "/v1/models": ("GET", self._list_models),
            "/health": ("GET", self._show_health),
            "/live": ("GET", self._show_live),
            "/ready": ("GET", self._show_ready),
            "/metrics": ("GET", self._show_metrics),
        }

    async def __aenter__(self) -> Proxy:
        self._pulse_task = asyncio.create_task(self._pulse.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pulse_task is not None:
            self._pulse_task.cancel()
            await asyncio.wait([self._pulse_task])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"penstock serves HTTP only, not {scope['type']}")
        exchange = Exchange(scope, receive, send, f"{self._rng.getrandbits(96):024x}")
        try:
            await self._dispatch(exchange)
        except Cancelled:
            exchange.abort()
        except Exception as error:
            await self._refuse(exchange, error)

    async def drain(self, grace_s: float) -> None:
        """Takes no new requests; those that run end within `grace_s`, by an error at last."""
        self._closes_s = now() + grace_s
        for deadline in self._deadlines:
            deadline.reschedule(min(self._closes_s, deadline.when() or self._closes_s))
        try:
            async with asyncio.timeout_at(self._closes_s + 2 * LAST_WORDS_S):
                await self._is_idle.wait()
        except TimeoutError:
            log.warning("%d requests did not end in time", self.metrics.inflight)

    async def _dispatch(self, exchange: Exchange) -> None:
        if exchange.path not in self._routes:
            raise NotFound(f"there is nothing at {exchange.path[:200]}; there is {', '.join(self._routes)}")
        method, handler = self._routes[exchange.path]
        if exchange.path not in OPEN_PATHS:
            self._check_key(exchange)
        if exchange.method != method and (exchange.method, method) != ("HEAD", "GET"):
            raise MethodNotAllowed(f"{exchange.path} is for {method}, not {exchange.method[:20]}")
        await handler(exchange)

    def _check_key(self, exchange: Exchange) -> None:
        key = self._options.api_key
        given = exchange.headers.get(b"authorization", b"")
        if key and not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise Unauthorized("the API key is missing or wrong; send the header Authorization: Bearer KEY")

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts the request while inside the block. Raises Overloaded or WorkerDraining."""
        if self._closes_s < math.inf:
            raise WorkerDraining("this router is shutting down; ask another one")
        if self.metrics.inflight >= self._options.inflight:
            raise Overloaded(f"{self.metrics.inflight} requests are running, the most that this router takes")
        self.metrics.inflight += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self.metrics.inflight -= 1
            if not self.metrics.inflight:
                self._is_idle.set()

    # One request

    async def _pass(self, exchange: Exchange) -> None:
        arrived_s = now()
        with self._admitted():
            body = await exchange.read_body(self._options.body_bytes)
            try:
                async with asyncio.TaskGroup() as group:
                    watcher = group.create_task(exchange.watch_client(self._options.slow_client_s))
                    await self._answer(exchange, body, arrived_s)
                    watcher.cancel()
            except* Cancelled:
                exchange.abort()

    async def _answer(self, exchange: Exchange, body: bytes, arrived_s: float) -> None:
        """Answers errors as well: beyond the task group they are wrapped."""
        try:
            async with asyncio.timeout_at(min(arrived_s + self._options.timeout_s, self._closes_s)) as deadline:
                self._deadlines[deadline] = None
                try:
                    passage = await self._understand(exchange, body, arrived_s)
                    await self._try_servers(passage)
                finally:
                    del self._deadlines[deadline]
        except Exception as error:
            await self._refuse(exchange, error)

    async def _understand(self, exchange: Exchange, body: bytes, arrived_s: float) -> _Passage:
        """Raises BadRequest, UnknownModel or NoWorker."""
        kind = exchange.headers.get(b"content-type", b"application/json")
        if kind.partition(b";")[0].strip().lower() != b"application/json":
            # Also what keeps web pages of other origins from asking: a browser sends them no other type unasked.
            raise BadRequest("the body must be JSON; send the header Content-Type: application/json")
        wanted = read_wanted(body)
        models = self._attached.models()
        if not wanted.model and len(models) == 1:
            wanted = msgspec.structs.replace(wanted, model=next(iter(models)))
        roster, adapter = self._attached.find(wanted.model)
        url = self._attached.tokenizing(wanted.model)
        prompt = await self._prompts.tokens(wanted, models[wanted.model], url)
        request = Request(
            id=exchange.id,
            model=wanted.model,
            prompt=prompt,
            sampling=Sampling(1 if exchange.path == EMBEDDINGS else wanted.output_tokens),
            salt=salt_of(adapter, wanted.cache_salt),
        )
        tried = dict.fromkeys(self._attached.without(wanted.model), 0)
        return _Passage(exchange, body, wanted, request, roster, arrived_s, tried)

    async def _try_servers(self, passage: _Passage) -> None:
        """Asks one server after another. Raises the last one's error when all have failed."""
        refusal: _Refusal | None = None
        failure: WorkerError | None = None
        while True:
            try:
                decode, prefill = self._choose(passage)
            except NoWorker as error:
                if refusal is not None:
                    await passage.exchange.respond(refusal.status, refusal.body, refusal.kind, refusal.headers)
                    return
                raise failure or error from None
            try:
                refusal = await self._ask(passage, decode, prefill)
                if refusal is None:
                    return
            except WorkerError as error:
                log.warning("request %s: %s", passage.exchange.name, error)
                metrics.count(self.metrics.errors, error.code or "worker_error")
                self._attached.avoid(passage.blamed or decode.name)
                if passage.exchange.is_started:
                    raise
                failure = error
            finally:
                passage.roster.release(passage.request.id, now())
            passage.tried[passage.blamed or decode.name] = 1

    def _choose(self, passage: _Passage) -> tuple[Server, list[Server]]:
        """Who answers and who may prefill for it, best first; books. Raises NoWorker."""
        roster, request = passage.roster, passage.request
        roster.fleet(now(), passage.tried)  # raises NoWorker if nobody is left
        ask, found = roster.ask(request)
        choice = self._decide(passage, ask)
        if roster.corrects(ask, found, choice):
            choice = self._decide(passage, ask)
        roster.book(request.id, ask, found, choice, now())
        log.debug("request %s: %s", passage.exchange.name, choice.why)
        servers = self._attached.servers
        return servers[choice.decode], [servers[name] for name in choice.prefill]

    def _decide(self, passage: _Passage, ask: Ask) -> Choice:
        """Raises NoWorker."""
        fleet = passage.roster.fleet(now(), passage.tried, self._attached.avoided())
        choice = self._policy(now(), ask, fleet, self._rng)
        if self._can_serve(choice):
            return choice
        fleet = passage.roster.fleet(now(), passage.tried)
        choice = handing_over("sglang", fleet, fleet.queued_tokens + ask.uncached_tokens, fleet.streams, self._rng)
        if not self._can_serve(choice):
            raise NoWorker("SGLang needs a prefill server and a decode server, and there are none of one kind")
        return choice

    def _can_serve(self, choice: Choice) -> bool:
        """False for what only SGLang cannot: its decode servers do not prefill, nor its prefill servers decode."""
        decode, *prefill = (self._attached.servers[name] for name in (choice.decode, *choice.prefill[:1]))
        if decode.about.kind != "sglang" or decode.role == "any":
            return True
        return decode.role == "decode" and any(server.role == "prefill" for server in prefill)

    async def _ask(self, passage: _Passage, decode: Server, prefill: list[Server]) -> _Refusal | None:
        """Has the request answered; returns what a full server said instead. Raises WorkerError."""
        passage.prefill = passage.blamed = ""
        if passage.exchange.path == EMBEDDINGS or not prefill:
            return await self._relay(passage, decode, passage.body)
        body: two_calls.Body = msgspec.json.decode(passage.body)
        if decode.about.kind == "sglang":
            return await self._ask_both(passage, decode, prefill[0], body)
        return await self._relay(passage, decode, await self._prefill(passage, prefill, body))

    async def _prefill(self, passage: _Passage, servers: list[Server], body: two_calls.Body) -> bytes:
        """The body for the decode server. If no prefill server can help, the client's own: it then prefills itself."""
        asked = msgspec.json.encode(two_calls.vllm_prefill(body))
        for server in servers:
            try:
                status, answer = await self._upstream.fetch(*self._call(passage, server, asked))
                if status != 200:
                    raise WorkerError(f"{server.name} answers {status} to a prefill")
                ready = msgspec.json.encode(two_calls.vllm_decode(body, answer))
            except WorkerError as error:
                log.warning("request %s: %s", passage.exchange.name, error)
                metrics.count(self.metrics.errors, "prefill_failed")
                self._attached.avoid(server.name)
            else:
                passage.prefill = server.name
                return ready
        return passage.body

    async def _ask_both(
        self, passage: _Passage, decode: Server, prefill: Server, body: two_calls.Body
    ) -> _Refusal | None:
        """SGLang's way: the same request to both at once. If one fails, so does the other."""
        address = prefill.address
        asked = msgspec.json.encode(two_calls.sglang_both(body, address.host, address.bootstrap, self._rng))
        passage.prefill = prefill.name
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._prefill_beside(passage, prefill, asked))
                return await self._relay(passage, decode, asked)
        except* WorkerError as errors:
            raise _first_of(errors) from errors

    async def _prefill_beside(self, passage: _Passage, server: Server, asked: bytes) -> None:
        try:
            status, _ = await self._upstream.fetch(*self._call(passage, server, asked))
            if status != 200:
                raise WorkerError(f"{server.name} answers {status} to a prefill")
        except WorkerError:
            passage.blamed = server.name
            raise

    async def _relay(self, passage: _Passage, server: Server, body: bytes) -> _Refusal | None:
        """The server's answer as it is. Raises WorkerError."""
        async with self._upstream.post(*self._call(passage, server, body)) as reply:
            headers = [*reply.headers, (b"x-penstock-server", server.name.encode())]
            if passage.prefill:
                headers.append((b"x-penstock-prefill", passage.prefill.encode()))
            if reply.is_events:
                await self._relay_events(passage, reply, headers)
            else:
                whole = await reply.read()
                if reply.status in FULL:
                    return _Refusal(reply.status, reply.kind.encode(), headers, whole)
                self._note_first(passage)
                await passage.exchange.respond(reply.status, whole, reply.kind.encode(), headers)
        metrics.count(self._answers, server.name)
        series = self.metrics.model(passage.wanted.model)
        series.e2e_s.observe(now() - passage.arrived_s)
        metrics.count(series.finished, str(reply.status))
        return None

    async def _relay_events(self, passage: _Passage, reply: Reply, headers: list[tuple[bytes, bytes]]) -> None:
        exchange = passage.exchange
        async for chunk in reply.chunks():
            if not exchange.is_started:  # not sooner: what fails before the first byte can go to another server
                self._note_first(passage)
                await exchange.begin(reply.status, [(b"content-type", reply.kind.encode()), *headers])
            await exchange.write(chunk, now())
        if not exchange.is_started:
            raise WorkerError("a stream ended before its first event")
        await exchange.end(b"")

    def _note_first(self, passage: _Passage) -> None:
        at_s = now()
        passage.roster.prefilled(passage.request.id, at_s)
        series = self.metrics.model(passage.wanted.model)
        series.ttft_s.observe(at_s - passage.arrived_s)
        series.prompt_tokens += passage.request.prompt_tokens

    def _call(self, passage: _Passage, server: Server, body: bytes) -> tuple[str, bytes, Mapping[str, str]]:
        exchange = passage.exchange
        headers = {
            name: value.decode("latin-1")
            for name, value in ((name.decode("latin-1"), value) for name, value in exchange.headers.items())
            if name not in HOP_BY_HOP and (name != "authorization" or self._options.passes_key)
        }
        headers["x-request-id"] = exchange.name
        if server.address.rank is not None:
            headers["x-data-parallel-rank"] = str(server.address.rank)
        return server.address.url + exchange.path, body, headers

    # Errors

    def _explain(self, error: Exception) -> PenstockError:
        """What is told to the client."""
        if isinstance(error, PenstockError):
            return error
        if isinstance(error, TimeoutError):
            if self._closes_s < math.inf:
                return WorkerDraining("this router is shutting down; ask another one")
            return DeadlineExceeded(f"not done after {self._options.timeout_s:g} s; ask for less at a time")
        log.exception("a request failed", exc_info=error)
        return PenstockError("the router failed; its log says why")

    async def _refuse(self, exchange: Exchange, cause: Exception) -> None:
        """The error as the response, or as the end of one that has begun."""
        error = self._explain(cause)
        metrics.count(self.metrics.errors, error.code or error.type)
        if exchange.is_ended:
            return
        if exchange.is_started:
            try:
                async with asyncio.timeout(LAST_WORDS_S):
                    await exchange.end(openai.error_event(error))
            except TimeoutError:  # the client does not read
                exchange.abort()
            return
        headers = []
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", self._routes[exchange.path][0].encode()))
        await exchange.respond(error.status, openai.error_body(error), headers=headers)

    # What people and Prometheus want to see

    async def _list_models(self, exchange: Exchange) -> None:
        data = [
            {"id": name, "object": "model", "created": self._since, "owned_by": "penstock", "max_model_len": limit}
            for name, limit in self._attached.models().items()
        ]
        await exchange.respond(200, msgspec.json.encode({"object": "list", "data": data}))

    def _status(self) -> str:
        if self._closes_s < math.inf:
            return "draining"
        return "ready" if self._attached.models() else "no server"

    async def _show_live(self, exchange: Exchange) -> None:
        await exchange.respond(200, b'{"status":"live"}')

    async def _show_ready(self, exchange: Exchange) -> None:
        status = self._status()
        await exchange.respond(200 if status == "ready" else 503, msgspec.json.encode({"status": status}))

    async def _show_health(self, exchange: Exchange) -> None:
        status = self._status()
        fields = {
            "status": status,
            "version": __version__,
            "models": list(self._attached.models()),
            "servers": {name: _describe(server) for name, server in self._attached.servers.items()},
            "requests": self.metrics.inflight,
        }
        await exchange.respond(200 if status == "ready" else 503, msgspec.json.encode(fields))

    async def _show_metrics(self, exchange: Exchange) -> None:
        standings, index = self._attached.standings(), metrics.IndexMetrics()
        index.blocks = {name: server.indexed_blocks for name, server in self._attached.servers.items()}
        page = metrics.render(self.metrics, standings, (), index, self._pulse.delay_p99_s, self._of_servers())
        await exchange.respond(200, page, metrics.CONTENT_TYPE.encode())

    def _of_servers(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("penstock_server_up", "Whether a server is in the fleet", labels=["worker"])
        answers = CounterMetricFamily("penstock_server_answers", "Answers by this server", labels=["worker"])
        events = CounterMetricFamily(
            "penstock_kv_event_messages",
            "KV event messages and events, by what became of them",
            labels=["worker", "fate"],
        )
        for name, server in self._attached.servers.items():
            up.add_metric([name], server.standing is not None)
            answers.add_metric([name], self._answers.get(name, 0))
            for fate, times in asdict(server.counts).items():
                events.add_metric([name, fate], times)
        yield from (up, answers, events)


def _describe(server: Server) -> dict[str, object]:
    standing = server.standing
    if standing is None:
        return {"up": False}
    load = standing.load
    return {
        "up": True,
        "kind": server.about.kind,
        "role": server.role,
        "models": list(server.about.models),
        "running": load.running,
        "waiting": load.waiting,
        "kv_events": standing.member.kv_events,
        "indexed_blocks": server.indexed_blocks,
    }


def _first_of(errors: BaseExceptionGroup[WorkerError]) -> WorkerError:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
