"""What a router does about workers that vanish, refuse, or differ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random

import msgspec
import pytest

from penstock.blocks import KvLayout
from penstock.cluster import Member, ModelCard, Standing
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.simulated import Options, SimulatedEngine, expected_tokens
from penstock.errors import Overloaded, SetupError
from penstock.policy.routing import choose
from penstock.request import Sampling
from penstock.serve.decode import DecodeOptions
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.wire.memory import MemoryNetwork
from tests.serve.cluster import cluster, through

OPTIONS = Options(vocab_size=32_000)
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
        async with cluster(engines, choose, full, 64) as both:  # type: ignore[arg-type]
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
