"""`penstock bench`: a sweep of loads against a running server, as a table, JSON and a page.

flags -> plan, checked before the first request -> what the server is -> warm-up -> measurements -> table, JSON, HTML
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from penstock import clock
from penstock.cli import process
from penstock.cli.load_plan import Level, Plan, fields_of, plan_of
from penstock.cli.output import (
    STANDARD_OUTPUT,
    OnProgress,
    as_json,
    check_writable,
    positive,
    print_table,
    progress,
    table_console,
    write,
)
from penstock.config import EndpointSettings, LoadSettings, LoadTargetSettings, PromptSettings
from penstock.errors import SetupError
from penstock.load.columns import COLUMNS
from penstock.load.generator import Asking, Generator
from penstock.load.http import Http
from penstock.load.page import heading, page, rows
from penstock.load.prompts import Prompts, words_of_server, words_of_tokenizer
from penstock.load.record import Recorder
from penstock.load.report import Cell, Report, complaints, summarize
from penstock.load.server import count_tokens, find_model, try_once
from penstock.workloads.workload import Turn

WARMUP = Level("concurrency", 8)
FIRST = Turn(8, range(1), 1)  # what a server is asked first


async def bench(
    url: str,
    asked: EndpointSettings,
    load: LoadSettings,
    prompts: PromptSettings,
    targets: LoadTargetSettings,
    json_file: str,
    html: Path | None,
) -> None:
    """The command. Raises SetupError for what cannot be asked, before the first request if it can be known."""
    plan = plan_of(load, prompts, targets)
    more = fields_of(asked.body)
    json_path = None if json_file in ("", STANDARD_OUTPUT) else Path(json_file)
    for path in (json_path, html):
        if path is not None:
            check_writable(path)
    positive("--timeout-s", asked.timeout_s)
    headers = {"Authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
    async with Http(url, headers) as http:
        asking = await asking_of(http, asked, plan, more)
        reports = await measure_all(http, asking, plan, url)
    if not reports:
        raise SetupError("stopped before anything was measured")
    if html is not None:
        write(html, page(reports))
    if json_path is not None:
        write(json_path, as_json(reports))
    if json_file == STANDARD_OUTPUT:
        print(as_json(reports), end="")
    else:
        show(reports, table_console())


# What people read


def show(reports: Sequence[Report], console: Console) -> None:
    """One measurement in full, a sweep as a row for each; then what should be known before it is believed."""
    cell = reports[0].cell
    console.print(f"{cell.model} at {cell.url}: {heading(reports[0])}", markup=False, soft_wrap=True)
    if len(reports) == 1:
        show_one(reports[0], console)
    else:
        print_table((cell.load,), COLUMNS, rows(reports), console)
    for report in reports:
        for line in complaints(report):
            console.print(f"{report.cell.title}: {line}", markup=False, soft_wrap=True)


def show_one(report: Report, console: Console) -> None:
    latencies = report.latencies
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(report.cell.title, no_wrap=True)
    for title in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(title, justify="right")
    for name, spread in (
        ("TTFT, ms", latencies.ttft),
        ("ITL, ms", latencies.itl),
        ("TPOT, ms", latencies.tpot),
        ("gap before the second token, ms", latencies.second_token_gap),
        ("end to end, ms", latencies.end_to_end),
        ("sent late, ms", report.generated.lateness),
    ):
        if spread is not None:
            values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
            table.add_row(name, *(f"{value * 1e3:,.2f}" for value in values))
    console.print(table)
    for line in facts(report):
        console.print(line, markup=False, soft_wrap=True)


def facts(report: Report) -> Iterator[str]:
    """What is no latency."""
    rates, tokens, met = report.throughput, report.tokens, report.attainment
    yield f"{report.ended:,} of {report.requests:,} requests ended well in {report.duration_s:,.1f} s"
    yield (
        f"{rates.requests_per_s:,.2f} requests/s, {rates.output_tokens_per_s:,.1f} tokens/s out, "
        f"{rates.total_tokens_per_s:,.1f} in and out"
    )
    yield (
        f"targets: all met by {met.all:.1%} of requests, TTFT by {met.ttft:.1%}, TPOT by {met.tpot:.1%}; "
        f"goodput {met.goodput_per_s:,.2f} requests/s"
    )
    cached = "" if tokens.hit_share is None else f", {tokens.hit_share:.1%} of them cached"
    yield (
        f"tokens: {tokens.prompt:,} in{cached}, {tokens.output:,} out in {tokens.per_event:.2f} per event; "
        f"the generator was busy for {report.generated.busy:.0%} of a core"
    )


# Asking


async def asking_of(http: Http, asked: EndpointSettings, plan: Plan, more: Mapping[str, object]) -> Asking:
    """How the server wants to be asked, found out by asking. Raises SetupError if it does not answer."""
    model = await find_model(http, asked.model)
    asking = Asking(
        model=model,
        endpoint=asked.endpoint,
        prompts=Prompts(asked.endpoint, None, plan.prefix, ""),
        timeout_s=asked.timeout_s,
        has_ignore_eos=asked.ignore_eos,
        more=more,
    )
    words = None
    count = count_tokens(http, asking)
    if asked.tokenizer is not None:
        words = await words_of_tokenizer(asked.tokenizer, count)
    elif asked.endpoint == "chat":
        words = await words_of_server(count)
    else:
        await try_once(http, asking, asking.prompts.talk(0).say(FIRST))
    return replace(asking, prompts=replace(asking.prompts, words=words))


async def measure_all(http: Http, asking: Asking, plan: Plan, url: str) -> list[Report]:
    """A report for each level; a signal ends the sweep, and what was measured of its last level counts."""
    stop = process.stop_requested()
    reports: list[Report] = []
    with progress(f"asking {asking.model}" + f" x {len(plan.levels)}" * (len(plan.levels) > 1)) as on_progress:
        if plan.warmup:
            warmup = replace(plan, requests=plan.warmup, duration_s=None)
            await measure(http, asking, warmup, WARMUP, "warm-up", stop, lambda share: None)
        for place, level in enumerate(plan.levels):
            if stop.is_set():
                break
            part = partial(tell_part, on_progress, place, len(plan.levels))
            recorder = await measure(http, asking, plan, level, f"{level.load} {level.value}", stop, part)
            reports.append(summarize(recorder, cell_of(asking, plan, level, url), plan.slo))
    return [report for report in reports if report.requests]


def tell_part(on_progress: OnProgress, place: int, parts: int, share: float) -> None:
    """So much is done of one of several parts."""
    on_progress((place + min(1.0, share)) / parts)


async def measure(
    http: Http, asking: Asking, plan: Plan, level: Level, salt: str, stop: asyncio.Event, on_progress: OnProgress
) -> Recorder:
    """What clients saw at one level, until its end or `stop`."""
    recorder, begun_s, cpu_s = Recorder(), clock.now(), clock.cpu_s()
    ended = 0

    def on_end() -> None:
        nonlocal ended
        ended += 1
        on_progress(max(ended / (plan.most or math.inf), (clock.now() - begun_s) / (plan.duration_s or math.inf)))

    own = replace(asking, prompts=replace(asking.prompts, salt=f"{salt} {plan.seed}"))
    generator = Generator(http, own, recorder, on_end)
    sessions = plan.sessions(level, salt)
    if level.load == "concurrency":
        work = generator.closed(sessions, int(level.value), plan.duration_s)
    else:
        work = generator.open(sessions, plan.duration_s)
    await until(stop, work)
    recorder.cpu_s = clock.cpu_s() - cpu_s
    return recorder


async def until(stop: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Runs `work` to its end, or until `stop` is set. Raises what it raises."""
    async with asyncio.TaskGroup() as group:
        doing, stopping = group.create_task(work), group.create_task(stop.wait())
        await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
        doing.cancel()
        stopping.cancel()


def cell_of(asking: Asking, plan: Plan, level: Level, url: str) -> Cell:
    words = asking.prompts.words
    spelling = "token ids" if words is None else f"words of {min(words.costs)} to {max(words.costs)} tokens"
    return Cell(
        url=url,
        model=asking.model,
        endpoint=asking.endpoint,
        workload=plan.name,
        prompts="words of one token" if words is not None and set(words.costs) == {1} else spelling,
        load=level.load,
        level=level.value,
        seed=plan.seed,
    )
