"""`penstock serve`: the processes of a server on this machine, and what its user is shown of them.

this process     holds the listening sockets, which outlive a frontend that dies
  |- frontend    HTTP, tokenizer, router, registry; several of them with --frontends
  |- prefill-0   workers, which join the registry as any other would
  `- decode-0    ...
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, fields
from pathlib import Path

from penstock import plugin
from penstock.cli import process, sockets
from penstock.cli.client import Client, Json, NoAnswer
from penstock.cli.frontends import command, frontend_jobs
from penstock.cli.report import Answered, Asked, AskFailed, Ready, Report, Said, Starting, Stopping
from penstock.config import FrontendConfig, Model, ServeConfig, parse, read_tenants
from penstock.launch.api import Job
from penstock.launch.local import LocalLauncher

POLL_S = 0.05
ANSWER_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask a model, in the way that this model can be asked."""

    text: str
    path: str
    body: Json


async def serve(config: ServeConfig, report: Report) -> None:
    """Serves until SIGINT or SIGTERM. Raises SetupError if one of the processes refuses to start."""
    engine_options = options_of_workers(config)
    plugin.find("policy.routing", config.policy)
    stop = process.stop_requested()
    http, registry = sockets.listen_at_both(config.listen, config.frontends)
    with http, registry:
        join = sockets.address_of(registry)
        client = Client(*sockets.split_address(sockets.address_of(http)), any_key(config))
        async with LocalLauncher(os.environ) as launcher:
            report(Starting(config.model.name, config.frontends + len(config.fleet.roles())))
            frontends = frontend_jobs(frontend_config(config), config.frontends, config.log_level, http, registry)
            for job in frontends:
                await launcher.start(job)
            for job in worker_jobs(config, join, engine_options):
                await launcher.start(job)
            async with asyncio.TaskGroup() as group:
                introduction = group.create_task(introduce(config, client, join, launcher, report))
                await stop.wait()
                introduction.cancel()
            report(Stopping())
            # First, while their streams still have workers.
            await asyncio.gather(*(launcher.stop(job.name) for job in frontends))


def options_of_workers(config: ServeConfig) -> dict[str, str]:
    """What every worker's engine is told. Raises SetupError for what it would refuse."""
    name, values = config.engine.engine, config.engine.values()
    options = plugin.find("engine", name).Options
    parse(options, {"model": str(config.model.folder), **values}, f"the {name} engine")
    if "threads" in (option.name for option in fields(options)):
        cores = len(os.sched_getaffinity(0))
        values.setdefault("threads", str(max(1, cores // len(config.fleet.roles()))))
    return values


def frontend_config(config: ServeConfig) -> FrontendConfig:
    return FrontendConfig(
        model=config.model,
        secrets=config.secrets,
        leases=config.leases,
        policy=config.policy,
        topology=config.topology,
        service=config.service,
        answers=config.answers,
    )


def any_key(config: ServeConfig) -> str:
    """One with which this server may be asked; empty where it needs none."""
    tenants = read_tenants(config.service.tenants).values()
    return config.secrets.api_key or next((tenant.key for tenant in tenants if tenant.key is not None), "")


def worker_jobs(config: ServeConfig, join: str, engine_options: Mapping[str, str]) -> Iterator[Job]:
    flags = {"join": join, "engine": config.engine.engine, "kv-gib": config.kv.kv_gib, "lease-s": config.kv.lease_s}
    flags |= {f"engine-option.{name}": value for name, value in engine_options.items()}
    if sockets.is_dialable(config.listen.join_host):
        flags["host"] = config.listen.join_host  # workers that join from elsewhere must reach these
    if config.kv.domain:
        flags["domain"] = config.kv.domain
    transports = [f"--transport={spec}" for spec in config.kv.transport]
    for name, role in config.fleet.roles().items():
        arguments = command("worker", config.model, config.log_level, {"name": name, "role": role, **flags})
        yield Job(name, [*arguments, *transports], {"PENSTOCK_TOKEN": config.secrets.token})


async def introduce(config: ServeConfig, client: Client, join: str, launcher: LocalLauncher, report: Report) -> None:
    """Reports when everything is up, and the answer to a first question."""
    question = question_for(config.model)
    workers = await wait_ready(client, list(config.fleet.roles()))
    curl = curl_line(client.url, question, bool(client.api_key))
    join_command = shlex.join([*process.own_command(), "worker", *config.model.arguments, "--join", join])
    report(Ready(config.model.name, client.url, join, workers, launcher.pids(), curl, join_command))
    if config.ask:
        await ask(client, question, report)


async def wait_ready(client: Client, names: list[str]) -> dict[str, str]:
    """Waits until all these workers have joined; returns the roles of all who have."""
    while True:
        try:
            workers: dict[str, str] = (await client.get("/health"))["workers"]
            if all(name in workers for name in names):
                return workers
        except NoAnswer:
            pass  # the frontend is not up yet, or has no worker
        await asyncio.sleep(POLL_S)


async def ask(client: Client, question: Question, report: Report) -> None:
    """Asks the model, and reports the answer as it comes and where the time went."""
    report(Asked(question.text))
    wishes = {"stream": True, "temperature": 0, "max_tokens": ANSWER_TOKENS, "penstock": {"timeline": True}}
    try:
        async with aclosing(client.stream(question.path, {**question.body, **wishes})) as events:
            async for event in events:
                for choice in event["choices"]:
                    report(Said(choice.get("text") or choice.get("delta", {}).get("content") or ""))
                if "penstock" in event:
                    report(Answered(event["penstock"]["timeline"]))
    except NoAnswer as error:
        report(AskFailed(str(error)))


def question_for(model: Model) -> Question:
    """One that the bundled model knows, or something that any model has an opinion on."""
    known = model.folder / "questions.txt"
    text = known.read_text(encoding="utf-8").split("\n")[0] if known.exists() else "What is a KV cache?"
    if has_chat_template(model.folder):
        messages = [{"role": "user", "content": text}]
        return Question(text, "/v1/chat/completions", {"model": model.name, "messages": messages})
    return Question(text, "/v1/completions", {"model": model.name, "prompt": text})


def has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the frontend, which needs this file, will say what is wrong with it
        return False


def curl_line(url: str, question: Question, has_key: bool) -> str:
    """A command that asks the question; the key comes from the user's environment."""
    key = ' -H "Authorization: Bearer $PENSTOCK_API_KEY"' if has_key else ""
    head = f"curl {url}{question.path} -H 'Content-Type: application/json'{key}"
    return f"{head} \\\n    -d {shlex.quote(json.dumps(question.body))}"
