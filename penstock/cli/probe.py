"""`penstock topology probe`: links between running workers, measured by them, as a table and as a topology file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from penstock.cli.output import OnProgress, check_writable, progress, write
from penstock.cluster import Member
from penstock.errors import ConnectionLost, PenstockError, SetupError
from penstock.serve.probe import MeasureAsk, Measured, Row, decode_measured, decode_members, pairs
from penstock.serve.rpc import Endpoint
from penstock.topology.document import VERTEX_NAME
from penstock.wire.stream import StreamWire


async def probe(join: str, token: str, size_mib: int, partners: int, out: Path | None, as_json: bool) -> None:
    """Asks the frontend at `join` who is there, and each of them to measure. Raises SetupError."""
    if size_mib < 1 or partners < 0:
        raise SetupError("--size must be 1 or more, --partners 0 (all) or more")
    if out is not None:
        check_writable(out)
    stream = StreamWire()
    async with Endpoint({"tcp": stream, "unix": stream}, token, {}) as endpoint:
        members = await find_members(endpoint, join)
        if out is not None:
            check_names(members)
        with progress(f"measuring between {len(members)} workers") as on_progress:
            rows = await measure(endpoint, pairs(members, partners), size_mib << 20, on_progress)
    if out is not None:
        write(out, as_topology(members, rows))
    if as_json:
        print(msgspec.json.encode({"links": rows}).decode())
    else:
        show(rows, Console(highlight=False))


async def find_members(endpoint: Endpoint, join: str) -> list[Member]:
    """Raises SetupError if there are not two workers to measure between."""
    try:
        peer = await endpoint.peer((f"tcp:{join}",))
        async with peer.call("members", None) as call:
            members = await call.receive(decode_members) or []
    except PenstockError as error:
        raise SetupError(f"no frontend tells its workers at {join}: {error}") from error
    if len(members) < 2:
        raise SetupError(f"{len(members)} workers have joined {join}; there is nothing to measure between")
    return members


async def measure(
    endpoint: Endpoint, some: Sequence[tuple[Member, Member]], size_bytes: int, on_progress: OnProgress
) -> list[Row]:
    """One pair at a time, so that they do not disturb each other. A worker that fails does so in its own rows."""
    rows = []
    for number, (source, target) in enumerate(some, start=1):
        try:
            found = await _ask(endpoint, source, target, size_bytes)
            rows.append(Row(source.worker, target.worker, found))
        except PenstockError as error:
            rows.append(Row(source.worker, target.worker, None, str(error)))
        on_progress(number / len(some))
    return rows


async def _ask(endpoint: Endpoint, source: Member, target: Member, size_bytes: int) -> Measured:
    """Raises what `source` raises, or ConnectionLost if it ends without an answer."""
    peer = await endpoint.peer(source.addresses)
    async with peer.call("measure", MeasureAsk(target.addresses, bulk_bytes=size_bytes)) as call:
        if (found := await call.receive(decode_measured)) is None:
            raise ConnectionLost(f"{source.worker} ended the measurement without a result: it may be stopping")
        return found


def check_names(members: Sequence[Member]) -> None:
    """Before the time is spent. Raises SetupError if a worker's name cannot be that of a host in a topology file."""
    for member in members:
        if not VERTEX_NAME.fullmatch(member.worker):
            raise SetupError(
                f"--out: worker {member.worker!r} cannot be named in a topology file: use letters, digits, '.', '_' "
                "and '-' in its --name, or leave --out away"
            )


def as_topology(members: Sequence[Member], rows: Sequence[Row]) -> str:
    """A topology file: a host for each worker, called as the worker is, and a link for each pair that was measured.

    A link has the lesser rate and the greater latency of its two directions, and a host's way to those to which nothing
    was measured the worst of its links. Names are quoted, as some would be numbers to YAML.
    """
    links: dict[frozenset[str], list[Measured]] = {}
    for row in rows:
        if row.measured is not None:
            links.setdefault(frozenset((row.source, row.target)), []).append(row.measured)
    lines = ["# Measured between running workers by `penstock topology probe`.", "name: measured", "holds:"]
    for member in members:
        own = [one for pair, found in links.items() if member.worker in pair for one in found]
        nic = f", nic: {{{_worst(own)}}}" if own else ""
        lines.append(f'  - {{preset: tcp-host, name: "{member.worker}"{nic}}}')
    lines += ["links:"] if links else []
    for pair, found in links.items():
        one, other = sorted(pair)
        lines.append(f'  - {{between: ["{one}", "{other}"], {_worst(found)}, medium: {found[0].medium}}}')
    return "\n".join(lines) + "\n"


def _worst(found: Sequence[Measured]) -> str:
    rate, latency_s = min(one.bytes_per_s for one in found), max(one.latency_s for one in found)
    return f"bandwidth: {rate / 1e9:.4g} GB/s, latency: {latency_s * 1e6:.4g} us"


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table("from", "to", "over", "latency", "rate", box=None, pad_edge=False)
    for row in rows:
        if (found := row.measured) is not None:
            rate, latency = f"{found.bytes_per_s / 1e9:.2f} GB/s", f"{found.latency_s * 1e6:.0f} us"
            table.add_row(row.source, row.target, found.medium, latency, rate)
        else:
            table.add_row(row.source, row.target, "failed", "", row.failure)
    console.print(table)
