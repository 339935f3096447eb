"""Frontends as processes: one, or several that share a port. `serve` starts them beside workers, `frontend` alone.

this process        holds the addresses, which outlive a frontend that dies
  |- frontend-0     listens there for clients, and takes workers from the socket that it inherits
  `- frontend-1     likewise
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from penstock import clock
from penstock.cli import process
from penstock.config import AnswerSettings, FrontendConfig, Model, ServiceSettings, SharedPort
from penstock.launch.api import Job
from penstock.launch.local import LocalLauncher


async def run_frontends(
    config: FrontendConfig, processes: int, log_level: str, http: socket.socket, registry: socket.socket
) -> None:
    """Keeps so many processes running, which listen beside `http` and at `registry`.

    Returns after SIGINT or SIGTERM, when what runs in them has ended.
    """
    stop = process.stop_requested()
    with http, registry:
        async with LocalLauncher(os.environ) as launcher:
            for job in frontend_jobs(config, processes, log_level, http, registry):
                await launcher.start(job)
            await stop.wait()


def frontend_jobs(
    config: FrontendConfig, processes: int, log_level: str, http: socket.socket, registry: socket.socket
) -> list[Job]:
    """`processes` of them; a single one is called `frontend` and takes over both sockets as they are."""
    flags: dict[str, object] = {"http-fd": http.fileno(), "join-fd": registry.fileno(), "policy": config.policy}
    flags |= service_flags(config.service) | answer_flags(config.answers)
    if config.topology is not None:
        flags["topology"] = config.topology.resolve()
    if config.leases is not None:
        flags["discovery"] = f"file:{config.leases.resolve()}"
    secrets = {"PENSTOCK_TOKEN": config.secrets.token, "PENSTOCK_API_KEY": config.secrets.api_key}
    sockets = (http.fileno(), registry.fileno())
    if processes == 1:
        return [Job("frontend", command("frontend", config.model, log_level, flags), secrets, sockets)]
    mesh = clock.nonce(8).hex()
    places = [SharedPort(mesh, index, processes) for index in range(processes)]
    return [
        Job(place.name, command("frontend", config.model, log_level, {**flags, "place": place}), secrets, sockets)
        for place in places
    ]


def service_flags(service: ServiceSettings) -> dict[str, object]:
    """Those that make a frontend admit as `service` says."""
    flags: dict[str, object] = {
        "ttft-patience": service.ttft_patience,
        "max-queued": service.max_queued,
        "affinity-s": service.affinity_s,
    }
    if service.ttft_slo is not None:
        flags["ttft-slo"] = service.ttft_slo
    if service.tenants is not None:
        flags["tenants"] = service.tenants.resolve()
    return flags


def answer_flags(answers: AnswerSettings) -> dict[str, object]:
    """Those that make a frontend answer as `answers` says."""
    named = {"tool-parser": answers.tool_parser, "reasoning-parser": answers.reasoning_parser}
    flags: dict[str, object] = {"generation-config": answers.generation_config}
    return flags | {name: value for name, value in named.items() if value is not None}


def command(name: str, model: Model, log_level: str, flags: Mapping[str, object]) -> list[str]:
    """The arguments of a `penstock` command about a model."""
    common = {"model-name": model.name, "log-level": log_level}
    return [name, str(model.folder), *(f"--{flag}={value}" for flag, value in {**common, **flags}.items())]
