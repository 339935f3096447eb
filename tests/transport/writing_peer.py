"""A process that connects to a region and then does as it is told, a line of stdin at a time.

`python -m tests.transport.writing_peer OFFER TOKEN WRITER`, the offer as msgpack in hexadecimal. Its own region, as
large, is full of 7. It answers each line with one: errors with their class, "holds N" with whether it has a byte of
that.
"""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from penstock import plugin
from penstock.blocks import BlockId
from penstock.errors import PenstockError
from penstock.transport.api import Offer, Pipe
from penstock.transport.host_memory import new_region

ANSWERS = os.fdopen(os.dup(1), "w")  # libraries print to standard output
os.dup2(2, 1)


async def stream(pipe: Pipe, everything: list[tuple[BlockId, BlockId]]) -> None:
    while True:
        pipe.write(everything)
        await pipe.flush()


async def read_for_ever(pipe: Pipe, everything: list[tuple[BlockId, BlockId]]) -> None:
    while True:
        pipe.read(everything)
        await pipe.flush()


async def obey(command: str, pipe: Pipe, blocks: int) -> None:
    """Streams and reads for ever say nothing before they fail."""
    everything = [(BlockId(number), BlockId(number)) for number in range(blocks)]
    match command:
        case "write":
            pipe.write(everything)
        case "flush":
            await pipe.flush()
        case "read":
            pipe.read(everything)
        case "stream":
            await stream(pipe, everything)
        case "read for ever":
            await read_for_ever(pipe, everything)
        case _:
            raise ValueError(command)


async def main(offer_hex: str, token: str, writer: str) -> None:
    offer = msgspec.msgpack.decode(bytes.fromhex(offer_hex), type=Offer)
    async with (
        plugin.find("transport", offer.transport).TRANSPORT(token) as transport,
        new_region("p", 1, offer.layout, offer.blocks) as source,
    ):
        assert source.buffer is not None
        source.buffer[:] = b"\7" * len(source.buffer)
        async with transport.connect(offer, source, writer, "r", lambda: None) as pipe:
            print("connected", file=ANSWERS, flush=True)
            while (command := sys.stdin.readline().strip()) not in ("leave", ""):  # its bytes move on another thread
                if command.startswith("holds "):
                    print(bytes([int(command[6:])]) in bytes(source.buffer), file=ANSWERS, flush=True)
                    continue
                try:
                    await obey(command, pipe, offer.blocks)
                    print("done", file=ANSWERS, flush=True)
                except PenstockError as error:
                    print(type(error).__name__, file=ANSWERS, flush=True)
        print("left", file=ANSWERS, flush=True)
        sys.stdin.readline()


asyncio.run(main(*sys.argv[1:]))
