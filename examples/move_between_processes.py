"""A million tokens of KV change hands between two processes of one host, and not a byte is copied.

python examples/move_between_processes.py
"""

import asyncio
import secrets
import sys
import time

import msgspec

from penstock.blocks import KvLayout
from penstock.transport.api import Offer
from penstock.transport.host_memory import new_region
from penstock.transport.shm import ShmTransport

TOKENS = 1_000_000
LAYOUT = KvLayout(layers=4, kv_heads=1, head_dim=64, block_tokens=16, dtype="bfloat16")  # 1 KiB a token


async def decode() -> None:
    """Owns the memory, lends it, and reads what is there."""
    token = secrets.token_hex(16)
    async with new_region("decode", 1, LAYOUT, TOKENS // 16) as region, ShmTransport(token).export(region) as exported:
        offer = msgspec.msgpack.encode(exported.offer).hex()
        command = (sys.executable, __file__, offer, token)
        peer = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert peer.stdout is not None and region.buffer is not None
        await peer.stdout.readline()  # it is written; this line is all that has crossed
        began_s = time.perf_counter()
        assert region.buffer[0] == region.buffer[-1] == 7
        took_ms = (time.perf_counter() - began_s) * 1e3
        print(f"{TOKENS:,} tokens, {len(region.buffer) / 2**20:.0f} MiB: read {took_ms:.3f} ms after they were written")
        await peer.wait()
        await exported.fence("prefill:1", "")  # returns since nobody can write any more


async def prefill(offer: Offer, token: str) -> None:
    """Computes in the other process's memory: here it fills it with sevens."""
    async with ShmTransport(token).attach(offer, "prefill:1") as attached:
        assert attached.region.buffer is not None
        attached.region.buffer[:] = b"\7" * len(attached.region.buffer)
        print("written", flush=True)


if len(sys.argv) == 1:
    asyncio.run(decode())
else:
    asyncio.run(prefill(msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=Offer), sys.argv[2]))
