"""Round after round a worker is killed or frozen in some phase of a request, and the client gets all of its tokens.

PENSTOCK_ROUNDS=200 python -m pytest tests/processes/test_rounds.py
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from tests.processes.server import Server, children_of, serving, until
from tests.processes.test_kills import a_prompt, complete, expected_text, restarted
from tests.support import run

ROUNDS = int(os.environ.get("PENSTOCK_ROUNDS", "20"))
TOKENS = 120  # of output


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_rounds(transport: str) -> None:
    async def story() -> None:
        rng = random.Random(transport)
        # Chunks that take a while, links that do not, and leases that lapse while a frozen worker sleeps.
        async with serving("--decode=2", "--lease-s=1", f"--transport={transport}", "--policy=p_token") as server:
            for number in range(ROUNDS // 2):
                await one_round(server, rng, number)
            await server.wait_at_rest()

    run(story(), timeout_s=30 + 15 * ROUNDS)


async def one_round(server: Server, rng: random.Random, number: int) -> None:
    victim = rng.choice(["prefill-0", "decode-0", "decode-1"])
    prompts = [a_prompt(rng.choice([30, 700]), seed=1_000 * number + which) for which in range(3)]
    asking = [asyncio.create_task(complete(server, prompt, TOKENS)) for prompt in prompts]
    await asyncio.sleep(rng.uniform(0, 1.5))
    if rng.random() < 0.5:
        server.kill(victim)
        await until(lambda: restarted(server, victim))
        await note_new_process(server, victim)
    else:
        server.kill(victim, signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.1, 2.5))
        server.kill(victim, signal.SIGCONT)
    for prompt, task in zip(prompts, asking, strict=True):
        answer = await task
        assert answer.choices[0].text == expected_text(prompt, TOKENS), f"round {number}, {victim}"
        assert answer.usage is not None and answer.usage.completion_tokens == TOKENS


async def note_new_process(server: Server, name: str) -> None:
    """Whom to harm next time."""

    async def is_found() -> bool:
        found = [pid for pid in children_of(server.process.pid) if f"--name={name}" in arguments_of(pid)]
        server.pids[name] = found[0] if found else 0
        return bool(found)

    await until(is_found)


def arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
