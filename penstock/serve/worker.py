"""A worker: one engine, one region of KV, and the calls it serves. Any worker can prefill and decode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from penstock import clock
from penstock.blocks import Region
from penstock.cluster import Load, Member, Role, Standing
from penstock.engine.api import Engine
from penstock.kv.journal import Journal
from penstock.kv.lease import LeaseTable
from penstock.kv.prefix_cache import PrefixCache
from penstock.policy.batching import Limits
from penstock.policy.latency.steps import StepFit
from penstock.serve import kv_events
from penstock.serve.decode import DecodeOptions, Decoder
from penstock.serve.kv_events import Teller, TellOptions
from penstock.serve.lend import Lender, LendOptions
from penstock.serve.paths import PathOptions, Paths, Shared
from penstock.serve.prefill import Prefiller, PrefillOptions
from penstock.serve.probe import Prober
from penstock.serve.pulse import Pulse
from penstock.serve.rpc import Call, Endpoint, Handler, RpcOptions
from penstock.serve.stepper import Stepper
from penstock.transport.api import MakeRegion, Transport
from penstock.wire.api import Wire

log = logging.getLogger(__name__)

_decode_role = msgspec.msgpack.Decoder(Role).decode


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Everything a worker is told.

    `kv_bytes` is the size of its region; 0 takes room for `kv_streams` full contexts, or what there is: on the
    engine's own device all that is left, of host memory at most `kv_room_bytes`.
    """

    name: str
    epoch: int
    role: Role = "any"
    model: str = ""
    token: str = ""
    addresses: Sequence[str] = ()
    kv_bytes: int = 0
    kv_streams: int = 16
    kv_room_bytes: int = 1 << 30
    pid: int = 0
    domain: str = ""
    device: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    prefill: PrefillOptions = field(default_factory=PrefillOptions)
    lend: LendOptions = field(default_factory=LendOptions)
    paths: PathOptions = field(default_factory=PathOptions)
    rpc: RpcOptions = field(default_factory=RpcOptions)
    tell: TellOptions = field(default_factory=TellOptions)
    keeps_origins: bool = False  # the journal says what blocks hold as well
    pulse_s: float = 0.05
    sweep_s: float = 1.0


class Worker:
    """Used as `async with`: entering loads the engine, makes the region, offers it over all transports, and listens.

    Others may be there to reach this worker's KV, `transports` is how; without any it prefills for itself alone.
    Its `endpoint`, known once it is open, is there to call others with; its `journal`, to follow its prefix cache.
    """

    endpoint: Endpoint
    journal: Journal
    _member: Member

    def __init__(
        self,
        options: WorkerOptions,
        engine: Engine,
        wires: Mapping[str, Wire],
        new_region: MakeRegion,
        transports: Sequence[Transport],
    ) -> None:
        self._options = options
        self._engine = engine
        self._wires = wires
        self._new_region = new_region
        self._paths = Paths(transports, options.paths)
        self._stack = AsyncExitStack()
        self._is_draining = False
        self._methods: dict[str, Handler] = {}
        self._lives: list[asyncio.Task[object]] = []

    async def __aenter__(self) -> Worker:
        try:
            await self._open(self._stack)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def member(self) -> Member:
        """How this worker announces itself; known once it is open."""
        return self._member

    def standing(self) -> Standing:
        """The member and its report."""
        return Standing(self._member, self.load(), self._is_draining)

    def load(self) -> Load:
        """The report that routers read."""
        stepper, pace, counters = self._stepper, self._stepper.pace, self._decoder.counters
        return Load(
            at_s=clock.now(),
            steps=stepper.steps,
            step_s=stepper.call_s,
            busy_s=stepper.busy_s,
            waiting=stepper.waiting + self._prefiller.queued,
            running=stepper.running,
            queued_tokens=stepper.queued_tokens + self._prefiller.queued_tokens,
            blocks=self._cache.blocks,
            free_blocks=self._cache.available,
            leased_blocks=self._leases.leased_blocks,
            quarantined_blocks=self._cache.quarantined,
            prefill_tokens_per_s=pace.prefill_tokens_per_s,
            decode_step_s=pace.decode_step_s,
            step_prices=pace.step_prices,
            computed_tokens=stepper.computed_tokens,
            prefills=stepper.prefills,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            output_tokens=counters.output_tokens,
            preemptions=stepper.preemptions,
            handoffs=counters.handoffs,
            handoff_failures=counters.handoff_failures,
            in_place_bytes=counters.in_place_bytes,
            copied_bytes=counters.copied_bytes,
            loop_delay_p99_s=self._pulse.delay_p99_s,
        )

    async def serve(
        self, stay_known: Coroutine[None, None, None], leave: asyncio.Event, grace_s: Callable[[], float]
    ) -> None:
        """Serves until `leave` is set, with `stay_known` telling the world; then drains for at most `grace_s()`.

        Raises if this worker's own machinery failed, or what tells the world.
        """
        async with _background(stay_known) as telling, _background(leave.wait()) as leaving:
            # None of the others ends by itself: if one does, it failed, and so has this worker.
            done, _ = await asyncio.wait((leaving, telling, *self._lives), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await self.drain(grace_s())

    def prefer(self, role: Role) -> None:
        """Takes another role from now on; routers hear of it with the next report."""
        self._member = msgspec.structs.replace(self._member, role=role)

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new and returns when everything it had is done, at the latest after `grace_s`."""
        self._is_draining = self._decoder.is_draining = self._prefiller.is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._decoder.wait_idle()
                await self._prefiller.wait_idle()
        except TimeoutError:
            left = self._decoder.live + self._prefiller.live
            log.warning("%s leaves %d requests unfinished after %.0f s", self._options.name, left, grace_s)

    def check_integrity(self) -> None:
        """Raises AssertionError if a block is unaccounted for."""
        self._cache.check_integrity()

    async def _open(self, stack: AsyncExitStack) -> None:
        options, engine = self._options, self._engine
        await stack.enter_async_context(engine)
        region = await stack.enter_async_context(
            self._new_region(options.name, options.epoch, engine.info.layout, self._count_blocks())
        )
        shared = await stack.enter_async_context(self._paths.export(region))
        engine.attach(region)
        stack.callback(engine.detach, region.key)
        self.endpoint = endpoint = await stack.enter_async_context(
            Endpoint(self._wires, options.token, self._methods, options.rpc)
        )
        bound = [await stack.enter_async_context(endpoint.listen(address)) for address in options.addresses]
        self._member = self._describe(region, bound)
        self._assemble(shared, endpoint)
        stack.push_async_callback(self._prefiller.close)
        for life in (self._stepper.run(), self._pulse.run(), self._sweep()):
            self._lives.append(await stack.enter_async_context(_background(life)))

    def _count_blocks(self) -> int:
        info = self._engine.info
        wanted_bytes = self._options.kv_bytes
        if not wanted_bytes:
            step_tokens = self._options.limits.step_tokens
            full_bytes = info.layout.blocks_for(info.max_context_tokens, step_tokens) * info.layout.block_bytes
            wanted_bytes = info.kv_room_bytes or min(self._options.kv_streams * full_bytes, self._options.kv_room_bytes)
        return max(len(info.layout.keeps), wanted_bytes // info.layout.block_bytes)

    def _describe(self, region: Region, bound: Sequence[str]) -> Member:
        options, info = self._options, self._engine.info
        return Member(
            worker=options.name,
            epoch=options.epoch,
            role=options.role,
            model=options.model or info.model,
            addresses=tuple(bound),
            layout=info.layout,
            blocks=region.blocks,
            max_context_tokens=info.layout.tokens_in(
                region.blocks, options.limits.step_tokens, info.max_context_tokens
            ),
            memory=self._paths.memory,
            pid=options.pid,
            domain=options.domain,
            device=options.device,
            engine=info.name,
            supports=info.supports,
            kv_events=kv_events.CALL,
            labels=dict(options.labels),
            chunk_tokens=options.limits.step_tokens,
        )

    def _assemble(self, shared: Shared, endpoint: Endpoint) -> None:
        options, engine = self._options, self._engine
        self.journal = Journal(shared.region.blocks, options.keeps_origins)
        self._cache = PrefixCache(shared.region.blocks, self.journal, shared.region.layout.reads)
        self._leases = LeaseTable(self._cache, options.lend.lease_s)
        self._stepper = Stepper(
            engine, shared.region, self._cache, self._leases, options.limits, StepFit(engine.info.step_prior)
        )
        lender = Lender(self._cache, self._leases, self._stepper, shared, endpoint, options.lend)
        self._decoder = Decoder(
            *(self._member, engine.info.eos_token_ids, engine.info.vocab_size, shared, self._cache),
            *(self._stepper, lender, endpoint, options.decode),
        )
        self._prefiller = Prefiller(
            *(self._member, engine, shared.region, self._cache),
            *(self._paths, self._stepper, options.prefill),
        )
        self._pulse = Pulse(options.pulse_s)
        prober = Prober(endpoint)
        self._methods |= {
            "generate": self._decoder.generate,
            "prefill": self._prefiller.prefill,
            "settle": self._prefiller.settle,
            "prefer": self._serve_prefer,
            "kv_events": Teller(self.journal, options.tell).tell,
            "measure": prober.measure,
            "sink": prober.sink,
        }

    async def _serve_prefer(self, call: Call) -> None:
        self.prefer(_decode_role(call.body))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._options.sweep_s)
            await self._prefiller.release_regions()


@asynccontextmanager
async def _background(life: Coroutine[None, None, object]) -> AsyncIterator[asyncio.Task[object]]:
    """Runs `life` while inside the block; its failure is raised at the end."""
    task = asyncio.ensure_future(life)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
