"""What the tests of wires share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from penstock.wire.api import Connection, Wire


class Tap:
    """Keeps what a connection hands over."""

    def __init__(self, connection: Connection, on_frame: Callable[[bytes], None] = lambda _: None) -> None:
        self.frames: list[bytes] = []
        self.reasons: list[str] = []
        self._changed = asyncio.Event()
        self._on_frame = on_frame
        connection.on_frame(self._receive, self._end)

    async def wait_frames(self, count: int) -> list[bytes]:
        """All frames, once there are `count`. More than that, or an early end, is a failure."""
        while len(self.frames) < count:
            assert not self.reasons, self.reasons
            await self._wait()
        assert len(self.frames) == count
        return self.frames

    async def wait_end(self) -> str:
        while not self.reasons:
            await self._wait()
        return self.reasons[0]

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _receive(self, frame: bytes) -> None:
        assert not self.reasons, "a frame came after the end"
        self.frames.append(frame)
        self._changed.set()
        self._on_frame(frame)

    def _end(self, reason: str) -> None:
        self.reasons.append(reason)
        self._changed.set()


@asynccontextmanager
async def connected(here: Wire, there: Wire, address: str, token: str) -> AsyncIterator[tuple[Connection, Connection]]:
    """A connection's two ends: the one that connected, the one that was accepted."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()
    async with there.listen(address, token, accepted.put_nowait) as bound:
        near = await here.connect(bound, token)
        yield near, await accepted.get()
