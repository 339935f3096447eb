"""The writer's side of the `tcp` transport: keeps a link to each owner, over which its pipes take turns.

    peer        an owner, as this writer knows it: one link at a time, dialled when it is needed
    link        several connections; lost with the first of them that is lost
    sending     a pipe: a backlog of blocks, cut into frames when there is room for one
    lane        one connection, which sends one frame at a time

All of it lives on the I/O thread. A frame is as long as what its connection sends in `CHUNK_S`, and after each the next
pipe has its turn, so that none waits long for a big one. Frames go from this worker's region to the kernel as they lie.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from penstock import auth, clock
from penstock.blocks import BlockId
from penstock.errors import ConnectionLost, PenstockError
from penstock.transport.api import Moved, Offer
from penstock.transport.sockets import dial, is_loopback
from penstock.transport.tcp_backlog import Backlog, Run
from penstock.transport.tcp_frames import (
    CLOSE,
    CLOSED,
    DAMAGED,
    DIGEST,
    FETCHED,
    GOODBYE,
    HEAD,
    MAX_RANGES,
    MAX_REASON_BYTES,
    OPEN,
    OPENED,
    PIECES,
    PLACED,
    PURPOSE,
    REPLY,
    Hello,
    advance,
    digest,
    frame_head,
    say_hello,
    wasted,
)
from penstock.transport.tcp_options import Options

log = logging.getLogger(__name__)

CHUNK_S = 0.005  # that a frame should take on its connection
MIN_CHUNK_BYTES = 64 << 10
MAX_CHUNK_BYTES = 4 << 20
FIRST_CHUNK_BYTES = 1 << 20  # of a connection that has not been measured
ATTEMPTS = 2  # at getting a frame over undamaged

_QUEUED = struct.Struct("i")
_FILLER = memoryview(bytes(1 << 20))  # for the rest of a frame that nobody wants any more


@dataclass(slots=True, eq=False)
class _Part:
    """A part of a pipe's blocks: with it and all before it, so many `pairs` are whole."""

    pairs: int
    is_placed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    sending: Sending
    part: _Part | None  # of what is written
    number: int
    runs: list[Run]
    size: int
    is_read: bool
    attempt: int
    loaded_s: float


class Peer:
    """The way to one owner. Pipes share its link."""

    def __init__(self, offer: Offer, writer: str, token: str, options: Options) -> None:
        self.offer = offer
        self.options = options
        self.users = 0  # pipes; counted by the transport, on its own loop
        self._writer = writer
        self._token = token
        self._link: Link | None = None
        self._lock = asyncio.Lock()

    @property
    def is_idle(self) -> bool:
        """Nobody uses it, and it has nothing that is worth keeping."""
        return not self.users and (self._link is None or self._link.error is not None)

    async def link(self) -> Link:
        """The link, or a new one if it was lost: then nothing of the older one is taken by the owner any more.

        Raises Refused, StaleEpoch or ConnectionLost.
        """
        async with self._lock:
            if self._link is None or self._link.error is not None:
                self._link = await self._dial()
            return self._link

    def close(self) -> None:
        if self._link is not None:
            self._link.fail(ConnectionLost(f"{self._writer} closed its transport"))

    async def _dial(self) -> Link:
        owner, sockets = self.offer.owner, list[socket.socket]()
        try:
            async with asyncio.timeout(self.options.dial_s):
                name, has_checksums = clock.nonce(16), True
                for _ in range(self.options.connections):
                    sockets.append(sock := await dial(self.offer.address))
                    await auth.join(sock, self._token, PURPOSE, owner)
                    if len(sockets) == 1:
                        has_checksums = self._has_checksums(sock)
                    await say_hello(sock, Hello(self.offer, self._writer, name, has_checksums))
        except BaseException as error:
            for sock in sockets:
                sock.close()
            if isinstance(error, TimeoutError):
                raise ConnectionLost(f"{owner} gave no answer within {self.options.dial_s:g} s when dialled") from None
            if isinstance(error, OSError):
                raise ConnectionLost(f"lost {owner} at {self.offer.address} when dialling: {error}") from error
            raise
        return Link(self.offer, self.options, sockets, has_checksums)

    def _has_checksums(self, sock: socket.socket) -> bool:
        asked = self.options.has_checksums
        return not is_loopback(sock.getpeername()[0]) if asked is None else asked


class Link:
    """The connections to an owner. `error` is set once they are lost."""

    def __init__(self, offer: Offer, options: Options, sockets: Sequence[socket.socket], has_checksums: bool) -> None:
        self.offer = offer
        self.options = options
        self.has_checksums = has_checksums
        self.error: PenstockError | None = None
        self._numbers = 0  # given to sessions and frames so far
        self._replies = 0
        self._sessions: dict[int, Sending] = {}
        self._turns: deque[Sending] = deque()  # who has something to send, the next one first
        self._frames: dict[int, _Frame] = {}  # that the owner has not answered for
        share_bytes = options.max_outstanding_bytes // len(sockets)
        self._lanes = [_Lane(self, sock, share_bytes) for sock in sockets]

    # For pipes

    def register(self, sending: Sending) -> int:
        """The number of a new session."""
        self._numbers += 1
        self._sessions[self._numbers] = sending
        return self._numbers

    def say(self, kind: int, session: int, name: int = 0) -> None:
        self._lanes[0].say(HEAD.pack(kind, session, name, 0))

    def send(self, sending: Sending) -> None:
        """It has something to send."""
        if sending not in self._turns:
            self._turns.append(sending)
        for lane in self._lanes:
            lane.wake()

    def withdraw(self, sending: Sending) -> None:
        """Nothing that lies in its memory is sent from now on, nor anything stored there."""
        if sending in self._turns:
            self._turns.remove(sending)
        for lane in self._lanes:
            lane.blank(sending)
            lane.waste(sending)

    def forget(self, session: int) -> None:
        self._sessions.pop(session, None)

    async def wait(self, event: asyncio.Event) -> None:
        """Waits for an event of a registered pipe, which the loss of this link also sets: so does want of progress."""
        while not event.is_set():
            before = self._progress()
            try:
                async with asyncio.timeout(self.options.stalled_s):
                    await event.wait()
            except TimeoutError:
                if self._progress() == before:
                    self.fail(
                        ConnectionLost(f"{self.offer.owner} took and said nothing for {self.options.stalled_s:g} s")
                    )

    def fail(self, error: PenstockError) -> None:
        """Ends it for all pipes. Idempotent."""
        if self.error is not None:
            return
        self.error = error
        log.info("the link to %s has ended: %s", self.offer.owner, error)
        for lane in self._lanes:
            lane.stop()
        sessions = list(self._sessions.values())
        self._sessions.clear()
        self._turns.clear()
        self._frames.clear()
        for sending in sessions:
            sending.on_lost(error)

    # For lanes

    @property
    def has_turns(self) -> bool:
        return bool(self._turns)

    def next_frame(self, limit_bytes: int) -> _Frame:
        """Of the pipe whose turn it is; only while it `has_turns`."""
        sending = self._turns.popleft()
        self._numbers += 1
        frame = sending.next_frame(self._numbers, limit_bytes)
        self._frames[frame.number] = frame
        if sending.has_more:
            self._turns.append(sending)
        return frame

    def on_reply(self, kind: int, session: int, number: int, lane: _Lane) -> None:
        self._replies += 1
        if kind in (OPENED, CLOSED):
            if (sending := self._sessions.get(session)) is not None:
                sending.on_answer(kind)
            return
        frame = self._frames.pop(number, None)
        if frame is None:
            self.fail(ConnectionLost(f"{self.offer.owner} answered for frame {number}, which it was not sent"))
            return
        lane.on_reply(frame)
        if kind in (PLACED, FETCHED):
            frame.sending.on_placed(frame)
        else:
            frame.sending.on_not_placed(frame, kind == DAMAGED)

    def find_frame(self, number: int) -> _Frame | None:
        """One that the owner has not answered for."""
        return self._frames.get(number)

    def on_goodbye(self, reason: str) -> None:
        self.fail(ConnectionLost(f"{self.offer.owner} ended the link: {reason}"))

    def _progress(self) -> tuple[int, int]:
        """Changes while bytes or replies arrive anywhere."""
        return self._replies, sum(lane.arrived_bytes + lane.received_bytes for lane in self._lanes)


class Sending:
    """A pipe on the I/O thread.   new -> open (`write`, `flush`) -> left;  lost with its link at any time"""

    def __init__(self, peer: Peer, source: memoryview, name: str, on_moved: Callable[[], None]) -> None:
        self.moved = Moved()
        self._peer = peer
        self._source = source
        self._name = name
        self._on_moved = on_moved
        self._parts: deque[_Part] = deque()  # in order, from the first on that is not placed
        self._backlog = Backlog(peer.offer.layout.block_bytes)
        self._reads = Backlog(peer.offer.layout.block_bytes)
        self._again: deque[_Frame] = deque()  # arrived damaged
        self._link: Link | None = None
        self._session = 0
        self._unplaced = 0  # frames
        self._began_s = 0.0  # when there was something to do, after there was nothing
        self._error: PenstockError | None = None
        self._answered = asyncio.Event()  # OPENED, or lost
        self._settled = asyncio.Event()  # everything is placed, or nothing more will be
        self._settled.set()

    @property
    def has_more(self) -> bool:
        return bool(self._backlog or self._reads or self._again)

    async def open(self) -> None:
        """Raises Refused, StaleEpoch or ConnectionLost."""
        self._link = link = await self._peer.link()
        self._session = link.register(self)
        link.say(OPEN, self._session, digest((self._name.encode(),)))
        await link.wait(self._answered)
        if self._error is not None:
            raise self._error

    def write(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        self._move(self._backlog, pairs)

    def read(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        self._move(self._reads, pairs)

    def _move(self, backlog: Backlog, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        if self._error is not None or self._link is None or not pairs:
            return  # `flush` says so
        if self._settled.is_set():
            self._settled.clear()
            self._began_s = clock.now()
        backlog.add(pairs)
        self._link.send(self)

    async def flush(self) -> None:
        """Raises ConnectionLost."""
        if self._link is not None:
            await self._link.wait(self._settled)
        if self._error is not None:
            raise self._error

    async def leave(self) -> None:
        """Nothing is sent from this region any more, and nothing stored there."""
        link, self._link = self._link, None
        if link is None or not self._session:
            return
        self._forget_rest()
        link.withdraw(self)
        if link.error is None:
            link.say(CLOSE, self._session)
            link.forget(self._session)

    def _forget_rest(self) -> None:
        self._backlog.clear()
        self._reads.clear()
        self._again.clear()

    def next_frame(self, number: int, limit_bytes: int) -> _Frame:
        """Only while it `has_more`."""
        now = clock.now()
        self._unplaced += 1
        if self._again:
            bad = self._again.popleft()
            return _Frame(self, bad.part, number, bad.runs, bad.size, bad.is_read, bad.attempt + 1, now)
        backlog = self._reads or self._backlog
        runs = backlog.take(limit_bytes, MAX_RANGES)
        part = None
        if backlog is self._backlog:
            self._parts.append(part := _Part(backlog.taken_pairs))
        return _Frame(self, part, number, runs, sum(run.size for run in runs), part is None, 1, now)

    def own(self, frame: _Frame) -> list[memoryview]:
        """A frame's ranges of this worker's region."""
        return [self._source[run.source : run.source + run.size] for run in frame.runs]

    @property
    def is_over(self) -> bool:
        return self._link is None or self._error is not None

    def pieces(self, frame: _Frame) -> list[memoryview]:
        """All of a frame as it is sent."""
        payload = None if frame.is_read else self.own(frame)
        ranges = [(run.target, run.size) for run in frame.runs]
        has_checksums = self._link is not None and self._link.has_checksums
        head = frame_head(self._session, frame.number, ranges, payload, has_checksums)
        return [memoryview(head), *(payload or ())]

    def on_answer(self, kind: int) -> None:
        self._answered.set()

    def on_placed(self, frame: _Frame) -> None:
        self._unplaced -= 1
        if frame.part is not None:
            frame.part.is_placed = True
        moved = self.moved
        blocks, seconds = moved.blocks, moved.seconds
        while self._parts and self._parts[0].is_placed:
            blocks = self._parts.popleft().pairs
        if not self._unplaced and not self.has_more:
            seconds += clock.now() - self._began_s
            self._settled.set()
        self.moved = Moved(blocks, moved.size_bytes + frame.size, seconds, moved.descriptors + len(frame.runs))
        self._on_moved()

    def on_not_placed(self, frame: _Frame, is_damaged: bool) -> None:
        """Sends it once more, unless the pipe was left."""
        self._unplaced -= 1
        link, owner = self._link, self._peer.offer.owner
        if link is None:
            return
        if not is_damaged:
            link.withdraw(self)
            self.on_lost(ConnectionLost(f"{owner} took its memory back"))
        elif frame.attempt == ATTEMPTS:
            link.fail(ConnectionLost(f"{frame.size} bytes for {owner} were damaged on their way {ATTEMPTS} times"))
        else:
            log.warning("%d bytes for %s were damaged on their way and are sent again", frame.size, owner)
            self._again.append(frame)
            link.send(self)

    def on_lost(self, error: PenstockError) -> None:
        self._error = error
        self._forget_rest()
        self._answered.set()
        self._settled.set()


class _Lane:
    """One connection: what is to be said first, then frames."""

    def __init__(self, link: Link, sock: socket.socket, max_outstanding_bytes: int) -> None:
        self._link = link
        self._sock = sock
        self._max_outstanding_bytes = max_outstanding_bytes
        self._outstanding_bytes = 0  # sent or being sent, and not answered for
        self._chunk_bytes = FIRST_CHUNK_BYTES
        self._replied_s = 0.0
        self._sent_bytes = 0
        self._said: deque[bytes] = deque()
        self._frame: _Frame | None = None  # that `_pieces` is the rest of
        self._pieces: deque[memoryview] = deque()
        self._is_waiting = False  # for room in the kernel
        self.received_bytes = 0
        self._reply = bytearray(REPLY.size)
        self._rest = bytearray()  # of a reply: a reason, or a checksum
        self._fetched: _Frame | None = None  # whose bytes are coming
        self._wanted: deque[memoryview] = deque()
        self._then: Callable[[], None] = self._on_head
        self._want_head()
        asyncio.get_running_loop().add_reader(sock, self._on_readable)

    @property
    def arrived_bytes(self) -> int:
        """So many bytes has the peer's kernel acknowledged."""
        if self._link.error is not None:
            return self._sent_bytes
        (queued,) = _QUEUED.unpack(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(_QUEUED.size)))
        return self._sent_bytes - int(queued)

    def say(self, message: bytes) -> None:
        self._said.append(message)
        self.wake()

    def wake(self) -> None:
        """There may be something to send."""
        if not self._is_waiting and self._link.error is None:
            self._push()

    def blank(self, sending: Sending) -> None:
        """The rest of a frame of it, which must be sent for the next one to be found, is sent from elsewhere."""
        if self._frame is None or self._frame.sending is not sending:
            return
        rest = sum(map(len, self._pieces))
        if not rest:
            return
        size = min(rest, self._frame.size)  # of the payload
        kept = [self._pieces[0]] if rest > size else []  # the head, all of it or its end
        whole, end = divmod(size, len(_FILLER))
        self._pieces = deque([*kept, *[_FILLER] * whole, *([_FILLER[:end]] if end else [])])

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        asyncio.get_running_loop().remove_writer(self._sock)
        self._sock.close()
        self._pieces.clear()
        self._frame = None

    def on_reply(self, frame: _Frame) -> None:
        """The owner answered for a frame that was sent here."""
        self._outstanding_bytes -= frame.size
        now = clock.now()
        took_s = now - max(frame.loaded_s, self._replied_s)
        self._replied_s = now
        if frame.size * 2 > self._chunk_bytes and took_s > 0:  # short ones tell more of latency
            fitting = int(frame.size * CHUNK_S / took_s)
            self._chunk_bytes = min(max((self._chunk_bytes + fitting) // 2, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
        self.wake()

    def _push(self) -> None:
        """One call of the kernel; the loop calls again when it has room, as long as there is more."""
        if self._pieces or self._load():
            try:
                count = self._sock.sendmsg(list(islice(self._pieces, PIECES)))
            except BlockingIOError:
                count = 0
            except OSError as error:
                self._link.fail(ConnectionLost(f"lost {self._link.offer.owner} while sending: {error.strerror}"))
                return
            self._sent_bytes += count
            advance(self._pieces, count)
        self._wait(bool(self._pieces) or self._may_load())

    def _wait(self, is_waiting: bool) -> None:
        """Whether the loop should call when the kernel has room."""
        if is_waiting == self._is_waiting:
            return
        self._is_waiting = is_waiting
        if is_waiting:
            asyncio.get_running_loop().add_writer(self._sock, self._push)
        else:
            asyncio.get_running_loop().remove_writer(self._sock)

    def _may_load(self) -> bool:
        return bool(self._said) or (self._link.has_turns and not self._is_full)

    @property
    def _is_full(self) -> bool:
        """No frame may be added before another is answered for."""
        outstanding = self._outstanding_bytes
        return outstanding > 0 and outstanding + self._chunk_bytes > self._max_outstanding_bytes

    def _load(self) -> bool:
        """Whether there is something to send now."""
        self._frame = None
        if self._said:
            self._pieces.append(memoryview(b"".join(self._said)))
            self._said.clear()
            return True
        if not self._link.has_turns or self._is_full:
            return False
        self._frame = frame = self._link.next_frame(self._chunk_bytes)
        self._outstanding_bytes += frame.size
        self._pieces.extend(frame.sending.pieces(frame))
        return True

    def waste(self, sending: Sending) -> None:
        """What is still to come for it goes nowhere."""
        if self._fetched is not None and self._fetched.sending is sending:
            self._fetched = None
            self._wanted = wasted(sum(map(len, self._wanted)))

    def _on_readable(self) -> None:
        for _ in range(2):  # a reply, and what is there of its bytes
            if self._link.error is not None or not self._receive():
                return

    def _receive(self) -> bool:
        """One call of the kernel; whether there may be more."""
        try:
            count = self._sock.recvmsg_into(list(islice(self._wanted, PIECES)))[0]
        except BlockingIOError:
            return False
        except OSError as error:
            self._link.fail(ConnectionLost(f"lost {self._link.offer.owner}: {error.strerror}"))
            return False
        if not count:
            self._link.fail(ConnectionLost(f"{self._link.offer.owner} closed a connection"))
            return False
        self.received_bytes += count
        advance(self._wanted, count)
        if not self._wanted:
            self._then()
        return True

    def _want_head(self) -> None:
        self._want(memoryview(self._reply), then=self._on_head)

    def _want(self, *pieces: memoryview, then: Callable[[], None]) -> None:
        self._wanted.extend(pieces)
        self._then = then

    def _on_head(self) -> None:
        kind, session, number = REPLY.unpack(self._reply)
        if kind == GOODBYE:
            self._rest = bytearray(min(max(number, 1), MAX_REASON_BYTES))
            self._want(memoryview(self._rest), then=self._on_reason)
        elif kind == FETCHED:
            self._want_fetched(number)
        else:
            self._link.on_reply(kind, session, number, self)
            self._want_head()

    def _on_reason(self) -> None:
        self._link.on_goodbye(self._rest.decode(errors="replace"))

    def _want_fetched(self, number: int) -> None:
        frame = self._link.find_frame(number)
        if frame is None or not frame.is_read:
            self._link.fail(ConnectionLost(f"{self._link.offer.owner} sent what it was not asked for"))
            return
        self._rest = bytearray(DIGEST.size if self._link.has_checksums else 0)
        is_over = frame.sending.is_over
        self._fetched = None if is_over else frame
        pieces = wasted(frame.size) if is_over else frame.sending.own(frame)
        head = [memoryview(self._rest)] if self._rest else []
        self._want(*head, *pieces, then=lambda: self._on_fetched(frame))

    def _on_fetched(self, frame: _Frame) -> None:
        kind = FETCHED
        if self._fetched is not None and self._rest:
            (expected,) = DIGEST.unpack(self._rest)
            kind = FETCHED if digest(frame.sending.own(frame)) == expected else DAMAGED
        self._fetched = None
        self._link.on_reply(kind, 0, frame.number, self)
        self._want_head()
