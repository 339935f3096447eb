"""Where everything is put together: the only place that knows which backends a process uses."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Coroutine

from penstock import clock, plugin
from penstock.cli import process
from penstock.config import FrontendConfig, WorkerConfig, parse
from penstock.discovery.api import Discovery
from penstock.discovery.file import FileDiscovery
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.api import Engine
from penstock.serve.frontend import Frontend, FrontendOptions
from penstock.serve.http_server import serve_http
from penstock.serve.registry import Registry, stay_announced, stay_joined
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.serve.text import load_tokenizer
from penstock.serve.worker import Worker, WorkerOptions
from penstock.transport.api import Transport
from penstock.transport.private import PrivateTransport
from penstock.transport.shm import ShmTransport
from penstock.wire.api import Wire
from penstock.wire.stream import StreamWire

REPORT_S = 1.0
GRACE_S = 30.0
ORPHAN_GRACE_S = 1.0  # nobody waits for the work of a server whose launcher is gone
SWITCH_INTERVAL_S = 0.0005  # how long the engine's thread may keep the interpreter from the event loop


async def run_worker(config: WorkerConfig) -> None:
    """A worker's process, until SIGTERM."""
    leave = process.stop_requested()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    engine = build_engine(config)
    rng = clock.chance()
    options = WorkerOptions(
        name=config.name,
        epoch=int(clock.wall_s() * 1000),
        role=config.role,
        model=config.model.name,
        token=config.secrets.token,
        addresses=(f"unix:@penstock-{config.name}-{rng.getrandbits(64):x}", f"tcp:{_bracketed(config.host)}:0"),
        kv_bytes=config.kv.kv_bytes,
        pid=os.getpid(),
    )
    async with Worker(options, engine, _wires(), _transport(engine, config.secrets.token)) as worker:
        await worker.serve(_stay_known(config, worker), leave, ORPHAN_GRACE_S if process.is_orphan() else GRACE_S)


async def run_frontend(config: FrontendConfig, http: socket.socket, registry: socket.socket) -> None:
    """A frontend's process, until SIGTERM. Takes over two listening sockets."""
    leave = process.stop_requested()
    rng = clock.chance()
    tokenizer = load_tokenizer(config.model.folder, config.model.name)
    discovery: Discovery = FileDiscovery(config.leases) if config.leases else MemoryDiscovery()
    endpoint = Endpoint(_wires(), config.secrets.token, {"join": Registry(discovery).join})
    options = FrontendOptions(api_key=config.secrets.api_key)
    async with (
        endpoint,
        endpoint.listen(f"fd:{registry.fileno()}"),
        Router(discovery, endpoint, rng) as router,
        Frontend(router, {config.model.name: tokenizer}, rng, options) as frontend,
        serve_http(frontend, http, GRACE_S),
    ):
        await leave.wait()


def build_engine(config: WorkerConfig) -> Engine:
    """The engine that the settings name. Raises SetupError."""
    module = plugin.find("engine", config.engine.engine)
    options = {"model": str(config.model.folder)} | config.engine.values()
    engine: Engine = module.ENGINE(parse(module.Options, options, f"the {config.engine.engine} engine"))
    return engine


def _stay_known(config: WorkerConfig, worker: Worker) -> Coroutine[None, None, None]:
    if config.leases:
        return stay_announced(FileDiscovery(config.leases), worker.standing, REPORT_S)
    return stay_joined(worker.endpoint, (f"tcp:{config.join}",), worker.standing, REPORT_S)


def _wires() -> dict[str, Wire]:
    stream = StreamWire()
    return {"tcp": stream, "unix": stream, "fd": stream}


def _transport(engine: Engine, token: str) -> Transport:
    return ShmTransport(token) if engine.info.shares_memory else PrivateTransport()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
