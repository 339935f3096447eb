"""`penstock simulate`: a sweep of policies, rates and splits over one workload, as a table, JSON and a page.

flags -> plans, all checked before the first is played -> a process for each -> reports -> table, JSON, HTML
"""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from rich.console import Console

from penstock import plugin
from penstock.cli.output import (
    STANDARD_OUTPUT,
    OnProgress,
    as_json,
    check_writable,
    listed,
    positive,
    print_table,
    progress,
    table_console,
    write,
)
from penstock.columns import Row
from penstock.config import SimulationSettings, TargetSettings, suggestion
from penstock.errors import SetupError
from penstock.sim import cluster_file
from penstock.sim.cluster import ClusterSpec
from penstock.sim.columns import COLUMNS
from penstock.sim.page import page
from penstock.sim.record import Recorder
from penstock.sim.report import Cell, Report, Slo, summarize
from penstock.sim.simulation import LINK_VERBS, WORKER_VERBS, Fault
from penstock.sim.simulation import simulate as simulate_one
from penstock.workloads import named

DEFAULT_WORKLOAD = "mooncake-like"
DEFAULT_REQUESTS = 500
NOTICED = 0.002  # a process tells of its progress once it is so much further


@dataclass(frozen=True, slots=True)
class Plan:
    """One simulation, in words that another process understands."""

    cluster: Path | None
    workload: str
    requests: int  # so many of the workload, which has no fewer
    policy: str
    rate: float
    split: tuple[int, int] | None
    seed: int
    slo: Slo
    faults: tuple[Fault, ...] = ()

    @property
    def title(self) -> str:
        split = "" if self.split is None else ", split {}:{}".format(*self.split)
        return f"{self.policy} at rate {self.rate:g}{split}"


Play = Callable[[Plan, OnProgress], Report]


def simulate(settings: SimulationSettings, targets: TargetSettings, json_file: str, html: Path | None) -> None:
    """The command. Raises SetupError for what cannot be simulated, before the first simulation if it can be known."""
    sweep = plans(settings, targets)
    json_path = None if json_file in ("", STANDARD_OUTPUT) else Path(json_file)
    for path in (json_path, html):
        if path is not None:
            check_writable(path)
    with progress(f"simulating {sweep[0].workload}" + f" x {len(sweep)}" * (len(sweep) > 1)) as on_progress:
        reports = play_all(sweep, settings.jobs, play, on_progress)
    if html is not None:
        write(html, page(reports))
    if json_path is not None:
        write(json_path, as_json(reports))
    if json_file == STANDARD_OUTPUT:
        print(as_json(reports), end="")
    else:
        show(reports, table_console())


# What is to be played


def plans(settings: SimulationSettings, targets: TargetSettings) -> list[Plan]:
    """Rates outermost and policies innermost, so that those to be compared are neighbours. Raises SetupError."""
    if settings.jobs < 1:
        raise SetupError(f"--jobs {settings.jobs} plays nothing: it must be 1 or more")
    if settings.requests is not None and settings.requests < 1:
        raise SetupError(f"--requests {settings.requests} plays nothing: it must be 1 or more")
    policies = listed("--policy", settings.policy)
    rates = list(dict.fromkeys(rate(text) for text in listed("--rate", settings.rate)))
    splits: list[tuple[int, int] | None] = [None]
    if settings.split:
        splits = list(dict.fromkeys(split(text) for text in listed("--split", settings.split)))
    slo = Slo(positive("--slo-ttft", targets.slo_ttft), positive("--slo-itl", targets.slo_itl))
    for policy in policies:
        plugin.find("policy.routing", policy)
    faults = tuple(fault(text) for text in settings.fault)
    for workers in splits:
        check_faults(faults, cluster_of(settings.cluster, workers))
    workload, requests = workload_of(settings)
    return [
        Plan(settings.cluster, workload, requests, policy, rate, split, settings.seed, slo, faults)
        for rate, split, policy in product(rates, splits, policies)
    ]


def rate(text: str) -> float:
    try:
        return positive("--rate", float(text))
    except ValueError:
        raise SetupError(f"--rate {text} is no number: write factors such as 1,2,4") from None


def split(text: str) -> tuple[int, int]:
    prefill, colon, decode = text.partition(":")
    if not (colon and prefill.isdecimal() and decode.isdecimal()):
        raise SetupError(f"--split {text} is no split: write PREFILL:DECODE workers, such as 8:8,6:10")
    return int(prefill), int(decode)


def fault(text: str) -> Fault:
    """Raises SetupError for what is no SECONDS:VERB:NAME."""
    at, _, rest = text.partition(":")
    verb, _, name = rest.partition(":")
    try:
        at_s = float(at)
    except ValueError:
        raise SetupError(f"--fault {text} has no time: write SECONDS:VERB:NAME, such as 60:crash:decode-0") from None
    for known in (*WORKER_VERBS, *LINK_VERBS):
        if verb == known and name and 0 <= at_s < float("inf"):
            return Fault(at_s, known, name)
    verbs = ", ".join((*WORKER_VERBS, *LINK_VERBS))
    raise SetupError(f"--fault {text} is none: write SECONDS:VERB:NAME, and for VERB {verbs}")


def check_faults(faults: Sequence[Fault], cluster: ClusterSpec) -> None:
    """Raises SetupError for a worker that the cluster does not have; links are known once something crosses them."""
    names = [worker.name for worker in cluster.workers]
    for fault in faults:
        if fault.verb in WORKER_VERBS and fault.name not in names:
            raise SetupError(f"--fault: no worker is called {fault.name}{suggestion(fault.name, names)}")


def workload_of(settings: SimulationSettings) -> tuple[str, int]:
    """What `named.find` is to find, and how many requests of it are played. All of them are read, mistakes found."""
    if settings.trace is not None and settings.workload:
        raise SetupError("--trace and --workload are two workloads: name one")
    named_one = str(settings.trace or settings.workload)
    most = settings.requests or (None if named_one else DEFAULT_REQUESTS)
    name = named_one or DEFAULT_WORKLOAD
    workload = named.find(name)
    requests = sum(len(session.turns) for session in (workload if most is None else workload.of_requests(most)))
    if not requests:
        raise SetupError(f"{name} has no requests")
    return name, requests


def cluster_of(file: Path | None, split: tuple[int, int] | None) -> ClusterSpec:
    cluster = cluster_file.default() if file is None else cluster_file.read(file)
    return cluster if split is None else cluster.with_split(*split)


# Playing


def play(plan: Plan, on_progress: OnProgress) -> Report:
    """One simulation from its beginning to its end, in this process."""
    cluster, recorder = cluster_of(plan.cluster, plan.split), Recorder()
    workload = named.find(plan.workload).faster(plan.rate).of_requests(plan.requests)
    simulate_one(
        *(cluster, workload, plan.policy, plan.seed, recorder),
        lambda ended: on_progress(ended / plan.requests),
        plan.faults,
    )
    text = plan.workload + (f", {len(plan.faults)} faults" if plan.faults else "")
    cell = Cell(cluster.name, text, plan.policy, plan.rate, split_name(cluster), cluster.gpus, plan.seed)
    return summarize(recorder, cell, plan.slo)


def split_name(cluster: ClusterSpec) -> str:
    """8:8 workers that prefill and decode; those that do both are told apart."""
    roles = Counter(worker.role for worker in cluster.workers)
    apart = f"{roles['prefill']}:{roles['decode']}" if roles["prefill"] or roles["decode"] else ""
    both = f"{roles['any']} any" if roles["any"] else ""
    return " + ".join(part for part in (apart, both) if part)


def play_all(sweep: Sequence[Plan], jobs: int, play: Play, on_progress: OnProgress) -> list[Report]:
    """The reports in the order of the plans: a process for each, `jobs` at a time; a single plan needs none.

    So the memory of one is free before the next begins. Raises SetupError if one refuses, or dies; the others are
    killed.
    """
    if len(sweep) == 1:
        return [play(sweep[0], on_progress)]
    waiting, playing = deque(sweep), dict[Connection, Player]()
    news: dict[Plan, float | Report] = dict.fromkeys(sweep, 0.0)
    try:
        while waiting or playing:
            while waiting and len(playing) < jobs:
                player = start(waiting.popleft(), play)
                playing[player.pipe] = player
            for player in [playing[pipe] for pipe in wait(list(playing)) if isinstance(pipe, Connection)]:
                news[player.plan] = hear(player)
                if isinstance(news[player.plan], Report):
                    end(playing.pop(player.pipe))
            on_progress(sum(heard if isinstance(heard, float) else 1.0 for heard in news.values()) / len(sweep))
    finally:
        for player in playing.values():
            end(player)
    return [heard for heard in news.values() if isinstance(heard, Report)]


@dataclass(frozen=True, slots=True, eq=False)
class Player:
    """A process that plays one plan. The pipe brings shares that are done, then a Report or a SetupError."""

    plan: Plan
    pipe: Connection
    process: SpawnProcess


def start(plan: Plan, play: Play) -> Player:
    spawn = get_context("spawn")
    near, far = spawn.Pipe(duplex=False)
    process = spawn.Process(target=play_apart, args=(play, plan, far), daemon=True)
    process.start()
    far.close()  # the process has its own; when it dies, `near` ends
    return Player(plan, near, process)


def hear(player: Player) -> float | Report:
    """What the process says next. Raises SetupError if it refuses, or is gone."""
    try:
        said: float | Report | SetupError = player.pipe.recv()
    except EOFError:
        player.process.join()
        raise SetupError(
            f"the simulation of {player.plan.title} died with exit status {player.process.exitcode}: "
            "if its memory was not enough, take fewer --jobs or --requests"
        ) from None
    if isinstance(said, SetupError):
        raise said
    return said


def end(player: Player) -> None:
    player.process.kill()
    player.process.join()
    player.pipe.close()


def play_apart(play: Play, plan: Plan, pipe: Connection) -> None:
    """What the process does. Ctrl-C is for its parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = 0.0

    def on_progress(share: float) -> None:
        nonlocal told
        if share >= told + NOTICED:
            told = share
            pipe.send(share)

    try:
        pipe.send(play(plan, on_progress))
    except SetupError as error:
        pipe.send(error)


# What people read


def show(reports: Sequence[Report], console: Console) -> None:
    """A table with a row for each report; a line between those that differ in more than their policy."""
    cell, slo = reports[0].cell, reports[0].slo
    console.print(
        f"{cell.workload} on {cell.cluster}, {cell.gpus} GPUs; targets: TTFT within {slo.ttft_s:g} s, "
        f"TPOT within {slo.itl_s * 1e3:g} ms",
        markup=False,
        soft_wrap=True,
    )
    rows = [
        Row((told.policy, f"{told.rate:g}", told.split), (told.rate, told.split), report)
        for report in reports
        for told in (report.cell,)
    ]
    print_table(("policy", "rate", "split"), COLUMNS, rows, console)
    for report in reports:
        for line in complaints(report):
            console.print(line, markup=False, soft_wrap=True)


def complaints(report: Report) -> Iterator[str]:
    if report.errors:
        counts = ", ".join(f"{count:,} x {kind}" for kind, count in report.errors.items())
        yield f"{report.cell.title}: {counts}"
    if report.unfinished:
        yield f"{report.cell.title}: {report.unfinished:,} requests were not over at the end"
