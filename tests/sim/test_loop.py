"""The virtual loop: time jumps, ties keep their order, and what cannot be virtual raises."""

from __future__ import annotations

import asyncio
import os
import re

import pytest

from penstock import clock
from penstock.sim.loop import Deadlock, NotVirtual, run_virtual


def test_an_hour_takes_no_time_and_timeouts_work() -> None:
    async def story() -> float:
        await asyncio.sleep(3600)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return clock.now()

    assert run_virtual(story()) == 3605.0


def test_timers_that_tie_run_in_the_order_in_which_they_were_set() -> None:
    async def story() -> list[int]:
        order: list[int] = []
        loop = asyncio.get_running_loop()
        for index in range(50):
            loop.call_at(1.0, order.append, index)
        await asyncio.sleep(2)
        return order

    assert run_virtual(story()) == list(range(50))


def test_a_cancelled_timer_does_not_fire() -> None:
    async def story() -> None:
        asyncio.get_running_loop().call_later(1, pytest.fail, "it fired").cancel()
        await asyncio.sleep(2)

    run_virtual(story())


def test_a_deadlock_says_who_waits_for_what() -> None:
    forks = [asyncio.Lock(), asyncio.Lock()]

    async def take(fork: asyncio.Lock) -> None:
        await fork.acquire()

    async def dine(left: asyncio.Lock, right: asyncio.Lock) -> None:
        await take(left)
        await asyncio.sleep(1)
        await take(right)

    async def story() -> None:
        async with asyncio.TaskGroup() as table:
            table.create_task(dine(*forks), name="plato")
            table.create_task(dine(*reversed(forks)), name="kant")

    with pytest.raises(Deadlock) as raised:
        run_virtual(story())
    report = str(raised.value)
    assert report.startswith("nothing is ready and no timer is set at 1.000000 s")
    for name in ("plato", "kant"):
        assert re.search(rf"{name} in .*dine:\d+ > .*take:\d+ > Lock.acquire:\d+", report)


def test_a_deadlock_names_the_task_that_is_waited_for() -> None:
    async def story() -> None:
        godot = asyncio.create_task(asyncio.Event().wait(), name="godot")
        await asyncio.create_task(asyncio.wait_for(godot, None), name="vladimir")

    with pytest.raises(Deadlock, match=r"vladimir in wait_for:\d+ > task godot"):
        run_virtual(story())


def test_threads_sockets_and_processes_raise() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(NotVirtual):
            loop.run_in_executor(None, os.getpid)
        with pytest.raises(NotVirtual):
            loop.call_soon_threadsafe(os.getpid)
        with pytest.raises(NotVirtual):
            loop.add_reader(0, os.getpid)
        with pytest.raises(NotVirtual):
            await asyncio.open_connection("127.0.0.1", 1)
        with pytest.raises(NotVirtual):
            await asyncio.create_subprocess_exec("true")

    run_virtual(story())
