"""What every discovery promises. In virtual time, so that silence is exact and costs nothing."""

from __future__ import annotations

import asyncio
import pkgutil
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import penstock.discovery
from penstock import clock
from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, Standing
from penstock.discovery.api import Announcement, Discovery
from penstock.discovery.file import FileDiscovery
from penstock.discovery.memory import MemoryDiscovery
from penstock.sim.loop import run_virtual
from tests.support import without_threads

TTL_S = 6.0
Open = Callable[[], Discovery]  # one party's access to what all parties of a test share


def memory(_: Path) -> Open:
    shared = MemoryDiscovery(TTL_S)
    return lambda: shared


def file(folder: Path) -> Open:
    return lambda: FileDiscovery(folder / "leases", TTL_S)


BACKENDS = {"memory": memory, "file": file}


def test_every_backend_is_here() -> None:
    assert {module.name for module in pkgutil.iter_modules(penstock.discovery.__path__)} == {"api", *BACKENDS}


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def party(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    without_threads(monkeypatch)
    backend: Callable[[Path], Open] = request.param
    return backend(tmp_path)


def member(worker: str, epoch: int = 1) -> Member:
    layout = KvLayout(layers=2, kv_heads=1, head_dim=4, block_tokens=16, dtype="float32")
    return Member(worker, epoch, "any", "demo", ("tcp:127.0.0.1:9000",), layout, 64, 1024, labels={"rack": "a/1"})


class Watcher:
    """One reader of a discovery."""

    def __init__(self, views: AsyncIterator[dict[str, Standing]]) -> None:
        self._views = views

    async def next(self) -> dict[str, Standing]:
        return await anext(self._views)

    async def until(self, is_there: Callable[[dict[str, Standing]], bool]) -> dict[str, Standing]:
        async with asyncio.timeout(100 * TTL_S):
            while not is_there(view := await self.next()):
                pass
        return view

    async def until_workers(self, *workers: str) -> dict[str, Standing]:
        return await self.until(lambda view: sorted(view) == sorted(workers))


@asynccontextmanager
async def watching(party: Open) -> AsyncIterator[Watcher]:
    async with aclosing(party().watch()) as views:  # type: ignore[type-var]
        yield Watcher(views)


async def renew_for(duration_s: float, entries: Sequence[tuple[Announcement, Standing]]) -> None:
    end_s = clock.now() + duration_s
    while clock.now() < end_s:
        for entry, standing in entries:
            await entry.renew(standing)
        await asyncio.sleep(TTL_S / 3)


def virtual(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_virtual(scenario())


def test_nobody_is_there_at_first(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with watching(party) as watcher:
            assert await watcher.next() == {}


def test_a_member_appears_with_all_it_says(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with watching(party) as watcher:
            assert await watcher.next() == {}
            async with party().announce(member("a")):
                assert await watcher.until_workers("a") == {"a": Standing(member("a"))}


def test_who_comes_later_sees_who_is_there(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with party().announce(member("a")), party().announce(member("b")), watching(party) as watcher:
            assert sorted(await watcher.next()) == ["a", "b"]


def test_renewals_carry_load_role_and_draining(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with watching(party) as watcher, party().announce(member("a")) as entry:
            standing = Standing(member("a"), Load(steps=7, free_blocks=3), draining=True)
            await entry.renew(standing)
            assert await watcher.until(lambda view: "a" in view and view["a"].draining) == {"a": standing}


def test_a_member_stays_while_it_renews_and_vanishes_when_silent(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with party().announce(member("a")) as a, party().announce(member("b")), watching(party) as watcher:
            assert sorted(await watcher.next()) == ["a", "b"]
            async with asyncio.TaskGroup() as group:
                group.create_task(renew_for(3 * TTL_S, [(a, Standing(member("a")))]))
                await watcher.until_workers("a")
                assert TTL_S <= clock.now() <= 1.5 * TTL_S
            last_heard_s = clock.now()
            await watcher.until_workers()
            assert 0.5 * TTL_S <= clock.now() - last_heard_s <= 1.5 * TTL_S


def test_a_member_comes_back_after_silence(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with party().announce(member("a")) as entry, watching(party) as watcher:
            await watcher.until_workers()
            await entry.renew(Standing(member("a"), Load(steps=1)))
            await watcher.until_workers("a")


@pytest.mark.parametrize("is_crash", [False, True])
def test_a_member_vanishes_when_it_leaves(party: Open, is_crash: bool) -> None:
    @virtual
    async def _() -> None:
        async with watching(party) as watcher:
            try:
                async with party().announce(member("a")):
                    await watcher.until_workers("a")
                    if is_crash:
                        raise RuntimeError
            except RuntimeError:
                pass
            left_s = clock.now()
            await watcher.until_workers()
            assert clock.now() - left_s < TTL_S / 2


def test_a_newer_incarnation_replaces_the_older_at_once(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with party().announce(member("a", epoch=1)), watching(party) as watcher:
            await watcher.until_workers("a")
            async with party().announce(member("a", epoch=2)):
                came_s = clock.now()
                await watcher.until(lambda view: view["a"].member.epoch == 2)
                assert clock.now() - came_s < TTL_S / 2


def test_an_older_incarnation_is_not_heard(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with watching(party) as watcher, party().announce(member("a", epoch=2)) as newer:
            async with party().announce(member("a", epoch=1)) as older:
                late, current = Standing(member("a", epoch=1), Load(steps=9)), Standing(member("a", epoch=2))
                await renew_for(2 * TTL_S, [(older, late), (newer, current)])
                assert await watcher.next() == {"a": current}
            await newer.renew(Standing(member("a", epoch=2), Load(steps=1)))
            after = await watcher.until(lambda view: "a" not in view or view["a"].load.steps > 0)
            assert after["a"].load.steps == 1  # the older one's leaving did not take the newer one along


def test_a_slow_watcher_sees_the_latest_state_only(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with party().announce(member("a")) as entry, watching(party) as watcher:
            assert (await watcher.next())["a"].load.steps == 0
            for steps in range(1, 50):
                await entry.renew(Standing(member("a"), Load(steps=steps)))
            assert (await watcher.next())["a"].load.steps == 49


def test_all_watchers_are_told(party: Open) -> None:
    @virtual
    async def _() -> None:
        async with watching(party) as one, watching(party) as other:
            assert [await one.next(), await other.next()] == [{}, {}]
            async with party().announce(member("a")):
                await one.until_workers("a")
                await other.until_workers("a")


def test_any_name_will_do(party: Open) -> None:
    @virtual
    async def _() -> None:
        names = ["a/b", "..", "ü.1.json", "-", "x" * 60]
        async with watching(party) as watcher, asyncio.TaskGroup() as group:
            stays = [asyncio.Event() for _ in names]

            async def stay(name: str, until: asyncio.Event) -> None:
                async with party().announce(member(name)):
                    await until.wait()

            for name, until in zip(names, stays, strict=True):
                group.create_task(stay(name, until))
            await watcher.until_workers(*names)
            for until in stays:
                until.set()
