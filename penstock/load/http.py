"""HTTP as a load generator needs it: kept-alive connections, and pieces of an answer with the time when they came.

One callback per piece and no task, queue or buffer between the socket and whoever reads the answer, so that thousands
of events a second cost little: `bench/load_client.py` compares it with general clients.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools

from penstock.clock import now
from penstock.errors import SetupError

IDLE_S = 3.0  # less than the 5 s after which uvicorn, which vLLM and SGLang run on, closes a silent connection
CONNECT_S = 10.0
ERROR_BYTES = 64 << 10  # that are kept of an answer that is no success

Sink = Callable[[bytes, float], None]  # a piece of the body, and when it came


class NoReply(Exception):
    """There was no whole answer. The message is short and the same for all failures of a kind: they are counted."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of an exchange. `body` is that of a refusal; what a success says went to the sink."""

    status: int
    body: bytes


class Http:
    """Connections to one server; used as `async with`, whose end hangs up."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """`headers` go with every request. Raises SetupError for a URL that is none."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise SetupError(f"{url} has no valid port: write http://HOST:PORT") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SetupError(f"{url} is no address of a server: write http://HOST:PORT")
        self.url = url
        self.base = parts.path.rstrip("/").removesuffix("/v1")  # of paths on this server, which name it themselves
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._ssl else 80)
        named = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "penstock-bench", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        self._idle: list[_Connection] = []  # the one that was used last is at the end
        self._open: set[_Connection] = set()

    async def __aenter__(self) -> Http:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in list(self._open):
            connection.close()
        self._idle.clear()

    async def ask(self, method: str, path: str, body: bytes, sink: Sink) -> Reply:
        """One request, to the end of its answer. Raises NoReply; who cancels it hangs up."""
        connection = self._kept() or await self._connect()
        head = f"{method} {path} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            reply = await connection.ask(head.encode("latin-1") + b"\r\n" + body, sink)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return reply

    def _kept(self) -> _Connection | None:
        """The connection that was used last, unless that is so long ago that the server may be hanging up."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and now() - connection.used_s < IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._open), self._host, self._port, ssl=self._ssl
                )
        except TimeoutError:
            raise NoReply("no connection in time") from None
        except OSError as error:
            raise NoReply(f"no connection: {error.strerror or error}") from error
        return connection


class _Connection(asyncio.Protocol):
    """Carries one exchange at a time. Also the receiver of httptools' callbacks, `on_...`."""

    def __init__(self, others: set[_Connection]) -> None:
        self.used_s = 0.0
        self.is_open = False
        self._others = others
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Reply] | None = None
        self._sink: Sink = _nowhere
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._has_length = False
        self._refusal = bytearray()

    async def ask(self, request: bytes, sink: Sink) -> Reply:
        """Raises NoReply."""
        if self._transport is None or not self.is_open:
            raise NoReply("connection lost")
        self._status, self._has_length, self._refusal = 0, False, bytearray()
        self._sink = sink
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer, self._sink = None, _nowhere

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self.is_open = False

    # From the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no such class
        self.is_open = True
        self._others.add(self)

    def data_received(self, data: bytes) -> None:
        self.used_s = now()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("answer is no HTTP")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._others.discard(self)
        if self._status and not self._has_length and error is None:
            self._settle()  # such an answer ends with its connection
        self._fail("connection lost")

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(NoReply(why))

    def _settle(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Reply(self._status, bytes(self._refusal)))

    # From the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        if self._status == 200:
            self._sink(piece, self.used_s)
        elif len(self._refusal) < ERROR_BYTES:
            self._refusal += piece

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._settle()


def _nowhere(piece: bytes, at_s: float) -> None:
    """What comes when nothing was asked for is dropped."""
