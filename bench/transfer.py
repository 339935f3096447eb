"""Moving KV between two processes of this host: penstock's transports beside a memcpy, NIXL and Mooncake, in one run.

Bytes are written into the other process and are in place there when the clock stops: 1, 64 and 512 MiB, as one range
and as blocks of 32 KiB of which no two are neighbours on both sides, and a single block of 4 KiB. The best of several
rounds counts, after one that is not counted. Every byte is checked by the process that it was written to.

What is read instead is checked in the same way: both sides must have the same bytes at the end.

Each way is measured by two processes of its own, one way after the other. Over shared memory penstock copies nothing;
what is measured is a copy into the mapping. NIXL and Mooncake are measured where they are installed beside penstock:
`nixl` and `nixl-cu12` (with --no-deps; they need numpy and torch), `mooncake-transfer-engine-non-cuda` (and the
system's libibverbs1). NIXL's target polls as fast as it can, and neither side has NIXL's progress thread, which on two
cores starves the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
from report import Row, emit
from xxhash import xxh3_64_intdigest

from penstock.blocks import BlockId, KvLayout, Region
from penstock.transport.api import Offer, Transport
from penstock.transport.host_memory import new_region
from penstock.transport.nixl import NixlTransport
from penstock.transport.shm import ShmTransport
from penstock.transport.tcp import Options, TcpTransport

TOKEN = "bench"
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=256, block_tokens=16, dtype="float32")  # a block is 32 KiB
SMALL_LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=32, block_tokens=16, dtype="float32")  # 4 KiB

Bytes = npt.NDArray[np.uint8]
Move = Callable[[], object]  # returns when everything is in place


@dataclass(frozen=True, slots=True)
class Case:
    """`blocks` of a layout, moved to where they are here or, scattered, to the same places backwards."""

    name: str
    layout: KvLayout
    blocks: int
    is_scattered: bool
    rounds: int

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.layout.block_bytes

    @property
    def pairs(self) -> list[tuple[BlockId, BlockId]]:
        there = range(self.blocks)
        return [(BlockId(n), BlockId(m)) for n, m in enumerate(reversed(there) if self.is_scattered else there)]

    @property
    def ranges(self) -> list[tuple[int, int, int]]:
        """First byte here and there, and how many, neighbours joined."""
        size = self.layout.block_bytes
        return [(n * size, m * size, size) for n, m in self.pairs] if self.is_scattered else [(0, 0, self.size_bytes)]


Prepare = Callable[[Case], Move]


@dataclass(frozen=True, slots=True)
class Way:
    """`serve` runs in the process that is written to: it says how to reach its memory, then answers what has arrived.
    `reaching` gets that, and the bytes to move, in the process that writes.
    """

    serve: Callable[[Connection, int], None]
    reaching: Callable[[Any, Bytes], AbstractContextManager[Prepare]]
    package: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


SMALL = Case("4 KiB", SMALL_LAYOUT, blocks=1, is_scattered=False, rounds=300)


def cases(sizes_mib: Sequence[int]) -> list[Case]:
    found = []
    for size_mib in sizes_mib:
        blocks, rounds = (size_mib << 20) // LAYOUT.block_bytes, 20 if size_mib == 1 else 4
        found.append(Case(f"{size_mib} MiB", LAYOUT, blocks, is_scattered=False, rounds=rounds))
        found.append(Case(f"{size_mib} MiB in blocks", LAYOUT, blocks, is_scattered=True, rounds=rounds))
    return [*found, SMALL]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="up to 64 MiB")
    parser.add_argument("--way", choices=WAYS, help="measure this one by itself, and print seconds as JSON")
    arguments = parser.parse_args()
    plan = cases((1, 64) if arguments.quick else (1, 64, 512))
    if arguments.way is not None:
        print(json.dumps(measure(WAYS[arguments.way], plan)), flush=True)
        os._exit(0)  # foreign libraries' threads do not all survive the end of the interpreter
    seconds = {"memcpy": measure_memcpy(plan)}
    for name, way in WAYS.items():
        if way.package is None or find_spec(way.package) is not None:
            seconds[name] = measure_apart(name, way, arguments.quick)
        else:
            print(f"{name} is skipped: the package {way.package} is not installed", file=sys.stderr)
    emit(compared(plan, seconds), arguments.json)


def compared(plan: Sequence[Case], seconds: Mapping[str, Mapping[str, float]]) -> Iterator[Row]:
    for case in plan:
        values = {name: value_of(case, found[case.name]) for name, found in seconds.items() if case.name in found}
        unit, more_is_better = ("us", False) if case is SMALL else ("GB/s", True)
        for name, value in values.items():
            if name != "memcpy":
                yield Row(f"{case.name}: {name}", value, unit, "memcpy", values["memcpy"])
        for ours, rival in (("tcp", "NIXL over tcp"), ("tcp", "Mooncake"), ("nixl", "NIXL over CMA")):
            if ours in values and rival in values:
                aim = 1.0 if ours == "tcp" and case is not SMALL else None
                yield Row(f"{case.name}: {ours}", values[ours], unit, rival, values[rival], aim, more_is_better)


def value_of(case: Case, seconds: float) -> float:
    return seconds * 1e6 if case is SMALL else case.size_bytes / seconds / 1e9


# Measuring


def measure_apart(name: str, way: Way, is_quick: bool) -> dict[str, float]:
    """Seconds by case, found by another process; nothing if that fails, as foreign libraries do on some hosts."""
    command = [sys.executable, __file__, f"--way={name}", *(["--quick"] if is_quick else [])]
    done = subprocess.run(
        command, env={**os.environ, **way.environment}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(f"{name} failed, see above", file=sys.stderr)
        return {}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(way: Way, plan: Sequence[Case]) -> dict[str, float]:
    """Seconds of the best round of each case."""
    size_bytes = max(case.size_bytes for case in plan)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=way.serve, args=(there, size_bytes), daemon=True)
    process.start()
    there.close()  # so that its death is noticed
    source = noise(size_bytes)
    seconds = {}
    with way.reaching(here.recv(), source) as prepare:
        for case in plan:
            seconds[case.name] = best_s(prepare(case), case.rounds)
            if case is not SMALL:
                here.send(case.size_bytes)
                check(case, source, here.recv())
    here.send(None)
    process.join()
    return seconds


def measure_memcpy(plan: Sequence[Case]) -> dict[str, float]:
    """Inside one process."""
    source, target = (noise(max(case.size_bytes for case in plan)) for _ in range(2))
    return {case.name: best_s(partial(copy, case.ranges, source, target), case.rounds) for case in plan}


def best_s(move: Move, rounds: int) -> float:
    move()
    seconds = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


def noise(size_bytes: int) -> Bytes:
    """No two MiB are alike."""
    made = np.frombuffer(bytearray(secrets.token_bytes(1 << 20) * (size_bytes >> 20)), np.uint8)
    made[:: 1 << 20] = np.arange(size_bytes >> 20) % 251
    return made


def copy(ranges: Sequence[tuple[int, int, int]], source: Bytes, target: Bytes) -> None:
    for here, there, size in ranges:
        target[there : there + size] = source[here : here + size]


def check(case: Case, source: Bytes, digest: int) -> None:
    """Of what the other process has."""
    expected = np.empty(case.size_bytes, np.uint8)
    copy(case.ranges, source, expected)
    if xxh3_64_intdigest(expected) != digest:
        raise SystemExit(f"{case.name}: what arrived is not what was sent")


def answer(connection: Connection, memory: Bytes | memoryview) -> bool:
    """The digest of as much as is asked for; False if nothing more will be asked."""
    size_bytes = connection.recv()
    if size_bytes is not None:
        connection.send(xxh3_64_intdigest(memory[:size_bytes]))
    return size_bytes is not None


# penstock


async def serve_penstock(transport: Transport, connection: Connection, size_bytes: int) -> None:
    async with AsyncExitStack() as stack:
        if isinstance(transport, AbstractAsyncContextManager):
            await stack.enter_async_context(transport)
        regions = [
            await stack.enter_async_context(new_region("d", 1, layout, size_bytes // layout.block_bytes))
            for layout in (LAYOUT, SMALL_LAYOUT)
        ]
        exports = [await stack.enter_async_context(transport.export(region)) for region in regions]
        connection.send([exported.offer for exported in exports])
        asked = asyncio.Event()
        asyncio.get_running_loop().add_reader(connection.fileno(), asked.set)
        memory = regions[0].buffer
        assert memory is not None
        memory[:] = memoryview(noise(size_bytes))  # for those who read
        while True:
            await asked.wait()
            asked.clear()
            if not answer(connection, memory):
                break
        asyncio.get_running_loop().remove_reader(connection.fileno())
        del memory


def serve_tcp(connection: Connection, size_bytes: int) -> None:
    asyncio.run(serve_penstock(TcpTransport(TOKEN), connection, size_bytes))


def serve_own_nixl(connection: Connection, size_bytes: int) -> None:
    asyncio.run(serve_penstock(NixlTransport(TOKEN), connection, size_bytes))


def serve_shm(connection: Connection, size_bytes: int) -> None:
    asyncio.run(serve_penstock(ShmTransport(TOKEN), connection, size_bytes))


@contextmanager
def reaching(
    offers: Sequence[Offer], source: Bytes, new: Callable[[], Any], is_read: bool = False
) -> Iterator[Prepare]:
    """Over a transport of penstock's: moves blocks there or, with `is_read`, from there."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        loop, pipes = runner.get_loop(), {}

        async def connect() -> None:
            transport = await stack.enter_async_context(new())
            for number, offer in enumerate(offers):
                own = Region("p", 1, offer.layout, offer.blocks, memoryview(source))
                writer = f"p:{number}"
                pipes[offer.layout] = await stack.enter_async_context(
                    transport.connect(offer, own, writer, "bench", lambda: None)
                )

        def prepare(case: Case) -> Move:
            pipe, pairs = pipes[case.layout], case.pairs
            if is_read:
                source[:] = 0

            async def move() -> None:
                (pipe.read if is_read else pipe.write)(pairs)
                await pipe.flush()

            return lambda: loop.run_until_complete(move())

        runner.run(connect())
        try:
            yield prepare
        finally:
            runner.run(stack.aclose())


@contextmanager
def reaching_shm(offers: Sequence[Offer], source: Bytes) -> Iterator[Prepare]:
    attaching = ShmTransport(TOKEN).attach(offers[0], "p:1")
    loop = asyncio.new_event_loop()  # not closed: this process ends with the mapping in use
    attached = loop.run_until_complete(attaching.__aenter__())
    assert attached.region.buffer is not None
    target = np.frombuffer(attached.region.buffer, np.uint8)
    yield lambda case: partial(copy, case.ranges, source, target)


# NIXL


def nixl_agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"], enable_prog_thread=False))


def serve_nixl(connection: Connection, size_bytes: int) -> None:
    agent, memory = nixl_agent("target"), np.ones(size_bytes, np.uint8)
    agent.register_memory([(memory.ctypes.data, size_bytes, 0, "")], "DRAM")
    connection.send((agent.get_agent_metadata(), memory.ctypes.data))
    while not connection.poll() or answer(connection, memory):
        agent.get_new_notifs()  # moves what has arrived


@contextmanager
def reaching_nixl(reach: tuple[bytes, int], source: Bytes) -> Iterator[Prepare]:
    metadata, target = reach
    agent = nixl_agent("writer")
    agent.register_memory([(source.ctypes.data, len(source), 0, "")], "DRAM")
    peer = agent.add_remote_agent(metadata)
    agent.make_connection(peer)

    def prepare(case: Case) -> Move:
        pieces = range(len(case.ranges))
        here = [(source.ctypes.data + first, size, 0) for first, _, size in case.ranges]
        there = [(target + first, size, 0) for _, first, size in case.ranges]
        near = agent.prep_xfer_dlist("", agent.get_xfer_descs(here, "DRAM"))
        far = agent.prep_xfer_dlist(peer, agent.get_xfer_descs(there, "DRAM"))

        def move() -> None:
            handle = agent.make_prepped_xfer("WRITE", near, list(pieces), far, list(pieces), b"moved")
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            agent.release_xfer_handle(handle)
            if state != "DONE":
                raise SystemExit(f"{case.name}: NIXL says {state}")

        return move

    yield prepare


# Mooncake

MOONCAKE_BATCH = 1024  # of several thousand ranges at once it says -1


def mooncake_engine() -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if code := engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit(f"Mooncake does not start: {code}")
    return engine


def serve_mooncake(connection: Connection, size_bytes: int) -> None:
    engine, memory = mooncake_engine(), np.ones(size_bytes, np.uint8)
    engine.register_memory(memory.ctypes.data, size_bytes)
    connection.send((engine.get_rpc_port(), memory.ctypes.data))
    while answer(connection, memory):
        pass
    os._exit(0)  # its threads do not end by themselves


@contextmanager
def reaching_mooncake(reach: tuple[int, int], source: Bytes) -> Iterator[Prepare]:
    port, target = reach
    engine = mooncake_engine()
    engine.register_memory(source.ctypes.data, len(source))

    def prepare(case: Case) -> Move:
        here = [source.ctypes.data + first for first, _, _ in case.ranges]
        there = [target + first for _, first, _ in case.ranges]
        sizes = [size for _, _, size in case.ranges]
        address = f"127.0.0.1:{port}"

        def move() -> None:
            for first in range(0, len(sizes), MOONCAKE_BATCH):
                part = slice(first, first + MOONCAKE_BATCH)
                if code := engine.batch_transfer_sync_write(address, here[part], there[part], sizes[part]):
                    raise SystemExit(f"{case.name}: Mooncake says {code}")

        return move

    yield prepare


QUIET = {"NIXL_LOG_LEVEL": "WARN"}
WAYS = {
    "tcp": Way(serve_tcp, partial(reaching, new=lambda: TcpTransport(TOKEN))),
    "tcp with checksums": Way(
        serve_tcp, partial(reaching, new=lambda: TcpTransport(TOKEN, Options(has_checksums=True)))
    ),
    "tcp, reading": Way(serve_tcp, partial(reaching, new=lambda: TcpTransport(TOKEN), is_read=True)),
    "shm": Way(serve_shm, reaching_shm),
    "nixl": Way(serve_own_nixl, partial(reaching, new=lambda: NixlTransport(TOKEN)), "nixl", QUIET),
    "nixl over tcp": Way(
        *(serve_own_nixl, partial(reaching, new=lambda: NixlTransport(TOKEN)), "nixl"), {"UCX_TLS": "tcp", **QUIET}
    ),
    "NIXL over tcp": Way(serve_nixl, reaching_nixl, "nixl", {"UCX_TLS": "tcp", **QUIET}),
    "NIXL over CMA": Way(serve_nixl, reaching_nixl, "nixl", QUIET),
    "Mooncake": Way(serve_mooncake, reaching_mooncake, "mooncake", {"GLOG_minloglevel": "2"}),
}

if __name__ == "__main__":
    main()
