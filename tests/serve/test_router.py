"""What a router does about workers that vanish, refuse, or differ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from random import Random

import msgspec
import pytest

from penstock import plugin
from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, ModelCard, Standing
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.simulated import Options, SimulatedEngine, expected_tokens
from penstock.errors import BadRequest, NoWorker, Overloaded, SetupError, UnknownModel
from penstock.policy.routing import least_loaded
from penstock.policy.routing.pairs import route
from penstock.request import Request, Sampling
from penstock.serve.decode import DecodeOptions
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.wire.memory import MemoryNetwork
from tests.serve.cluster import cluster, through

OPTIONS = Options(vocab_size=32_000)
REQUEST = Request("r", "m", b"", Sampling(max_tokens=5))
MEMBER = Member("a", 1, "any", "m", (), KvLayout(1, 1, 1, 16, "uint64"), 10, max_context_tokens=1_000)


def endpoint() -> Endpoint:
    return Endpoint({"memory": MemoryNetwork().wire("frontend")}, "", {})


def test_a_stream_outlives_its_workers_entry_in_the_discovery() -> None:
    async def story() -> None:
        engines = {"d": ("decode", SimulatedEngine(OPTIONS))}
        async with cluster(engines, through("d", "d"), WorkerOptions("", 0), 64) as one:  # type: ignore[arg-type]
            sampling = Sampling(max_tokens=500, temperature=0)
            asking = asyncio.create_task(one.ask([1, 2, 3], sampling))
            await asyncio.sleep(0.5)
            async with one.discovery.announce(one.workers["d"].member):
                pass  # leaving takes the entry out, as if a folder could not be read for a while
            await asyncio.sleep(0.1)
            assert not one.router.standings()
            tokens, _ = await asking
            assert [token.id for token in tokens] == expected_tokens([1, 2, 3], sampling, OPTIONS)

    run_virtual(story())


def test_if_all_workers_refuse_the_client_is_told_their_reason() -> None:
    async def story() -> None:
        engines = {name: ("any", SimulatedEngine(OPTIONS)) for name in ("a", "b")}
        full = replace(WorkerOptions("", 0), decode=DecodeOptions(max_queued=0))
        async with cluster(engines, route, full, 64) as both:  # type: ignore[arg-type]
            with pytest.raises(Overloaded, match="0 requests queued, its limit"):
                await both.ask([1, 2, 3], Sampling(max_tokens=5))

    run_virtual(story())


def test_a_card_promises_what_every_worker_of_the_model_can_do() -> None:
    async def story() -> None:
        discovery = MemoryDiscovery()
        one = msgspec.structs.replace(MEMBER, supports=("sampling", "logprobs"))
        other = msgspec.structs.replace(MEMBER, worker="b", supports=("sampling",), max_context_tokens=500)
        announced = discovery.announce(one), discovery.announce(other)
        async with announced[0], announced[1], endpoint() as own, Router(discovery, own, Random(1)) as router:
            assert router.cards() == {"m": ModelCard("m", 500, ("sampling",))}

    run_virtual(story())


class Unwatchable(MemoryDiscovery):
    async def watch(self) -> AsyncIterator[dict[str, Standing]]:
        raise SetupError("no such folder")
        yield {}


def test_a_discovery_that_cannot_be_watched_refuses_the_start() -> None:
    async def story() -> None:
        with pytest.raises(SetupError, match="no such folder"):
            async with endpoint() as own, Router(Unwatchable(), own, Random(1)):
                pass

    run_virtual(story())


@pytest.mark.parametrize("name", plugin.names("policy.routing"))
def test_every_policy_serves_a_split_fleet_and_one_that_is_not(name: str) -> None:
    async def story(roles: dict[str, str]) -> None:
        engines = {worker: (role, SimulatedEngine(OPTIONS)) for worker, role in roles.items()}
        chosen = plugin.find("policy.routing", name).ROUTING
        async with cluster(engines, chosen, WorkerOptions("", 0), 256) as some:  # type: ignore[arg-type]
            for length in (10, 400, 410):
                prompt, sampling = list(range(length)), Sampling(max_tokens=5, temperature=0)
                tokens, finish = await some.ask(prompt, sampling)
                assert [token.id for token in tokens] == expected_tokens(prompt, sampling, OPTIONS)
                assert finish.timeline.why.startswith(name)
            some.check_all_free()

    run_virtual(story({"p": "prefill", "q": "prefill", "d": "decode"}))
    run_virtual(story({"a": "any", "b": "any"}))


def test_a_worker_that_lost_a_request_is_avoided_until_it_is_another_or_time_has_passed() -> None:
    async def story() -> None:
        discovery = MemoryDiscovery()
        one, other = (msgspec.structs.replace(MEMBER, worker=name) for name in ("a", "b"))
        async with discovery.announce(other), endpoint() as own, AsyncExitStack() as stack:
            announced = await stack.enter_async_context(discovery.announce(one))
            await announced.renew(Standing(one, Load(running=1)))
            async with Router(discovery, own, Random(1), least_loaded.route) as router:
                await router.wait_ready(2)

                def chosen() -> str:
                    standing, _ = router.route(REQUEST, {})
                    router.release(REQUEST)
                    return standing.member.worker

                assert chosen() == "b"
                router.avoid(Standing(other))
                assert chosen() == "a"
                with pytest.raises(NoWorker):
                    router.route(REQUEST, {"a": None, "b": None})
                await asyncio.sleep(router.options.avoid_s)
                assert chosen() == "b"
                router.avoid(Standing(other))
                again = await stack.enter_async_context(discovery.announce(msgspec.structs.replace(other, epoch=2)))
                await again.renew(Standing(msgspec.structs.replace(other, epoch=2)))
                await asyncio.sleep(0)
                assert chosen() == "b"

    run_virtual(story())


def test_a_model_that_nobody_serves_and_a_fleet_of_none_are_told_apart() -> None:
    async def story() -> None:
        discovery = MemoryDiscovery()
        async with endpoint() as own, Router(discovery, own, Random(1)) as router:
            with pytest.raises(NoWorker, match="penstock worker --join"):
                router.route(REQUEST, {})
            async with discovery.announce(msgspec.structs.replace(MEMBER, model="another")):
                await router.wait_ready(1)
                with pytest.raises(UnknownModel, match="there is another"):
                    router.route(REQUEST, {})

    run_virtual(story())


def test_a_prompt_with_tokens_that_the_model_does_not_have_reaches_no_engine() -> None:
    """Tokenizers may have more tokens than their models, and an engine fails whole steps."""

    async def story() -> None:
        engines = {"d": ("decode", SimulatedEngine(OPTIONS))}
        async with cluster(engines, through("d", "d"), WorkerOptions("", 0), 64) as one:  # type: ignore[arg-type]
            with pytest.raises(BadRequest, match="token 32000; the model's last is 31999"):
                await one.ask([1, 32_000, 3], REQUEST.sampling)
            assert one.workers["d"].load().steps == 0
            await one.ask([1, 31_999, 3], REQUEST.sampling)

    run_virtual(story())
