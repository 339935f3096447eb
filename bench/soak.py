"""Whether a server stays as it was: many idle connections, many streams at once, many requests one after the other.

A frontend and a simulated engine in processes of their own, over real HTTP. Idle connections hold sockets and nothing
else, so what counts is their memory and whether others are served meanwhile. All streams of a crowd must end complete.
Memory over many requests is the slope of a line through what the frontend holds after the first fifth of them, when its
records of past requests and its prefix index are full; the aim is what 100,000 requests may leave behind.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from frontend import MODEL, Case, make_model, serving
from loadgen import chat_request, generate_load
from report import Row, emit

Address = tuple[str, int]

END = b"data: [DONE]\n\n\r\n0\r\n\r\n"  # of a stream that is complete
PROMPT_TOKENS, STREAM_TOKENS = 128, 64
SPARE_FILES = 500
SAMPLES = 40
STREAMS_OF_WORKER = 200  # which runs 256 at once, lets as many wait, and refuses more
LOAD = Case("soak", 0.0, 32, PROMPT_TOKENS, 1, "", "", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    arguments = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    idle, streams, requests = (2_000, 500, 10_000) if arguments.quick else (10_000, 2_000, 100_000)
    idle = min(idle, files - SPARE_FILES)
    with tempfile.TemporaryDirectory() as folder:
        prompts = make_prompts(make_model(Path(folder)))
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[1:] or cores)
        with serving(Path(folder), LOAD, "pairs", cores[0]) as (address, frontend):
            rows = [*measure_idle(address, frontend, prompts[0], idle)]
            rows += measure_slope(address, frontend, prompts, requests)
        crowded = replace(LOAD, workers=math.ceil(streams / STREAMS_OF_WORKER))
        with serving(Path(folder), crowded, "pairs", cores[0]) as (address, _):
            rows += measure_crowd(address, prompts, streams)
    emit(rows, arguments.json)


def make_prompts(words: Sequence[str]) -> list[str]:
    rng = Random(0)
    return [" ".join(rng.choices(words, k=PROMPT_TOKENS)) for _ in range(400)]


def measure_idle(address: Address, frontend: int, prompt: str, connections: int) -> Iterator[Row]:
    """What idle connections cost, and what they cost others."""
    before_s = asyncio.run(median_answer_s(address, prompt))
    before_kib = memory_kib(frontend)
    during_s, during_kib = asyncio.run(among_idle(address, frontend, prompt, connections))
    name = f"{connections:,} idle connections"
    yield Row(f"{name}: memory each", (during_kib - before_kib) / connections, "KiB", aim=32.0)
    yield Row(f"{name}: time of another's request", during_s * 1e3, "ms", "without them", before_s * 1e3, aim=1.5)


async def among_idle(address: Address, frontend: int, prompt: str, connections: int) -> tuple[float, float]:
    """Seconds of a request, and memory of the frontend, while so many connections are open."""
    async with AsyncExitStack() as opened:
        for _ in range(connections):
            await opened.enter_async_context(connected(address))
        return await median_answer_s(address, prompt), memory_kib(frontend)


async def median_answer_s(address: Address, prompt: str) -> float:
    taken = []
    async with connected(address) as (reader, writer):
        for _ in range(100):
            sent_s = time.perf_counter()
            writer.write(chat_request(MODEL, prompt, 1))
            await reader.readuntil(END)
            taken.append(time.perf_counter() - sent_s)
    return statistics.median(taken)


def measure_crowd(address: Address, prompts: Sequence[str], streams: int) -> Iterator[Row]:
    complete, seconds = asyncio.run(crowd(address, prompts, streams))
    yield Row(f"{streams:,} streams at once: complete", 100 * complete / streams, "%", aim=100.0, more_is_better=True)
    yield Row(f"{streams:,} streams at once: tokens", streams * STREAM_TOKENS / seconds, "tokens/s")


async def crowd(address: Address, prompts: Sequence[str], streams: int) -> tuple[int, float]:
    """How many of so many streams, all open before the first one is asked for, end complete; and the time for all."""
    async with AsyncExitStack() as opened:
        connections = [await opened.enter_async_context(connected(address)) for _ in range(streams)]
        started_s = time.perf_counter()
        for number, (_, writer) in enumerate(connections):
            writer.write(chat_request(MODEL, prompts[number % len(prompts)], STREAM_TOKENS))
        ends = await asyncio.gather(*(is_complete(reader) for reader, _ in connections))
        return sum(ends), time.perf_counter() - started_s


async def is_complete(reader: asyncio.StreamReader) -> bool:
    if b" 200 " not in await reader.readline():
        return False
    try:
        events = (await reader.readuntil(END)).count(b"data: ")
    except asyncio.IncompleteReadError:
        return False
    return events == STREAM_TOKENS + 3  # the role, the finish and [DONE]


def measure_slope(address: Address, frontend: int, prompts: Sequence[str], requests: int) -> Iterator[Row]:
    """Memory against the number of requests served."""
    made = [chat_request(MODEL, prompt, 1) for prompt in prompts]
    served, points = 0, []
    while served < requests:
        served += serve_some(address, made, requests // SAMPLES)
        if served > requests // 5:
            points.append((served, memory_kib(frontend)))
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    reference = ("all it has", points[-1][1] / 1024)
    yield Row(f"memory over {served:,} requests: growth per 10,000", slope * 10_000 / 1024, "MiB", *reference, aim=0.01)


def serve_some(address: Address, made: Sequence[bytes], count: int) -> int:
    """At least `count` requests; how many there were."""
    served = 0
    while served < count:
        totals = generate_load(address, made, LOAD.connections, 0.0, 0.5, lambda: None)
        if totals.errors:
            raise SystemExit(f"a request failed: {totals.errors[0]}")
        served += totals.requests
    return served


def memory_kib(process: int) -> float:
    """Of a process, resident."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.close()


if __name__ == "__main__":
    main()
