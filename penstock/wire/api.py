"""The port of message connections between processes: ordered frames of bytes, both ways.

Calls, streams and errors are built on it by `serve.rpc`; a backend only carries frames. An address is a string whose
scheme names the backend: `memory:NAME`, `tcp:HOST:PORT`, `unix:PATH`, `unix:@NAME` (abstract: leaves no file behind).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol

MAX_FRAME_BYTES = 64 << 20


class Connection(Protocol):
    """One end. Ends when either side closes, or the peer's process dies."""

    peer: str  # for messages to people

    def send_nowait(self, frame: bytes) -> None:
        """Queues one frame. Never blocks; a peer that stops reading is cut once `MAX_BACKLOG_BYTES` wait for it.

        Raises ConnectionLost if the connection has ended, FrameTooLarge over MAX_FRAME_BYTES.
        """
        ...

    def on_frame(self, receive: Callable[[bytes], None], ended: Callable[[str], None]) -> None:
        """Sets who gets frames, in order, from now on (those that came earlier first), and who is told the end.

        `ended` is called once, with the reason, after the last frame. Callbacks run on the loop and must not block.
        """
        ...

    def close(self) -> None:
        """Flushes what was sent and ends the connection. Idempotent."""
        ...


MAX_BACKLOG_BYTES = 64 << 20

Accept = Callable[[Connection], None]


class Wire(Protocol):
    """A way to reach other processes. Both sides know a token; a wrong one ends in Refused."""

    def listen(self, address: str, token: str, accept: Accept) -> AbstractAsyncContextManager[str]:
        """Accepts connections while inside the block; yields the address bound (`tcp:HOST:0` takes a free port).

        `accept` is called for each connection after its token was checked. Raises AddressInUse.
        """
        ...

    async def connect(self, address: str, token: str, timeout_s: float = 5.0) -> Connection:
        """Raises Refused (nobody there, wrong token) or ConnectionLost (no answer within `timeout_s`)."""
        ...


class EventSource(Protocol):
    """One engine's KV events, in the format of `kv_events`; used as `async with`. Messages can be lost."""

    async def __aenter__(self) -> EventSource: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def read(self) -> tuple[int, bytes]:
        """Waits for the next message: its sequence and payload. Raises WireError for what is none."""
        ...

    async def replay(self, first: int) -> Sequence[tuple[int, bytes]]:
        """What the engine still has from message `first` on; nothing if it repeats nothing, or does not answer."""
        ...


Subscribe = Callable[[str, str], EventSource]  # to an engine's endpoint and its replay endpoint, which may be empty
