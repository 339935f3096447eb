"""A process that connects to a region and then does as it is told, a line of stdin at a time.

`python -m tests.transport.tcp_peer OFFER TOKEN WRITER`, the offer as msgpack in hexadecimal. Its own region, as large,
is full of 7. It answers each line with one: errors with their class, "holds N" with whether it has a byte of that.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from penstock.blocks import BlockId
from penstock.errors import PenstockError
from penstock.transport.api import Offer
from penstock.transport.host_memory import new_region
from penstock.transport.tcp import TcpPipe, TcpTransport


async def stream(pipe: TcpPipe, everything: list[tuple[BlockId, BlockId]]) -> None:
    while True:
        pipe.write(everything)
        await pipe.flush()


async def read_for_ever(pipe: TcpPipe, everything: list[tuple[BlockId, BlockId]]) -> None:
    while True:
        pipe.read(everything)
        await pipe.flush()


async def obey(command: str, pipe: TcpPipe, blocks: int) -> None:
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
        TcpTransport(token) as transport,
        new_region("p", 1, offer.layout, offer.blocks) as source,
    ):
        assert source.buffer is not None
        source.buffer[:] = b"\7" * len(source.buffer)
        async with transport.connect(offer, source, writer, "r", lambda: None) as pipe:
            print("connected", flush=True)
            while (command := sys.stdin.readline().strip()) not in ("leave", ""):  # its bytes move on another thread
                if command.startswith("holds "):
                    print(bytes([int(command[6:])]) in bytes(source.buffer), flush=True)
                    continue
                try:
                    await obey(command, pipe, offer.blocks)
                    print("done", flush=True)
                except PenstockError as error:
                    print(type(error).__name__, flush=True)
        print("left", flush=True)
        sys.stdin.readline()


asyncio.run(main(*sys.argv[1:]))
