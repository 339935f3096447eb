"""A frontend's process: HTTP, tokenizer, router and registry put together, until SIGTERM."""

from __future__ import annotations

import gc
import logging
import math
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from penstock import clock, plugin
from penstock.cli import process
from penstock.config import FrontendConfig, ServiceSettings, SharedPort, Tenant, read_tenants
from penstock.discovery.api import Discovery
from penstock.discovery.file import FileDiscovery
from penstock.discovery.memory import MemoryDiscovery
from penstock.errors import BadTopology
from penstock.fabric import Fabric
from penstock.metrics import Metrics
from penstock.policy.admission import ServiceLevel
from penstock.policy.routing.ways import Climber, Rung
from penstock.serve.frontend import Frontend, FrontendOptions
from penstock.serve.generation_config import NO_DEFAULTS, load_defaults
from penstock.serve.http_server import serve_http
from penstock.serve.registry import Registry, tell_nobody
from penstock.serve.router import Router, ServiceOptions
from penstock.serve.rpc import Endpoint, Handler
from penstock.serve.siblings import Siblings
from penstock.serve.text import load_tokenizer
from penstock.topology.file import FileTopology, Options
from penstock.wire.stream import StreamWire

log = logging.getLogger(__name__)


async def run_frontend(config: FrontendConfig, http: socket.socket, registry: socket.socket) -> None:
    """Takes over two listening sockets. Raises SetupError where the start is refused."""
    route = plugin.find("policy.routing", config.policy).ROUTING
    wiring = Placed(FileTopology(Options(config.topology)).load()) if config.topology is not None else None
    leave = process.stop_requested()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the event loop
    rng = clock.chance()
    answers, folder = config.answers, config.model.folder
    offload = process.OneThread("encoding")
    tokenizer = load_tokenizer(folder, config.model.name, offload, answers.tool_parser, answers.reasoning_parser)
    discovery: Discovery = FileDiscovery(config.leases) if config.leases is not None else MemoryDiscovery()
    stream = StreamWire()
    wires = {"tcp": stream, "unix": stream, "fd": stream}
    methods: dict[str, Handler] = {}  # filled in before anybody listens
    endpoint = Endpoint(wires, config.secrets.token, methods)
    siblings = _siblings(config.process, endpoint, discovery)
    registered = Registry(discovery, siblings.telling if siblings and config.leases is None else tell_nobody)
    tenants = read_tenants(config.service.tenants)
    keys = {name: tenant.key for name, tenant in tenants.items() if tenant.key is not None}
    defaults = load_defaults(folder) if answers.generation_config else NO_DEFAULTS
    options = FrontendOptions(api_key=config.secrets.api_key, tenant_keys=keys, defaults={config.model.name: defaults})
    service, measured = service_options(config.service, tenants), Metrics()
    router = Router(discovery, endpoint, rng, route, wiring=wiring, service=service, queued=measured.queue)
    frontend = Frontend(router, {config.model.name: tokenizer}, rng, options, measured, siblings)
    methods |= {"join": registered.join, "members": registered.members, **frontend.methods()}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(endpoint)
        await stack.enter_async_context(endpoint.listen(f"fd:{registry.fileno()}"))
        await stack.enter_async_context(router)
        await stack.enter_async_context(frontend)
        if siblings is not None and config.process is not None:
            methods["relay"] = siblings.relayed
            await stack.enter_async_context(endpoint.listen(config.process.address))
            await siblings.wait_caught_up()
        _spare_collector()
        await stack.enter_async_context(serve_http(frontend, http, process.grace_s))
        await leave.wait()


def _spare_collector() -> None:
    """Has Python look for cycles in what requests leave behind, and less often: it took a twentieth of a short one."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)


def _siblings(own: SharedPort | None, endpoint: Endpoint, discovery: Discovery) -> Siblings | None:
    """The other processes that share this one's port; None if it is alone."""
    return None if own is None else Siblings(own.name, own.others(), endpoint, discovery)


class Placed:
    """The wiring of workers that say on which device of `fabric` they are; others may be anywhere."""

    def __init__(self, fabric: Fabric) -> None:
        self._climber = Climber(fabric)
        self._unknown: set[str] = set()

    def climb(self, device: str) -> Sequence[Rung]:
        """Nothing, and a warning, for a device that the fabric does not have."""
        if not device or device in self._unknown:
            return ()
        try:
            return self._climber.climb((device,))
        except BadTopology as error:
            self._unknown.add(device)
            log.warning("a worker's --device is not in --topology, so it may be anywhere: %s", error)
            return ()


def service_options(settings: ServiceSettings, tenants: Mapping[str, Tenant]) -> ServiceOptions:
    """What the router is told of them."""
    level = ServiceLevel(
        ttft_s=math.inf if settings.ttft_slo is None else settings.ttft_slo,
        patience=settings.ttft_patience,
        max_queued=settings.max_queued,
        weights={name: tenant.weight for name, tenant in tenants.items()},
    )
    return ServiceOptions(level, settings.affinity_s)
