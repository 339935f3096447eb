"""A whole cluster in one process on virtual time: the program that ships, on a memory network, arithmetic modelled.

async def story() -> None:
    async with World(seed=1) as world:
        world.freeze("prefill-0")
        answer = await world.ask(tokens=4096)
run_virtual(story())
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from penstock import clock
from penstock.cluster import Role
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.simulated import Options as EngineOptions
from penstock.engine.simulated import expected_tokens
from penstock.errors import PenstockError
from penstock.request import Finish, Request, Sampling
from penstock.serve.registry import Registry, stay_joined
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.serve.worker import Worker, WorkerOptions
from penstock.sim.faults import FAIR, MortalEngine, Weather
from penstock.tokens import pack
from penstock.transport.memory import MemoryHub, MemoryTransport
from penstock.wire.memory import MemoryNetwork

FRONTEND = "memory:frontend"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the cluster consists of. Worker options apply to all; names, epochs and addresses are given by the world."""

    prefill: int = 1
    decode: int = 1
    either: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
    kv_blocks: int = 1024
    worker: WorkerOptions = field(default_factory=lambda: WorkerOptions("", 0))
    report_s: float = 0.5
    ttl_s: float = 3.0
    grace_s: float = 10.0

    def names(self) -> list[tuple[str, Role]]:
        counts: list[tuple[Role, int]] = [("prefill", self.prefill), ("decode", self.decode), ("any", self.either)]
        return [(f"{role}-{index}", role) for role, count in counts for index in range(count)]


@dataclass(slots=True)
class Answer:
    """What a client of the virtual cluster got, and what it should have got."""

    tokens: list[int]
    expected: list[int]
    finish: Finish | None = None
    error: PenstockError | None = None
    ttft_s: float = 0.0
    ended_s: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Ended by itself, with every token right."""
        return self.finish is not None and self.error is None and self.tokens == self.expected

    @property
    def is_right_so_far(self) -> bool:
        """What arrived is what should have arrived, whether or not it is all."""
        return self.tokens == self.expected[: len(self.tokens)]


@dataclass(slots=True, eq=False)
class _Process:
    """One incarnation of a worker."""

    options: WorkerOptions
    engine: MortalEngine
    worker: Worker
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class World:
    """Used as `async with`; then `ask`, and the verbs of misfortune. At the end every block must be free."""

    def __init__(self, seed: int = 0, shape: Shape = Shape(), weather: Weather = FAIR) -> None:
        self.shape = shape
        self.weather = weather
        self.rng = Random(seed)
        self.network = MemoryNetwork(lambda source, to, _: self.weather.fate(self.rng, source, to))
        self.hub = MemoryHub()
        self.hub.on_kill = self._kill_writer
        self._processes: dict[str, _Process] = {}
        self._epochs: dict[str, int] = {}
        self._requests = 0
        self._group = asyncio.TaskGroup()
        self._frontend: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.router: Router

    async def __aenter__(self) -> World:
        await self._group.__aenter__()
        ready = asyncio.Event()
        self._frontend = self._group.create_task(self._run_frontend(ready), name="frontend")
        await ready.wait()
        for name, role in self.shape.names():
            self.start(name, role)
        await self.router.wait_ready(len(self._processes))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for process in self._processes.values():
            process.engine.thaw()
            process.leave.set()
        tasks = [process.task for process in self._processes.values() if process.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        self._closing.set()
        await self._group.__aexit__(kind, error, None)

    @property
    def workers(self) -> dict[str, Worker]:
        """Workers that live, by name."""
        return {name: process.worker for name, process in self._processes.items()}

    def engine(self, name: str) -> MortalEngine:
        return self._processes[name].engine

    async def ask(
        self,
        prompt: Sequence[int] = (),
        tokens: int = 100,
        max_tokens: int = 8,
        seed: int = 0,
        leave_after: int | None = None,
        timeout_s: float = 120.0,
    ) -> Answer:
        """One client's request; `tokens` random ones are the prompt if none is given. Errors are in the answer.

        `leave_after` makes the client disconnect after so many tokens.
        """
        content = list(prompt) or [self.rng.randrange(100, 30_000) for _ in range(tokens)]
        sampling = Sampling(max_tokens=max_tokens, temperature=1.0 if seed else 0.0, seed=seed)
        self._requests += 1
        request = Request(f"r{self._requests}", self.shape.engine.model, pack(content), sampling, timeout_s)
        answer = Answer([], expected_tokens(content, sampling, self.shape.engine))
        arrived_s = clock.now()
        try:
            async with self.router.generate(request) as stream:
                while answer.finish is None and leave_after != len(answer.tokens):
                    fresh, answer.finish = await stream.read()
                    answer.tokens += [token.id for token in fresh]
                    answer.ttft_s = answer.ttft_s or clock.now() - arrived_s
        except PenstockError as error:
            answer.error = error
        answer.ended_s = clock.now() - arrived_s
        return answer

    # Misfortunes

    def start(self, name: str, role: Role = "any") -> None:
        """Starts a worker, or starts it again under a new epoch."""
        self._epochs[name] = epoch = self._epochs.get(name, 0) + 1
        address = f"memory:{name}:{epoch}"
        options = replace(
            self.shape.worker,
            name=name,
            epoch=epoch,
            role=role,
            addresses=(address,),
            kv_bytes=self.shape.kv_blocks * 16 * self.shape.engine.block_tokens,
        )
        engine = MortalEngine(self.shape.engine)
        wires = {"memory": self.network.wire(address.removeprefix("memory:"))}
        process = _Process(options, engine, Worker(options, engine, wires, MemoryTransport(self.hub)))
        self._processes[name] = process
        process.task = self._group.create_task(self._run_worker(process), name=name)

    def crash(self, name: str) -> None:
        """kill -9: it says nothing more and writes nothing more."""
        process = self._processes.pop(name)
        process.engine.kill()
        self.network.crash(self._endpoint_name(process))
        self.hub.died(f"{name}:{process.options.epoch}")
        if process.task is not None:
            process.task.cancel()

    def freeze(self, name: str) -> None:
        """SIGSTOP: it hears and says nothing, and a step in progress stands still half-written."""
        self._processes[name].engine.freeze()
        self.network.freeze(self._endpoint_name(self._processes[name]))

    def thaw(self, name: str) -> None:
        """SIGCONT: it goes on where it was, writes included."""
        self._processes[name].engine.thaw()
        self.network.thaw(self._endpoint_name(self._processes[name]))

    def drain(self, name: str) -> None:
        """SIGTERM: it takes nothing new, finishes what it has, and ends."""
        self._processes[name].leave.set()

    async def settle(self, within_s: float = 60.0) -> None:
        """Returns once no worker holds anything for anybody; raises AssertionError if that does not come about."""
        deadline_s = clock.now() + within_s
        while busy := [why for name in self._processes if (why := self._busy(name))]:
            if clock.now() > deadline_s:
                raise AssertionError(f"not at rest after {within_s} s: {'; '.join(busy)}")
            await asyncio.sleep(0.1)
        for worker in self.workers.values():
            worker.check_integrity()

    def _busy(self, name: str) -> str:
        load = self._processes[name].worker.load()
        if load.free_blocks == load.blocks and not (load.running or load.waiting or load.leased_blocks):
            return ""
        return (
            f"{name} has {load.running} running, {load.waiting} waiting, {load.free_blocks} of {load.blocks} blocks "
            f"free, {load.leased_blocks} leased, {load.quarantined_blocks} in quarantine"
        )

    @staticmethod
    def _endpoint_name(process: _Process) -> str:
        return f"{process.options.name}:{process.options.epoch}"

    def _kill_writer(self, writer: str) -> None:
        name, epoch = writer.rsplit(":", 1)
        if name in self._processes and self._processes[name].options.epoch == int(epoch):
            self.crash(name)

    async def _run_frontend(self, ready: asyncio.Event) -> None:
        discovery = MemoryDiscovery(self.shape.ttl_s)
        wires = {"memory": self.network.wire("frontend")}
        endpoint = Endpoint(wires, "", {"join": Registry(discovery).join}, self.shape.worker.rpc)
        async with endpoint, endpoint.listen(FRONTEND), Router(discovery, endpoint, self.rng) as self.router:
            ready.set()
            await self._closing.wait()

    async def _run_worker(self, process: _Process) -> None:
        try:
            async with process.worker as worker:
                joining = stay_joined(worker.endpoint, (FRONTEND,), worker.standing, self.shape.report_s)
                await worker.serve(joining, process.leave, lambda: self.shape.grace_s)
        finally:
            if self._processes.get(process.options.name) is process:
                del self._processes[process.options.name]
