"""The writer's side of the `tcp` transport: keeps a link to each owner, over which its pipes take turns.

    peer        an owner, as this writer knows it: one link at a time, dialled when it is needed
    link        several connections (lanes); lost with the first of them that is lost
    session     a pipe: blocks, cut into frames when a lane has room for one

All of it lives on the I/O thread. After each frame the next pipe has its turn, so that none waits long for a big one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Sequence

from penstock import auth, clock
from penstock.errors import ConnectionLost, PenstockError
from penstock.transport.api import Offer
from penstock.transport.sockets import dial, is_loopback
from penstock.transport.tcp_frames import HEAD, PURPOSE, Hello, say_hello
from penstock.transport.tcp_lane import Lane
from penstock.transport.tcp_options import Options
from penstock.transport.tcp_session import Frame, Session

log = logging.getLogger(__name__)


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
        self.has_checksums = has_checksums
        self.error: PenstockError | None = None
        self._stalled_s = options.stalled_s
        self._numbers = 0  # given to sessions and frames so far
        self._sessions: dict[int, Session] = {}
        self._turns: deque[Session] = deque()  # who has something to move, the next one first
        share_bytes = options.max_outstanding_bytes // len(sockets)
        self._lanes = [Lane(self, sock, share_bytes) for sock in sockets]

    # For sessions

    def register(self, session: Session) -> int:
        """Its number."""
        self._numbers += 1
        self._sessions[self._numbers] = session
        return self._numbers

    def say(self, kind: int, session: int, name: int = 0) -> None:
        self._lanes[0].say(HEAD.pack(kind, session, name, 0))

    def send(self, session: Session) -> None:
        """It has something to move."""
        if session not in self._turns:
            self._turns.append(session)
        for lane in self._lanes:
            lane.wake()

    def withdraw(self, session: Session) -> None:
        """Nothing that lies in its region is sent from now on, nor anything stored there."""
        if session in self._turns:
            self._turns.remove(session)
        for lane in self._lanes:
            lane.withdraw(session)

    def forget(self, number: int) -> None:
        self._sessions.pop(number, None)

    async def wait(self, event: asyncio.Event) -> None:
        """Waits for an event of a registered session. The loss of this link sets it too, as does want of progress."""
        while not event.is_set():
            before = self._progress()
            try:
                async with asyncio.timeout(self._stalled_s):
                    await event.wait()
            except TimeoutError:
                if self._progress() == before:
                    self.fail(ConnectionLost(f"{self.offer.owner} took and said nothing for {self._stalled_s:g} s"))

    def fail(self, error: PenstockError) -> None:
        """Ends it for all sessions. Idempotent."""
        if self.error is not None:
            return
        self.error = error
        log.info("the link to %s has ended: %s", self.offer.owner, error)
        for lane in self._lanes:
            lane.close()
        sessions = list(self._sessions.values())
        self._sessions.clear()
        self._turns.clear()
        for session in sessions:
            session.on_lost(error)

    def _progress(self) -> list[tuple[int, int]]:
        """Changes while bytes arrive anywhere."""
        return [] if self.error is not None else [lane.progress for lane in self._lanes]

    # For lanes

    @property
    def has_turns(self) -> bool:
        """Some session has something to move."""
        return bool(self._turns)

    def next_frame(self, limit_bytes: int) -> Frame:
        """Of the session whose turn it is; only while it `has_turns`."""
        session = self._turns.popleft()
        self._numbers += 1
        frame = session.next_frame(self._numbers, limit_bytes)
        if session.has_more:
            self._turns.append(session)
        return frame

    def on_opened(self, number: int) -> None:
        if (session := self._sessions.get(number)) is not None:
            session.on_opened()
