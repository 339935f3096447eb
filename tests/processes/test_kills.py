"""Real processes, killed: the client gets its tokens or an error, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import replace

import httpx
import pytest
from openai import APIError, AsyncStream
from openai.types import Completion

from penstock.engine.simulated import expected_tokens
from penstock.request import Sampling
from tests.processes.server import ENGINE, TOKENIZER, Server, children_of, lives, serving, until
from tests.support import run


def a_prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{seed}/{length}")
    return [rng.randrange(300, 1000) for _ in range(length)]


def expected_text(prompt: list[int], max_tokens: int) -> str:
    output = TOKENIZER.output()
    tokens = expected_tokens(prompt, Sampling(max_tokens=max_tokens, temperature=0), ENGINE)
    return "".join(output.push(token) for token in tokens) + output.finish()


async def complete(server: Server, prompt: list[int], max_tokens: int) -> Completion:
    return await server.client.completions.create(
        model="demo", prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=TIMELINE
    )


async def stream(server: Server, prompt: list[int], max_tokens: int) -> AsyncStream[Completion]:
    return await server.client.completions.create(
        model="demo", prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
    )


TIMELINE = {"penstock": {"timeline": True}}


def timeline(completion: Completion) -> dict[str, object]:
    found: dict[str, object] = completion.model_extra["penstock"]["timeline"]  # type: ignore[index]
    return found


async def wait_until_prefilling(server: Server) -> None:
    await until(lambda: is_positive(server, "penstock_kv_cache_usage_perc"))


def test_prefill_killed_in_prefill_is_done_again_and_the_worker_returns() -> None:
    async def story() -> None:
        async with serving() as server:
            prompt = a_prompt(1_500)
            asking = asyncio.create_task(complete(server, prompt, 8))
            await wait_until_prefilling(server)
            server.kill("prefill-0")
            answer = await asking
            assert answer.choices[0].text == expected_text(prompt, 8)
            assert timeline(answer)["path"] == "local" and timeline(answer)["failures"]
            await until(lambda: restarted(server, "prefill-0"))
            answer = await complete(server, a_prompt(400), 8)
            assert timeline(answer)["path"] == "in-place"
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_prefill_stopped_in_prefill_is_done_again_and_its_late_writes_hit_nobody() -> None:
    async def story() -> None:
        async with serving("--lease-s=1.5") as server:
            prompt = a_prompt(1_500)
            asking = asyncio.create_task(complete(server, prompt, 8))
            await wait_until_prefilling(server)
            server.kill("prefill-0", signal.SIGSTOP)
            answer = await asking
            assert answer.choices[0].text == expected_text(prompt, 8)
            await until(lambda: is_positive(server, "penstock_kv_blocks_quarantined"))
            others = [asyncio.create_task(complete(server, a_prompt(30, seed), 200)) for seed in range(6)]
            server.kill("prefill-0", signal.SIGCONT)
            for seed, other in enumerate(others):
                assert (await other).choices[0].text == expected_text(a_prompt(30, seed), 200)
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_decode_stopped_past_its_leases_wakes_and_trusts_none_of_them() -> None:
    async def story() -> None:
        async with serving("--lease-s=1.0") as server:
            prompt = a_prompt(1_500)
            asking = asyncio.create_task(complete(server, prompt, 8))
            await wait_until_prefilling(server)
            server.kill("decode-0", signal.SIGSTOP)
            asyncio.get_running_loop().call_later(3.0, server.kill, "decode-0", signal.SIGCONT)
            answer = await asking
            assert answer.choices[0].text == expected_text(prompt, 8)
            assert timeline(answer)["path"] == "local" and timeline(answer)["failures"]
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_decode_killed_in_mid_stream_is_not_noticed_by_the_client_and_the_worker_returns() -> None:
    async def story() -> None:
        async with serving() as server:
            prompt, text = a_prompt(20), ""
            async for event in await stream(server, prompt, 400):
                if not text:
                    server.kill("decode-0")
                text += event.choices[0].text
            assert text == expected_text(prompt, 400)
            await until(lambda: restarted(server, "decode-0"))
            prompt = a_prompt(300)
            assert (await complete(server, prompt, 8)).choices[0].text == expected_text(prompt, 8)
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_the_only_worker_killed_in_mid_stream_goes_on_with_it_when_it_is_back() -> None:
    async def story() -> None:
        async with serving("--workers=1") as server:
            prompt, text = a_prompt(20), ""
            async for event in await stream(server, prompt, 400):
                if not text:
                    server.kill("worker-0")
                text += event.choices[0].text
            assert text == expected_text(prompt, 400)

    run(story(), timeout_s=60)


def test_a_rolling_restart_loses_no_stream() -> None:
    async def story() -> None:
        async with serving("--workers=2") as server:
            prompts = [a_prompt(20, seed) for seed in range(4)]
            asking = [asyncio.create_task(complete(server, prompt, 1_500)) for prompt in prompts]
            await until(lambda: running(server, 4))
            for name in ("worker-0", "worker-1"):
                server.kill(name, signal.SIGTERM)
                await until(lambda name=name: restarted(server, name))
            moves = 0
            for prompt, task in zip(prompts, asking, strict=True):
                answer = await task
                assert answer.choices[0].text == expected_text(prompt, 1_500)
                assert answer.usage is not None and answer.usage.completion_tokens == 1_500
                moves += int(str(timeline(answer).get("moves", 0)))
            assert moves >= 4 and await server.metric("penstock_stream_moves_total") == moves
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_a_killed_frontend_comes_back_on_the_same_port_and_workers_join_it_again() -> None:
    async def story() -> None:
        async with serving() as server:
            with pytest.raises((APIError, httpx.HTTPError)):
                async for _ in await stream(server, a_prompt(20), 2_000):
                    server.kill("frontend")
            await until(lambda: joined(server, 2))
            prompt = a_prompt(300)
            assert (await complete(server, prompt, 8)).choices[0].text == expected_text(prompt, 8)
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_a_killed_launcher_takes_everybody_with_it() -> None:
    async def story() -> None:
        async with serving() as server:
            children = children_of(server.process.pid)
            assert len(children) == 3
            server.kill("launcher")

            async def all_gone() -> bool:
                return not any(lives(pid) for pid in children)

            await until(all_gone)

    run(story(), timeout_s=60)


def test_sigterm_lets_streams_end() -> None:
    async def story() -> None:
        async with serving() as server:
            prompt = a_prompt(20)
            text = ""
            async for event in await stream(server, prompt, 100):
                if not text:
                    server.kill("launcher", signal.SIGTERM)
                text += event.choices[0].text
            assert text == expected_text(prompt, 100)
            assert await server.process.wait() == 0

    run(story(), timeout_s=60)


@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_clients_that_disconnect_are_forgotten_by_every_worker(phase: str) -> None:
    async def story() -> None:
        async with serving() as server:
            if phase == "queued":  # behind others
                asking = [asyncio.create_task(complete(server, a_prompt(900, seed), 8)) for seed in range(6)]
                await wait_until_prefilling(server)
            elif phase == "prefill":
                asking = [asyncio.create_task(complete(server, a_prompt(1_900), 8))]
                await wait_until_prefilling(server)
            else:
                asking = [asyncio.create_task(complete(server, a_prompt(10, seed), 1_900)) for seed in range(4)]
                await until(lambda: running(server, 4))
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_five_hundred_mixed_requests_leave_every_block_free() -> None:
    async def story() -> None:
        quick = replace(ENGINE, prefill_token_s=20e-6, step_s=0.002)
        async with serving("--decode=2", engine=quick) as server:
            slots = asyncio.Semaphore(48)

            async def one(index: int) -> None:
                rng = random.Random(index)
                prompt, tokens = a_prompt(rng.choice([3, 40, 200, 800]), index % 60), rng.randrange(1, 40)
                async with slots:
                    if index % 7 == 0:  # leaves in the middle
                        events = await stream(server, prompt, 500)
                        async for _ in events:
                            break
                        await events.close()
                    else:
                        assert (await complete(server, prompt, tokens)).choices[0].text == expected_text(prompt, tokens)

            async with asyncio.TaskGroup() as group:
                for index in range(500):
                    group.create_task(one(index))
            await server.wait_at_rest()
            assert await server.metric("penstock_handoffs_total") > 0
            assert await server.metric("penstock_handoff_failures_total") == 0

    run(story(), timeout_s=120)


async def is_positive(server: Server, metric: str) -> bool:
    return await server.metric(metric) > 0


async def restarted(server: Server, name: str) -> bool:
    """Whether a new process of this name has joined."""
    if name not in await server.workers():
        return False
    return not lives(server.pids[name])


async def joined(server: Server, workers: int) -> bool:
    try:
        return len(await server.workers()) == workers
    except httpx.HTTPError:
        return False


async def running(server: Server, streams: int) -> bool:
    return await server.metric("penstock_num_requests_running") == streams


def test_a_reader_that_leaves_does_not_stop_the_server() -> None:
    async def story() -> None:
        async with serving() as server:
            assert server.process.stdout is not None
            server.process.stdout._transport.close()  # type: ignore[attr-defined]
            prompt = a_prompt(30)
            assert (await complete(server, prompt, 8)).choices[0].text == expected_text(prompt, 8)
            server.kill("launcher", signal.SIGTERM)  # upon which it reports that it stops
            assert await server.process.wait() == 0

    run(story(), timeout_s=60)
