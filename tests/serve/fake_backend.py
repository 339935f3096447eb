"""A backend that plays a script, and a client that speaks ASGI: the frontend alone, without sockets or workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from penstock.cluster import ModelCard, Standing
from penstock.metrics import IndexMetrics
from penstock.policy.routing.api import Choice
from penstock.request import Finish, Request, Timeline, Token
from penstock.serve.chat_template import ChatTemplate
from penstock.serve.decisions import Decided, Decision, Journal
from penstock.serve.frontend import Frontend, FrontendOptions
from penstock.serve.parsers.choice import pick
from penstock.serve.siblings import Siblings
from penstock.serve.text import Tokenizer
from penstock.tokens import unpack
from tests.serve.tokenizers_made import CHAT, byte_level

TOLD = Timeline(decode_worker="decode-0", cached_tokens=3, first_token_s=0.3)
News = tuple[list[Token], Finish | None]
Script = Callable[[Request], AsyncGenerator[News, None]]

TOKENIZER = Tokenizer(byte_level(), ChatTemplate(CHAT, {}), "demo")
FORMATS = pick("", "", "hermes", "deepseek_r1")
CALLER = Tokenizer(byte_level(), ChatTemplate(CHAT, {}), "demo", formats=FORMATS)
CARD = ModelCard("demo", 200, ("logprobs", "sampling", "penalties", "prompt_logprobs"))


def tokens_of(text: str) -> list[Token]:
    return [Token(token) for token in byte_level().encode(text).ids]


def scored_as(token: int) -> Token:
    return Token(token, -token / 100, ((0, -0.5),))


def finish(reason: Any = "length", stop_token: int | None = None) -> Finish:
    times = {"prefill_started_s": 0.1, "prefill_ended_s": 0.3}
    timeline = Timeline(decode_worker="decode-0", prefill_worker="decode-0", cached_tokens=3, **times)
    return Finish(reason, timeline, stop_token)


def decided() -> list[Decided]:
    """A request whose first worker was lost: two decisions, of which the second one stood."""
    journal = Journal()
    choices = [
        Choice("decode-1", (), 0.1, why="pairs: decode-1 prefills for itself"),
        Choice(
            *("decode-0", ("prefill-0", "prefill-1"), 0.06),
            wait_s=0.05,
            why="pairs: prefill-0 prefills for decode-0",
            parts={"wait": 0.05, "later": 0.01},
            others=(("decode-0", "", 0.2), ("decode-1", "prefill-0", 0.3)),
        ),
    ]
    for number, choice in enumerate(choices):
        passed_over = ("decode-1",) * number
        journal.note("r", Decision(10.0 + number, "pairs", choice, 200, 64, 128 * number, 4, passed_over))
    journal.prefilled("r")
    return journal.tell("r")


def saying(text: str, end: Finish | None = None) -> Script:
    """One token at a time, the end with the last."""

    async def script(request: Request) -> AsyncGenerator[News, None]:
        tokens = tokens_of(text)
        for token in tokens[:-1]:
            yield [token], None
        yield tokens[-1:], end or finish()

    return script


def failing(error: Exception, after: str = "") -> Script:
    """Some tokens, one at a time, then an error."""

    async def script(request: Request) -> AsyncGenerator[News, None]:
        for token in tokens_of(after):
            yield [token], None
        raise error

    return script


def stuck(after: str = "") -> Script:
    """Some tokens, one at a time, then silence."""

    async def script(request: Request) -> AsyncGenerator[News, None]:
        for token in tokens_of(after):
            yield [token], None
        await asyncio.Event().wait()

    return script


class FakeStream:
    def __init__(self, news: AsyncIterator[News], scores: list[Token] | None) -> None:
        self._news = news
        self.timeline: Timeline | None = None
        self.prompt_logprobs = scores

    async def read(self) -> News:
        await asyncio.sleep(0)
        news = await anext(self._news)
        self.timeline = TOLD
        return news


@dataclass
class FakeBackend:
    """Plays `script` for each request; `live` counts those whose block has not been left."""

    script: Script = field(default_factory=lambda: saying("water and power"))
    models: dict[str, ModelCard] = field(default_factory=lambda: {"demo": CARD})
    workers: dict[str, Standing] = field(default_factory=dict)
    still: list[str] = field(default_factory=list)
    decided: dict[str, list[Decided]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    live: int = 0
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def cards(self) -> Mapping[str, ModelCard]:
        return self.models

    def standings(self) -> Mapping[str, Standing]:
        return self.workers

    def index_metrics(self) -> IndexMetrics:
        return IndexMetrics()

    def stalled(self) -> Collection[str]:
        return self.still

    def decisions(self, request_id: str) -> list[Decided]:
        return self.decided.get(request_id, [])

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[FakeStream]:
        self.requests.append(request)
        self.live += 1
        self.entered.set()
        news = self.script(request)
        try:
            scored = request.sampling.prompt_logprobs is not None
            yield FakeStream(news, [scored_as(token) for token in unpack(request.prompt)[1:]] if scored else None)
        finally:
            await news.aclose()
            self.live -= 1
            self.left.set()


def frontend(
    backend: FakeBackend, tokenizer: Tokenizer = TOKENIZER, siblings: Siblings | None = None, **options: Any
) -> Frontend:
    return Frontend(backend, {"demo": tokenizer}, Random(1), FrontendOptions(**options), siblings=siblings)


Message = MutableMapping[str, Any]


class Client:
    """One request to an ASGI application. `leave` closes the connection; `may_read` cleared makes sends wait."""

    def __init__(self, app: Frontend) -> None:
        self.app = app
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.is_over = False
        self.is_aborted = False
        self.got_part = asyncio.Event()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._gone = asyncio.Event()

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of all server-sent events; [DONE] as it is."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        data = [block.removeprefix("data: ") for block in blocks]
        return [one if one == "[DONE]" else json.loads(one) for one in data]

    def leave(self) -> None:
        self._gone.set()

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        chunks: list[bytes] | None = None,
    ) -> Client:
        """Returns when the application does. `chunks` are sent as the body in place of `body` as JSON."""
        if chunks is None:
            chunks = [b"" if body is None else json.dumps(body).encode()]
        waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        if waiting:
            waiting[-1]["more_body"] = False

        async def receive() -> Message:
            if waiting:
                return waiting.pop(0)
            await self._gone.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "extensions": {"penstock.connection": {"abort": self._abort}},
        }
        await self.app(scope, receive, self._send)
        return self

    def _abort(self) -> None:
        self.is_aborted = True

    async def _send(self, message: Message) -> None:
        await self.may_read.wait()
        if message["type"] == "http.response.start":
            assert self.status == 0
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        assert self.status
        assert not self.is_over
        self.parts.append(message["body"])
        self.is_over = not message["more_body"]
        self.got_part.set()


async def get(app: Frontend, path: str, **headers: str) -> Client:
    return await Client(app).ask(
        "GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


async def chat(app: Frontend, **fields: object) -> Client:
    return await Client(app).ask("POST", "/v1/chat/completions", chat_body(**fields))


async def complete(app: Frontend, **fields: object) -> Client:
    return await Client(app).ask("POST", "/v1/completions", {"model": "demo", "prompt": "water"} | fields)


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": "demo", "messages": [{"role": "user", "content": "water"}]} | fields
