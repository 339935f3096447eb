"""`penstock route explain`: why a request went where it went, and how that turned out, asked of a running server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from urllib.parse import quote, urlsplit

import msgspec
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from penstock.cli.client import Client, Json, NoAnswer
from penstock.cli.report import phases
from penstock.errors import SetupError
from penstock.request import Timeline
from penstock.serve.decisions import Compared, Decided

PATIENCE_S = 10.0


class Explained(msgspec.Struct):
    """What is used of a record as /debug/requests/{id} tells it."""

    id: str
    model: str
    state: str
    error: str | None
    timeline: Timeline | None
    decisions: list[Decided]
    compared: list[Compared]


def explain(url: str, api_key: str, request: str, as_json: bool) -> None:
    """Prints the record of one request; without a name that of the last one. Raises SetupError."""
    record = asyncio.run(_fetch(client_of(url, api_key), request))
    if as_json:
        print(json.dumps(record))
    else:
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(*_page(msgspec.convert(record, Explained)), sep="\n")


def client_of(url: str, api_key: str) -> Client:
    """Raises SetupError for what is no http://HOST:PORT."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return Client(parts.hostname, parts.port or 80, api_key)
    except ValueError:  # a port that is none
        pass
    raise SetupError(f"--url {url} cannot be asked: write http://HOST:PORT, as `penstock serve` prints it")


async def _fetch(client: Client, request: str) -> Json:
    try:
        async with asyncio.timeout(PATIENCE_S):
            name = request or _last((await client.get("/debug/requests"))["requests"])
            return await client.get(f"/debug/requests/{quote(name)}")
    except NoAnswer as error:
        raise SetupError(f"{client.url} does not tell: {error}") from error
    except TimeoutError:
        raise SetupError(f"{client.url} gave no answer within {PATIENCE_S:.0f} s") from None


def _last(heads: list[Json]) -> str:
    if not heads:
        raise NoAnswer("it remembers no request; ask it something first")
    return str(heads[0]["id"])


def _page(record: Explained) -> Iterator[RenderableType]:
    timeline = record.timeline or Timeline()
    yield f"{record.id}, of {record.model}: {record.state}" + (f", {record.error}" if record.error else "")
    for number, decided in enumerate(record.decisions, 1):
        yield ""
        yield from _decision(number, decided, record.compared if decided.gave_first_token else [])
        if decided.gave_first_token:
            yield from _departure(decided, timeline)
    if not record.decisions:
        yield "\nit was not routed, or that is forgotten"
    if happened := list(phases(timeline)):
        yield "\nwhat happened"
        yield from (f"  {phase:12} {what}" for phase, what in happened)
    for failure in timeline.failures:
        yield f"  {'failed':12} {failure}"


def _decision(number: int, decided: Decided, compared: list[Compared]) -> Iterator[RenderableType]:
    way = f"{decided.prefill[0]} prefills for {decided.decode}" if decided.prefill else f"all on {decided.decode}"
    yield f"decision {number}, after {_ms(decided.after_s)}, by {decided.policy} of {decided.workers} workers: {way}"
    yield f"  believed cached of {decided.prompt_tokens} tokens: {_cached(decided)}"
    if decided.passed_over:
        yield f"  passed over: {', '.join(decided.passed_over)}"
    if len(decided.prefill) > 1:
        yield f"  next, should {decided.prefill[0]} fail: {', '.join(decided.prefill[1:])}"
    yield f"  {decided.why}"
    yield _costs(decided, compared)


def _departure(decided: Decided, timeline: Timeline) -> Iterator[str]:
    """The decode worker has the last word on who prefills."""
    planned, did = decided.prefill[:1], timeline.prefill_worker
    if planned and did and did not in planned:
        reason = "who was asked failed" if timeline.prefill_attempts else "by its own cache and load that was quicker"
        yield f"  but {did} prefilled: {reason}"


def _cached(decided: Decided) -> str:
    at_decode = f"{decided.cached_at_decode} at {decided.decode}"
    return f"{at_decode}, {decided.cached_at_prefill} at {decided.prefill[0]}" if decided.prefill else at_decode


def _costs(decided: Decided, compared: list[Compared]) -> Table:
    """The parts of the cost, beside what they took where that is known; then the cost, and that of others."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("  cost of")
    table.add_column("predicted", justify="right")
    table.add_column("took", justify="right")
    for part in compared or [Compared(name, seconds, None) for name, seconds in decided.parts.items()]:
        if part.predicted_s is not None or part.actual_s is not None:
            table.add_row(f"  {part.part}", _ms(part.predicted_s), _ms(part.actual_s))
    table.add_section()
    is_in_seconds = bool(decided.parts)
    table.add_row("  this choice", _cost(decided.cost, is_in_seconds))
    for other in decided.runners_up:
        pair = f"{other.prefill} -> {other.decode}" if other.prefill else f"all on {other.decode}"
        table.add_row(f"  {pair}", _cost(other.cost, is_in_seconds))
    return table


def _cost(cost: float, is_in_seconds: bool) -> str:
    """Policies that price no parts count in units of their own."""
    return _ms(cost) if is_in_seconds else f"{cost:.4g}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"
