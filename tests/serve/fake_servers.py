"""Servers as vLLM and SGLang are, seen from outside: real sockets, real KV events, and no model."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from penstock.kv_events import BlockRemoved, BlockStored, EventBatch, KvEvent, encode_batch
from penstock.policy.kv_feed import Message
from penstock.serve.http import Receive, Scope, Send
from penstock.serve.http_server import serve_http

BLOCK = 4
MODEL = "tiny"


@dataclass
class Call:
    """A request that a server got."""

    path: str
    headers: dict[str, str]
    body: dict[str, object]


@dataclass
class Answer:
    """What a server says to completions: events, or whole. `dies_after` so many parts, or before the head (0)."""

    parts: Sequence[bytes] = (b'data: {"n": 1}\n\n', b'data: {"n":2, "x": "\\u00e9"}\n\n', b"data: [DONE]\n\n")
    kind: bytes = b"text/event-stream; charset=utf-8"
    status: int = 200
    headers: Sequence[tuple[bytes, bytes]] = ()
    dies_after: int | None = None


class Publisher:
    """vLLM's: numbered messages, and a socket that repeats them. `loses` messages that only the latter knows."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.loses = 0
        self.clock_s = 0.0
        self._context = zmq.asyncio.Context()
        self._events = self._context.socket(zmq.XPUB)
        self._replays = self._context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self._events.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay = f"tcp://127.0.0.1:{self._replays.bind_to_random_port('tcp://127.0.0.1')}"

    async def wait_subscriber(self) -> None:
        """Returns when somebody hears what is published."""
        assert await self._events.recv() == b"\x01"

    def begin(self) -> None:
        """A new engine in the old one's place."""
        self.messages = []

    async def publish(self, *events: KvEvent) -> None:
        self.clock_s += 1
        payload = encode_batch(EventBatch(self.clock_s, events))
        number = len(self.messages)
        self.messages.append((number, payload))
        if self.loses:
            self.loses -= 1
        else:
            await self._events.send_multipart([b"kv", number.to_bytes(8, "big"), payload])

    async def repeat(self) -> None:
        """Answers replays, until cancelled."""
        while True:
            client, _, first = await self._replays.recv_multipart()
            for number, payload in self.messages[int.from_bytes(first, "big") :]:
                await self._replays.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
            await self._replays.send_multipart([client, b"", (-1).to_bytes(8, "big", signed=True), b""])

    def close(self) -> None:
        self._context.destroy(linger=0)


@dataclass
class FakeServer:
    """An application. A prompt that it answers is cached, and told of, in blocks of `BLOCK` tokens: bytes of text."""

    kind: str = "vllm"
    answer: Answer = field(default_factory=Answer)
    publisher: Publisher | None = None
    tokenizes: bool = True
    running: int = 0
    adapters: tuple[str, ...] = ()
    calls: list[Call] = field(default_factory=list)
    held: dict[bytes, int] = field(default_factory=dict)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)
    waits_for: asyncio.Event | None = None  # before it answers
    transfer: dict[str, object] | None = None  # what it answers to a prefill, besides
    prompt_tokens: int = 0
    port: int = 0

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.name}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        if path.startswith("/v1/") and path != "/v1/models":
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            call = Call(path, headers, msgspec.json.decode(body))
            self.calls.append(call)
            self.called.set()
            if self.waits_for is not None and not await self._wait(self.waits_for, receive):
                return
            await self._complete(call, scope, receive, send)
            return
        status, answer = self._tell(path, body)
        await _send_whole(send, Answer((answer,), b"application/json", status))

    async def _wait(self, event: asyncio.Event, receive: Receive) -> bool:
        """False if the client leaves before."""
        tasks = [asyncio.create_task(event.wait()), asyncio.create_task(receive())]  # type: ignore[arg-type]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return event.is_set()

    async def drain(self, grace_s: float) -> None: ...

    def _tell(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/models":
            cards = [{"id": MODEL, "owned_by": self.kind, "max_model_len": 4096}]
            cards += [{"id": one, "owned_by": self.kind, "parent": MODEL} for one in self.adapters]
            return 200, msgspec.json.encode({"data": cards})
        if path == "/tokenize" and self.tokenizes:
            return 200, msgspec.json.encode({"tokens": list(_text_of(msgspec.json.decode(body)))})
        if path == "/kv_event_sources" and self.publisher is not None and self.kind == "vllm":
            source = {"endpoint": self.publisher.endpoint, "replay_endpoint": self.publisher.replay}
            return 200, msgspec.json.encode({"0": source})
        if path == "/metrics":
            return 200, self._metrics()
        return (200, b"") if path == "/health" else (404, b"{}")

    def _metrics(self) -> bytes:
        return (
            f'vllm:num_requests_running{{model_name="{MODEL}",engine="0"}} {self.running}\n'
            f'vllm:num_requests_waiting{{model_name="{MODEL}",engine="0"}} 0\n'
            f"# TYPE vllm:prefix_cache_queries counter\n"
            f'vllm:prefix_cache_queries_total{{engine="0"}} {self.prompt_tokens}\n'
            f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="1000"}} 1\n'
        ).encode()

    async def _complete(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.answer
        if self.transfer is not None and call.body.get("max_tokens") == 1:
            whole = msgspec.json.encode({"choices": [], "kv_transfer_params": self.transfer})
            answer = Answer((whole,), b"application/json")
        if answer.dies_after == 0:
            scope["extensions"]["penstock.connection"]["abort"]()
            return
        if answer.status == 200:
            await self.cache(_text_of(call.body))
        if not answer.kind.startswith(b"text/event-stream"):
            await _send_whole(send, answer)
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", answer.kind)]})
        for number, part in enumerate(answer.parts):
            if answer.dies_after == number:
                scope["extensions"]["penstock.connection"]["abort"]()
                return
            await send({"type": "http.response.body", "body": part, "more_body": True})
            if part == b"wait":
                await receive()
                self.hung_up.set()
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def cache(self, text: bytes) -> None:
        self.prompt_tokens += len(text)
        prefixes = [text[:end] for end in range(BLOCK, len(text) + 1, BLOCK)]
        new = [prefix for prefix in prefixes if prefix not in self.held]
        if not new:
            return
        parent = self.held.get(new[0][:-BLOCK])
        for prefix in new:
            self.held[prefix] = hash(prefix) & (1 << 63) - 1
        if self.publisher is not None:
            names = tuple(self.held[prefix] for prefix in new)
            ids = tuple(token for prefix in new for token in prefix[-BLOCK:])
            await self.publisher.publish(BlockStored(names, parent, ids, BLOCK, medium="GPU"))

    async def evict(self, text: bytes) -> None:
        assert self.publisher is not None
        await self.publisher.publish(BlockRemoved((self.held.pop(text),), medium="GPU"))


def _text_of(body: dict[str, object]) -> bytes:
    """What stands for tokenizing: the bytes of a prompt, or of all messages with their roles."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return b"".join(one.encode() if isinstance(one, str) else bytes([one]) for one in prompt)
    if isinstance(prompt, str):
        return prompt.encode()
    messages = body.get("messages") or []
    assert isinstance(messages, list)
    return "".join(f"<{one['role']}>{one['content']}" for one in messages).encode()


async def _send_whole(send: Send, answer: Answer) -> None:
    body = b"".join(answer.parts)
    headers = [(b"content-type", answer.kind), (b"content-length", b"%d" % len(body)), *answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def listener(port: int = 0) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    found.listen()
    return found


class Switch:
    """Turns a server off and on, in the same place."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._stack = AsyncExitStack()

    async def on(self) -> None:
        await self._stack.enter_async_context(up(self._server))

    async def off(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def up(server: FakeServer) -> AsyncIterator[None]:
    """It serves, at the same port as before if there was one."""
    here = listener(server.port)
    server.port = here.getsockname()[1]
    told = nullcontext() if server.publisher is None else repeating(server.publisher)
    async with told, serve_http(server, here, lambda: 0.0):
        yield


@asynccontextmanager
async def repeating(publisher: Publisher) -> AsyncIterator[None]:
    """It answers replays."""
    task = asyncio.create_task(publisher.repeat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def publishers(count: int) -> AsyncIterator[list[Publisher]]:
    made = [Publisher() for _ in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.close()
