"""What clients can ask beside an answer, and how they hear that they cannot have it: over ASGI, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.cluster import ModelCard
from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import Unauthorized
from penstock.metrics import Metrics
from penstock.policy.admission import ServiceLevel
from penstock.request import Constraints
from penstock.serve.frontend import Frontend, FrontendOptions
from penstock.serve.keys import Keys
from penstock.serve.router import Router, ServiceOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Shape, World
from tests.serve.fake_backend import CARD, TOKENIZER, Client, FakeBackend, chat_body, frontend, get, stuck

Story = Callable[[Frontend, FakeBackend], Awaitable[None]]


def play(story: Story, backend: FakeBackend | None = None, **options: Any) -> None:
    async def bounded() -> None:
        played = backend or FakeBackend()
        async with asyncio.timeout(1_000), frontend(played, **options) as app:
            await story(app, played)

    run_virtual(bounded())


async def ask(app: Frontend, headers: dict[str, str], **fields: object) -> Client:
    return await Client(app).ask("POST", "/v1/chat/completions", chat_body(**fields), headers)


def test_wishes_reach_the_router() -> None:
    headers = {
        "x-penstock-require": "zone=eu-1, gpu=h100",
        "x-penstock-prefer": "topology.kubernetes.io/rack=7",
        "x-penstock-session": "talk:42",
        "x-penstock-tenant": "acme",
        "x-penstock-timeout": "2.5",
    }

    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await ask(app, headers, priority=-3)).status == 200
        asked = backend.requests[0]
        assert asked.constraints == Constraints(
            require=(("zone", "eu-1"), ("gpu", "h100")),
            prefer=(("topology.kubernetes.io/rack", "7"),),
            session="talk:42",
            tenant="acme",
            priority=-3,
        )
        assert (asked.timeout_s, asked.salt) == (2.5, "acme ")

    play(story)


def test_who_wishes_nothing_goes_anywhere() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        await ask(app, {})
        assert backend.requests[0].constraints == Constraints()
        assert (backend.requests[0].timeout_s, backend.requests[0].salt) == (600.0, "")

    play(story)


@pytest.mark.parametrize(
    ("headers", "key", "session"),
    [
        ({"x-penstock-session": "a", "x-dynamo-session-id": "b"}, "c", "a"),
        ({"x-dynamo-session-id": "b"}, "c", "b"),
        ({"x-smg-routing-key": "b"}, None, "b"),
        ({}, "what the standard has for it", "what the standard has for it"),
    ],
)
def test_sessions_by_whatever_name(headers: dict[str, str], key: str | None, session: str) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        await ask(app, headers, prompt_cache_key=key)
        assert backend.requests[0].constraints.session == session

    play(story)


@pytest.mark.parametrize(
    ("header", "value", "problem"),
    [
        ("x-penstock-require", "zone", "'zone' is no label; write them as zone=a,rack=b"),
        ("x-penstock-require", "", "'' is no label"),
        ("x-penstock-require", "zone=a,", "'' is no label"),
        ("x-penstock-prefer", "zone=a b", "'zone=a b' is no label"),
        ("x-penstock-prefer", ",".join("a=b" for _ in range(9)), "9 labels are more than the 8"),
        ("x-penstock-session", "two words", "'two words' is no name"),
        ("x-penstock-tenant", "a" * 129, "is no name"),
        ("x-penstock-timeout", "soon", "'soon' is no number of seconds above 0"),
        ("x-penstock-timeout", "0", "no number of seconds above 0"),
        ("x-penstock-timeout", "nan", "no number of seconds above 0"),
    ],
)
def test_what_cannot_be_understood_is_a_400_that_names_the_header(header: str, value: str, problem: str) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await ask(app, {header: value})
        error = client.json["error"]
        assert (client.status, error["param"]) == (400, header)
        assert problem in error["message"] and error["message"].startswith(header)
        assert not backend.requests

    play(story)


def test_priority_has_bounds() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await ask(app, {}, priority=5_000)
        assert (client.status, client.json["error"]["param"]) == (400, "priority")

    play(story)


def test_a_client_can_have_less_time_than_others_but_not_more() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        loop = asyncio.get_running_loop()
        for wanted, had_s in (("2", 2.0), ("900", 60.0)):
            begun_s = loop.time()
            client = await ask(app, {"x-penstock-timeout": wanted})
            assert client.status == 504
            assert f"not done after {had_s:g} s" in client.json["error"]["message"]
            assert loop.time() - begun_s == pytest.approx(had_s)

    play(story, FakeBackend(stuck()), timeout_s=60.0)


def test_a_key_says_whose_request_it_is() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        for key, claimed, tenant in (("key-of-a", "b", "a"), ("key-of-all", "b", "b"), ("key-of-all", "", "")):
            headers = {"authorization": f"Bearer {key}"} | ({"x-penstock-tenant": claimed} if claimed else {})
            assert (await ask(app, headers)).status == 200
            assert backend.requests[-1].constraints.tenant == tenant
        assert (await ask(app, {"authorization": "Bearer key"})).status == 401

    play(story, api_key="key-of-all", tenant_keys={"a": "key-of-a"})


def test_keys() -> None:
    assert Keys("", {}).find_tenant({b"authorization": b"Bearer whatever"}) == ""
    with pytest.raises(Unauthorized, match="needs an API key"):
        Keys("", {"a": "key"}).find_tenant({})
    with pytest.raises(Unauthorized, match="is wrong"):
        Keys("", {"a": "key"}).find_tenant({b"authorization": b"Basic key"})
    assert Keys("", {"a": "key"}).find_tenant({b"authorization": b"Bearer key"}) == "a"


def test_an_adapter_is_asked_for_as_a_model() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        listed = (await get(app, "/v1/models")).json["data"]
        assert [model["id"] for model in listed] == ["demo", "french"]
        client = await ask(app, {}, model="french")
        assert (client.status, client.json["model"]) == (200, "french")
        asked = backend.requests[0]
        assert (asked.model, asked.constraints.adapter, asked.salt) == ("demo", "french", " french")
        assert (await ask(app, {}, model="klingon")).status == 404
        await ask(app, {}, cache_salt="french")  # of the model itself, whose blocks are others
        assert backend.requests[-1].salt not in ("", asked.salt)

    play(story, FakeBackend(models={"demo": CARD, "french": ModelCard("french", 200, base="demo")}))


# With a router and workers


def prompt(tokens: int, seed: int) -> list[int]:
    return [Random(seed).randrange(200) for _ in range(tokens)]


async def complete(app: Frontend, tokens: int, seed: int, **headers: str) -> Client:
    body = {"model": "simulated", "prompt": prompt(tokens, seed), "max_tokens": 2}
    named = {f"x-penstock-{name}": value for name, value in headers.items()}
    return await Client(app).ask("POST", "/v1/completions", body, named)


async def numbers(app: Frontend) -> dict[str, float]:
    page = (await get(app, "/metrics")).body.decode()
    families = text_string_to_metric_families(page)
    return {f"{each.name}{''.join(each.labels.values())}": each.value for one in families for each in one.samples}


def test_overload_is_told_in_the_words_of_http() -> None:
    """A burst of 40 long prompts of two tenants on one worker, which computes one of them in 1.6 s."""

    async def story() -> None:
        engine = EngineOptions(step_s=0.002, prefill_token_s=200e-6)
        level = ServiceLevel(ttft_s=60.0, max_queued=4)
        shape = Shape(prefill=0, decode=0, either=1, engine=engine, kv_blocks=8_192)
        async with World(1, shape, service=ServiceOptions(level)) as world:
            measured = Metrics()
            measured.queue = world.queue
            backend: Router = world.router
            async with Frontend(
                backend, {"simulated": TOKENIZER}, Random(1), FrontendOptions(inflight=100), measured
            ) as app:
                await complete(app, 2_000, 0)
                await world.settle()
                await asyncio.sleep(shape.timing.report_s)
                elsewhere = await complete(app, 10, 0, require="zone=mars")
                assert elsewhere.status == 503
                assert "zone=mars" in elsewhere.json["error"]["message"]
                burst = [asyncio.create_task(complete(app, 8_000, seed + 1, tenant="a")) for seed in range(40)]
                await asyncio.sleep(0.01)
                assert (await numbers(app))["penstock_num_requests_queued"] == 4
                others = [asyncio.create_task(complete(app, 8_000, seed + 50, tenant="b")) for seed in range(2)]
                hasty = await complete(app, 8_000, 99, timeout="1")
                assert (hasty.status, hasty.json["error"]["code"]) == (504, "deadline_exceeded")
                assert [(await one).status for one in others] == [200, 200]
                answers = [await one for one in burst]
                codes = {200: 0, 429: 0, 503: 0}
                for client in answers:
                    codes[client.status] += 1
                    if client.status != 200:
                        assert 1 <= int(client.headers["retry-after"]) <= 60
                assert codes[429] >= 1 and codes[503] > 5
                refused = next(client for client in answers if client.status == 429)
                assert refused.json["error"]["type"] == "rate_limit_error"
                shown = await numbers(app)
                assert shown["penstock_requests_shed_totalshare"] == codes[429]
                assert shown["penstock_requests_shed_totaldeadline"] == 1
                assert shown["penstock_requests_shed_totalfull"] == codes[503]
                assert shown["penstock_num_requests_queued"] == 0
                assert shown["penstock_admission_wait_seconds_count"] == 4 + len(others) - codes[429]
            await world.settle()

    run_virtual(story())
