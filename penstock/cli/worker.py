"""A worker's process: engine, transport and wire put together, until SIGTERM."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import fields
from typing import TYPE_CHECKING

from penstock import clock, plugin
from penstock.cli import process, sockets
from penstock.config import EngineSettings, Model, WorkerConfig, parse, settings
from penstock.discovery.file import FileDiscovery
from penstock.engine.api import Engine
from penstock.serve.lend import LendOptions
from penstock.serve.registry import stay_announced, stay_joined
from penstock.serve.worker import Worker, WorkerOptions
from penstock.transport.api import Transport
from penstock.transport.host_memory import new_region as new_host_region
from penstock.transport.memory import bare_region
from penstock.wire.stream import StreamWire

if TYPE_CHECKING:
    from penstock.wire.zmq_publisher import PublisherOptions

REPORT_S = 1.0
SWITCH_INTERVAL_S = 0.0005  # how long the engine's thread may keep the interpreter from the event loop
HOST_TRANSPORTS = ("shm", "tcp")  # for KV in host memory
SHARE_OF_HOST_MEMORY = 0.1  # for the KV of one worker that was not told how much


async def run_worker(config: WorkerConfig) -> None:
    """Raises SetupError where the start is refused."""
    leave = process.stop_requested()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    engine = build_engine(config.model, config.engine)
    stream = StreamWire()
    wires = {"tcp": stream, "unix": stream}
    async with AsyncExitStack() as stack:
        transports = [await _opened(stack, transport) for transport in build_transports(config, engine)]
        options = worker_options(config, transports)
        new_region = new_host_region if engine.info.shares_memory else bare_region
        worker = await stack.enter_async_context(Worker(options, engine, wires, new_region, transports))
        if config.kv_events:
            await stack.enter_async_context(_publishing(publisher_options(config.kv_events), worker))
        gc.freeze()  # a model is 360,000 objects, which the collector need not walk through again
        await worker.serve(_stay_known(config, worker), leave, process.grace_s)


def build_engine(model: Model, settings: EngineSettings) -> Engine:
    """The engine that the settings name. Raises SetupError."""
    module = plugin.find("engine", settings.engine)
    options = {"model": str(model.folder)} | settings.values()
    engine: Engine = module.ENGINE(parse(module.Options, options, f"the {settings.engine} engine"))
    return engine


def host_room_bytes() -> int:
    """How much of this host's memory the KV of one worker may take, if nobody says."""
    return int(SHARE_OF_HOST_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def build_transports(config: WorkerConfig, engine: Engine) -> list[Transport]:
    """Those that the settings name. Raises SetupError."""
    chosen = config.kv.transport or (HOST_TRANSPORTS if engine.info.shares_memory else ())
    return [_build_transport(spec, config) for spec in chosen]


def _build_transport(spec: str, config: WorkerConfig) -> Transport:
    name = spec.partition(":")[0]
    module = plugin.find("transport", name)
    values = settings(spec, "transport")
    if "host" in (option.name for option in fields(module.Options)):
        values.setdefault("host", config.host)
    transport: Transport = module.TRANSPORT(config.secrets.token, parse(module.Options, values, f"transport {name!r}"))
    return transport


def publisher_options(spec: str) -> PublisherOptions:
    """From `ENDPOINT` or `ENDPOINT,key=value,key=value`. Raises SetupError."""
    from penstock.wire.zmq_publisher import PublisherOptions  # loads ZMQ, which most workers do without

    endpoint, _, listed = spec.partition(",")
    return parse(PublisherOptions, {"endpoint": endpoint} | settings(f"--kv-events:{listed}", "flag"), "--kv-events")


def _publishing(options: PublisherOptions, worker: Worker) -> AbstractAsyncContextManager[None]:
    from penstock.wire.zmq_publisher import publishing

    return publishing(worker.journal, worker.member.layout.block_tokens, options)


async def _opened(stack: AsyncExitStack, transport: Transport) -> Transport:
    if isinstance(transport, AbstractAsyncContextManager):
        await stack.enter_async_context(transport)
    return transport


def worker_options(config: WorkerConfig, transports: Sequence[Transport]) -> WorkerOptions:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return WorkerOptions(
        name=config.name,
        epoch=int(clock.wall_s() * 1000),
        role=config.role,
        model=config.model.name,
        token=config.secrets.token,
        addresses=(f"unix:@penstock-{config.name}-{clock.nonce(8).hex()}", f"tcp:{host}:0"),
        kv_bytes=config.kv.kv_bytes,
        kv_room_bytes=host_room_bytes(),
        pid=os.getpid(),
        domain=config.kv.domain or _domain(config.host, transports),
        device=config.device,
        labels=config.labels,
        lend=LendOptions(lease_s=config.kv.lease_s),
        keeps_origins=bool(config.kv_events),
    )


def _stay_known(config: WorkerConfig, worker: Worker) -> Coroutine[None, None, None]:
    if config.leases is not None:
        return stay_announced(FileDiscovery(config.leases), worker.standing, REPORT_S)
    return stay_joined(worker.endpoint, (f"tcp:{config.join}",), worker.standing, REPORT_S)


def _domain(host: str, transports: Sequence[Transport]) -> str:
    """Those that dial each other are in one, but what is offered on loopback ends at this host."""
    if all(transport.limits.is_in_place for transport in transports):
        return ""
    return f"loopback of {socket.gethostname()}" if sockets.is_loopback(host) else "network"
