"""One HTTP request and its response, over ASGI. Used by `frontend`; `http_server` is what calls it.

A response is whole (`respond`) or a stream of events (`begin`, `write`, `end`). ASGI does not say when a client stops
reading: a `send` then just does not return. `watch_client` notices that, and that the client left.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from penstock.clock import now
from penstock.errors import BodyTooLarge, Cancelled, TooSlow

Scope = Mapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

# ASGI extension of `http_server`: its "abort" drops the connection at once, and what is put in as "filler" can be sent
# anywhere in the response without a change of its meaning.
CONNECTION = "penstock.connection"
BODY_S = 20.0  # for a body to come, and a second more for each
BODY_BYTES_PER_S = 16 << 10  # of it
JSON = b"application/json"
EVENTS = ((b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"))
_COMMENT = b":\n\n"  # among events; readers skip it
_SANE_NAME = re.compile(rb"[A-Za-z0-9._:@=+/-]{1,128}")


class Exchange:
    """A request and its response. `id` is unique; `name` is what `x-request-id` says, the client's if it is sane."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, id: str) -> None:
        self.id = id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.name = given.decode() if _SANE_NAME.fullmatch(given) else id
        self.is_started = False
        self.is_ended = False
        self._connection: dict[str, Any] = (scope.get("extensions") or {}).get(CONNECTION, {})
        self._receive = receive
        self._send = send
        self._sending_since_s: float | None = None

    async def read_body(self, limit_bytes: int) -> bytes:
        """Raises BodyTooLarge as soon as that is known, TooSlow, or Cancelled if the client leaves."""
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and float(declared) > limit_bytes:
            raise _too_large(limit_bytes)
        parts, size, started_s = [], 0, now()
        while True:
            message = await self._receive_until(started_s + BODY_S + size / BODY_BYTES_PER_S)
            if message["type"] == "http.disconnect":
                raise Cancelled("the client left before its request was whole")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def respond(self, status: int, body: bytes, kind: bytes = JSON, headers: Headers = ()) -> None:
        """The whole response."""
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [(b"content-type", kind), length, *headers])
        await self.end(body)

    async def _receive_until(self, latest_s: float) -> Message:
        try:
            async with asyncio.timeout_at(latest_s):
                return await self._receive()
        except TimeoutError:
            raise TooSlow("the body did not come in time; send it at once") from None

    async def begin(self, status: int = 200, headers: Headers = EVENTS) -> None:
        """Starts a stream, by default of server-sent events."""
        if headers is EVENTS:
            self._connection["filler"] = _COMMENT
        await self._start(status, list(headers))

    async def write(self, events: bytes, at_s: float) -> None:
        """Sends events; waits while the client reads too slowly. `at_s` is the time now, which the caller knows."""
        self._sending_since_s = at_s
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self._sending_since_s = None

    async def end(self, rest: bytes) -> None:
        """Sends the last events, or the whole body."""
        self.is_ended = True
        self._sending_since_s = now()
        await self._send({"type": "http.response.body", "body": rest, "more_body": False})
        self._sending_since_s = None

    async def watch_client(self, patience_s: float) -> None:
        """Raises Cancelled once the client left, or has read nothing for `patience_s` or a bit more.

        Returns if it left when the response had ended.

        To be called once the body has been read.
        """
        while True:
            try:
                async with asyncio.timeout(patience_s / 4):
                    message = await self._receive()
            except TimeoutError:
                since_s = self._sending_since_s
                if since_s is not None and now() - since_s > patience_s:
                    raise Cancelled(f"the client read nothing for {patience_s:.0f} s") from None
            else:
                if message["type"] == "http.disconnect":
                    if self.is_ended:
                        return
                    raise Cancelled("the client left")

    def abort(self) -> None:
        """Drops the connection with what is still unsent, where the server can; others do it when we return."""
        if (abort := self._connection.get("abort")) is not None:
            abort()

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.is_started = True
        self._sending_since_s = now()
        headers.append((b"x-request-id", self.name.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._sending_since_s = None


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is over the limit of {limit_bytes} bytes; shorten the prompt")
