"""Serves the frontend, or a proxy, on a listening socket: uvicorn's HTTP/1.1 protocol on the running loop.

uvicorn's own server is left out: it takes over signals, and its shutdown ends streams without a word.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from penstock.serve.http import ABORT, Receive, Scope, Send

IDLE_S = 65.0  # a connection may be silent between requests; longer than load balancers assume
LINGER_S = 5.0  # after the last request's end, for its last bytes to leave
MAX_HEAD_BYTES = 64 << 10
BACKLOG = 2048


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
    """uvicorn's protocol with the bounds that it lacks: on heads, on silence, and on what a client leaves unread."""

    server_state: _State

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.server_state.closed.clear()
        self._is_in_head = False
        self._head_bytes = 0
        self._expect_data()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if not self.server_state.connections:
            self.server_state.closed.set()

    def data_received(self, data: bytes) -> None:
        head = self.headers
        super().data_received(data)
        if self._is_in_head and not self.transport.is_closing():
            self._head_bytes += len(data) if self.headers is head else 0
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The head of the request is over the limit of {MAX_HEAD_BYTES} bytes.")
            else:
                self._expect_data()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}
        self._is_in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Drops the connection, with whatever of the last response the client has not read."""
        self.transport.abort()

    def _expect_data(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(IDLE_S, self.timeout_keep_alive_handler)
