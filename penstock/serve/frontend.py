"""The HTTP side: OpenAI's API, and what people and Prometheus want to see. The start of every request's path.

    read the body -> understand it -> tokenize -> `Backend.generate` -> tokens -> text -> events -> the end

A request is one coroutine. It holds the backend's stream in an `async with`, so however it ends (the last token, a
stop string, an error, the deadline, a client that left or does not read) the workers stop at once.

    GET  /v1/models  /v1/models/{id}            POST /v1/completions  /v1/chat/completions  /tokenize  /detokenize
    GET  /health  /live  /ready  /metrics  /debug/requests  /debug/requests/{id}  /openapi.json  /

Every response carries `x-request-id`, the client's own if it sent a sane one; it, or the `id` of an answer, finds
what happened to the request, and why it was routed so, under /debug/requests/. `x-penstock-timeline: 1`, or
`"penstock": {"timeline": true}` in the body, adds what happened to the answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Literal, Protocol

import msgspec

from penstock import __version__, metrics
from penstock.clock import now, wall_s
from penstock.cluster import ModelCard, Standing
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
    UnknownModel,
    WorkerDraining,
)
from penstock.request import Constraints, Finish, Request, Timeline, Token
from penstock.serve import openai, openapi, tokenize
from penstock.serve.answer import Answer, Choice, Manner, Record
from penstock.serve.decisions import Decided, compare
from penstock.serve.generation_config import NO_DEFAULTS, Defaults
from penstock.serve.http import Exchange, Receive, Scope, Send
from penstock.serve.intake import check_needs, encode_prompts, requests_of, sampling_of, told_of
from penstock.serve.keys import Keys
from penstock.serve.openai import Dialect, Heading
from penstock.serve.pulse import Pulse
from penstock.serve.rpc import Call
from penstock.serve.rpc import Handler as RpcHandler
from penstock.serve.siblings import Siblings
from penstock.serve.text import Tokenizer
from penstock.serve.wishes import constraints_of, timeout_of

log = logging.getLogger(__name__)


class TokenStream(Protocol):
    """One request's output. `timeline` is what the workers have told so far, None before the first token.

    `prompt_logprobs` are those of the prompt's tokens but the first, if asked for; they come with the first token.
    """

    timeline: Timeline | None
    prompt_logprobs: list[Token] | None

    async def read(self) -> tuple[list[Token], Finish | None]:
        """Waits for news: tokens since the last read, and the end with the last of them.

        A token that ended the output (`Finish.stop_token`) is among the tokens. Raises PenstockError.
        """
        ...


class Backend(Protocol):
    """What the frontend needs of the rest of penstock; the router is one."""

    def cards(self) -> Mapping[str, ModelCard]:
        """Models that live workers serve, by name."""
        ...

    def generate(self, request: Request) -> AbstractAsyncContextManager[TokenStream]:
        """The output, while inside the block; leaving it cancels what still runs. Raises Overloaded, NoWorker."""
        ...

    def standings(self) -> Mapping[str, Standing]:
        """Live workers by name."""
        ...

    def index_metrics(self) -> metrics.IndexMetrics:
        """What workers told of their prefix caches."""
        ...

    def stalled(self) -> Collection[str]:
        """Those of them whose engines stand still."""
        ...

    def decisions(self, request_id: str) -> list[Decided]:
        """How a request was routed, in order; none if that is not known."""
        ...


@dataclass(frozen=True, slots=True)
class FrontendOptions:
    """`inflight` requests at a time, the rest gets a 503. No `api_key` and no `tenant_keys`: everybody may ask."""

    api_key: str = field(default="", repr=False)
    tenant_keys: Mapping[str, str] = field(default_factory=dict, repr=False)  # by tenant
    defaults: Mapping[str, Defaults] = field(default_factory=dict)  # what clients leave out, by model
    inflight: int = 4096
    body_bytes: int = 16 << 20
    timeout_s: float = 600.0  # from a request's arrival to its last token
    slow_client_s: float = 30.0  # how long a client may read nothing while there is something to read
    records: int = 1000  # how many requests /debug/requests/ remembers


Handler = Callable[[Exchange], Awaitable[None]]

LISTED = 100  # requests, by /debug/requests
LAST_WORDS_S = 1.0  # for the error that ends a stream to leave
OPEN_PATHS = ("/health", "/live", "/ready")  # probes have no key


class Frontend:
    """An ASGI application, used as `async with`. With `siblings`, its `methods` are what these may ask of it."""

    def __init__(
        self,
        backend: Backend,
        tokenizers: Mapping[str, Tokenizer],
        rng: Random,
        options: FrontendOptions = FrontendOptions(),
        measured: metrics.Metrics | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.metrics = measured or metrics.Metrics()
        self._siblings = siblings
        self._backend = backend
        self._tokenizers = tokenizers
        self._rng = rng
        self._options = options
        self._keys = Keys(options.api_key, options.tenant_keys)
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._deadlines: dict[asyncio.Timeout, None] = {}  # of the requests that run
        self._since = 0
        self._closes_s = math.inf  # by when every request must have ended; draining sets it
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._pulse = Pulse(0.1)
        self._pulse_task: asyncio.Task[None] | None = None
        self._routes: dict[str, tuple[str, Handler]] = {
            "/": ("GET", self._show_hints),
            "/v1/models": ("GET", self._list_models),
            "/v1/completions": ("POST", lambda exchange: self._generate(exchange, openai.COMPLETIONS)),
            "/v1/chat/completions": ("POST", lambda exchange: self._generate(exchange, openai.CHAT)),
            "/tokenize": ("POST", lambda exchange: self._tell(exchange, tokenize.tokenize)),
            "/detokenize": ("POST", lambda exchange: self._tell(exchange, tokenize.detokenize)),
            "/health": ("GET", self._show_health),
            "/live": ("GET", self._show_live),
            "/ready": ("GET", self._show_ready),
            "/metrics": ("GET", self._show_metrics),
            "/debug/requests": ("GET", self._list_records),
            "/openapi.json": ("GET", self._describe),
        }
        self._prefix_routes: dict[str, tuple[str, Handler]] = {
            "/v1/models/": ("GET", self._show_model),
            "/debug/requests/": ("GET", self._show_record),
        }

    async def __aenter__(self) -> Frontend:
        self._since = int(wall_s())
        self._pulse_task = asyncio.create_task(self._pulse.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pulse_task is not None:
            self._pulse_task.cancel()
            await asyncio.wait([self._pulse_task])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            raise NotImplementedError(f"penstock serves HTTP only, not {scope['type']}")
        exchange = Exchange(scope, receive, send, self._new_id())
        try:
            await self._dispatch(exchange)
        except Cancelled:
            exchange.abort()
        except Exception as error:
            await self._refuse(exchange, self._explain(error, self._options.timeout_s))

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

    @property
    def _is_draining(self) -> bool:
        return self._closes_s < math.inf

    def routes(self) -> dict[str, str]:
        """The method of each path; what ends in / goes on with a name."""
        return {path: method for path, (method, _) in {**self._routes, **self._prefix_routes}.items()}

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan, for servers other than `http_server`."""
        await receive()
        async with self:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    def _new_id(self) -> str:
        return f"{self._rng.getrandbits(96):024x}"

    async def _dispatch(self, exchange: Exchange) -> None:
        method, handler = self._find_route(exchange.path)
        if exchange.path not in OPEN_PATHS:
            self._keys.find_tenant(exchange.headers)
        if exchange.method != method and (exchange.method, method) != ("HEAD", "GET"):
            raise MethodNotAllowed(f"{exchange.path} is for {method}, not {exchange.method[:20]}")
        await handler(exchange)

    def _find_route(self, path: str) -> tuple[str, Handler]:
        found = self._routes.get(path)
        if found is None:
            found = next((route for head, route in self._prefix_routes.items() if path.startswith(head)), None)
        if found is None:
            raise NotFound(f"there is nothing at {path[:200]}; GET / says what there is")
        return found

    # Answers

    async def _generate(self, exchange: Exchange, dialect: Dialect) -> None:
        arrived_s = now()
        with self._admitted():
            async with asyncio.timeout(self._options.timeout_s):
                body = await self._read(exchange)
                answer = await self._understand(exchange, dialect, body, arrived_s)
            try:
                async with asyncio.TaskGroup() as group:
                    watcher = group.create_task(exchange.watch_client(self._options.slow_client_s))
                    await self._answer(exchange, answer)
                    watcher.cancel()
            except* Cancelled as left:
                answer.cancel(left.exceptions[0])
                exchange.abort()

    async def _tell(self, exchange: Exchange, tell: tokenize.Tell) -> None:
        """What needs no worker's time."""
        with self._admitted():
            async with asyncio.timeout(self._options.timeout_s):
                body = await self._read(exchange)
                answer = await tell(body, self._find_model, self._served())
            await exchange.respond(200, answer)

    async def _read(self, exchange: Exchange) -> bytes:
        """A body of JSON."""
        body = await exchange.read_body(self._options.body_bytes)
        kind = exchange.headers.get(b"content-type", b"application/json")
        if kind.partition(b";")[0].strip().lower() != b"application/json":
            # Also what keeps web pages of other origins from asking: a browser sends them no other type unasked.
            raise BadRequest("the body must be JSON; send the header Content-Type: application/json")
        return body

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts the request while inside the block. Raises Overloaded or WorkerDraining."""
        if self._is_draining:
            raise WorkerDraining("this server is shutting down; ask another one")
        if self.metrics.inflight >= self._options.inflight:
            raise Overloaded(f"{self.metrics.inflight} requests are running, the most that this server takes")
        self.metrics.inflight += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self.metrics.inflight -= 1
            if not self.metrics.inflight:
                self._is_idle.set()

    async def _understand(self, exchange: Exchange, dialect: Dialect, body: bytes, arrived_s: float) -> Answer:
        """Everything that can be refused without asking a worker is refused here."""
        try:
            ask = dialect.parse(body)
        except RecursionError:
            raise BadRequest("the body is nested too deep") from None
        if exchange.headers.get(b"x-penstock-timeline") == b"1":
            ask = msgspec.structs.replace(ask, wants_timeline=True)
        card, tokenizer = self._find_model(ask.model)
        check_needs(ask, card)
        tenant, adapter = self._keys.find_tenant(exchange.headers), card.name if card.base else ""
        wishes = constraints_of(exchange.headers, ask, tenant, adapter)
        prompts = await encode_prompts(ask, tokenizer, card.max_context_tokens)
        defaults = self._options.defaults.get(card.base or card.name, NO_DEFAULTS)
        like = Request(
            id=exchange.id,
            model=card.base or ask.model,
            prompt=b"",
            sampling=sampling_of(ask, tokenizer, defaults.sampling(card.supports), self._rng),
            timeout_s=timeout_of(exchange.headers, self._options.timeout_s),
            salt=_salt(wishes, ask.salt),
            constraints=wishes,
        )
        requests = requests_of(ask, prompts, card, dialect.default_tokens or defaults.max_new_tokens, like)
        heading = Heading(dialect.id_prefix + exchange.id, int(wall_s()), ask.model)
        manner = Manner(ask, dialect, heading, tokenizer, self.metrics.model(ask.model), arrived_s)
        answer = Answer(manner, requests, await told_of(ask, prompts, tokenizer))
        self._remember(exchange.name, answer)
        return answer

    def _find_model(self, name: str) -> tuple[ModelCard, Tokenizer]:
        cards = self._backend.cards()
        card = cards.get(name)
        tokenizer = self._tokenizers.get(name if card is None else card.base or name)
        if tokenizer is None:
            known = ", ".join(self._tokenizers)
            raise UnknownModel(f"there is no model {name[:200]!r} here; there is {known}", "model")
        if card is None:
            raise NoWorker(f"no worker serves {name!r} now; try again, or start one")
        return card, tokenizer

    async def _answer(self, exchange: Exchange, answer: Answer) -> None:
        """From the first token to the last byte. Answers errors as well: beyond the task group they are wrapped."""
        try:
            latest_s = min(answer.arrived_s + answer.timeout_s, self._closes_s)
            async with asyncio.timeout_at(latest_s) as deadline:
                self._deadlines[deadline] = None
                try:
                    await (self._stream if answer.ask.is_stream else self._respond)(exchange, answer)
                finally:
                    del self._deadlines[deadline]
        except Exception as error:
            explained = self._explain(_innermost(error), answer.timeout_s)
            answer.fail(explained)
            await self._refuse(exchange, explained)

    async def _stream(self, exchange: Exchange, answer: Answer) -> None:
        if len(answer.choices) > 1:
            await _each(answer, lambda choice: self._stream_one_of_many(exchange, choice))
            await exchange.end(answer.closing())
            return
        (choice,) = answer.choices
        await self._stream_choice(exchange, choice)
        await exchange.end(choice.closing() + answer.closing())

    async def _stream_one_of_many(self, exchange: Exchange, choice: Choice) -> None:
        await self._stream_choice(exchange, choice)
        await exchange.write(choice.closing(), now())

    async def _stream_choice(self, exchange: Exchange, choice: Choice) -> None:
        async with self._backend.generate(choice.request) as stream:
            while not choice.is_complete:
                tokens, finish = await stream.read()
                choice.record.timeline = stream.timeline
                at_s = now()
                events = choice.events(tokens, finish, at_s)
                if not choice.has_begun.is_set():
                    choice.begin(stream.prompt_logprobs)
                    if not exchange.is_started:  # not sooner: what fails before the first token has its own status
                        await exchange.begin()
                    await exchange.write(await choice.opening(), at_s)
                await exchange.write(events, at_s)

    async def _respond(self, exchange: Exchange, answer: Answer) -> None:
        await _each(answer, self._collect_choice)
        await exchange.respond(200, await answer.body())

    async def _collect_choice(self, choice: Choice) -> None:
        async with self._backend.generate(choice.request) as stream:
            while not choice.is_complete:
                tokens, finish = await stream.read()
                choice.record.timeline = stream.timeline
                choice.collect(tokens, finish, now())
                if not choice.has_begun.is_set():
                    choice.begin(stream.prompt_logprobs)

    # Errors

    def _explain(self, error: Exception, timeout_s: float) -> PenstockError:
        """What is told to the client."""
        if isinstance(error, PenstockError):
            return error
        if isinstance(error, TimeoutError):
            if self._is_draining:
                return WorkerDraining("this server is shutting down; ask another one")
            return DeadlineExceeded(f"not done after {timeout_s:g} s; ask for less at a time")
        log.error("a request failed by a fault of this program", exc_info=error)
        return PenstockError(f"a fault of this server: {type(error).__name__}; its log says more")

    async def _refuse(self, exchange: Exchange, error: PenstockError) -> None:
        metrics.count(self.metrics.errors, error.code or str(error.status))
        if exchange.is_started:
            await self._end_by(exchange, error)
            return
        headers = []
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", self._find_route(exchange.path)[0].encode()))
        await exchange.respond(error.status, openai.error_body(error), headers=headers)

    async def _end_by(self, exchange: Exchange, error: PenstockError) -> None:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await exchange.end(openai.error_event(error))
        except TimeoutError:  # the client does not read
            exchange.abort()

    # What people and Prometheus want to see

    def _remember(self, name: str, answer: Answer) -> None:
        """Under the client's name for it, too, and each choice under its own; the oldest are forgotten."""
        for key, choice in ((name, answer.choices[0]), *((each.request.id, each) for each in answer.choices)):
            self._records.pop(key, None)
            self._records[key] = choice.record
        while len(self._records) > 2 * self._options.records:
            self._records.popitem(last=False)

    async def _list_records(self, exchange: Exchange) -> None:
        """The last ones, the newest first; of several processes to the second."""
        shown = self._heads()
        if self._siblings is not None:
            shown = sorted([*shown, *await self._siblings.heads()], key=_created, reverse=True)[:LISTED]
        await exchange.respond(200, msgspec.json.encode({"requests": shown}))

    def _heads(self) -> list[dict[str, object]]:
        records = {record.id: record for record in reversed(self._records.values())}
        return [_head(record) for record in islice(records.values(), LISTED)]

    async def _show_record(self, exchange: Exchange) -> None:
        name = _without_prefix(exchange.path.removeprefix("/debug/requests/"))
        shown = self._find_record(name)
        if shown is None and self._siblings is not None:
            shown = await self._siblings.find_record(name)
        if shown is None:
            raise NotFound(f"no request {name[:200]!r} among the last {self._options.records}")
        await exchange.respond(200, shown)

    def _find_record(self, name: str) -> bytes | None:
        """In JSON, of a request that this process had."""
        record = self._records.get(name)
        if record is None:
            return None
        fields = msgspec.structs.asdict(record)
        fields["decisions"] = decisions = self._backend.decisions(_without_prefix(record.id))
        if (timeline := record.timeline) is not None:
            fields["timeline"] = msgspec.structs.asdict(timeline)
            fields["compared"] = [part for one in decisions if one.gave_first_token for part in compare(one, timeline)]
        return msgspec.json.encode(fields)

    async def _list_models(self, exchange: Exchange) -> None:
        await exchange.respond(200, openai.models_body(self._served().values(), self._since))

    async def _show_model(self, exchange: Exchange) -> None:
        card, _ = self._find_model(exchange.path.removeprefix("/v1/models/"))
        await exchange.respond(200, openai.model_body(card, self._since))

    def _served(self) -> dict[str, ModelCard]:
        return {name: card for name, card in self._backend.cards().items() if (card.base or name) in self._tokenizers}

    async def _show_live(self, exchange: Exchange) -> None:
        await exchange.respond(200, b'{"status":"live"}')

    async def _show_ready(self, exchange: Exchange) -> None:
        status = self._status()
        await exchange.respond(200 if status == "ready" else 503, msgspec.json.encode({"status": status}))

    async def _show_health(self, exchange: Exchange) -> None:
        status = self._status()
        standings = self._backend.standings().values()
        fields = {
            "status": status,
            "version": __version__,
            "models": list(self._served()),
            "workers": {one.member.worker: one.member.role for one in standings},
            "stalled": list(self._backend.stalled()),
            "requests": self.metrics.inflight,
        }
        await exchange.respond(200 if status == "ready" else 503, msgspec.json.encode(fields))

    def _status(self) -> Literal["ready", "draining", "no worker"]:
        if self._is_draining:
            return "draining"
        return "ready" if self._served() else "no worker"

    async def _show_metrics(self, exchange: Exchange) -> None:
        backend, processes = self._backend, None
        if self._siblings is not None:
            processes = {self._siblings.own: self._told(), **await self._siblings.metrics()}
        page = metrics.render(
            self.metrics,
            backend.standings(),
            backend.stalled(),
            backend.index_metrics(),
            self._pulse.delay_p99_s,
            processes=processes,
        )
        await exchange.respond(200, page, metrics.CONTENT_TYPE.encode())

    def _told(self) -> metrics.Told:
        return metrics.Told(self.metrics, self._pulse.delay_p99_s)

    def methods(self) -> dict[str, RpcHandler]:
        """What siblings ask when a client asked them."""
        return {"counts": self._tell_counts, "record": self._tell_record, "heads": self._tell_heads}

    async def _tell_counts(self, call: Call) -> None:
        call.send(self._told())

    async def _tell_record(self, call: Call) -> None:
        call.send(self._find_record(msgspec.msgpack.decode(call.body, type=str)))

    async def _tell_heads(self, call: Call) -> None:
        call.send(self._heads())

    async def _describe(self, exchange: Exchange) -> None:
        await exchange.respond(200, openapi.body())

    async def _show_hints(self, exchange: Exchange) -> None:
        paths = "".join(f"  {method:4} {path}\n" for path, (method, _) in self._routes.items())
        models = ", ".join(self._served()) or "no model yet"
        text = f"penstock {__version__} serves {models}, as OpenAI's API does.\n\n{paths}"
        await exchange.respond(200, text.encode(), b"text/plain; charset=utf-8")


async def _each(answer: Answer, follow: Callable[[Choice], Awaitable[None]]) -> None:
    """Follows all choices. Those of one prompt wait for the first token of the first: then its blocks are cached."""
    if len(answer.choices) == 1:
        await follow(answer.choices[0])
        return

    async def in_turn(choice: Choice) -> None:
        if choice.leader is not None:
            await choice.leader.has_begun.wait()
        await follow(choice)

    async with asyncio.TaskGroup() as group:
        for choice in answer.choices:
            group.create_task(in_turn(choice))


def _innermost(error: Exception) -> Exception:
    """The first of those that a task group raises together."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _salt(wishes: Constraints, asked: str) -> str:
    """What tenants and adapters compute is not for others; nor is what a client asks to keep apart."""
    own = f"{wishes.tenant} {wishes.adapter}" if wishes.tenant or wishes.adapter else ""
    return f"{own}\0{asked}" if asked else own  # no name has that character, so none can be made up


def _without_prefix(name: str) -> str:
    """The request's own id, of which an answer's is made."""
    for prefix in (openai.CHAT.id_prefix, openai.COMPLETIONS.id_prefix):
        name = name.removeprefix(prefix)
    return name


def _created(head: Mapping[str, object]) -> int:
    created = head["created"]
    assert isinstance(created, int)
    return created


def _head(record: Record) -> dict[str, object]:
    """What tells one request from another in a list."""
    timeline = record.timeline or Timeline()
    return {
        "id": record.id,
        "model": record.model,
        "created": record.created,
        "state": record.state,
        "prefill_worker": timeline.prefill_worker,
        "decode_worker": timeline.decode_worker,
        "prompt_tokens": timeline.prompt_tokens,
        "output_tokens": timeline.output_tokens,
        "first_token_s": timeline.first_token_s,
        "ended_s": timeline.ended_s,
        "error": record.error,
    }
