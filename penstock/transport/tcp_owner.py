"""The owner's side of `tcp`: what writers send goes straight into its region, and what they ask for out of it.

    link        all connections of one incarnation of a writer; ends with the first of them that ends
    session     a pipe of it: open -> closed by the writer, fenced off, or ended with its link
    lane        one connection, which receives one frame at a time, and answers one

All of it lives on the I/O thread, and a lane touches the region only while one of its callbacks runs. So once a
callback has closed a session nothing is written for it any more, whatever the kernel still holds, and nothing is read:
unlike memory that is mapped, a region reached this way can be taken back from a writer that is frozen, or beyond a
broken network. A peer that does not read its answers is not read from either, and finds its own kernel's buffers full.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from penstock import auth
from penstock.errors import PenstockError, Refused, StaleEpoch, WireError, to_wire
from penstock.transport.api import Offer
from penstock.transport.offers import check
from penstock.transport.sockets import listening
from penstock.transport.tcp_frames import (
    CLOSE,
    DAMAGED,
    DATA,
    DIGEST,
    DROPPED,
    FETCH,
    FETCHED,
    GOODBYE,
    HEAD,
    MAX_FRAME_BYTES,
    MAX_RANGES,
    MAX_REASON_BYTES,
    OPEN,
    OPENED,
    PAYLOAD,
    PLACED,
    PURPOSE,
    RANGE,
    REPLY,
    Hello,
    answer_hello,
    digest,
    read_hello,
)
from penstock.transport.tcp_halves import Inlet, Outlet, drain
from penstock.transport.tcp_options import Options

log = logging.getLogger(__name__)

LINGER_S = 1.0  # for a peer to read why it was cut
MAX_WAITING = 64  # answers on one connection, before nothing more is received there


class BadFrame(WireError):
    """A peer that knows the token broke the protocol."""


class Receiver:
    """Listens for the writers of one region. `offer` has no address before `open` returned one."""

    def __init__(self, offer: Offer, buffer: memoryview, token: str, options: Options) -> None:
        self._offer = offer
        self._buffer = buffer
        self._token = token
        self._options = options
        self._links: dict[str, _Link] = {}  # by writer
        self._stack = AsyncExitStack()

    async def open(self) -> str:
        """Listens, and returns the address. Raises AddressInUse or SetupError."""
        listener = self._stack.enter_context(await listening(self._options.host, self._options.port))
        await self._stack.enter_async_context(auth.admitting(listener, self._token, PURPOSE, self._serve))
        host, port = listener.getsockname()[:2]
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"

    async def close(self) -> None:
        """Nothing is written any more, and the region's memory not referred to."""
        for link in list(self._links.values()):
            link.end(f"{self._offer.owner} withdrew its region")
        await self._stack.aclose()

    async def fence(self, writer: str, request: str) -> None:
        """Closes the sessions that `writer` has open under this name."""
        if (link := self._links.get(writer)) is not None:
            name = digest((request.encode(),))
            for session in [session for session, known in link.sessions.items() if known == name]:
                link.close(session)

    def revoke(self, writer: str) -> None:
        """Ends all sessions of `writer`. It may come back with new ones."""
        if (link := self._links.get(writer)) is not None and link.sessions:
            link.end(f"{self._offer.owner} took its memory back from {writer}")

    async def _serve(self, sock: socket.socket) -> None:
        """Receives from one connection of a peer that knows the token, until its link ends."""
        async with asyncio.timeout(self._options.hello_s):
            hello = await read_hello(sock)
            try:
                link = self._link_of(hello)
            except PenstockError as error:
                await answer_hello(sock, to_wire(error))
                return
            lane = _Lane(link, sock, self._buffer)
            link.lanes.append(lane)
            try:
                await answer_hello(sock, None)
            except BaseException:
                link.end("a connection of it was lost as it began")
                raise
        try:
            lane.start()
            await lane.ended.wait()
        finally:
            link.end("the listener was closed")
            lane.close()

    def _link_of(self, hello: Hello) -> _Link:
        """Raises StaleEpoch or Refused. By then an older link of the writer has ended: it cannot need that any more."""
        link = self._links.get(hello.writer)
        if link is not None and link.name != hello.link:
            link.end(f"{hello.writer} came back on another link")
            link = None
        if (hello.offer.owner, hello.offer.epoch) != self._offer.key:
            raise StaleEpoch(
                f"the offer is of {hello.offer.owner} in epoch {hello.offer.epoch}, here is {self._offer.owner} "
                f"in epoch {self._offer.epoch}: ask it for its offer again"
            )
        check(hello.offer, self._offer)
        if link is None:
            link = self._new_link(hello)
        elif len(link.lanes) >= self._options.max_connections:
            raise Refused(f"{hello.writer} has {len(link.lanes)} connections to {self._offer.owner}, its limit")
        return link

    def _new_link(self, hello: Hello) -> _Link:
        if len(self._links) >= self._options.max_peers:
            raise Refused(f"{self._offer.owner} has {len(self._links)} writers connected, its limit")
        link = _Link(hello.link, hello.writer, hello.has_checksums, self._options.max_pipes, self._forget)
        self._links[hello.writer] = link
        return link

    def _forget(self, link: _Link) -> None:
        if self._links.get(link.writer) is link:
            del self._links[link.writer]


class _Link:
    """The connections of one writer. `on_end` is told its end, once."""

    def __init__(
        self, name: bytes, writer: str, has_checksums: bool, max_sessions: int, on_end: Callable[[_Link], None]
    ) -> None:
        self.name = name
        self.writer = writer
        self.has_checksums = has_checksums
        self.lanes: list[_Lane] = []
        self.sessions: dict[int, int] = {}  # names, by number
        self._max_sessions = max_sessions
        self._on_end: Callable[[_Link], None] | None = on_end

    def open(self, session: int, name: int) -> None:
        """Raises BadFrame."""
        if session in self.sessions:
            raise BadFrame(f"session {session} was opened twice")
        if len(self.sessions) >= self._max_sessions:
            raise BadFrame(f"{len(self.sessions)} sessions are open, the limit")
        self.sessions[session] = name

    def close(self, session: int) -> None:
        """Nothing is written for it, or read, from now on. For one that is not open it does nothing."""
        for lane in self.lanes:
            lane.drop(session)
        self.sessions.pop(session, None)

    def end(self, reason: str) -> None:
        """Closes all sessions and connections. Idempotent."""
        if self._on_end is None:
            return
        on_end, self._on_end = self._on_end, None
        log.info("the link from %s has ended: %s", self.writer, reason)
        for lane in self.lanes:
            lane.stop(reason)
        self.sessions.clear()
        on_end(self)


@dataclass(slots=True, eq=False)
class _Fetch:
    """What a peer asked for. Without `pieces`, where they are in the region, it is not sent any more."""

    session: int
    number: int
    pieces: list[memoryview]
    size: int


class _Lane:
    """One connection. It receives one frame at a time, and answers one."""

    def __init__(self, link: _Link, sock: socket.socket, buffer: memoryview) -> None:
        self.ended = asyncio.Event()
        self._is_stopped = False
        self._deadline: asyncio.TimerHandle | None = None  # for the peer to close
        self._link = link
        self._sock = sock
        self._buffer = buffer
        self._inlet = Inlet(sock, link.writer, self._on_lost)
        self._head = bytearray(HEAD.size)
        self._table = bytearray()
        self._session = 0  # of the frame that is coming
        self._number = 0
        self._ranges = 0
        self._payload: list[memoryview] = []  # where it goes; empty where it is thrown away
        self._outlet = Outlet(sock, link.writer, self._load, self._is_more, self._on_lost)
        self._replies: deque[bytes] = deque()
        self._fetches: deque[_Fetch] = deque()
        self._sending: _Fetch | None = None

    def start(self) -> None:
        if not self._is_stopped:
            self._want_head()
            self._inlet.open()

    def stop(self, reason: str) -> None:
        """Nothing more goes into the region, or out of it. Tells the peer why, unless it would take that for a payload.

        Closes once the peer has read that and closed too: if a connection is closed while bytes come in, it is reset,
        and the peer may lose what was said last.
        """
        self._is_stopped = True
        is_between_payloads = self._sending is None and self._outlet.is_empty
        self._inlet.close()
        self._outlet.close()
        self._payload.clear()
        self._fetches.clear()
        self._sending = None
        text = reason.encode()[:MAX_REASON_BYTES]
        try:
            if is_between_payloads:
                self._sock.send(REPLY.pack(GOODBYE, 0, len(text)) + text)
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:  # it is gone, or does not read
            self.close()
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sock, self._drain)
        self._deadline = loop.call_later(LINGER_S, self.close)

    def close(self) -> None:
        """Idempotent. What `stop` is for must have happened."""
        if self._deadline is not None:
            self._deadline.cancel()
        if not self.ended.is_set():
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self.ended.set()

    def drop(self, session: int) -> None:
        """What is still to come of this session's frame goes nowhere, and nothing that it asked for is sent."""
        if self._payload and self._session == session:
            self._payload.clear()
            self._inlet.waste()
        for fetch in self._fetches:
            if fetch.session == session:
                fetch.pieces.clear()
        if self._sending is not None and self._sending.session == session:
            self._sending.pieces.clear()
            self._outlet.blank(self._sending.size)

    def _on_lost(self, error: WireError) -> None:
        if isinstance(error, BadFrame):
            log.warning("%s broke the protocol and is cut: %s", self._link.writer, error)
            self._link.end(f"you broke the protocol: {error}")
        else:
            self._link.end(str(error))

    def _drain(self) -> None:
        if not drain(self._sock):
            self.close()

    # What comes

    def _want_head(self) -> None:
        self._inlet.want(memoryview(self._head), then=self._on_head)

    def _on_head(self) -> None:
        """Raises BadFrame, as all that follow."""
        kind, self._session, self._number, self._ranges = HEAD.unpack(self._head)
        if kind == DATA:
            self._want_table(digests=2, then=self._on_data)
        elif kind == FETCH:
            self._want_table(digests=1, then=self._on_fetch)
        elif kind == OPEN:
            self._link.open(self._session, self._number)
            self._reply(OPENED)
            self._want_head()
        elif kind == CLOSE:
            self._link.close(self._session)
            self._want_head()
        else:
            raise BadFrame(f"there are no frames of kind {kind}")

    def _want_table(self, digests: int, then: Callable[[], None]) -> None:
        if not 0 < self._ranges <= MAX_RANGES:
            raise BadFrame(f"a frame has {self._ranges} ranges; 1 to {MAX_RANGES} may be")
        self._table = bytearray(self._ranges * RANGE.size + (digests * DIGEST.size if self._link.has_checksums else 0))
        self._inlet.want(memoryview(self._table), then=then)

    def _on_data(self) -> None:
        pieces = self._pieces()
        if self._session in self._link.sessions:
            self._payload = pieces
            self._inlet.want(*pieces, then=self._on_payload)
        else:  # closed since it was sent
            self._inlet.want_waste(sum(map(len, pieces)), then=self._on_payload)

    def _on_payload(self) -> None:
        self._reply(self._verdict())
        self._payload.clear()
        self._want_head()

    def _verdict(self) -> int:
        if not self._payload:
            return DROPPED
        if not self._link.has_checksums:
            return PLACED
        (expected,) = DIGEST.unpack_from(self._table, len(self._table) - 2 * DIGEST.size)
        return PLACED if digest(self._payload) == expected else DAMAGED

    def _on_fetch(self) -> None:
        pieces = self._pieces()
        if self._session in self._link.sessions:
            self._fetches.append(_Fetch(self._session, self._number, pieces, sum(map(len, pieces))))
            self._push_back()
        else:
            self._reply(DROPPED)
        self._want_head()

    def _pieces(self) -> list[memoryview]:
        """The frame's ranges of the region."""
        if self._link.has_checksums:
            (expected,) = DIGEST.unpack_from(self._table, len(self._table) - DIGEST.size)
            if digest((self._head, memoryview(self._table)[: -DIGEST.size])) != expected:
                raise BadFrame("the head of a frame was damaged on its way")
        ranges = list(RANGE.iter_unpack(memoryview(self._table)[: self._ranges * RANGE.size]))
        for start, length in ranges:
            if not length or start + length > len(self._buffer):
                raise BadFrame(f"{length} bytes from {start} on are not in a region of {len(self._buffer)}")
        size = sum(length for _, length in ranges)
        if size > MAX_FRAME_BYTES:
            raise BadFrame(f"a frame has {size} bytes; the limit is {MAX_FRAME_BYTES}")
        return [self._buffer[start : start + length] for start, length in ranges]

    # What is answered

    def _reply(self, kind: int) -> None:
        self._replies.append(REPLY.pack(kind, self._session, self._number))
        self._push_back()

    def _push_back(self) -> None:
        """Sends, and receives nothing more while a peer lets too many answers wait."""
        self._outlet.wake()
        if len(self._replies) + len(self._fetches) >= MAX_WAITING:
            self._inlet.pause()

    def _load(self) -> list[memoryview]:
        """What is sent next."""
        if self._sending is not None:
            fetch, self._sending = self._sending, None
            return [memoryview(self._end_of(fetch))]
        if self._replies:
            loaded = [memoryview(b"".join(self._replies))]
            self._replies.clear()
        elif self._fetches:
            loaded = self._begin(self._fetches.popleft())
        else:
            return []
        self._inlet.open()
        return loaded

    def _is_more(self) -> bool:
        return bool(self._sending or self._replies or self._fetches)

    def _begin(self, fetch: _Fetch) -> list[memoryview]:
        if not fetch.pieces:
            return [memoryview(self._end_of(fetch))]
        self._sending = fetch
        return [memoryview(REPLY.pack(PAYLOAD, fetch.session, fetch.number)), *fetch.pieces]

    def _end_of(self, fetch: _Fetch) -> bytes:
        if not fetch.pieces:
            return REPLY.pack(DROPPED, fetch.session, fetch.number)
        return REPLY.pack(FETCHED, fetch.session, digest(fetch.pieces) if self._link.has_checksums else 0)
