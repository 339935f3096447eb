"""What routers take workers to hold is what they hold: in quiet always, after any fault once it was noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from random import Random

import pytest

from penstock import clock
from penstock.cluster import Member
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import ConnectionLost
from penstock.metrics import IndexMetrics
from penstock.policy.routing import pairs
from penstock.policy.routing.api import Ask, Choice, Fleet
from penstock.request import Request, Sampling, Timeline
from penstock.serve.kv_events import CALL, Change, Part, TellOptions
from penstock.serve.kv_watch import CallFeed, NewFeed, Update
from penstock.serve.registry import Registry, stay_joined
from penstock.serve.router import FEEDS, Router
from penstock.serve.rpc import Call, Endpoint
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Shape, World
from penstock.tokens import pack

ENGINE = EngineOptions(step_s=0.01, prefill_token_s=1e-4)
AUDIT_S = 6.5  # after a change at the latest, what was lost of it has been found and mended


class Watched:
    """`pairs`, and how much of each prompt it took the decode worker to hold."""

    def __init__(self) -> None:
        self.believed: dict[int, int] = {}  # by the number of the ask

    def __call__(self, now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        choice = pairs.route(now, ask, fleet, rng)
        self.believed[ask.number] = int(ask.cached_tokens[list(fleet.names).index(choice.decode)])
        return choice


class Chats:
    """Conversations that grow by each answer; begun anew when they are long."""

    def __init__(self, world: World, number: int = 12, seed: int = 5) -> None:
        self.world = world
        self.rng = Random(seed)
        self.prompts = [self.words(80) for _ in range(number)]

    def words(self, count: int) -> list[int]:
        return [self.rng.randrange(100, 30_000) for _ in range(count)]

    async def turn(self, number: int | None = None) -> Timeline:
        chat = self.rng.randrange(len(self.prompts)) if number is None else number
        answer = await self.world.ask(self.prompts[chat], max_tokens=20)
        assert answer.is_whole and answer.finish is not None, answer
        longer = self.prompts[chat] + answer.tokens + self.words(20)
        self.prompts[chat] = longer if len(longer) < 400 else self.words(80)
        return answer.finish.timeline

    async def turns(self, number: int, each: int) -> None:
        """All chats of one person after the other, several people at a time."""
        for _ in range(each):
            await self.turn(number)
            await asyncio.sleep(self.rng.random())

    async def crowd(self, people: int, each: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(people):
                group.create_task(self.turns(number, each))


def world(
    watched: Watched, feeds: Mapping[str, NewFeed] = FEEDS, kv_blocks: int = 1024, tell: TellOptions = TellOptions()
) -> World:
    options = WorkerOptions("", 0, tell=tell)
    shape = Shape(prefill=0, decode=0, either=3, engine=ENGINE, kv_blocks=kv_blocks, worker=options)
    return World(3, shape, policy=watched, feeds=feeds)


def differing(world: World, router: Router) -> list[str]:
    """Workers that hold other blocks than the index has of them."""
    entered = {worker: index.digest(worker) for worker, (_, index) in router.indices().items()}
    held = {
        (name, worker.member.epoch): (worker.journal.count, worker.journal.digest)
        for name, worker in world.workers.items()
    }
    assert sorted(entered) == sorted(held)
    return [name for (name, epoch), digest in held.items() if entered[name, epoch] != digest]


async def ask_alone(watched: Watched, chats: Chats, turns: int) -> tuple[int, int, int]:
    """Turns with nothing else going on: tokens that were wrongly taken as cached; missed; cached."""
    false = missed = hits = 0
    for _ in range(turns):
        await asyncio.sleep(0.05)
        asked = len(watched.believed)
        timeline = await chats.turn()
        surplus = watched.believed[asked] - timeline.cached_tokens
        false, missed, hits = false + max(0, surplus), missed + max(0, -surplus), hits + timeline.cached_tokens
    return false, missed, hits


@pytest.mark.parametrize("kv_blocks", [1024, 64, 30], ids=["all fits", "some fits", "eviction with every prompt"])
def test_in_quiet_a_router_knows_exactly_what_is_cached(kv_blocks: int) -> None:
    async def story() -> None:
        watched = Watched()
        async with world(watched, kv_blocks=kv_blocks) as cluster:
            false, missed, hits = await ask_alone(watched, Chats(cluster), 60)
            assert (false, missed) == (0, 0) and hits > 3000
            await asyncio.sleep(0.1)
            assert not differing(cluster, cluster.router)
            assert cluster.router.index_metrics().drifts == 0

    run_virtual(story())


def test_under_load_with_evictions_nothing_drifts() -> None:
    async def story() -> None:
        watched = Watched()
        async with world(watched, kv_blocks=100) as cluster:
            await Chats(cluster).crowd(people=12, each=10)
            await asyncio.sleep(0.1)
            assert not differing(cluster, cluster.router)
            metrics = cluster.router.index_metrics()
            assert (metrics.drifts, metrics.snapshots) == (0, 3)
            assert metrics.changes > sum(metrics.blocks.values()) > 0
            assert metrics.lag_s.counts[1] == sum(metrics.lag_s.counts) > 0  # what they are collected for, and no more

    run_virtual(story())


class FaultyFeed(CallFeed):
    """Of its changes one in so many is lost, comes twice, and comes after the next one."""

    lost, repeated, late = 0.0, 0.0, 0.0

    def __init__(self, member: Member, endpoint: Endpoint, metrics: IndexMetrics) -> None:
        super().__init__(member, endpoint, metrics)
        self.rng = Random(member.worker)
        self.ready: list[Update] = []

    async def receive(self, call: Call) -> Update | None:
        while not self.ready:
            update = await super().receive(call)
            if not isinstance(update, Change):
                return update
            if self.rng.random() < self.late and (following := await super().receive(call)) is not None:
                self.ready.append(following)
            if self.rng.random() >= self.lost:
                self.ready += [update] * (2 if self.rng.random() < self.repeated else 1)
        return self.ready.pop(0)


class LossyFeed(FaultyFeed):
    lost = 0.01


class StormyFeed(FaultyFeed):
    lost, repeated, late = 0.1, 0.2, 0.2


@pytest.mark.parametrize("feed", [LossyFeed, StormyFeed])
def test_lost_repeated_and_late_changes_are_noticed_and_mended(feed: NewFeed) -> None:
    async def story() -> None:
        watched = Watched()
        async with world(watched, {CALL: feed}, kv_blocks=100, tell=TellOptions(flush_s=0.001)) as cluster:
            chats = Chats(cluster)
            await chats.crowd(people=12, each=15)
            metrics = cluster.router.index_metrics()
            assert metrics.drifts > 0 and metrics.snapshots > 3
            feed.lost = feed.repeated = feed.late = 0.0  # type: ignore[attr-defined]
            await asyncio.sleep(AUDIT_S)
            assert not differing(cluster, cluster.router)
            false, _, hits = await ask_alone(watched, chats, 30)
            assert false <= 0.001 * hits

    run_virtual(story())


def test_a_lost_change_that_nothing_follows_is_found_by_the_audit() -> None:
    async def story() -> None:
        watched, lost = Watched(), list[Change]()

        class LosesLast(CallFeed):
            async def receive(self, call: Call) -> Update | None:
                update = await super().receive(call)
                if isinstance(update, Change) and not lost:
                    lost.append(update)
                    return await super().receive(call)
                return update

        async with world(watched, {CALL: LosesLast}) as cluster:
            await cluster.ask(tokens=200, max_tokens=2)
            await asyncio.sleep(1.0)
            assert lost and len(differing(cluster, cluster.router)) == 1
            await asyncio.sleep(AUDIT_S)
            assert not differing(cluster, cluster.router)
            assert cluster.router.index_metrics().drifts == 1

    run_virtual(story())


def test_without_snapshots_for_a_while_beliefs_serve() -> None:
    async def story() -> None:
        watched = Watched()

        class LateFeed(CallFeed):
            async def receive(self, call: Call) -> Update | None:
                update = await super().receive(call)
                if isinstance(update, Part) and clock.now() < 20.0:
                    raise ConnectionLost("no snapshot now")
                return update

        async with world(watched, {CALL: LateFeed}) as cluster:
            chats = Chats(cluster)
            _, _, hits = await ask_alone(watched, chats, 60)
            assert clock.now() < 20.0 and hits > 3000
            assert cluster.router.index_metrics().snapshots == 0
            await asyncio.sleep(26.0 - clock.now())
            assert not differing(cluster, cluster.router)
            assert (await ask_alone(watched, chats, 20))[0] == 0

    run_virtual(story())


def test_a_new_incarnation_under_traffic_begins_with_nothing() -> None:
    async def story() -> None:
        watched = Watched()
        async with world(watched) as cluster:
            chats = Chats(cluster)
            async with asyncio.TaskGroup() as group:
                crowd = group.create_task(chats.crowd(people=12, each=8))
                for name in ("any-0", "any-1", "any-0"):
                    await asyncio.sleep(1.0)
                    cluster.crash(name)
                    cluster.start(name)
                await crowd
            await asyncio.sleep(1.0)
            assert [worker.member.epoch for worker in cluster.workers.values()].count(1) == 1
            assert not differing(cluster, cluster.router)
            assert (await ask_alone(watched, chats, 20))[0] == 0
            assert cluster.router.index_metrics().snapshots == 6

    run_virtual(story())


def test_a_frozen_worker_is_asked_for_all_again_when_it_is_back() -> None:
    async def story() -> None:
        watched = Watched()
        async with world(watched) as cluster:
            chats = Chats(cluster)
            await ask_alone(watched, chats, 20)
            cluster.freeze("any-1")
            await asyncio.sleep(15.0)
            assert ("any-1", 1) not in cluster.router.indices()
            cluster.thaw("any-1")
            await asyncio.sleep(10.0)
            assert len(cluster.router.indices()) == 3 and not differing(cluster, cluster.router)
            assert (await ask_alone(watched, chats, 20))[0] == 0

    run_virtual(story())


def test_two_frontends_know_the_same() -> None:
    async def story() -> None:
        watched, others = Watched(), MemoryDiscovery(3.0)
        cluster = world(watched)
        endpoint = Endpoint({"memory": cluster.network.wire("other")}, "", {"join": Registry(others).join})
        async with cluster, endpoint, endpoint.listen("memory:other"), Router(others, endpoint, Random(1)) as other:
            for worker in cluster.workers.values():
                worker.endpoint.spawn(stay_joined(worker.endpoint, ("memory:other",), worker.standing, 0.5))
            await other.wait_ready(3)
            await Chats(cluster).crowd(people=6, each=5)
            await asyncio.sleep(0.1)
            assert not differing(cluster, cluster.router) and not differing(cluster, other)
            assert other.index_metrics().blocks == cluster.router.index_metrics().blocks

            prompt = [7] * 320
            answer = await cluster.ask(prompt)
            await asyncio.sleep(0.1)
            finish = None
            async with other.generate(Request("x", ENGINE.model, pack(prompt), Sampling(max_tokens=3))) as stream:
                while finish is None:
                    _, finish = await stream.read()
            assert answer.finish is not None
            assert finish.timeline.decode_worker == answer.finish.timeline.decode_worker
            assert finish.timeline.cached_tokens == 304

    run_virtual(story())
