"""KV events of one engine over ZMQ: a subscription, and the socket that repeats what was missed.

A message is `[topic, sequence, payload]`. A replay is asked for by `[empty, first sequence]` and answered by one
message a time that ends in `[sequence, payload]`; the last has the sequence -1.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

import zmq
import zmq.asyncio

from penstock.errors import SetupError, WireError

SEQUENCE_BYTES = 8
BACKLOG = 1 << 16  # messages that wait here for a busy loop; more of them are lost, which the reader notices
REPLAY_S = 5.0  # for the whole answer


class ZmqEvents:
    """An `EventSource`. `endpoint` and `replay` are those of the engine as seen from here; `replay` may be empty."""

    def __init__(self, endpoint: str, replay: str = "") -> None:
        self._endpoint = endpoint
        self._replay = replay
        self._context: zmq.asyncio.Context | None = None
        self._events: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> ZmqEvents:
        """Raises SetupError for an endpoint that ZMQ does not understand. Nobody need be there yet."""
        self._context = zmq.asyncio.Context()
        try:
            self._events = self._connect(zmq.SUB, self._endpoint)
        except SetupError:
            self._context.destroy()
            raise
        self._events.subscribe(b"")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)

    async def read(self) -> tuple[int, bytes]:
        """The next message: its sequence and payload. A publisher that comes back is connected to again.

        Raises WireError for a message of another kind.
        """
        assert self._events is not None, "used outside of `async with`"
        return _numbered(await self._events.recv_multipart())

    async def replay(self, first: int) -> list[tuple[int, bytes]]:
        """What the engine still has from message `first` on; nothing where it repeats nothing, or does not answer.

        Raises WireError for an answer of another kind.
        """
        if not self._replay:
            return []
        found: list[tuple[int, bytes]] = []
        with self._connect(zmq.DEALER, self._replay) as socket:
            await socket.send_multipart([b"", first.to_bytes(SEQUENCE_BYTES, "big")])
            try:
                async with asyncio.timeout(REPLAY_S):
                    while (message := _numbered(await socket.recv_multipart()))[0] >= 0:
                        found.append(message)
            except TimeoutError:  # what came is in order, so it is good as far as it goes
                pass
        return found

    def _connect(self, kind: int, endpoint: str) -> zmq.asyncio.Socket:
        assert self._context is not None, "used outside of `async with`"
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.rcvhwm = BACKLOG
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise SetupError(f"{endpoint!r} is no endpoint of ZMQ: {error}; write tcp://HOST:PORT") from error
        return socket


def _numbered(frames: list[bytes]) -> tuple[int, bytes]:
    if len(frames) < 2:
        raise WireError(f"a message of {len(frames)} frames is none of KV events; is that address theirs?")
    return int.from_bytes(frames[-2], "big", signed=True), frames[-1]
