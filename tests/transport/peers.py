"""Other processes that write into a region of this one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from penstock.transport.api import Exported

TOKEN = "token"
WRITER = "p:1"


class PeerProcess:
    """tests.transport.writing_peer, and how to tell it what to do."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")

    async def ask(self, command: str) -> str:
        self.tell(command)
        return await self.read()

    async def read(self) -> str:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()


@asynccontextmanager
async def peer_of(exported: Exported, writer: str = WRITER) -> AsyncIterator[PeerProcess]:
    """A child process that has connected; killed at the end."""
    offer = msgspec.msgpack.encode(exported.offer).hex()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.transport.writing_peer", offer, TOKEN, writer),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        peer = PeerProcess(process)
        assert await peer.read() == "connected"
        yield peer
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
