"""Frames over TCP and Unix sockets.

A connection begins with the handshake of `auth`. Then each frame is its length, four bytes little-endian, and itself.
Closing sends what is queued, then an end-of-file, and waits a while for the other side's: a socket closed while data
still comes in resets the connection, and the peer may lose what was sent last.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

from penstock import auth
from penstock.errors import ConnectionLost, FrameTooLarge
from penstock.wire.api import MAX_BACKLOG_BYTES, MAX_FRAME_BYTES, Accept, Connection
from penstock.wire.inbox import Inbox
from penstock.wire.sockets import dial, listening

CLOSE_S = 5.0  # how long a closed connection may take to flush
HOLD_BYTES = 1 << 20  # of frames that nobody asked for yet; more stay in the kernel, and then with the sender

_LENGTH = struct.Struct("<I")
_PURPOSE = b"wire"


class StreamWire:
    """See `wire.api.Wire`. One instance serves all addresses.

    The event loop must run until `ended` was called for what has been closed, or the last frames may stay unsent.
    """

    @asynccontextmanager
    async def listen(self, address: str, token: str, accept: Accept) -> AsyncIterator[str]:
        """Leaving the block closes the listener, then its connections, and returns when these have ended."""
        streams: dict[_Stream, None] = {}

        async def admitted(sock: socket.socket) -> None:
            stream = await _open(sock, auth.peer_name(sock))
            streams[stream] = None
            stream.lost.add_done_callback(lambda _: streams.pop(stream))
            try:
                accept(stream)
            except Exception as error:
                stream.abort(f"the listener could not take the connection: {error!r}")
                raise

        try:
            async with (
                listening(address) as (listener, bound),
                auth.admitting(listener, token, _PURPOSE, admitted),
            ):
                yield bound
        finally:
            await _close_all(list(streams))

    async def connect(self, address: str, token: str, timeout_s: float = 5.0) -> Connection:
        """See `wire.api.Wire`."""
        try:
            async with asyncio.timeout(timeout_s):
                with await dial(address) as sock:
                    await auth.join(sock, token, _PURPOSE, address)
                    return await _open(sock, address)
        except TimeoutError:
            raise ConnectionLost(f"{address} gave no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise ConnectionLost(f"lost {address} while connecting: {error}") from error


class FrameSplitter:
    """Cuts a stream of bytes into frames. Copies each byte a fixed number of times, however it is chopped."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed_bytes = _LENGTH.size  # no frame is complete before `_rest` has so many

    @property
    def is_inside_frame(self) -> bool:
        return bool(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes. Raises FrameTooLarge for a length over MAX_FRAME_BYTES."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed_bytes:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        frames = []
        start, end = 0, len(data)
        needed = _LENGTH.size
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > MAX_FRAME_BYTES:
                raise FrameTooLarge(f"a frame of {length} bytes is coming; the limit is {MAX_FRAME_BYTES}")
            needed = _LENGTH.size + length
            if end - start < needed:
                break
            frames.append(data[start + _LENGTH.size : start + needed])
            start += needed
            needed = _LENGTH.size
        self._rest += data[start:]
        self._needed_bytes = needed
        return frames


class _Stream(asyncio.Protocol):
    """One end of a connection, after the handshake. See `wire.api.Connection`.

    open -> closing (flushing; what comes in is thrown away) -> lost;   open -> lost
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox = Inbox(self.abort)
        self._splitter = FrameSplitter()
        self._reason: str | None = None  # why it is not open any more
        self._deadline: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport  # set by connection_made, before anybody else sees this object

    def send_nowait(self, frame: bytes) -> None:
        # Written at once and not gathered per turn of the loop: serve.rpc has gathered already, and for one frame a
        # turn that costs a quarter less.
        if self._reason is not None:
            raise ConnectionLost(f"the connection to {self.peer} has ended: {self._reason}")
        if len(frame) > MAX_FRAME_BYTES:
            raise FrameTooLarge(f"{len(frame)} bytes for {self.peer}; the limit is {MAX_FRAME_BYTES}")
        if (waiting := self._transport.get_write_buffer_size()) > MAX_BACKLOG_BYTES:
            self.abort(f"cut, as {waiting} bytes waited for {self.peer} to read")
            raise ConnectionLost(f"the connection to {self.peer} has ended: {self._reason}")
        self._transport.write(_LENGTH.pack(len(frame)) + frame)

    def on_frame(self, receive: Callable[[bytes], None], ended: Callable[[str], None]) -> None:
        self._inbox.on_frame(receive, ended)
        asyncio.get_running_loop().call_soon(self._resume)  # after the inbox let go of what it holds

    def close(self) -> None:
        if self._reason is not None:
            return
        self._reason = "closed here"
        self._inbox.stop()
        if not self._transport.is_closing():
            self._deadline = asyncio.get_running_loop().call_later(CLOSE_S, self._transport.abort)
            self._transport.resume_reading()
            self._transport.write_eof()

    def abort(self, reason: str) -> None:
        """Ends the connection at once; what was not sent yet is dropped."""
        if self._reason is None:
            self._reason = reason
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._reason is not None:
            return
        try:
            frames = self._splitter.feed(data)
        except FrameTooLarge as error:
            self.abort(f"cut, as {self.peer} broke the protocol: {error}")
            return
        for frame in frames:
            self._inbox.put(frame)
        if self._inbox.held_bytes > HOLD_BYTES:
            self._transport.pause_reading()

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> None:
        """Returns None, upon which the event loop flushes and closes this side too."""
        if self._reason is None:
            is_cut = self._splitter.is_inside_frame
            self._reason = f"{self.peer} {'vanished in the middle of a frame' if is_cut else 'closed'}"

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._reason is None:
            self._reason = f"lost {self.peer}: {exc or 'the connection was reset'}"
        self.lost.set_result(None)
        self._inbox.end(self._reason)


async def _open(sock: socket.socket, peer: str) -> _Stream:
    """Hands the socket over to the event loop; `sock` is left detached."""
    owned = socket.socket(fileno=sock.detach())
    _, stream = await asyncio.get_running_loop().connect_accepted_socket(lambda: _Stream(peer), owned)
    return stream


async def _close_all(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.close()
    if streams:
        await asyncio.wait([stream.lost for stream in streams])
