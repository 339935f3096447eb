"""A frontend's process: HTTP, tokenizer, router and registry put together, until SIGTERM."""

from __future__ import annotations

import os
import socket

from penstock import clock, plugin
from penstock.cli import process
from penstock.config import FrontendConfig
from penstock.discovery.api import Discovery
from penstock.discovery.file import FileDiscovery
from penstock.discovery.memory import MemoryDiscovery
from penstock.serve.frontend import Frontend, FrontendOptions
from penstock.serve.http_server import serve_http
from penstock.serve.registry import Registry
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.serve.text import load_tokenizer
from penstock.wire.stream import StreamWire


async def run_frontend(config: FrontendConfig, http: socket.socket, registry: socket.socket) -> None:
    """Takes over two listening sockets. Raises SetupError where the start is refused."""
    route = plugin.find("policy.routing", config.policy).ROUTING
    leave = process.stop_requested()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the event loop
    rng = clock.chance()
    tokenizer = load_tokenizer(config.model.folder, config.model.name)
    discovery: Discovery = FileDiscovery(config.leases) if config.leases is not None else MemoryDiscovery()
    stream = StreamWire()
    wires = {"tcp": stream, "unix": stream, "fd": stream}
    registered = Registry(discovery)
    methods = {"join": registered.join, "members": registered.members}
    endpoint = Endpoint(wires, config.secrets.token, methods)
    options = FrontendOptions(api_key=config.secrets.api_key)
    async with (
        endpoint,
        endpoint.listen(f"fd:{registry.fileno()}"),
        Router(discovery, endpoint, rng, route) as router,
        Frontend(router, {config.model.name: tokenizer}, rng, options) as frontend,
        serve_http(frontend, http, process.grace_s),
    ):
        await leave.wait()
