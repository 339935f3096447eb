"""A worker that cannot tell the world of itself ends; one that is not heard for a while goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from penstock import clock
from penstock.cluster import Member, Standing
from penstock.discovery.memory import MemoryAnnouncement, MemoryDiscovery
from penstock.engine.simulated import Options, SimulatedEngine
from penstock.errors import SetupError, WireError
from penstock.serve.registry import stay_announced
from penstock.serve.worker import Worker, WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.transport.memory import MemoryHub, MemoryTransport, heap_region
from penstock.wire.memory import MemoryNetwork


def worker() -> Worker:
    options = WorkerOptions("w", 1, addresses=("memory:w",))
    wires = {"memory": MemoryNetwork().wire("w")}
    return Worker(options, SimulatedEngine(Options()), wires, heap_region, [MemoryTransport(MemoryHub())])


class Closed(MemoryDiscovery):
    """Lets nobody in."""

    @asynccontextmanager
    async def announce(self, member: Member) -> AsyncIterator[MemoryAnnouncement]:
        raise SetupError("cannot make the folder")
        yield MemoryAnnouncement(self)


class Flaky(MemoryDiscovery):
    """Loses every other report."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = 0

    @asynccontextmanager
    async def announce(self, member: Member) -> AsyncIterator[MemoryAnnouncement]:
        yield EveryOther(self)


class EveryOther(MemoryAnnouncement):
    def __init__(self, discovery: Flaky) -> None:
        super().__init__(discovery)
        self._flaky = discovery
        self._reports = 0

    async def renew(self, standing: Standing) -> None:
        self._reports += 1
        if self._reports % 2:
            raise WireError("the disk is full")
        self._flaky.heard += 1
        await super().renew(standing)


def test_a_worker_that_cannot_be_announced_ends_with_the_reason() -> None:
    async def story() -> None:
        with pytest.raises(SetupError, match="cannot make the folder"):
            async with asyncio.timeout(60), worker() as one:
                await one.serve(stay_announced(Closed(), one.standing, 1.0), asyncio.Event(), lambda: 0.0)
        assert clock.now() < 1

    run_virtual(story())


def test_a_report_that_fails_is_made_again() -> None:
    async def story() -> None:
        discovery = Flaky()
        async with worker() as one:
            leave = asyncio.Event()
            asyncio.get_running_loop().call_later(10.5, leave.set)
            await one.serve(stay_announced(discovery, one.standing, 1.0), leave, lambda: 0.0)
        assert discovery.heard == 5

    run_virtual(story())
