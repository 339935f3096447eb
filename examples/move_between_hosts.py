"""A million tokens of KV go from one host to another over TCP, block by block, straight into their places.

PENSTOCK_TOKEN=secret python examples/move_between_hosts.py receive 10.0.0.1    on that host, which prints
PENSTOCK_TOKEN=secret python examples/move_between_hosts.py send OFFER          what to run on the other one
"""

import asyncio
import os
import sys

import msgspec

from penstock.blocks import BlockId, KvLayout
from penstock.transport.api import Offer
from penstock.transport.host_memory import new_region
from penstock.transport.tcp import Options, TcpTransport

TOKENS = 1_000_000
LAYOUT = KvLayout(layers=4, kv_heads=1, head_dim=64, block_tokens=16, dtype="bfloat16")  # 1 KiB a token
BLOCKS = TOKENS // LAYOUT.block_tokens


async def receive(host: str) -> None:
    async with (
        TcpTransport(os.environ["PENSTOCK_TOKEN"], Options(host=host)) as transport,
        new_region("decode", 1, LAYOUT, BLOCKS) as region,
        transport.export(region) as exported,
    ):
        assert region.buffer is not None
        print(msgspec.msgpack.encode(exported.offer).hex(), flush=True)
        while not region.buffer[-1]:  # the last byte is sent last; between workers a message says it
            await asyncio.sleep(0.1)
        await exported.fence("prefill:1", "example")  # from here on nothing of this transfer would be taken
        assert region.buffer[0] == 7
        print(f"{TOKENS:,} tokens are here")


async def send(offer: Offer) -> None:
    async with (
        TcpTransport(os.environ["PENSTOCK_TOKEN"]) as transport,
        new_region("prefill", 1, LAYOUT, BLOCKS) as region,
        transport.connect(offer, region, "prefill:1", "example", lambda: None) as pipe,
    ):
        assert region.buffer is not None
        region.buffer[:] = b"\7" * len(region.buffer)
        pairs = [(BlockId(block), BlockId(block)) for block in range(BLOCKS)]
        for first in range(0, BLOCKS - 1, 1_000):  # while the next ones are computed
            pipe.write(pairs[first : min(first + 1_000, BLOCKS - 1)])
        await pipe.flush()
        pipe.write(pairs[-1:])
        await pipe.flush()
        size_bytes, seconds = pipe.moved.size_bytes, pipe.moved.seconds
        print(f"{size_bytes / 2**20:.0f} MiB in {seconds:.2f} s, {size_bytes / seconds / 1e9:.1f} GB/s")


if sys.argv[1] == "receive":
    asyncio.run(receive(sys.argv[2]))
else:
    asyncio.run(send(msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=Offer)))
