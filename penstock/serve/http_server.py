"""Serves the frontend, or a proxy, on a listening socket: uvicorn's HTTP/1.1 protocol on the running loop.

uvicorn's own server is left out: it takes over signals, and its shutdown ends streams without a word.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal, Protocol, cast

from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from penstock.errors import BadRequest, HeadTooLarge, RequestError, TooSlow
from penstock.serve.http import CONNECTION, Receive, Scope, Send
from penstock.serve.openai import error_body

IDLE_S = 65.0  # a connection may be silent between requests; longer than load balancers assume
HEAD_S = 20.0  # from a request's first byte to the end of its head
LINGER_S = 5.0  # after a connection's last answer, for its last bytes to leave and for what nobody reads to end
FIRST_PROBE_S, MAX_PROBE_S = 0.25, 10.0  # between probes of a half-closed connection; each wait is twice the last
MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 100
MAX_THROWN_BYTES = 1 << 20  # that come in vain after a refusal
BACKLOG = 2048

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # may come any number of times before a response

_UPGRADE = re.compile(rb"\r\nupgrade:[^\r]*", re.IGNORECASE)

_log = logging.getLogger("penstock.http")
_log.setLevel(logging.ERROR)  # what clients do wrong would fill the log


class App(Protocol):
    """An ASGI application that can be told to end what runs; `frontend` and `proxy` are."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    async def drain(self, grace_s: float) -> None:
        """Takes no new requests; those that run end within `grace_s`."""
        ...


@asynccontextmanager
async def serve_http(app: App, sock: socket.socket, grace_s: Callable[[], float]) -> AsyncIterator[None]:
    """Serves while inside the block. Takes over `sock`, which is bound and may listen already.

    Leaving the block refuses new requests, lets those that run end within `grace_s()`, and then ends them by an error.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        # Connections inherit it. asyncio sets it on some of them only: not where the socket's protocol is 0.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    state = _State()
    config = _config(app)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(config, state, {}), sock=sock, backlog=BACKLOG
    )
    try:
        yield
    finally:
        server.close()
        for connection in list(state.connections):
            connection.shutdown()  # at once if idle, else after its response
        await app.drain(grace_s())
        await state.wait_closed(LINGER_S)


def _config(app: App) -> Config:
    config = Config(
        app,
        interface="asgi3",
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=int(IDLE_S),
    )
    config.load()
    return config


class _State(ServerState):
    """The connections of one server. `default_headers` stays empty: no date, no server's name."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = asyncio.Event()
        self.closed.set()

    async def wait_closed(self, timeout_s: float) -> None:
        """Returns when all connections are closed and their requests over; what is not by then is dropped."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.closed.wait()
        except TimeoutError:
            for connection in list(self.connections):
                connection.transport.abort()
            await self.closed.wait()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=timeout_s)


class _Connection(HttpToolsProtocol):
    """uvicorn's protocol with the bounds that it lacks: on heads, on silence, and on what a client leaves unread.

    idle --first byte--> head --its end--> body --its end--> idle        each request, answered in turn
       `------------------`-----------------`--> refused: what still comes is thrown away, for a while

    A client that shuts its sending side, all requests being whole, gets its answers. It looks like one that is gone
    until something is sent to it, so now and then something is that changes nothing.
    """

    server_state: _State

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.logger = _log
        self.server_state.closed.clear()
        self._phase: Literal["idle", "head", "body", "refused"] = "idle"
        self._bytes = 0  # of the head, or thrown away
        self._overlong: HeadTooLarge | None = None  # why the parser was stopped
        self._running: RequestResponseCycle | None = None  # what is answered now; `cycle` is what was asked last
        self._stall: asyncio.TimerHandle | None = None  # ends a phase that takes too long
        self._probe: asyncio.TimerHandle | None = None  # whether a half-closed connection still has a client
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._running is not None and not self._running.response_complete:
            _disconnect(self._running)
        for timer in (self._stall, self._probe):
            if timer is not None:
                timer.cancel()
        if not self.server_state.connections:
            self.server_state.closed.set()

    def data_received(self, data: bytes) -> None:
        if self._phase == "refused":
            self._throw_away(data)
            return
        if self._phase == "idle" and b"h2c" in data:
            data = _without_offer(data)
        head = self.headers
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._phase == "head":
            self._watch_head(len(data) if self.headers is head else 0)
        elif self._phase == "idle" and self._is_answered:
            self._wait_for_request()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """True keeps the other direction open; else the client is taken for gone."""
        running = self._running
        if self._phase != "idle" or self._is_answered or running is None or not _filler(running):
            return None
        self.cycle.keep_alive = False  # the last of its requests
        self._probe_client(FIRST_PROBE_S)
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: {"abort": self.transport.abort}}
        self._phase = "head"
        self._bytes = 0

    def on_headers_complete(self) -> None:
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS or head_bytes > MAX_HEAD_BYTES:
            self._overlong = _head_too_large()
            raise self._overlong  # stops the parser, which has `send_400_response` called
        self._end_stall()
        self._phase = "body"
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._end_stall()
        self._phase = "idle"
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase == "body" and self._is_answered:  # without having been read
            self._unset_keepalive_if_required()
            self._stall = self.loop.call_later(LINGER_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._overlong or BadRequest("this is no HTTP/1.1; send a whole and valid request"))

    def timeout_keep_alive_handler(self) -> None:
        """Drops the connection, with whatever of the last response the client has not read."""
        self.transport.abort()

    @property
    def _is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_request(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(IDLE_S, self.timeout_keep_alive_handler)

    def _watch_head(self, more_bytes: int) -> None:
        """The head is not complete; `more_bytes` of it came."""
        self._bytes += more_bytes
        if self._bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        elif self._stall is None:
            self._stall = self.loop.call_later(HEAD_S, self._end_head)

    def _end_head(self) -> None:
        self._stall = None
        if self._is_answered:
            self._refuse(TooSlow(f"the head of the request did not come within {HEAD_S:.0f} s"))
        else:  # of the request before; the head may wait because of that
            self._watch_head(0)

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _refuse(self, error: RequestError) -> None:
        """Answers by `error` after whatever else is to be answered, and ends the connection."""
        self._end_stall()
        if self._is_answered or (self._phase == "body" and self._running is self.cycle):
            self._send_refusal(error)
        elif self._phase == "body":  # of a request that waits for its turn: it would wait for the rest for ever
            self.transport.abort()
        else:
            self.cycle.keep_alive = False
        self._phase, self._bytes = "refused", 0

    def _send_refusal(self, error: RequestError) -> None:
        """Closes as soon as the client does: a socket closed while data comes in is reset, and the answer lost."""
        body = error_body(error)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        try:
            self.transport.write_eof()
        except OSError:
            pass  # the client is gone
        if self.cycle is not None:
            _disconnect(self.cycle)
        self._stall = self.loop.call_later(LINGER_S, self.transport.abort)

    def _throw_away(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes > MAX_THROWN_BYTES:
            self.transport.abort()

    def _probe_client(self, wait_s: float) -> None:
        """Writes to the client, which resets the connection if it is gone."""
        if self.transport.is_closing():
            return
        if self._running is not None and not self.flow.write_paused:
            self.transport.write(_filler(self._running))
        self._probe = self.loop.call_later(wait_s, self._probe_client, min(2 * wait_s, MAX_PROBE_S))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)


def _without_offer(data: bytes) -> bytes:
    """The start of a request without its offer to go on in HTTP/2, for which the parser would pass over the body."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tells whoever answers that the client is gone."""
    cycle.disconnected = True
    cycle.message_event.set()


def _filler(cycle: RequestResponseCycle) -> bytes:
    """What a client skips; nothing for old clients, and in a response that has no room for it."""
    if not cycle.response_started:
        return _CONTINUE if cycle.scope["http_version"] == "1.1" else b""
    filler = cast(bytes, cycle.scope["extensions"][CONNECTION].get("filler", b""))
    return b"%x\r\n%b\r\n" % (len(filler), filler) if filler else b""


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the head of the request is over the limit of {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes")
