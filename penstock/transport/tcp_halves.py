"""The two halves of a connection of the `tcp` transport, each one call of the kernel at a time, on the I/O thread.

What goes between a region and the kernel lies in the region itself. Between two of these calls either half can be made
to let go of it: the other side still gets, or gives, as many bytes as it was promised, so that it finds the next ones.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from penstock.errors import ConnectionLost, WireError

PIECES = 128  # of memory, in one call of the kernel: it moves no more than these hold at one time anyway
CALLS = 3  # of the kernel in a row: for the head of a frame, its ranges, and what is there of its bytes

_FILLER = memoryview(bytes(1 << 20))  # what is sent in the place of something
_WASTE = memoryview(bytearray(1 << 20))  # where bytes go that nobody wants

OnLost = Callable[[WireError], None]


class Inlet:
    """Fills the memory that is wanted, then calls `then`, which wants the next.

    `on_lost` is told of the end of the connection with `peer`, and what WireError `then` raised.
    """

    def __init__(self, sock: socket.socket, peer: str, on_lost: OnLost) -> None:
        self.received_bytes = 0
        self._sock = sock
        self._peer = peer
        self._on_lost = on_lost
        self._wanted: deque[memoryview] = deque()
        self._then: Callable[[], None]
        self._is_open = False

    def want(self, *pieces: memoryview, then: Callable[[], None]) -> None:
        """Only when all that was wanted before is there."""
        self._wanted.extend(pieces)
        self._then = then

    def want_waste(self, size: int, then: Callable[[], None]) -> None:
        """`size` bytes that go nowhere."""
        self.want(*_repeated(_WASTE, size), then=then)

    def waste(self) -> None:
        """What is still to come of what is wanted goes nowhere."""
        self._wanted = deque(_repeated(_WASTE, sum(map(len, self._wanted))))

    def open(self) -> None:
        """Receives from now on. Idempotent, as all of these."""
        if not self._is_open:
            self._is_open = True
            asyncio.get_running_loop().add_reader(self._sock, self._on_readable)

    def close(self) -> None:
        """Receives nothing any more, and holds no memory."""
        self.pause()
        self._wanted.clear()

    def pause(self) -> None:
        """Receives nothing until it is opened again."""
        if self._is_open:
            self._is_open = False
            asyncio.get_running_loop().remove_reader(self._sock)

    def _on_readable(self) -> None:
        for _ in range(CALLS):
            if not (self._is_open and self._receive()):
                return

    def _receive(self) -> bool:
        """Whether there may be more."""
        try:
            count = self._sock.recvmsg_into(list(islice(self._wanted, PIECES)))[0]
        except BlockingIOError:
            return False
        except OSError as error:
            self._on_lost(ConnectionLost(f"lost {self._peer}: {error.strerror}"))
            return False
        if not count:
            self._on_lost(ConnectionLost(f"{self._peer} closed a connection"))
            return False
        self.received_bytes += count
        _advance(self._wanted, count)
        try:
            if not self._wanted:
                self._then()
        except WireError as error:
            self._on_lost(error)
        return True


class Outlet:
    """Sends what `load` gives, and when that is sent asks it again as long as there `is_more`. It may have nothing.

    `on_lost` is told of the end of the connection with `peer`.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        load: Callable[[], Sequence[memoryview]],
        is_more: Callable[[], bool],
        on_lost: OnLost,
    ) -> None:
        self.sent_bytes = 0
        self._sock = sock
        self._peer = peer
        self._load = load
        self._is_more = is_more
        self._on_lost = on_lost
        self._pieces: deque[memoryview] = deque()
        self._is_waiting = False  # for room in the kernel
        self._is_closed = False

    @property
    def is_empty(self) -> bool:
        """All that was loaded is with the kernel."""
        return not self._pieces

    def wake(self) -> None:
        """There may be something to load."""
        if not self._is_waiting and not self._is_closed:
            self._push()

    def blank(self, size: int) -> None:
        """What is left of the last `size` bytes is sent from elsewhere. What was loaded before them is one piece."""
        rest = sum(map(len, self._pieces))
        head = [self._pieces[0]] if rest > size else []
        self._pieces = deque([*head, *_repeated(_FILLER, min(rest, size))])

    def close(self) -> None:
        """Nothing more is sent. Idempotent."""
        self._is_closed = True
        self._pieces.clear()
        self._wait(False)

    def _push(self) -> None:
        """The loop calls again when the kernel has room, until there is nothing more."""
        if not self._pieces:
            self._pieces.extend(self._load())
        if self._pieces and not self._send():
            return
        self._wait(bool(self._pieces) or self._is_more())

    def _send(self) -> bool:
        """Whether the connection is still there."""
        try:
            count = self._sock.sendmsg(list(islice(self._pieces, PIECES)))
        except BlockingIOError:
            return True
        except OSError as error:
            self._on_lost(ConnectionLost(f"lost {self._peer} while sending: {error.strerror}"))
            return False
        self.sent_bytes += count
        _advance(self._pieces, count)
        return True

    def _wait(self, is_waiting: bool) -> None:
        if is_waiting == self._is_waiting:
            return
        self._is_waiting = is_waiting
        if is_waiting:
            asyncio.get_running_loop().add_writer(self._sock, self._push)
        else:
            asyncio.get_running_loop().remove_writer(self._sock)


def drain(sock: socket.socket) -> bool:
    """One call of the kernel; False at the end of what the peer sends."""
    try:
        return sock.recv_into(_WASTE) > 0
    except BlockingIOError:
        return True
    except OSError:
        return False


def _advance(pieces: deque[memoryview], count: int) -> None:
    """Takes the first `count` bytes off."""
    while count:
        first = pieces[0]
        if count < len(first):
            pieces[0] = first[count:]
            return
        count -= len(first)
        pieces.popleft()


def _repeated(memory: memoryview, size: int) -> list[memoryview]:
    """As often as it takes to come to `size` bytes."""
    whole, rest = divmod(size, len(memory))
    return [memory] * whole + ([memory[:rest]] if rest else [])
