"""A closed-loop load generator for OpenAI-compatible streaming endpoints: one thread, epoll, raw sockets.

Every connection sends a request, reads its events to the end, and at once sends the next one.
"""

from __future__ import annotations

import json
import select
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

END = b"0\r\n\r\n"  # of a chunked body
MARK = b"data: "
EVENTS_WITHOUT_TOKEN = 3  # the role, the finish and [DONE]


@dataclass
class Totals:
    """What happened in the measured window."""

    seconds: float = 0.0
    requests: int = 0
    events: int = 0
    errors: list[str] = field(default_factory=list)
    first_event_s: list[float] = field(default_factory=list)

    def tokens(self, per_request: int) -> float:
        """Tokens among the events; requests that the window cuts count in part."""
        return self.events * per_request / (per_request + EVENTS_WITHOUT_TOKEN)

    @property
    def median_first_event_s(self) -> float:
        return statistics.median(self.first_event_s)


def chat_request(model: str, prompt: str, tokens: int) -> bytes:
    fields = {"model": model, "stream": True, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields | {"messages": [{"role": "user", "content": prompt}]}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def generate_load(
    address: tuple[str, int],
    requests: Sequence[bytes],
    connections: int,
    warmup_s: float,
    window_s: float,
    on_edge: Callable[[], None],
) -> Totals:
    """Keeps `connections` requests under way; `on_edge` is called at the start and the end of the window."""
    with _connected(address, connections) as streams:
        load = _Load(streams, requests)
        load.run_for(warmup_s)
        load.totals = Totals()
        on_edge()
        started = time.perf_counter()
        load.run_for(window_s)
        load.totals.seconds = time.perf_counter() - started
        on_edge()
        return load.totals


@contextmanager
def _connected(address: tuple[str, int], connections: int) -> Iterator[list[_Stream]]:
    streams: list[_Stream] = []
    try:
        for _ in range(connections):
            streams.append(_Stream(socket.create_connection(address)))
        yield streams
    finally:
        for stream in streams:
            stream.socket.close()


class _Stream:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.sent_s = 0.0
        self.has_begun = False
        self.has_event = False
        self.tail = b""  # of the last piece, too short to hold a whole mark

    def send(self, request: bytes) -> None:
        self.sent_s = time.perf_counter()
        self.has_begun = False
        self.has_event = False
        self.tail = b""
        self.socket.sendall(request)

    def read(self) -> tuple[int, bool, bytes]:
        """Events that came, whether the response is over, and what was read. Raises EOFError."""
        piece = self.socket.recv(1 << 18)
        if not piece:
            raise EOFError("the server closed the connection")
        joined = self.tail + piece
        events = joined.count(MARK)
        cut = joined.rfind(MARK)
        rest = joined[cut + len(MARK) :] if cut >= 0 else joined
        self.tail = rest[-(len(MARK) - 1) :]
        return events, joined.endswith(END), piece


class _Load:
    def __init__(self, streams: Sequence[_Stream], requests: Sequence[bytes]) -> None:
        self.totals = Totals()
        self._requests = requests
        self._sent = 0
        self._streams = {stream.socket.fileno(): stream for stream in streams}
        self._poll = select.epoll()
        for number, stream in self._streams.items():
            self._poll.register(number, select.EPOLLIN)
            self._send_next(stream)

    def run_for(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for number, _ in self._poll.poll(0.1):
                self._read(self._streams[number])

    def _read(self, stream: _Stream) -> None:
        events, is_over, piece = stream.read()
        if events and not stream.has_event:
            stream.has_event = True
            self.totals.first_event_s.append(time.perf_counter() - stream.sent_s)
        self.totals.events += events
        if not stream.has_begun and not piece.startswith(b"HTTP/1.1 200"):
            self.totals.errors.append(piece[:300].decode(errors="replace"))
            is_over = True
        stream.has_begun = True
        if is_over:
            self.totals.requests += 1
            self._send_next(stream)

    def _send_next(self, stream: _Stream) -> None:
        stream.send(self._requests[self._sent % len(self._requests)])
        self._sent += 1
