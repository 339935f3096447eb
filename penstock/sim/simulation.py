"""A workload against a cluster that does not exist: the program that ships, and clients that note what they see."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from types import MappingProxyType
from typing import Literal

from penstock import clock, plugin
from penstock.discovery.api import Discovery
from penstock.errors import PenstockError, SetupError
from penstock.policy.batching import Limits
from penstock.policy.routing.api import Route
from penstock.request import Request, Sampling
from penstock.serve.decode import DecodeOptions
from penstock.serve.prefill import PrefillOptions
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint, RpcOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.cluster import ClusterSpec, WorkerSpec
from penstock.sim.engine import TOKEN, ModelledEngine, Options
from penstock.sim.faults import Weather
from penstock.sim.loop import run_virtual
from penstock.sim.network import Link, Network
from penstock.sim.processes import Incarnation, Parts, Process, Processes, Timing
from penstock.sim.record import LinkSample, Recorder, WorkerSample
from penstock.sim.transport import FabricHub, FabricTransport
from penstock.sim.wiring import Wiring
from penstock.tokens import count, pack
from penstock.transport.api import Transport
from penstock.transport.memory import MemoryHub, MemoryTransport, bare_region
from penstock.workloads.workload import Session, Turn, Workload, play

PATIENCE_S = 3600.0  # of clients: an overloaded cluster is to be seen as it is
QUIET_S = 60.0  # between looks at what cannot change in virtual time

WorkerVerb = Literal["crash", "start", "freeze", "thaw", "drain"]
LinkVerb = Literal["cut", "slow", "restore"]
WORKER_VERBS: tuple[WorkerVerb, ...] = ("crash", "start", "freeze", "thaw", "drain")
LINK_VERBS: tuple[LinkVerb, ...] = ("cut", "slow", "restore")


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s`, `verb` happens to the worker of that name; or to the link, `slow` to a tenth of what it carries."""

    at_s: float
    verb: WorkerVerb | LinkVerb
    name: str


def simulate(
    cluster: ClusterSpec,
    workload: Workload,
    policy: str | Route,
    seed: int,
    recorder: Recorder,
    on_progress: Callable[[int], None] = lambda requests: None,
    faults: Sequence[Fault] = (),
    skews_s: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Plays all of `workload` and returns when the last request has ended; `on_progress` gets how many have.

    `policy` is the name of one, or one of the caller's own.
    `skews_s` says how far the clocks of workers are ahead. The same arguments give the same run. Raises SetupError for
    a policy or a fault that does not fit, Deadlock if somebody waits for ever, and AssertionError if any worker still
    holds a block for anybody at the end.
    """
    simulation = Simulation(cluster, policy, seed, recorder, on_progress, faults, skews_s)
    try:
        run_virtual(simulation.run(workload))
    finally:
        gc.unfreeze()
        gc.collect()  # a cluster is full of cycles: who runs many should not have to wait for them to go


class Simulation:
    """One run."""

    def __init__(
        self,
        cluster: ClusterSpec,
        policy: str | Route,
        seed: int,
        recorder: Recorder,
        on_progress: Callable[[int], None],
        faults: Sequence[Fault],
        skews_s: Mapping[str, float],
    ) -> None:
        self._cluster = cluster
        self._recorder = recorder
        self._on_progress = on_progress
        self._faults = faults
        self._specs = {spec.name: spec for spec in cluster.workers}
        self._links = Network()
        self._wiring = Wiring(cluster.fabric, self._links)
        self._memory = MemoryHub()
        self._fabric = FabricHub(self._links, self._wiring)
        self._timing = Timing(cluster.report_s, 6 * cluster.report_s, PATIENCE_S)
        self._rpc = RpcOptions()
        self._processes = Processes(
            *(
                self._build,
                (self._memory, self._fabric),
                Random(seed),
                Weather(cluster.message_s),
                self._timing,
                self._rpc,
            ),
            partial(_new_router, policy, None if cluster.in_place else self._wiring),
        )
        self._processes.skews_s.update(skews_s)
        self._begun = 0
        self._ended = 0
        self._busy_s: dict[str, float] = {}
        self._carried_bytes: dict[str, float] = {}
        self._sampled_s = 0.0

    async def run(self, workload: Workload) -> None:
        async with self._processes as processes:
            for spec in self._cluster.workers:
                processes.start(spec.name, spec.role)
            await processes.router.wait_ready(len(self._specs))
            gc.freeze()  # what is there now stays: the collector need not walk through it again and again
            others = [asyncio.ensure_future(life) for life in (self._take_samples(), self._bring_misfortune())]
            try:
                await play(workload, self._ask)
            finally:
                for task in others:
                    task.cancel()
                await asyncio.wait(others)
            for task in others:
                if not task.cancelled():
                    task.result()
            await processes.settle()

    async def _ask(self, session: Session, turn: Turn, prompt: bytes) -> bytes | None:
        """One client's request; the answer if it is whole."""
        recorder, row = self._recorder, self._recorder.begin(clock.now(), count(prompt), session.tenant)
        self._begun += 1
        sampling = Sampling(max_tokens=turn.output_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"r{self._begun}", self._cluster.model, prompt, sampling, PATIENCE_S, session.tenant)
        tokens, finish, timeline, failure = 0, None, None, ""
        try:
            async with self._processes.router.generate(request) as stream:
                while finish is None:
                    fresh, finish = await stream.read()
                    recorder.tokens(row, clock.now(), len(fresh), stream.over_s)
                    tokens += len(fresh)
                timeline = stream.timeline
        except PenstockError as error:
            failure = type(error).__name__
        recorder.end(row, clock.now(), timeline, failure)
        self._ended += 1
        self._on_progress(self._ended)
        return None if failure else _ONE_TOKEN * tokens

    def _build(self, who: Incarnation) -> Parts:
        cluster, spec = self._cluster, self._specs[who.name]
        options = WorkerOptions(
            name=who.name,
            epoch=who.epoch,
            role=who.role,
            model=cluster.model,
            addresses=(who.address,),
            kv_bytes=spec.kv_blocks * cluster.layout.block_bytes,
            domain=cluster.name,
            device=spec.devices[0],
            limits=Limits(spec.step_tokens, spec.max_running),
            decode=DecodeOptions(max_queued=cluster.max_queued),
            prefill=PrefillOptions(max_queued=cluster.max_queued, chunk_tokens=spec.step_tokens),
            rpc=self._rpc,
            pulse_s=QUIET_S,
            sweep_s=QUIET_S,
        )
        model = Options(cluster.model, cluster.layout, cluster.max_context_tokens, spec.step_model)
        return Parts(options, ModelledEngine(model, who.fate), bare_region, [self._transport(spec)])

    def _transport(self, spec: WorkerSpec) -> Transport:
        if self._cluster.in_place:
            return MemoryTransport(self._memory)
        self._wiring.place(spec.name, spec.devices)
        return FabricTransport(self._fabric)

    # Looking on

    async def _take_samples(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._recorder.next_sample_s - clock.now()))
            now = clock.now()
            passed_s, self._sampled_s = now - self._sampled_s, now
            if passed_s > 0:
                living = [(name, process) for name, process in self._processes.living.items() if process.is_up]
                workers = [(name, self._worker_sample(name, process, passed_s)) for name, process in living]
                links = [(name, self._link_sample(link, passed_s)) for name, link in self._links.links.items()]
                self._recorder.sample(now, workers, links)

    def _worker_sample(self, name: str, process: Process, passed_s: float) -> WorkerSample:
        load = process.worker.load()
        before, self._busy_s[name] = self._busy_s.get(name, 0.0), load.busy_s
        used = 1 - load.free_blocks / load.blocks
        busy = max(0.0, load.busy_s - before) / passed_s  # a step that takes longer is seen when it ends
        return WorkerSample(load.running, load.waiting, load.queued_tokens, busy, used)

    def _link_sample(self, link: Link, passed_s: float) -> LinkSample:
        carried = self._links.use(link).carried_bytes
        before, self._carried_bytes[link.name] = self._carried_bytes.get(link.name, 0.0), carried
        return LinkSample((carried - before) / (link.nominal_bytes_per_s * passed_s))

    # Misfortune

    async def _bring_misfortune(self) -> None:
        for fault in sorted(self._faults, key=lambda fault: fault.at_s):
            await asyncio.sleep(max(0.0, fault.at_s - clock.now()))
            self._bring(fault)

    def _bring(self, fault: Fault) -> None:
        if fault.verb in LINK_VERBS:
            link = self._links.links.get(fault.name)
            if link is None:
                raise SetupError(f"there is no link {fault.name!r} in use; there is {', '.join(self._links.links)}")
            self._links.slow(link, _LINK_FACTORS[fault.verb])
        elif fault.verb == "start":
            if fault.name not in self._processes.living:
                self._processes.start(fault.name, self._specs[fault.name].role)
        elif fault.name in self._processes.living:
            getattr(self._processes, fault.verb)(fault.name)


_ONE_TOKEN = pack([TOKEN.id])
_LINK_FACTORS = {"cut": 0.0, "slow": 0.1, "restore": 1.0}


def _new_router(
    policy: str | Route, wiring: Wiring | None, discovery: Discovery, endpoint: Endpoint, rng: Random
) -> Router:
    route: Route = plugin.find("policy.routing", policy).ROUTING if isinstance(policy, str) else policy
    return Router(discovery, endpoint, rng, route, wiring=wiring)
