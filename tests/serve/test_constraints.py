"""Where a router sends requests that ask for certain workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import msgspec
import pytest

from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, ModelCard, Standing
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.simulated import Options, SimulatedEngine
from penstock.errors import NoWorker
from penstock.policy.routing import p_token
from penstock.request import Constraints, Label, Request, Sampling
from penstock.serve.router import Router, ServiceOptions
from penstock.serve.rpc import Endpoint
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.tokens import pack
from penstock.wire.memory import MemoryNetwork
from tests.serve.cluster import cluster

LAYOUT = KvLayout(1, 1, 1, 16, "uint64")
RATE = 1_000.0
IDLE = Load(blocks=1_000, free_blocks=1_000, prefill_tokens_per_s=RATE)
ZONE_X: tuple[Label, ...] = (("zone", "x"),)
ZONE_Y: tuple[Label, ...] = (("zone", "y"),)


def member(worker: str, adapters: tuple[str, ...] = (), epoch: int = 1, **labels: str) -> Member:
    return Member(worker, epoch, "any", "m", (), LAYOUT, 1_000, 10_000, labels=labels, adapters=adapters)


def queueing(tokens: int) -> Load:
    return msgspec.structs.replace(IDLE, queued_tokens=tokens)


class Fleet:
    """A router, and what its workers say."""

    def __init__(self, router: Router, stack: AsyncExitStack, discovery: MemoryDiscovery) -> None:
        self.router = router
        self._stack = stack
        self._discovery = discovery

    async def report(self, member: Member, load: Load = IDLE, draining: bool = False) -> None:
        """Announces it if it is new."""
        announced = await self._stack.enter_async_context(self._discovery.announce(member))
        await announced.renew(Standing(member, load, draining))
        await asyncio.sleep(0)

    def chosen(self, **wanted: object) -> str:
        """Of a prompt of one token, which is nothing to remember and takes no time."""
        constraints = Constraints(**wanted)  # type: ignore[arg-type]
        request = Request("r", "m", pack([1]), Sampling(1), constraints=constraints)
        standing, _ = self.router.route(request, {})
        self.router.release(request)
        return standing.member.worker


@asynccontextmanager
async def fleet(affinity_s: float) -> AsyncIterator[Fleet]:
    discovery = MemoryDiscovery()
    async with Endpoint({"memory": MemoryNetwork().wire("frontend")}, "", {}) as own, AsyncExitStack() as stack:
        service = ServiceOptions(affinity_s=affinity_s)
        async with Router(discovery, own, Random(1), p_token.route, service=service) as router:
            yield Fleet(router, stack, discovery)


def play(story: Callable[[Fleet], Coroutine[object, object, None]], affinity_s: float = 0.25) -> None:
    async def with_fleet() -> None:
        async with fleet(affinity_s) as some:
            await story(some)

    run_virtual(with_fleet())


def test_required_labels_bind_whatever_it_costs() -> None:
    async def story(some: Fleet) -> None:
        await some.report(member("a", zone="x", rack="1"), queueing(100_000))
        await some.report(member("b", zone="y", rack="1"))
        assert some.chosen() == "b"
        assert some.chosen(require=ZONE_X) == "a"
        assert some.chosen(require=(("rack", "1"),)) == "b"
        with pytest.raises(NoWorker, match=r"zone=x, rack=2.*labels there are: rack=1, zone=x, zone=y"):
            some.chosen(require=(*ZONE_X, ("rack", "2")))

    play(story)


def test_an_avoided_worker_is_better_than_a_wrong_one() -> None:
    async def story(some: Fleet) -> None:
        await some.report(one := member("a", zone="x"))
        await some.report(member("b", zone="y"))
        some.router.avoid(Standing(one))
        assert some.chosen() == "b"
        assert some.chosen(require=ZONE_X) == "a"

    play(story)


def test_labels_are_those_of_now() -> None:
    async def story(some: Fleet) -> None:
        await some.report(member("a", zone="x"))
        await some.report(member("b", zone="y"), queueing(1_000))
        assert some.chosen(require=ZONE_Y) == "b"
        await some.report(member("a", epoch=2, zone="y"))
        assert some.chosen(require=ZONE_Y) == "a"
        with pytest.raises(NoWorker, match="there are: zone=y"):
            some.chosen(require=ZONE_X)

    play(story)


def test_preferred_labels_yield_to_load() -> None:
    async def story(some: Fleet) -> None:
        await some.report(member("a", zone="x"), queueing(200))
        await some.report(member("b", zone="y"))
        assert some.chosen() == "b"
        assert some.chosen(prefer=ZONE_X) == "a"
        assert some.chosen(prefer=(("zone", "nowhere"),)) == "b"
        await some.report(member("a", zone="x"), queueing(300))
        assert some.chosen(prefer=ZONE_X) == "b"

    play(story)


def test_a_session_stays_until_its_worker_is_too_busy_or_another_one() -> None:
    async def story(some: Fleet) -> None:
        await some.report(member("a"))
        await some.report(member("b"), queueing(10))
        assert some.chosen(session="s") == "a"
        await some.report(member("a"), queueing(200))
        assert some.chosen() == "b"
        assert some.chosen(session="s") == "a"
        assert some.chosen(session="s", tenant="another") == "b"
        await some.report(member("a", epoch=2), queueing(200))
        assert some.chosen(session="s") == "b", "what the session had cached died with the first incarnation"
        await some.report(member("b"), queueing(2_000))
        assert some.chosen(session="s") == "a"
        assert some.chosen(session="s") == "a", "and it stays where it went"

    play(story, affinity_s=0.25)


def test_a_session_whose_worker_left_goes_anywhere() -> None:
    async def story(some: Fleet) -> None:
        await some.report(member("a"))
        await some.report(member("b"), queueing(10))
        assert some.chosen(session="s") == "a"
        await some.report(member("a"), draining=True)
        assert some.chosen(session="s") == "b"

    play(story)


def test_an_adapter_is_a_model_of_its_own_where_it_is_loaded() -> None:
    async def story(some: Fleet) -> None:
        await some.report(member("a", ("french", "terse")), queueing(5_000))
        await some.report(msgspec.structs.replace(member("b", ("terse",)), max_context_tokens=500))
        assert some.chosen(adapter="french") == "a"
        assert some.chosen(adapter="terse") == "b"
        with pytest.raises(NoWorker, match="the adapter klingon"):
            some.chosen(adapter="klingon")
        assert some.router.cards() == {
            "m": ModelCard("m", 500),
            "french": ModelCard("french", 10_000, base="m"),
            "terse": ModelCard("terse", 500, base="m"),
        }

    play(story)


def test_a_stream_that_only_a_draining_worker_may_serve_ends_there() -> None:
    async def story() -> None:
        engines = {name: ("any", SimulatedEngine(Options(vocab_size=32_000))) for name in ("a", "b")}
        async with cluster(engines, p_token.route, WorkerOptions("", 0), 64) as both:  # type: ignore[arg-type]
            here = msgspec.structs.replace(both.workers["a"].member, labels={"zone": "x"})
            async with both.discovery.announce(here) as announced:
                await announced.renew(Standing(here))
                await asyncio.sleep(0.1)
                request = Request(
                    "r", "m", pack([1, 2, 3]), Sampling(max_tokens=200), constraints=Constraints(require=ZONE_X)
                )
                async with both.router.generate(request) as stream:
                    await stream.read()
                    await announced.renew(Standing(here, draining=True))
                    while True:
                        _, finish = await stream.read()
                        if finish is not None:
                            break
                    assert finish.timeline.moves == 0
                    assert finish.timeline.output_tokens == 200

    run_virtual(story())
