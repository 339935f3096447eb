"""Why requests were routed as they were: what is kept, for how long, and what a real router keeps."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from penstock.engine.simulated import Options as EngineOptions
from penstock.policy.routing.api import Choice
from penstock.request import Timeline
from penstock.serve.decisions import Compared, Decided, Decision, Journal, compare
from penstock.serve.frontend import Frontend
from penstock.sim.loop import run_virtual
from penstock.sim.world import Shape, World
from tests.serve.fake_backend import TOKENIZER, Client, get

CHOICE = Choice("d", ("p",), 0.5, wait_s=0.2)


def decision(at_s: float = 1.0, choice: Choice = CHOICE) -> Decision:
    return Decision(at_s, "pairs", choice, 100, 10, 20, 3, ())


def told(choice: Choice) -> Decided:
    journal = Journal()
    journal.note("r", decision(choice=choice))
    return journal.tell("r")[0]


def test_decisions_are_told_in_order_with_the_one_that_gave_the_first_token() -> None:
    journal = Journal()
    for at_s in (1.0, 1.5, 4.0):
        journal.note("r", decision(at_s))
        if at_s == 1.5:
            journal.prefilled("r")
    assert [(one.after_s, one.gave_first_token) for one in journal.tell("r")] == [
        (0.0, False),
        (0.5, True),
        (3.0, False),
    ]


def test_the_oldest_requests_are_forgotten() -> None:
    journal = Journal(requests=3)
    for number in range(10):
        journal.note(f"r{number}", decision())
        journal.note("r7", decision())  # again: it does not count twice
    journal.prefilled("r0")
    assert [bool(journal.tell(f"r{number}")) for number in range(10)] == [False] * 7 + [True] * 3


def test_parts_are_compared_with_what_happened() -> None:
    choice = Choice("d", ("p",), 0.5, parts={"wait": 0.2, "transfer": 0.1, "later": 0.05})
    timeline = Timeline(
        moved_tokens=5, reached_worker_s=0.25, prefill_started_s=0.5, prefill_ended_s=1.5, decoding_s=2.0
    )
    assert compare(told(choice), timeline) == [
        Compared("wait", 0.2, 0.25),
        Compared("prefill", None, 1.0),
        Compared("transfer", 0.1, 0.5),
        Compared("later", 0.05, None),
    ]


@pytest.mark.parametrize(("choice", "wait_s"), [(CHOICE, 0.2), (Choice("d", (), 0.5), None)])
def test_a_policy_without_parts_predicts_the_wait_alone(choice: Choice, wait_s: float | None) -> None:
    assert compare(told(choice), Timeline()) == [
        Compared("wait", wait_s, None),
        Compared("prefill", None, None),
        Compared("transfer", None, None),
    ]


def test_a_router_tells_what_it_believed_and_where_a_stream_went_on() -> None:
    async def story() -> None:
        async with World(1, Shape(prefill=0, decode=2, engine=EngineOptions(step_s=0.01))) as world:
            prompt = list(range(100, 1_124))
            assert (await world.ask(prompt)).is_whole
            asking = asyncio.create_task(world.ask([*prompt, 7, 8, 9], max_tokens=100))
            await asyncio.sleep(0.5)
            world.crash("decode-0" if world.workers["decode-0"].load().running else "decode-1")
            assert (await asking).is_whole
            first, second = world.router.decisions("r2")
            assert first.gave_first_token and not second.gave_first_token
            assert (first.policy, first.prompt_tokens, first.cached_at_decode) == ("pairs", 1_027, 1_024)
            assert (first.workers, first.passed_over) == (2, ())
            assert second.passed_over and set(second.passed_over) == {first.decode} != {second.decode}
            assert second.prompt_tokens > first.prompt_tokens and 0.4 < second.after_s < 1
            assert len(world.router.decisions("r1")) == 1 and not world.router.decisions("r3")

    run_virtual(story())


def test_a_request_that_moved_is_compared_with_how_its_first_worker_did() -> None:
    async def story() -> None:
        engine = EngineOptions(model="demo", vocab_size=TOKENIZER.vocab_size, step_s=0.01, prefill_token_s=1e-4)
        async with (
            World(1, Shape(decode=2, engine=engine)) as world,
            Frontend(world.router, {"demo": TOKENIZER}, Random(1)) as app,
        ):
            body = {"model": "demo", "prompt": [105] * 2_000, "max_tokens": 100}
            asking = asyncio.create_task(Client(app).ask("POST", "/v1/completions", body))
            await asyncio.sleep(0.7)
            (head,) = (await get(app, "/debug/requests")).json["requests"]
            running = (await get(app, "/debug/requests/" + head["id"])).json
            assert (running["state"], running["timeline"]["prefill_worker"]) == ("running", "prefill-0")
            world.crash(head["decode_worker"])
            assert (await asking).status == 200
            record = (await get(app, "/debug/requests/" + head["id"])).json
            assert record["timeline"]["moves"] == 1 and len(record["decisions"]) == 2
            for part in (running, record):
                took = {one["part"]: one["actual_s"] for one in part["compared"]}
                assert took["prefill"] == pytest.approx(0.24, rel=0.1) and 0 < took["transfer"] < 0.02

    run_virtual(story())


def test_the_whole_way_from_a_request_to_its_explanation() -> None:
    async def story() -> None:
        engine = EngineOptions(model="demo", vocab_size=TOKENIZER.vocab_size)
        async with (
            World(1, Shape(decode=2, engine=engine)) as world,
            Frontend(world.router, {"demo": TOKENIZER}, Random(1)) as app,
        ):
            body = {"model": "demo", "prompt": [105] * 2_000, "max_tokens": 20}
            client = await Client(app).ask("POST", "/v1/completions", body)
            assert client.status == 200, client.json
            record = (await get(app, "/debug/requests/" + client.json["id"])).json
            (only,) = record["decisions"]
            assert (only["policy"], only["prefill"]) == ("pairs", ["prefill-0"]) and only["gave_first_token"]
            assert record["timeline"]["decode_worker"] == only["decode"]
            took = {one["part"]: one["actual_s"] for one in record["compared"]}
            assert took["prefill"] == pytest.approx(0.05, rel=0.3) and took["transfer"] > 0
            assert b"penstock_worker_stalled" in (await get(app, "/metrics")).body

    run_virtual(story())
