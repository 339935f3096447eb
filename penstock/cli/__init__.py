"""The `penstock` command: what can be asked of it, and in which words it refuses.

    serve      everything on this machine, in one command
    worker     one more worker for a server that runs
    frontend   the HTTP side alone; `serve` starts it, and so can an orchestrator
    router     in front of servers that run already: vLLM, SGLang, others
    profile    how long steps of an engine take here, and a model of it
    topology   what is wired to what
    route      why a request went where it went
    simulate   a cluster that need not exist, on virtual time
    bench      how quick a server is under load, any that speaks OpenAI's API

Exit status: 0 after Ctrl-C or SIGTERM; 2, and one line on standard error, for a start that is refused.
What is heavy is imported inside the commands, so that `penstock --help` is quick.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from penstock import __version__
from penstock.cli import process, sockets
from penstock.cli.model import find_model
from penstock.cluster import Role
from penstock.config import (
    AnswerSettings,
    AttachSettings,
    EndpointSettings,
    EngineSettings,
    FleetSettings,
    FrontendConfig,
    KvSettings,
    ListenSettings,
    LoadSettings,
    LoadTargetSettings,
    PromptSettings,
    RouterConfig,
    Secrets,
    ServeConfig,
    ServiceSettings,
    SharedPort,
    SimulationSettings,
    TargetSettings,
    WorkerConfig,
)
from penstock.errors import SetupError

app = App(
    name="penstock",
    help="Serves large language models with prefill and decode on separate workers.",
    version=__version__,
    default_parameter=Parameter(show_default=lambda default: shown(default), negative_iterable=()),
)

Engine = Annotated[EngineSettings, Parameter(name="*", group="Engine")]
Kv = Annotated[KvSettings, Parameter(name="*", group="Engine")]
Fleet = Annotated[FleetSettings, Parameter(name="*", group="Workers")]
Answers = Annotated[AnswerSettings, Parameter(name="*", group="Answers")]
Service = Annotated[ServiceSettings, Parameter(name="*", group="Service levels")]
Simulation = Annotated[SimulationSettings, Parameter(name="*", group="What is simulated")]
Targets = Annotated[TargetSettings, Parameter(name="*", group="Targets")]
Asked = Annotated[EndpointSettings, Parameter(name="*", group="Server")]
Load = Annotated[LoadSettings, Parameter(name="*", group="Load")]
Prompts = Annotated[PromptSettings, Parameter(name="*", group="Prompts")]
LoadTargets = Annotated[LoadTargetSettings, Parameter(name="*", group="Targets")]
Attach = Annotated[AttachSettings, Parameter(name="*", group="Servers", consume_multiple=True)]
Listen = Annotated[ListenSettings, Parameter(name="*", group="Network")]
LogLevel = Literal["debug", "info", "warning", "error"]
Descriptor = Annotated[int | None, Parameter(show=False)]  # of a socket that `serve` has bound


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line, by default that of this process; returns at its end or exits."""
    process.end_with_parent()
    try:
        app(sys.argv[1:] if arguments is None else arguments, exit_on_error=False, print_error=False)
    except (CycloptsError, SetupError) as error:
        process.refuse(error)
    except BaseExceptionGroup as errors:
        refusals, others = errors.split(SetupError)
        if refusals is None or others is not None:
            raise
        process.refuse(refusals)
    except KeyboardInterrupt:  # before the command was ready for it
        sys.exit(130)


@app.command
def serve(
    model: str = "",
    /,
    *,
    model_name: str = "",
    fleet: Fleet = FleetSettings(),
    listen: Listen = ListenSettings(),
    engine: Engine = EngineSettings(),
    kv: Kv = KvSettings(),
    policy: str = "pairs",
    topology: Path | None = None,
    answers: Answers = AnswerSettings(),
    service: Service = ServiceSettings(),
    discovery: str = "",
    frontends: int = 1,
    ask: bool = True,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Serve a model on this machine: a frontend, prefill workers and decode workers, each a process of its own.

    Ctrl-C or SIGTERM lets running requests end and stops everything; a second one does not wait for them.

    Parameters
    ----------
    model
        A Hugging Face folder, or a hub id such as org/name; by default the bundled demo model.
    model_name
        What clients call the model; by default the folder's name or the hub id.
    policy
        How requests are routed: pairs, p_token, round_robin, ... as docs/routing.md lists them.
    topology
        A file that says how workers are wired, see docs/topology.md: those with a --device are paired by it.
    discovery
        Where workers that join are listed for other frontends too, as file:FOLDER.
    frontends
        How many processes share the work of HTTP, text and routing; they share the port, too.
    ask
        Ask the model one question at the start, and show where the time went.
    as_json
        Print what happens as one JSON object a line, for scripts.
    log_level
        The least serious messages to print on standard error.
    """
    from penstock.cli.report import Printer, print_json
    from penstock.cli.serve import serve as serve_until_stopped

    listen = replace(listen, api_key=process.api_key(listen.api_key))
    token, is_new = process.token_or_new()
    config = ServeConfig(
        model=find_model(model, model_name),
        secrets=Secrets(token, listen.api_key),
        fleet=fleet,
        listen=listen,
        engine=engine,
        kv=kv,
        leases=leases_folder(discovery),
        policy=policy,
        topology=topology,
        answers=answers,
        service=service,
        frontends=positive(frontends, "--frontends"),
        ask=ask,
        log_level=log_level,
    )
    process.log_to_stderr("serve", log_level)
    with nullcontext(print_json) if as_json else Printer(token if is_new else "") as report:
        asyncio.run(serve_until_stopped(config, report))


@app.command
def worker(
    model: str = "",
    /,
    *,
    join: str = "",
    role: Role = "any",
    name: str = "",
    model_name: str = "",
    host: str = "",
    device: str = "",
    label: dict[str, str] | None = None,
    engine: Engine = EngineSettings(),
    kv: Kv = KvSettings(),
    kv_events: str = "",
    discovery: str = "",
    log_level: LogLevel = "warning",
) -> None:
    """Add a worker to a running server; needs PENSTOCK_TOKEN, which `penstock serve` prints.

    Parameters
    ----------
    model
        The folder or hub id of the model that the server serves; by default the bundled demo model.
    join
        HOST:PORT of the server's registry, which `penstock serve` prints.
    role
        What it should rather do; any worker can prefill and decode.
    name
        What others call this worker; by default made from the host's name and the process id.
    model_name
        What clients call the model; by default the folder's name or the hub id.
    host
        The address at which other processes reach this worker; by default the one that leads to --join.
    kv_events
        Also publish what the prefix cache holds over ZMQ, in vLLM's format, for routers other than penstock's: an
        endpoint of this host, as tcp://127.0.0.1:5557, or with one that repeats events, as
        tcp://127.0.0.1:5557,replay=tcp://127.0.0.1:5558.
    device
        The device of the server's --topology that this worker computes on, as `penstock topology` names it.
    label
        What requests may ask for, as --label.NAME VALUE: its zone, its rack, what it may be used for.
    discovery
        Instead of --join: the list of workers that the frontends read, as file:FOLDER.
    log_level
        The least serious messages to print on standard error.
    """
    if bool(join) == bool(discovery):
        raise SetupError("a worker needs --join HOST:PORT or --discovery file:FOLDER, and not both")
    name = name or process.unique_name()
    process.log_to_stderr(name, log_level)
    config = WorkerConfig(
        name=name,
        role=role,
        model=find_model(model, model_name),
        secrets=Secrets(process.token()),
        join=join,
        leases=leases_folder(discovery),
        host=host or sockets.address_towards(join),
        engine=engine,
        kv=kv,
        kv_events=kv_events,
        device=device,
        labels=label or {},
    )
    from penstock.cli.worker import run_worker

    process.run(run_worker(config))


@app.command
def frontend(
    model: str = "",
    /,
    *,
    model_name: str = "",
    listen: Listen = ListenSettings(),
    policy: str = "pairs",
    topology: Path | None = None,
    answers: Answers = AnswerSettings(),
    service: Service = ServiceSettings(),
    discovery: str = "",
    processes: int = 1,
    http_fd: Descriptor = None,
    join_fd: Descriptor = None,
    place: Annotated[str, Parameter(show=False)] = "",
    log_level: LogLevel = "warning",
) -> None:
    """Serve HTTP, and the registry that workers join; needs PENSTOCK_TOKEN, which these workers need too.

    Parameters
    ----------
    model
        The folder or hub id of the model, for its tokenizer; by default the bundled demo model.
    model_name
        What clients call the model; by default the folder's name or the hub id.
    policy
        How requests are routed: pairs, p_token, round_robin, ... as docs/routing.md lists them.
    topology
        A file that says how workers are wired, see docs/topology.md: those with a --device are paired by it.
    discovery
        Where workers are listed, if several frontends share them, as file:FOLDER.
    processes
        How many processes share the work, and the port.
    log_level
        The least serious messages to print on standard error.
    """
    shared = SharedPort.parse(place) if place else None
    process.log_to_stderr(shared.name if shared is not None else "frontend", log_level)
    listen = replace(listen, api_key=process.api_key(listen.api_key))
    config = FrontendConfig(
        model=find_model(model, model_name),
        secrets=Secrets(process.token(), listen.api_key),
        leases=leases_folder(discovery),
        policy=policy,
        topology=topology,
        answers=answers,
        service=service,
        process=shared,
    )
    if http_fd is None or join_fd is None:
        http, registry = sockets.listen_at_both(listen, positive(processes, "--processes"))
    else:
        http, registry = sockets.adopt(http_fd), sockets.adopt(join_fd)
    if shared is not None:
        http = sockets.listen_beside(http)
    if processes > 1:
        from penstock.cli.frontends import run_frontends

        asyncio.run(run_frontends(config, processes, log_level, http, registry))
        return
    from penstock.cli.frontend import run_frontend

    process.run(run_frontend(config, http, registry))


@app.command
def router(
    *,
    servers: Attach = AttachSettings(),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    policy: str = "pairs",
    log_level: LogLevel = "warning",
) -> None:
    """Route between OpenAI-compatible servers that run already, vLLM and SGLang above all, by load and cached prefixes.

    PENSTOCK_UPSTREAM_KEY is the key that these servers want; without it they get the client's own.

    Parameters
    ----------
    host
        Address for clients.
    port
        Port for clients; 0 takes a free one.
    api_key
        What clients must send as their key. Better set PENSTOCK_API_KEY: command lines can be seen by others.
    policy
        How requests are routed: pairs, p_token, round_robin, ... as docs/routing.md lists them.
    log_level
        The least serious messages to print on standard error.
    """
    from penstock.cli.router import print_ready, run_router

    process.log_to_stderr("router", log_level)
    key = process.api_key(api_key)
    listen = ListenSettings(host=host, port=port, api_key=key)
    sockets.check_exposure(listen)
    http = sockets.listen_at(host, port, "--port")
    config = RouterConfig(servers, policy, key, process.upstream_key())
    process.run(run_router(config, http, print_ready(f"http://{sockets.address_of(http)}")))


@app.command
def profile(
    model: str = "",
    /,
    *,
    engine: Engine = EngineSettings(),
    seconds: float = 20.0,
    plot: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Measure how long steps of an engine take on this machine, and fit a model that predicts it.

    Parameters
    ----------
    model
        A Hugging Face folder, or a hub id such as org/name; by default the bundled demo model.
    seconds
        How long to measure, once the model is loaded.
    plot
        Where to write the fit against what was measured, as SVG.
    as_json
        Print one JSON object, for scripts.
    """
    from penstock.cli.profile import profile as profile_engine

    if seconds <= 0:
        raise SetupError(f"--seconds {seconds:g} is too short: every kind of step must be measured once")
    profile_engine(find_model(model), engine, seconds, plot, as_json)


@app.command
def simulate(
    *,
    simulation: Simulation = SimulationSettings(),
    targets: Targets = TargetSettings(),
    json_file: Annotated[str, Parameter(name="--json", allow_leading_hyphen=True)] = "",
    html: Path | None = None,
) -> None:
    """Play requests against a cluster that need not exist, on virtual time: the program that serves, arithmetic
    modelled.

    Several policies, rates and splits are compared in one table; the same seed gives the same numbers.

    Parameters
    ----------
    json_file
        Where to write all numbers as JSON; - prints them instead of the table.
    html
        Where to write a page with plots.
    """
    from penstock.cli.simulate import simulate as simulate_all

    process.log_to_stderr("simulate", "warning")
    simulate_all(simulation, targets, json_file, html)


@app.command
def bench(
    url: str = "http://127.0.0.1:8000",
    /,
    *,
    asked: Asked = EndpointSettings(),
    load: Load = LoadSettings(),
    prompts: Prompts = PromptSettings(),
    targets: LoadTargets = LoadTargetSettings(),
    json_file: Annotated[str, Parameter(name="--json", allow_leading_hyphen=True)] = "",
    html: Path | None = None,
) -> None:
    """Measure a server under load: any that speaks OpenAI's API. What the figures mean is in docs/bench.md.

    Ctrl-C ends it, and shows what was measured until then.

    Parameters
    ----------
    url
        Where the server listens, with /v1 at its end or without.
    json_file
        Where to write all numbers as JSON; - prints them instead of the table.
    html
        Where to write a page with plots.
    """
    from penstock.cli.bench import bench as bench_all

    process.log_to_stderr("bench", "warning")
    asked = replace(asked, api_key=process.api_key(asked.api_key))
    process.run(bench_all(url, asked, load, prompts, targets, json_file, html))


topology_commands = App(name="topology", help="What is wired to what: devices, links, the domains they fail with.")
app.command(topology_commands)


@topology_commands.command(name="show")
def topology_show(
    source: str = "",
    /,
    *,
    local: Annotated[bool, Parameter(negative=())] = False,
    labels: Path | None = None,
    svg: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Show a topology as a tree; what is alike is shown once.

    Parameters
    ----------
    source
        A topology file, or the name of a preset such as hgx-h100; by default this host.
    local
        This host, which is also the default.
    labels
        Instead: a JSON file of node labels, {node: {label: value}}, or what `kubectl get nodes -o json` prints.
    svg
        Where to write a drawing.
    as_json
        Print all vertices and links as one JSON object, for scripts.
    """
    from penstock.cli.topology import show

    if sum(map(bool, (source, local, labels))) > 1:
        raise SetupError("a file or preset, --local and --labels are three topologies: name one")
    process.log_to_stderr("topology", "warning")
    show(source, labels, svg, as_json)


@topology_commands.command(name="probe")
def topology_probe(
    join: str,
    *,
    size: int = 64,
    partners: int = 0,
    out: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Measure the links between the workers of a running server; needs PENSTOCK_TOKEN, which `penstock serve` prints.

    Workers measure over the connections that their requests use, one pair at a time, and go on serving.

    Parameters
    ----------
    join
        HOST:PORT where workers join, as `penstock serve` prints it.
    size
        MiB to send for a rate.
    partners
        Measure from each worker to at most so many others; 0 for all.
    out
        Where to write a topology file with what was found.
    as_json
        Print the measurements as one JSON object, for scripts.
    """
    from penstock.cli.probe import probe

    process.log_to_stderr("topology", "warning")
    process.run(probe(join, process.token(), size, partners, out, as_json))


route_commands = App(name="route", help="Where requests go, and why.")
app.command(route_commands)


@route_commands.command(name="explain")
def route_explain(
    request: str = "",
    /,
    *,
    last: Annotated[bool, Parameter(negative=())] = False,
    url: str = "http://127.0.0.1:8000",
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Why a running server routed a request as it did: what it believed and predicted, what else there was, and what
    came of it; needs PENSTOCK_API_KEY where the server has one.

    Parameters
    ----------
    request
        The id of an answer, or the x-request-id of a response.
    last
        The last request that came, instead of one by its id.
    url
        The server's address, as `penstock serve` prints it.
    as_json
        Print the whole record as one JSON object, for scripts.
    """
    from penstock.cli.route import explain

    if bool(request) == last:
        raise SetupError("say which request: its id, or --last, and not both")
    explain(url, process.api_key(""), request, as_json)


def positive(count: int, flag: str) -> int:
    """Raises SetupError for a number of processes that is none."""
    if count < 1:
        raise SetupError(f"{flag} {count} serves nobody: give 1 or more")
    return count


def shown(default: object) -> str | None:
    """How help shows a default; not at all where that means nothing."""
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or None
    return str(default) if default else None


def leases_folder(discovery: str) -> Path | None:
    """The folder of `file:FOLDER`, None for nothing. Raises SetupError for anything else."""
    scheme, _, folder = discovery.partition(":")
    if not discovery:
        return None
    if scheme != "file" or not folder:
        raise SetupError(f"--discovery {discovery} is not known: write file:FOLDER")
    return Path(folder).resolve()
