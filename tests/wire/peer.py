"""A process that connects, sends one frame and then waits to be killed: `python -m tests.wire.peer ADDRESS TOKEN`."""

from __future__ import annotations

import asyncio
import os
import sys

from penstock.wire.stream import StreamWire


async def main(address: str, token: str) -> None:
    connection = await StreamWire().connect(address, token)
    connection.send_nowait(b"%d" % os.getpid())
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
