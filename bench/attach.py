"""`penstock router` in front of another server: its CPU per streamed event and per request, and the time it adds.

The server behind it is penstock's frontend with a simulated engine. The router has a core for itself where there are
two. It tokenizes each prompt and looks it up; the events pass as they are. With `--turns URL` nothing is started:
conversations of several turns are held at URL, such as that of a router in front of vLLM, and their waits are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import httpx
from frontend import MODEL, Case, cpu_of, free_port, make_model, running, serving
from loadgen import chat_request, generate_load
from report import Row, emit

POLICY = "pairs"
CASES = (
    Case("256 streams, a step every 6 ms", 0.006, 256, 128, 128, "CPU per event", "us", {POLICY: 25.0}),
    Case("32 streams, as fast as it goes", 0.0, 32, 128, 128, "CPU per event", "us", {POLICY: 25.0}),
    Case("128 tokens in, 1 out", 0.0, 32, 128, 1, "CPU per request", "ms", {POLICY: 1.0}),
)
CONVERSATIONS, TURNS, AT_A_TIME = 12, 5, 3
FIRST_WORDS, MORE_WORDS = 220, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--turns", metavar="URL", help="hold conversations at this server instead")
    arguments = parser.parse_args()
    if arguments.turns:
        emit(asyncio.run(hold_conversations(arguments.turns)), arguments.json)
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    rounds, seconds = (1, 3.0) if arguments.quick else (3, 8.0)
    with tempfile.TemporaryDirectory() as folder:
        words = make_model(Path(folder))
        rows = [measure(Path(folder), words, case, rounds, seconds, cores[0]) for case in CASES]
    emit(rows, arguments.json)


def measure(folder: Path, words: Sequence[str], case: Case, rounds: int, seconds: float, core: int) -> Row:
    values = [one_round(folder, words, case, Random(seed), seconds, core) for seed in range(rounds)]
    return Row(f"{case.what}: {case.name}", statistics.median(values), case.unit, aim=case.aims[POLICY])


def one_round(folder: Path, words: Sequence[str], case: Case, rng: Random, seconds: float, core: int) -> float:
    prompts = [" " + " ".join(rng.choices(words, k=case.prompt_tokens)) for _ in range(case.prompts)]
    requests = [chat_request(MODEL, prompt, case.tokens) for prompt in prompts]
    cpu_s: list[float] = []
    port = free_port()
    with serving(folder, case, POLICY, core) as ((host, upstream), _):
        flags = (f"--attach=http://{host}:{upstream}", f"--tokenizer={folder}", f"--port={port}")
        with running("router", None, "", *flags) as router:
            os.sched_setaffinity(router, {core})
            wait_ready(port)
            totals = generate_load(
                ("127.0.0.1", port), requests, case.connections, 1.0, seconds, lambda: cpu_s.append(cpu_of(router))
            )
    if totals.errors:
        raise SystemExit(f"{case.name}: {totals.errors[0]}")
    used_s = cpu_s[1] - cpu_s[0]
    return used_s / totals.events * 1e6 if case.unit == "us" else used_s / totals.requests * 1e3


def wait_ready(port: int, timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/ready", timeout=1).raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > until_s:
                raise SystemExit(f"the router was not ready within {timeout_s:.0f} s") from None
            time.sleep(0.05)


async def hold_conversations(url: str) -> list[Row]:
    """Several at a time, each with more words every turn; times to the first bytes of all turns but the first."""
    waits_s: list[float] = []
    free = asyncio.Semaphore(AT_A_TIME)
    started = f"{time.time():.0f}"  # so that a second run finds nothing cached

    async def hold(client: httpx.AsyncClient, model: str, number: int) -> None:
        rng = Random(number)
        text = f"Conversation {number} of {started}: {some_words(rng, FIRST_WORDS)}"
        async with free:
            for turn in range(TURNS):
                wait_s = await first_bytes_s(client, model, text)
                if turn:
                    waits_s.append(wait_s)
                text += f" Turn {turn}: {some_words(rng, MORE_WORDS)}"

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await asyncio.gather(*(hold(client, model, number) for number in range(CONVERSATIONS)))
    return [
        Row("time to first token of later turns, mean", statistics.mean(waits_s), "s"),
        Row("time to first token of later turns, median", statistics.median(waits_s), "s"),
    ]


def some_words(rng: Random, count: int) -> str:
    return " ".join(rng.choices(["water", "turbine", "river", "gate", "pipe", "valve"], k=count))


async def first_bytes_s(client: httpx.AsyncClient, model: str, prompt: str) -> float:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True}
    begun_s, came_s = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_raw():
            came_s = came_s or time.perf_counter()
    return came_s - begun_s


if __name__ == "__main__":
    main()
