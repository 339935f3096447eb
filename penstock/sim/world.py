"""A small cluster of engines that read back every byte they wrote, to see what harm can be done to it.

async def story() -> None:
    async with World(seed=1) as world:
        world.freeze("prefill-0")
        answer = await world.ask(tokens=4096)
run_virtual(story())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from penstock import clock
from penstock.cluster import Role
from penstock.engine.simulated import Options as EngineOptions
from penstock.engine.simulated import expected_tokens
from penstock.errors import PenstockError
from penstock.metrics import QueueMetrics
from penstock.policy.latency.transfers import over
from penstock.policy.routing import pairs
from penstock.policy.routing.api import Route
from penstock.request import Constraints, Finish, Request, Sampling
from penstock.serve.kv_watch import NewFeed
from penstock.serve.router import FEEDS, Router, ServiceOptions
from penstock.serve.worker import Worker, WorkerOptions
from penstock.sim.faults import FAIR, Fate, MortalEngine, Weather
from penstock.sim.network import Network
from penstock.sim.processes import Hub, Incarnation, Parts, Processes, Timing
from penstock.sim.transport import FabricHub, FabricTransport
from penstock.sim.wiring import Wiring
from penstock.tokens import pack
from penstock.topology.build import PRESETS, build
from penstock.transport.memory import MemoryHub, MemoryTransport, heap_region

HOSTS, GPUS = 2, 8  # of each

_PRIORS = {"rdma": over(1e-5, 1e-7, 40e9), "tcp": over(1e-4, 1e-6, 4e9)}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the cluster consists of. Worker options apply to all; names, epochs and addresses are given by the world.

    With `is_streamed` each worker has a GPU, eight to an HGX node, and KV crosses links; else all share one memory. It
    then goes the ways named, the first of them as RDMA does, without the owner; over "tcp" owners take what arrives.
    `new_engine` makes engines that are odd in other ways than those of `sim.faults`.
    """

    prefill: int = 1
    decode: int = 1
    either: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
    kv_blocks: int = 1024
    worker: WorkerOptions = field(default_factory=lambda: WorkerOptions("", 0))
    timing: Timing = field(default_factory=Timing)
    is_streamed: bool = False
    ways: tuple[str, ...] = ("rdma",)
    new_engine: Callable[[EngineOptions, Fate], MortalEngine] = MortalEngine

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


class World(Processes):
    """Used as `async with`; then `ask`, and the verbs of misfortune."""

    def __init__(
        self,
        seed: int = 0,
        shape: Shape = Shape(),
        weather: Weather = FAIR,
        policy: Route = pairs.route,
        service: ServiceOptions = ServiceOptions(),
        feeds: Mapping[str, NewFeed] = FEEDS,
    ) -> None:
        self.shape = shape
        self.rng = Random(seed)
        self.links = Network()
        self.wiring = Wiring(build([replace(PRESETS["hgx-h100"], count=HOSTS)]), self.links)
        self.memory = MemoryHub()
        self.ways = {
            name: FabricHub(self.links, self.wiring, name, is_fenced=name == "tcp", prior=_PRIORS[name])
            for name in (shape.ways if shape.is_streamed else ())
        }
        self._requests = 0
        self.queue = QueueMetrics()
        new_router = partial(Router, policy=policy, service=service, queued=self.queue, feeds=feeds)
        hubs: list[Hub] = [self.memory, *self.ways.values()]
        super().__init__(self._make, hubs, self.rng, weather, shape.timing, shape.worker.rpc, new_router)

    async def __aenter__(self) -> World:
        await super().__aenter__()
        for name, role in self.shape.names():
            self.start(name, role)
        await self.router.wait_ready(len(self.living))
        return self

    @property
    def workers(self) -> dict[str, Worker]:
        """Workers that live, by name."""
        return {name: process.worker for name, process in self.living.items()}

    def engine(self, name: str) -> MortalEngine:
        engine = self.living[name].parts.engine
        assert isinstance(engine, MortalEngine)
        return engine

    async def ask(
        self,
        prompt: Sequence[int] = (),
        tokens: int = 100,
        max_tokens: int = 8,
        seed: int = 0,
        leave_after: int | None = None,
        timeout_s: float = 120.0,
        constraints: Constraints = Constraints(),
    ) -> Answer:
        """One client's request; `tokens` random ones are the prompt if none is given. Errors are in the answer.

        `leave_after` makes the client disconnect after so many tokens.
        """
        content = list(prompt) or [self.rng.randrange(100, 30_000) for _ in range(tokens)]
        sampling = Sampling(max_tokens=max_tokens, temperature=1.0 if seed else 0.0, seed=seed)
        self._requests += 1
        request = Request(
            *(f"r{self._requests}", self.shape.engine.model, pack(content), sampling, timeout_s),
            constraints=constraints,
        )
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

    def _make(self, who: Incarnation) -> Parts:
        shape = self.shape
        names = [name for name, _ in shape.names()]
        options = replace(
            shape.worker,
            name=who.name,
            epoch=who.epoch,
            role=who.role,
            addresses=(who.address,),
            kv_bytes=shape.kv_blocks * 16 * shape.engine.block_tokens,
        )
        engine = shape.new_engine(shape.engine, who.fate)
        if not shape.is_streamed:
            return Parts(options, engine, heap_region, [MemoryTransport(self.memory)])
        number = names.index(who.name) if who.name in names else len(names)
        device = f"node{number // GPUS}/gpu{number % GPUS}"
        self.wiring.place(who.name, (device,))
        transports = [FabricTransport(hub) for hub in self.ways.values()]
        return Parts(replace(options, domain="fabric", device=device), engine, heap_region, transports)
