"""The processes of a virtual cluster: the program that ships, started, stopped and harmed on virtual time.

What a worker consists of is the caller's business (`Build`); everything else here is as between real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from penstock import clock
from penstock.cluster import Role
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.api import Engine
from penstock.serve.registry import Registry, stay_joined
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint, RpcOptions
from penstock.serve.worker import Worker, WorkerOptions
from penstock.sim.faults import Fate, Weather
from penstock.sim.loop import skew_s
from penstock.transport.api import MakeRegion, Transport
from penstock.wire.memory import MemoryNetwork

FRONTEND = "memory:frontend"


@dataclass(frozen=True, slots=True)
class Incarnation:
    """Who starts: what `Build` must put into its options and its engine."""

    name: str
    epoch: int
    role: Role
    address: str
    fate: Fate


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is made of."""

    options: WorkerOptions
    engine: Engine
    new_region: MakeRegion
    transports: Sequence[Transport]


Build = Callable[[Incarnation], Parts]


class Hub(Protocol):
    """What the transports of a virtual cluster have in common: they must hear of deaths, and may ask for one."""

    on_kill: Callable[[str], None]

    def died(self, worker: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """How often workers report, when a silent one is forgotten, and how long one that leaves may take."""

    report_s: float = 0.5
    ttl_s: float = 3.0
    grace_s: float = 10.0


@dataclass(slots=True, eq=False)
class Process:
    """One incarnation of a worker."""

    who: Incarnation
    parts: Parts
    worker: Worker
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    is_up: bool = False  # it has a load to tell of


class Processes:
    """Used as `async with`: a frontend with a router; then `start` workers. At the end every block must be free."""

    router: Router

    def __init__(
        self,
        build: Build,
        hubs: Sequence[Hub],
        rng: Random,
        weather: Weather,
        timing: Timing,
        rpc: RpcOptions,
        new_router: Callable[[MemoryDiscovery, Endpoint, Random], Router],
    ) -> None:
        self.weather = weather
        self.network = MemoryNetwork(lambda source, to, _: self.weather.fate(rng, source, to))
        self.skews_s: dict[str, float] = {}  # by worker: how far its clock is ahead, from its next start on
        self._build = build
        self._hubs = hubs
        self._rng = rng
        self._timing = timing
        self._rpc = rpc
        self._new_router = new_router
        self._living: dict[str, Process] = {}
        self._epochs: dict[str, int] = {}
        self._group = asyncio.TaskGroup()
        self._closing = asyncio.Event()
        for hub in hubs:
            hub.on_kill = self._kill_writer

    async def __aenter__(self) -> Processes:
        await self._group.__aenter__()
        ready = asyncio.Event()
        self._group.create_task(self._run_frontend(ready), name="frontend")
        await ready.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._living.values():
            process.who.fate.thaw()
            process.leave.set()
        tasks = [process.task for process in self._living.values() if process.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        self._closing.set()
        await self._group.__aexit__(None, None, None)  # with an error of the block it would wrap that in a group

    @property
    def living(self) -> dict[str, Process]:
        """Those that run, by name."""
        return self._living

    def start(self, name: str, role: Role = "any") -> None:
        """Starts a worker, or starts it again under a new epoch."""
        self._epochs[name] = epoch = self._epochs.get(name, 0) + 1
        who = Incarnation(name, epoch, role, f"memory:{name}:{epoch}", Fate())
        context = copy_context()
        context.run(skew_s.set, self.skews_s.get(name, 0.0))
        wires = {"memory": context.run(self.network.wire, f"{name}:{epoch}")}
        parts = self._build(who)
        process = Process(who, parts, Worker(parts.options, parts.engine, wires, parts.new_region, parts.transports))
        self._living[name] = process
        process.task = self._group.create_task(self._run_worker(process), name=name, context=context)

    def crash(self, name: str) -> None:
        """kill -9: it says nothing more and writes nothing more."""
        process = self._living.pop(name)
        process.who.fate.kill()
        self.network.crash(f"{name}:{process.who.epoch}")
        for hub in self._hubs:
            hub.died(f"{name}:{process.who.epoch}")
        if process.task is not None:
            process.task.cancel()

    def freeze(self, name: str) -> None:
        """SIGSTOP: it hears and says nothing, and a step in progress stands still half-written."""
        process = self._living[name]
        process.who.fate.freeze()
        self.network.freeze(f"{name}:{process.who.epoch}")

    def thaw(self, name: str) -> None:
        """SIGCONT: it goes on where it was, writes included."""
        process = self._living[name]
        process.who.fate.thaw()
        self.network.thaw(f"{name}:{process.who.epoch}")

    def stall(self, name: str) -> None:
        """A kernel that does not return: the process lives and answers, but its steps stand still."""
        self._living[name].who.fate.freeze()

    def resume(self, name: str) -> None:
        """The kernel returns."""
        self._living[name].who.fate.thaw()

    def drain(self, name: str) -> None:
        """SIGTERM: it takes nothing new, finishes what it has, and ends."""
        self._living[name].leave.set()

    async def settle(self, within_s: float = 60.0) -> None:
        """Returns once no worker holds anything for anybody; raises AssertionError if that does not come about."""
        deadline_s = clock.now() + within_s
        while busy := [why for name in self._living if (why := self._busy(name))]:
            if clock.now() > deadline_s:
                raise AssertionError(f"not at rest after {within_s} s: {'; '.join(busy)}")
            await asyncio.sleep(0.1)
        for process in self._living.values():
            process.worker.check_integrity()

    def _busy(self, name: str) -> str:
        if not self._living[name].is_up:
            return f"{name} is about to start"
        load = self._living[name].worker.load()
        if load.free_blocks == load.blocks and not (load.running or load.waiting or load.leased_blocks):
            return ""
        return (
            f"{name} has {load.running} running, {load.waiting} waiting, {load.free_blocks} of {load.blocks} blocks "
            f"free, {load.leased_blocks} leased, {load.quarantined_blocks} in quarantine"
        )

    def _kill_writer(self, writer: str) -> None:
        name, epoch = writer.rsplit(":", 1)
        if name in self._living and self._living[name].who.epoch == int(epoch):
            self.crash(name)

    async def _run_frontend(self, ready: asyncio.Event) -> None:
        discovery = MemoryDiscovery(self._timing.ttl_s)
        registry = Registry(discovery)
        methods = {"join": registry.join, "members": registry.members}
        endpoint = Endpoint({"memory": self.network.wire("frontend")}, "", methods, self._rpc)
        async with (
            endpoint,
            endpoint.listen(FRONTEND),
            self._new_router(discovery, endpoint, self._rng) as self.router,
        ):
            ready.set()
            await self._closing.wait()

    async def _run_worker(self, process: Process) -> None:
        timing = self._timing
        try:
            async with process.worker as worker:
                process.is_up = True
                joining = stay_joined(worker.endpoint, (FRONTEND,), worker.standing, timing.report_s)
                await worker.serve(joining, process.leave, lambda: timing.grace_s)
        finally:
            if self._living.get(process.who.name) is process:
                del self._living[process.who.name]
