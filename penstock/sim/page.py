"""Simulations beside each other, as one HTML page that needs nothing else: no network, no script, dark where wanted.

headline table -> how it goes with rate or split -> distributions -> each cell as time went by
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby

from penstock.columns import Row
from penstock.page import all_of, charts, definitions, document, folded, lines, row, table
from penstock.plot import Axis, Chart, Points, Series, panel
from penstock.sim.columns import COLUMNS, Number, itl_p99_ms, ttft_p99_s
from penstock.sim.report import Curves, Link, Report, Slo, Worker

OPEN_GROUPS = 1  # of distributions, and of cells, that are unfolded at first
SHADES = 10  # of a worker's busy share
STRIP_WIDTH, STRIP_HEIGHT, NAME_WIDTH, SHARE_WIDTH, FOOT = 720, 14, 100, 70, 30  # pixels


def page(reports: Sequence[Report]) -> str:
    """The HTML text of at least one report. Equal reports make equal pages."""
    parts = [
        *_heading(reports),
        *table(("policy", "rate", "split"), COLUMNS, [_table_row(report) for report in reports]),
        *_sweeps(reports),
        *_distributions(reports),
        *_cells(reports),
        *definitions(DEFINITIONS),
    ]
    return document(_title(reports), parts)


def _title(reports: Sequence[Report]) -> str:
    cells = [report.cell for report in reports]
    return f"{all_of([cell.workload for cell in cells])} on {all_of([cell.cluster for cell in cells])}"


def _heading(reports: Sequence[Report]) -> Iterator[str]:
    slo = reports[0].slo
    gpus = all_of([f"{report.cell.gpus}" for report in reports])
    seeds = all_of([f"{report.cell.seed}" for report in reports])
    yield f"<h1>{escape(_title(reports))}</h1>"
    yield (
        f"<p>Simulated by penstock on {gpus} GPUs, seed {seeds}. Targets: TTFT within {slo.ttft_s:g} s and TPOT within "
        f"{slo.itl_s * 1e3:g} ms. Times are virtual; what the numbers mean is at the end.</p>"
    )


def _table_row(report: Report) -> Row[Report]:
    """Cells that differ in policy alone are rivals."""
    cell = report.cell
    return Row((cell.policy, f"{cell.rate:g}", cell.split), _setting(report), report)


def _setting(report: Report) -> tuple[float, str, str, str]:
    """What is not the policy."""
    return (report.cell.rate, report.cell.split, report.cell.cluster, report.cell.workload)


# Sweeps

_SWEPT: tuple[tuple[str, Axis, Number], ...] = (
    ("SLO attainment", Axis("% of requests", least=0, most=100), lambda report: 100 * report.attainment.both),
    (
        "Goodput per GPU",
        Axis("requests/s within both targets, per GPU", least=0),
        lambda report: report.attainment.goodput_per_gpu_s,
    ),
    ("Cache hits", Axis("% of prompt tokens", least=0, most=100), lambda report: 100 * report.kv.hit_share),
    ("TTFT p99", Axis("s", "log10"), ttft_p99_s),
    ("ITL p99", Axis("ms", "log10"), itl_p99_ms),
    ("Output per GPU", Axis("tokens/s", least=0), lambda report: report.throughput.output_tokens_per_gpu_s),
)


def _sweeps(reports: Sequence[Report]) -> Iterator[str]:
    """What becomes of the headlines when the rate changes, or else the split."""
    rates = sorted({report.cell.rate for report in reports})
    splits = list(dict.fromkeys(report.cell.split for report in reports))
    if len(rates) > 1:
        axis = Axis("rate, times the workload's own", "log2" if rates[-1] >= 4 * rates[0] else "linear")
        yield "<h2>With the rate</h2>"
        yield from charts(_by_rate(reports, axis, len(splits) > 1))
    elif len(splits) > 1:
        yield "<h2>With the split</h2>"
        yield from charts(_by_split(reports, splits))


def _by_rate(reports: Sequence[Report], x: Axis, with_split: bool) -> Iterator[Chart]:
    """A line for each policy, or each policy and split."""
    ticks = [(rate, f"{rate:g}") for rate in sorted({report.cell.rate for report in reports})]
    for title, y, number in _SWEPT:
        points = [
            (f"{report.cell.policy} {report.cell.split}" if with_split else report.cell.policy, report.cell.rate, value)
            for report in reports
            if (value := number(report)) is not None
        ]
        yield Chart(title, x, y, lines(points), ticks)


def _by_split(reports: Sequence[Report], splits: Sequence[str]) -> Iterator[Chart]:
    """A line for each policy."""
    ticks = [(float(place), split) for place, split in enumerate(splits)]
    for title, y, number in _SWEPT:
        points = [
            (report.cell.policy, float(splits.index(report.cell.split)), value)
            for report in reports
            if (value := number(report)) is not None
        ]
        yield Chart(title, Axis("prefill:decode workers"), y, lines(points), ticks)


# Distributions

_CURVES: tuple[tuple[str, str, float, Callable[[Curves], Points], Callable[[Slo], float | None]], ...] = (
    ("Time to first token", "s", 1.0, lambda curves: curves.ttft, lambda slo: slo.ttft_s),
    ("Inter-token latency", "ms", 1e3, lambda curves: curves.itl, lambda slo: None),
    ("End to end", "s", 1.0, lambda curves: curves.end_to_end, lambda slo: None),
    ("Gap before the second token", "ms", 1e3, lambda curves: curves.second_token_gap, lambda slo: None),
    ("Time per output token", "ms", 1e3, lambda curves: curves.tpot, lambda slo: slo.itl_s),
    ("Wait before prefill", "ms", 1e3, lambda curves: curves.queue, lambda slo: None),
)
_LEAST = 1e-3  # what is drawn of 0 on a logarithmic axis, in its unit


def _distributions(reports: Sequence[Report]) -> Iterator[str]:
    """Policies together, settings apart."""
    yield "<h2>Distributions</h2>"
    for place, (_, group) in enumerate(groupby(sorted(reports, key=_setting), key=_setting)):
        together = list(group)
        cell = together[0].cell
        yield from folded(
            f"rate {cell.rate:g}, split {cell.split}", place < OPEN_GROUPS, charts(_distribution_charts(together))
        )


def _distribution_charts(reports: Sequence[Report]) -> Iterator[Chart]:
    share = Axis("% of values up to this", least=0, most=100)
    for title, unit, factor, curve, target in _CURVES:
        lines = [
            Series(report.cell.policy, line=[(max(_LEAST, value * factor), 100 * part) for value, part in points])
            for report in reports
            if (points := curve(report.curves))
        ]
        target_s = target(reports[0].slo)
        marks = [] if target_s is None else [(target_s * factor, "target")]
        yield Chart(title, Axis(unit, "log10"), share, lines, marks=marks)


# Cells


def _cells(reports: Sequence[Report]) -> Iterator[str]:
    yield "<h2>As time went by</h2>"
    for place, report in enumerate(reports):
        yield from folded(report.cell.title, place < OPEN_GROUPS, _cell(report))


def _cell(report: Report) -> Iterator[str]:
    yield f'<p class="note">{escape("; ".join(_facts(report)))}</p>'
    yield from row([*map(panel, _queue_charts(report)), panel(_link_chart(report)), *_strips(report)])


def _queue_charts(report: Report) -> Iterator[Chart]:
    queues, step_s = report.queues, report.queues.interval_s
    running = Series("running", line=_over(queues.running, step_s))
    waiting = Series("waiting", line=_over(queues.waiting, step_s))
    queued = Series("", line=_over(queues.queued_tokens, step_s))
    busy = Series("busy", line=_percent(queues.busy, step_s))
    used = Series("KV blocks in use", line=_percent(queues.used, step_s))
    yield Chart("Sequences of all workers", _TIME, Axis("sequences", least=0), [running, waiting])
    yield Chart("Prompt tokens in queues", _TIME, Axis("tokens", least=0), [queued])
    yield Chart("Mean over workers", _TIME, Axis("%", least=0, most=100), [busy, used])


def _link_chart(report: Report) -> Chart:
    links = [
        Series(_link(link), line=_percent(link.utilisation, report.queues.interval_s)) for link in report.busiest_links
    ]
    return Chart("Busiest links", _TIME, Axis("% of their rate", least=0), links)


_TIME = Axis("virtual time, s", least=0)


def _facts(report: Report) -> Iterator[str]:
    yield f"{report.ended:,} of {report.requests:,} requests ended well in {report.duration_s:,.1f} s"
    yield from (f"{count:,} x {kind}" for kind, count in report.errors.items())
    if report.unfinished:
        yield f"{report.unfinished:,} were not over at the end"
    if (others := report.other_links).count:
        yield f"{others.count:,} other links: {others.mean:.2%} used in the mean, {others.peak:.1%} at most"
    for tenant in report.tenants:
        yield f"tenant {tenant.name or 'nobody'}: {tenant.requests:,} requests, {tenant.both:.1%} within both targets"


def _link(link: Link) -> str:
    return f"{link.name} ({link.mean:.1%} mean, {link.peak:.0%} peak)"


def _over(values: Sequence[float], step_s: float) -> Points:
    """Values at the end of every interval."""
    return [(step_s * (place + 1), value) for place, value in enumerate(values)]


def _percent(shares: Sequence[float], step_s: float) -> Points:
    return _over([100 * share for share in shares], step_s)


def _strips(report: Report) -> Iterator[str]:
    """A row for each worker: the darker, the busier."""
    rows = [worker for worker in report.workers if worker.strip]
    if not rows:
        return
    width, height = NAME_WIDTH + STRIP_WIDTH + SHARE_WIDTH, 28 + STRIP_HEIGHT * len(rows) + FOOT
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    yield f'<svg class="chart strips" {size} role="img" aria-label="How busy each worker was">'
    yield f'<text x="{NAME_WIDTH}" y="20" class="title">How busy each worker was</text>'
    for place, worker in enumerate(rows):
        yield from _strip(worker, 28 + STRIP_HEIGHT * place)
    low, right, end_s = height - FOOT + 16, NAME_WIDTH + STRIP_WIDTH, report.strip_interval_s * len(rows[0].strip)
    legend = "virtual time; the darker, the larger the share of it in steps"
    left_out = len(report.workers) - len(rows)
    legend += f"; {left_out:,} more workers are not drawn" if left_out else ""
    yield f'<text x="{NAME_WIDTH}" y="{low}" class="tick">0</text>'
    yield f'<text x="{right}" y="{low}" text-anchor="end" class="tick">{end_s:,.1f} s</text>'
    yield f'<text x="{(NAME_WIDTH + right) / 2}" y="{low}" text-anchor="middle" class="label">{legend}</text>'
    yield "</svg>"


def _strip(worker: Worker, top: int) -> Iterator[str]:
    """Name, what it did, and the strip: one path for each shade."""
    bottom, name = top + STRIP_HEIGHT - 3, escape(worker.name)
    told = f"{name}: busy {worker.busy:.0%}, KV {worker.used:.0%} in use, {worker.prefilled:,} prefilled, "
    yield f"<g><title>{told}{worker.decoded:,} decoded</title>"
    yield f'<text x="{NAME_WIDTH - 6}" y="{bottom}" text-anchor="end" class="tick">{name}</text>'
    yield f'<rect x="{NAME_WIDTH}" y="{top}" width="{STRIP_WIDTH}" height="{STRIP_HEIGHT - 1}" class="idle"/>'
    pixels = STRIP_WIDTH / len(worker.strip)
    shades: dict[int, list[str]] = {}
    place = 0
    for shade, run in groupby(round(busy * SHADES) for busy in worker.strip):
        length = len(list(run))
        left, across = NAME_WIDTH + place * pixels, length * pixels
        shades.setdefault(shade, []).append(f"M{left:.1f} {top}h{across:.1f}v{STRIP_HEIGHT - 1}h{-across:.1f}z")
        place += length
    for shade in sorted(set(shades) - {0}):
        yield f'<path d="{"".join(shades[shade])}" class="busy" fill-opacity="{shade / SHADES:g}"/>'
    yield f'<text x="{NAME_WIDTH + STRIP_WIDTH + 6}" y="{bottom}" class="tick">{worker.busy:.0%} busy</text></g>'


DEFINITIONS = (
    "TTFT: from the client's request to its first token. ITL: between two tokens of a request, over all tokens but "
    "the first two of each, whose gap, in which a hand-over hides, stands by itself. TPOT: (last token - first token) "
    "/ (tokens - 1) of one request.",
    "Latencies are of requests that ended without an error. SLO met: share of all requests whose TTFT and TPOT both "
    "kept to their targets; an error misses them. Goodput: such requests per second from the first request to the "
    "last event.",
    "Percentiles are nearest ranks; those of ITL come from buckets 2 % wide. Cache hits: prompt tokens found in a "
    "cache, of all prompt tokens. Moved: bytes of KV that hand-overs copied. Errors include requests that were not "
    "over when the simulation stopped. Samples over time are means between their neighbours.",
)
