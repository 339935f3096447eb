"""One connection of a link of the `tcp` transport: sends frames of its pipes, and takes what the owner answers."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock import clock
from penstock.errors import ConnectionLost
from penstock.transport.tcp_frames import (
    DAMAGED,
    DROPPED,
    FETCHED,
    GOODBYE,
    MAX_REASON_BYTES,
    OPENED,
    PAYLOAD,
    PLACED,
    REPLY,
    digest,
)
from penstock.transport.tcp_halves import Inlet, Outlet

if TYPE_CHECKING:
    from penstock.transport.tcp_link import Link
    from penstock.transport.tcp_session import Frame, Session

CHUNK_S = 0.005  # that a frame should take on its connection
MIN_CHUNK_BYTES = 64 << 10
MAX_CHUNK_BYTES = 4 << 20
FIRST_CHUNK_BYTES = 1 << 20  # of a connection that has not been measured

_QUEUED = struct.Struct("i")


class Lane:
    """What is to be said goes first, then frames: as long as what the connection moves in `CHUNK_S`.

    A frame stays outstanding until the owner has answered for it. Of these there are only so many bytes.
    """

    def __init__(self, link: Link, sock: socket.socket, max_outstanding_bytes: int) -> None:
        self._link = link
        self._sock = sock
        self._max_outstanding_bytes = max_outstanding_bytes
        self._outstanding_bytes = 0
        self._outstanding: dict[int, Frame] = {}  # by number
        self._chunk_bytes = FIRST_CHUNK_BYTES
        self._answered_s = 0.0
        self._outlet = Outlet(sock, link.offer.owner, self._load, self._is_more, link.fail)
        self._said: deque[bytes] = deque()
        self._loaded: Frame | None = None  # that was sent last, or is being sent
        self._inlet = Inlet(sock, link.offer.owner, link.fail)
        self._reply = bytearray(REPLY.size)
        self._reason = bytearray()
        self._coming: Frame | None = None  # of which the payload comes
        self._came: Frame | None = None  # of which it has come, and nothing else since
        self._want_reply()
        self._inlet.open()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that have arrived: here, and in the owner's kernel. Not for a lane that was closed."""
        (queued,) = _QUEUED.unpack(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(_QUEUED.size)))
        return self._inlet.received_bytes, self._outlet.sent_bytes - int(queued)

    def say(self, message: bytes) -> None:
        self._said.append(message)
        self._outlet.wake()

    def wake(self) -> None:
        """There may be something to send."""
        self._outlet.wake()

    def withdraw(self, session: Session) -> None:
        """Its region is touched no more: other bytes are sent for the rest of a frame, and others' are thrown away."""
        if self._loaded is not None and self._loaded.session is session and not self._loaded.is_read:
            self._outlet.blank(self._loaded.size)
        if self._coming is not None and self._coming.session is session:
            self._inlet.waste()

    def close(self) -> None:
        self._inlet.close()
        self._outlet.close()
        self._sock.close()
        self._outstanding.clear()

    # What is sent

    def _load(self) -> Sequence[memoryview]:
        self._loaded = None
        if self._said:
            message = b"".join(self._said)
            self._said.clear()
            return [memoryview(message)]
        if self._is_full or not self._link.has_turns:
            return []
        frame = self._link.next_frame(self._chunk_bytes)
        self._loaded = self._outstanding[frame.number] = frame
        self._outstanding_bytes += frame.size
        return frame.session.message(frame, self._link.has_checksums)

    def _is_more(self) -> bool:
        return bool(self._said) or (self._link.has_turns and not self._is_full)

    @property
    def _is_full(self) -> bool:
        outstanding = self._outstanding_bytes
        return outstanding > 0 and outstanding + self._chunk_bytes > self._max_outstanding_bytes

    # What is answered

    def _want_reply(self) -> None:
        self._inlet.want(memoryview(self._reply), then=self._on_reply)

    def _on_reply(self) -> None:
        """Raises ConnectionLost for answers that make no sense, as all that follow."""
        kind, session, number = REPLY.unpack(self._reply)
        if kind == GOODBYE:
            self._want_reason(number)
        elif kind == PAYLOAD:
            self._want_payload(self._find(number))
        else:
            self._on_answer(kind, session, number)
            self._want_reply()

    def _on_answer(self, kind: int, session: int, number: int) -> None:
        if kind == OPENED:
            self._link.on_opened(session)
        elif kind == FETCHED:
            self._on_fetched(checksum=number)
        elif kind == DROPPED:
            self._settle(self._find(number)).session.on_dropped()
        elif kind in (PLACED, DAMAGED):
            frame = self._find(number)
            if frame.is_read:
                raise self._makes_no_sense()
            self._settle(frame)
            frame.session.on_placed(frame) if kind == PLACED else frame.session.on_damaged(frame)
        else:
            raise self._makes_no_sense()

    def _want_payload(self, frame: Frame) -> None:
        if not frame.is_read or self._came is not None:
            raise self._makes_no_sense()
        self._coming = frame
        if frame.session.is_over:
            self._inlet.want_waste(frame.size, then=self._on_payload)
        else:
            self._inlet.want(*frame.session.own(frame), then=self._on_payload)

    def _on_payload(self) -> None:
        self._came, self._coming = self._coming, None
        self._want_reply()

    def _on_fetched(self, checksum: int) -> None:
        frame = self._came
        if frame is None:
            raise self._makes_no_sense()
        self._settle(frame)
        session = frame.session
        if session.is_over or not self._link.has_checksums or digest(session.own(frame)) == checksum:
            session.on_placed(frame)
        else:
            session.on_damaged(frame)

    def _find(self, number: int) -> Frame:
        """One that waits for an answer."""
        frame = self._outstanding.get(number)
        if frame is None:
            raise self._makes_no_sense()
        return frame

    def _settle(self, frame: Frame) -> Frame:
        """It has been answered for: there is room for another, whose length follows from what this one took."""
        del self._outstanding[frame.number]
        self._outstanding_bytes -= frame.size
        if frame is self._came:
            self._came = None
        now = clock.now()
        took_s = now - max(frame.loaded_s, self._answered_s)
        self._answered_s = now
        if frame.size * 2 > self._chunk_bytes and took_s > 0:  # short ones tell more of latency
            fitting = int(frame.size * CHUNK_S / took_s)
            self._chunk_bytes = min(max((self._chunk_bytes + fitting) // 2, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
        self._outlet.wake()
        return frame

    def _want_reason(self, length: int) -> None:
        if not 0 < length <= MAX_REASON_BYTES:
            raise self._makes_no_sense()
        self._reason = bytearray(length)
        self._inlet.want(memoryview(self._reason), then=self._on_reason)

    def _on_reason(self) -> None:
        reason = self._reason.decode(errors="replace")
        raise ConnectionLost(f"{self._link.offer.owner} ended the link: {reason}")

    def _makes_no_sense(self) -> ConnectionLost:
        return ConnectionLost(f"{self._link.offer.owner} sent what it was not asked for, or in disorder")
