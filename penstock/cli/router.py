"""The router's process: HTTP in front of existing servers, until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

from penstock import clock, plugin
from penstock.cli import process
from penstock.cluster import Role
from penstock.config import AttachSettings, RouterConfig
from penstock.errors import SetupError
from penstock.serve.attached import Address, Attached, parse_address
from penstock.serve.http_server import serve_http
from penstock.serve.prompts import Prompts
from penstock.serve.proxy import Proxy, ProxyOptions
from penstock.serve.text import Tokenizer, load_tokenizer
from penstock.serve.upstream import Upstream
from penstock.wire.zmq_events import ZmqEvents


def addresses(servers: AttachSettings) -> list[tuple[Address, Role]]:
    """Servers with their roles. Raises SetupError for a choice that makes no fleet."""
    if bool(servers.attach) == bool(servers.prefill or servers.decode):
        raise SetupError("a router needs --attach URL, or --prefill URL and --decode URL, and not both")
    if bool(servers.prefill) != bool(servers.decode):
        raise SetupError("--prefill and --decode go together: the one computes prompts for the other")
    given: list[tuple[tuple[str, ...], Role]] = [
        (servers.attach, "any"),
        (servers.prefill, "prefill"),
        (servers.decode, "decode"),
    ]
    return [(parse_address(text), role) for texts, role in given for text in texts]


async def run_router(config: RouterConfig, http: socket.socket, ready: Callable[[Attached], None]) -> None:
    """Takes over a listening socket. `ready` is told once the first server is there. Raises SetupError."""
    with http:
        route = plugin.find("policy.routing", config.policy).ROUTING
        servers = addresses(config.servers)
        tokenizer = _tokenizer(config.servers.tokenizer)
        async with Upstream(config.upstream_key) as upstream:
            prompts = Prompts(tokenizer, upstream)
            attached = Attached(servers, upstream, ZmqEvents, prompts.tokenizes)
            options = ProxyOptions(api_key=config.api_key)
            await _serve(attached, Proxy(attached, upstream, prompts, route, clock.chance(), options), http, ready)


async def _serve(attached: Attached, proxy: Proxy, http: socket.socket, ready: Callable[[Attached], None]) -> None:
    leave = process.stop_requested()
    async with attached, proxy, serve_http(proxy, http, process.grace_s), asyncio.TaskGroup() as group:
        announcing = group.create_task(_announce(attached, ready))
        await leave.wait()
        announcing.cancel()


async def _announce(attached: Attached, ready: Callable[[Attached], None]) -> None:
    while not attached.models():
        await attached.wait_change()
    ready(attached)


def _tokenizer(folder: Path | None) -> Tokenizer | None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the event loop
    return None if folder is None else load_tokenizer(folder, folder.name, process.OneThread("encoding"))


def print_ready(url: str) -> Callable[[Attached], None]:
    """Tells people where the router is, and what is behind it."""

    def show(attached: Attached) -> None:
        present = ", ".join(attached.standings())
        print(f"penstock routes {', '.join(attached.models())} at {url}/v1 to {present}", flush=True)

    return show
