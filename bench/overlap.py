"""How much of a KV transfer is waited for after prefill: streamed chunk by chunk, against sent when all is computed.

Simulated: prompts of 8,192 tokens of a model with 320 KiB of KV a token and 28,000 tokens/s of prefill (9.2 GB/s of
KV), over links of 1, 10 and 100 GB/s, from one prefill worker to one decode worker and from eight to one. The whole
serving path runs, on virtual time; its engine has 16 bytes of KV a token, and links are slower by as much.

Real: between this host and a network namespace, over a link of 200 MB/s that `tc` shapes (tbf), 64 MiB in 16 chunks.
The transfer is penstock's over TCP; a chunk's computation is a wait of 25 ms, so that prefill makes 168 MB/s of KV.
Where namespaces cannot be made, this part says so and is left out.

Exposed is the time from the end of prefill until the KV is in place and decoded from, as a share of prefill time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import mean

import msgspec
from report import Row, emit

from penstock.blocks import BlockId, KvLayout
from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import SetupError
from penstock.policy.batching import Limits
from penstock.policy.routing.api import Ask, Choice, Fleet
from penstock.serve.lend import LendOptions
from penstock.serve.prefill import PrefillOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Shape, World
from penstock.transport.api import Offer
from penstock.transport.host_memory import new_region
from penstock.transport.tcp import Options, TcpTransport

PROMPT, CHUNK = 8192, 512
KV_BYTES, SIMULATED_KV_BYTES = 320 << 10, 16  # a token
PREFILL_TOKENS_PER_S = 28_000
INCOMING_BYTES = LendOptions().incoming_bytes
STEP_S = 1e-4  # of a step beside its tokens: a prompt in 16 steps takes about as long as in one

TOKEN = "bench"
HERE, THERE = "10.77.32.1", "10.77.32.2"
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=256, block_tokens=16, dtype="float32")  # a block is 32 KiB
BLOCKS, CHUNKS = 2048, 16
CHUNK_S = 0.025
LINK_BYTES_PER_S = 200e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.add_argument("--send", nargs=3, metavar=("OFFER", "NUMBER", "CHUNKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        offer, number, chunks = arguments.send
        asyncio.run(send(msgspec.msgpack.decode(bytes.fromhex(offer), type=Offer), int(number), int(chunks)))
    else:
        emit([*simulated(), *real()], arguments.json)


# Simulated


def simulated() -> Iterator[Row]:
    for writers in (1, 8):
        for link_gb_per_s in (1, 10, 100):
            whole, streamed = (run_virtual(exposed(writers, link_gb_per_s, chunk)) for chunk in (PROMPT, CHUNK))
            name = f"simulated, {writers} to 1, {link_gb_per_s} GB/s: exposed share of prefill"
            # What a link that is faster than prefill must come to: the last chunk alone is waited for.
            is_faster = link_gb_per_s * 1e9 / writers > KV_BYTES * PREFILL_TOKENS_PER_S
            aim = 1.5 / (PROMPT // CHUNK) if is_faster else None
            yield Row(name, streamed, "", "not streamed", whole, aim, aim_is_for_value=True)
    shared = run_virtual(exposed(8, 10, CHUNK, incoming_bytes=1 << 50))
    streamed = run_virtual(exposed(8, 10, CHUNK))
    yield Row("the same, 8 to 1, 10 GB/s: one after the other", streamed, "", "side by side", shared, 0.7)


async def exposed(writers: int, link_gb_per_s: float, chunk: int, incoming_bytes: int = INCOMING_BYTES) -> float:
    """Mean over as many prompts as writers, all at once."""
    worker = WorkerOptions(
        *("", 0),
        limits=Limits(step_tokens=chunk),
        prefill=PrefillOptions(chunk_tokens=chunk),
        lend=LendOptions(incoming_bytes=incoming_bytes * SIMULATED_KV_BYTES // KV_BYTES),
    )
    shape = Shape(
        prefill=writers,
        engine=EngineOptions(prefill_token_s=1 / PREFILL_TOKENS_PER_S, step_s=STEP_S, max_context_tokens=PROMPT + 16),
        kv_blocks=writers * (PROMPT // 16 + 2),
        worker=worker,
        is_streamed=True,
    )
    async with World(seed=1, shape=shape, policy=to_each(writers)) as world:
        links = {link for n in range(writers) for link in world.wiring.route(f"prefill-{n}", "decode-0").links}
        rate = link_gb_per_s * 1e9 * SIMULATED_KV_BYTES / KV_BYTES
        for link in sorted(links, key=lambda link: link.name):
            world.links.slow(link, rate / link.nominal_bytes_per_s)
        answers = await asyncio.gather(*(world.ask(tokens=PROMPT, max_tokens=3) for _ in range(writers)))
        shares = []
        for answer in answers:
            if answer.finish is None or not answer.is_whole or answer.finish.timeline.path != "streamed":
                raise SystemExit(f"a prompt was not served as it should be: {answer}")
            timeline = answer.finish.timeline
            began_s, ended_s, decoded_s = timeline.prefill_started_s, timeline.prefill_ended_s, timeline.decoding_s
            assert began_s is not None and ended_s is not None and decoded_s is not None
            shares.append((decoded_s - ended_s - STEP_S) / (ended_s - began_s))
        return mean(shares)


def to_each(writers: int):
    """One prompt to each prefill worker."""
    turn = iter(range(1 << 30))

    def route(now: float, ask: Ask, fleet: Fleet, rng: object) -> Choice:
        return Choice("decode-0", (f"prefill-{next(turn) % writers}",), 0.0, -1.0, "by the benchmark")

    return route


# Real


def real() -> Iterator[Row]:
    try:
        with shaped_host() as namespace:
            for writers in (1, 8):
                whole, streamed = (asyncio.run(receive(namespace, writers, chunks)) for chunks in (1, CHUNKS))
                name = f"real, {writers} to 1, {LINK_BYTES_PER_S / 1e6:.0f} MB/s: exposed share of prefill"
                yield Row(name, streamed, "", "not streamed", whole)
    except SetupError as error:
        print(f"the real link is left out: {error}", file=sys.stderr)


@contextmanager
def shaped_host() -> Iterator[str]:
    """A network namespace behind a link of LINK_BYTES_PER_S. Raises SetupError where there can be none."""
    name = f"penstock-{os.getpid()}"
    near, far = f"pk{os.getpid()}a", f"pk{os.getpid()}b"
    rate = f"{LINK_BYTES_PER_S * 8:.0f}bit"
    shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms")
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
            run("ip", "addr", "add", f"{HERE}/30", "dev", near)
            run("ip", "link", "set", near, "up")
            for command in (("addr", "add", f"{THERE}/30", "dev", far), ("link", "set", far, "up")):
                run("ip", "netns", "exec", name, "ip", *command)
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", far, *shape)
            yield name
        finally:
            run("ip", "netns", "del", name)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise SetupError(f"{error}: {getattr(error, 'stderr', '')}") from error


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


async def receive(namespace: str, writers: int, chunks: int) -> float:
    """The mean exposed share of as many writers, all at once."""
    async with (
        TcpTransport(TOKEN, Options(host=HERE)) as transport,
        new_region("d", 1, LAYOUT, BLOCKS * writers) as region,
        transport.export(region) as exported,
    ):
        offer = msgspec.msgpack.encode(exported.offer).hex()
        command = ("ip", "netns", "exec", namespace, sys.executable, __file__)
        senders = [
            await asyncio.create_subprocess_exec(
                *(*command, "--send", offer, str(number), str(chunks)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            for number in range(writers)
        ]
        for sender in senders:
            assert sender.stdout is not None
            await sender.stdout.readline()  # it is connected
        found = await asyncio.gather(*(sender.communicate(b"go\n") for sender in senders))
        return mean(json.loads(output) for output, _ in found)


async def send(offer: Offer, number: int, chunks: int) -> None:
    """Computes and sends its part in so many chunks, and prints the exposed share."""
    blocks = range(number * BLOCKS, (number + 1) * BLOCKS)
    pairs = [(BlockId(block - blocks.start), BlockId(block)) for block in blocks]
    async with (
        TcpTransport(TOKEN) as transport,
        new_region("p", 1, LAYOUT, BLOCKS) as region,
        transport.connect(offer, region, f"p:{number}", "bench", lambda: None) as pipe,
    ):
        print("connected", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began_s = time.perf_counter()
        for part in parts(pairs, chunks):
            await asyncio.sleep(CHUNK_S * CHUNKS / chunks)
            pipe.write(part)
        computed_s = time.perf_counter()
        await pipe.flush()
        print((time.perf_counter() - computed_s) / (computed_s - began_s), flush=True)


def parts(pairs: Sequence[tuple[BlockId, BlockId]], count: int) -> Iterator[Sequence[tuple[BlockId, BlockId]]]:
    ends = [len(pairs) * number // count for number in range(count + 1)]
    return (pairs[start:end] for start, end in pairwise(ends))


if __name__ == "__main__":
    main()
