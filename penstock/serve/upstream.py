"""HTTP to the existing servers behind a router: kept-alive connections, and failures as errors of this project.

Bodies pass as they are: nothing is unpacked or encoded again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import aiohttp
from yarl import URL

from penstock.errors import WorkerError, WorkerLost

IDLE_S = 3.0  # less than the 5 s after which uvicorn, which vLLM and SGLang run on, closes a silent connection
CONNECT_S = 5.0
ANSWER_BYTES = 256 << 20  # of an answer that is no stream of events
HOP_BY_HOP = frozenset(
    (
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
EVENTS = "text/event-stream"


class Unreachable(WorkerLost):
    """Nobody listens there."""


class Reply:
    """A response whose head has come. Used inside `Upstream.post`."""

    def __init__(self, response: aiohttp.ClientResponse, server: str) -> None:
        self.status = response.status
        self.kind = response.headers.get("content-type", "application/octet-stream")
        self.is_events = response.content_type == EVENTS
        self._response = response
        self._server = server

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those that are the server's and not the connection's, without its content type."""
        dropped = HOP_BY_HOP | {"content-type", "x-request-id", "date", "server"}
        return [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in self._response.headers.items()
            if name.lower() not in dropped
        ]

    async def read(self) -> bytes:
        """The whole body. Raises WorkerLost if it ends early, WorkerError over ANSWER_BYTES."""
        parts, size = [], 0
        async for part in self.chunks():
            size += len(part)
            if size > ANSWER_BYTES:
                raise WorkerError(f"the answer of {self._server} is over {ANSWER_BYTES >> 20} MiB")
            parts.append(part)
        return b"".join(parts)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises WorkerLost if it ends early."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerLost(f"the connection to {self._server} broke in the middle of its answer: {error}") from error


class Upstream:
    """One pool of connections to all servers; used as `async with`."""

    def __init__(self, key: str = "") -> None:
        """`key` goes with every request; without one the client's own does."""
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, url: str) -> tuple[int, bytes]:
        """Status and body. Raises Unreachable or WorkerLost."""
        async with self._ask("GET", url, b"", {}) as reply:
            return reply.status, await reply.read()

    async def fetch(self, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Status and body of a POST. Raises Unreachable or WorkerLost."""
        async with self._ask("POST", url, body, headers) as reply:
            return reply.status, await reply.read()

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Reply]:
        """The reply, while inside the block; leaving it before the end hangs up. Raises Unreachable or WorkerLost."""
        return self._ask("POST", url, body, headers)

    @asynccontextmanager
    async def _ask(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Reply]:
        assert self._session is not None, "used outside of `async with`"
        if self._key:
            headers = {**headers, "authorization": f"Bearer {self._key}"}
        where = URL(url)
        server = where.authority
        try:
            response = await self._session.request(method, where, data=body or None, headers=headers)
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(f"nobody answers at {server}: {error.strerror or error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerLost(f"{server} hung up before its answer: {error}") from error
        try:
            yield Reply(response, server)
        finally:
            response.release() if response.content.is_eof() else response.close()
