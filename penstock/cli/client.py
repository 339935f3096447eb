"""The little HTTP that `serve` speaks with its own frontend."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


class NoAnswer(Exception):
    """The frontend refused, failed, or is not there; the message is its own where it gave one."""


@dataclass(frozen=True, slots=True)
class Client:
    """Asks one server; every request has a connection of its own."""

    host: str
    port: int
    api_key: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    async def get(self, path: str) -> Json:
        """The JSON at `path`. Raises NoAnswer."""
        async with self._ask("GET", path, b"") as pieces:
            return _parse(b"".join([piece async for piece in pieces]))

    async def stream(self, path: str, body: Mapping[str, object]) -> AsyncGenerator[Json, None]:
        """The server-sent events that answer `body`. Raises NoAnswer, also for an error event."""
        async with self._ask("POST", path, json.dumps(body).encode()) as pieces:
            async for event in _events(pieces):
                if event == b"[DONE]":
                    return
                parsed = _parse(event)
                if "error" in parsed:
                    raise NoAnswer(str(parsed["error"]["message"]))
                yield parsed
        raise NoAnswer("the stream ended too early")

    @asynccontextmanager
    async def _ask(self, method: str, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """The pieces of a response with status 200."""
        writer = None
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(self._head(method, path, len(body)) + body)
            status, headers = await _read_head(reader)
            pieces = _pieces(reader, headers)
            if status != 200:
                raise NoAnswer(_problem(status, b"".join([piece async for piece in pieces])))
            yield pieces
        except (OSError, EOFError, LookupError, ValueError) as error:  # what a stream that is no HTTP raises
            raise NoAnswer(str(error) or type(error).__name__) from error
        finally:
            if writer is not None:
                writer.close()

    def _head(self, method: str, path: str, length: int) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers


async def _pieces(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body, as it comes."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, however the body is cut."""
    rest = b""
    async for piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")


def _parse(text: bytes) -> Json:
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise NoAnswer(f"expected a JSON object, got {text[:80]!r}")
    return parsed


def _problem(status: int, body: bytes) -> str:
    """The message of an error response."""
    try:
        return str(_parse(body)["error"]["message"])
    except (ValueError, KeyError, NoAnswer):
        return f"HTTP {status}"
