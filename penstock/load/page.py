"""Measurements beside each other, as one HTML page: table, how it goes with the load, distributions, time going by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from penstock.columns import Row
from penstock.load.columns import COLUMNS, Number, end_to_end_p99_s, itl_p99_ms, ttft_p50_ms, ttft_p99_ms
from penstock.load.report import Course, Curves, Report, Slo, complaints
from penstock.page import charts, definitions, document, folded, lines, table
from penstock.plot import Axis, Chart, Points, Series

LEAST = 1e-3  # what is drawn of 0 on a logarithmic axis, in its unit


def page(reports: Sequence[Report]) -> str:
    """The HTML text of at least one report, all of one sweep. Equal reports make equal pages."""
    cell = reports[0].cell
    title = f"{cell.model} at {cell.url}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(heading(reports[0]))} What the numbers mean is at the end.</p>",
        *table((cell.load,), COLUMNS, rows(reports)),
        *_notes(reports),
        *_sweep(reports),
        "<h2>Distributions</h2>",
        *charts(_distributions(reports)),
        "<h2>As time went by</h2>",
        *(part for place, report in enumerate(reports) for part in _course(report, is_open=not place)),
        *definitions(DEFINITIONS),
    ]
    return document(title, parts)


def heading(report: Report) -> str:
    """What was asked, and what is aimed at, in a line."""
    cell, slo = report.cell, report.slo
    whole = "" if slo.end_to_end_s is None else f", the whole answer within {slo.end_to_end_s:g} s"
    targets = f"TTFT within {slo.ttft_s:g} s, TPOT within {slo.itl_s * 1e3:g} ms{whole}"
    return f"{cell.workload}; to {cell.endpoint} in {cell.prompts}, seed {cell.seed}; targets: {targets}."


def rows(reports: Sequence[Report]) -> list[Row[Report]]:
    """One for each load."""
    return [Row((f"{report.cell.level:g}",), report.cell.load, report) for report in reports]


def _notes(reports: Sequence[Report]) -> Iterator[str]:
    for report in reports:
        for line in complaints(report):
            yield f'<p class="note">{escape(report.cell.title)}: {escape(line)}</p>'


_SWEPT: tuple[tuple[str, Axis, tuple[tuple[str, Number], ...]], ...] = (
    ("TTFT", Axis("ms", "log10"), (("p50", ttft_p50_ms), ("p99", ttft_p99_ms))),
    ("ITL p99", Axis("ms", "log10"), (("", itl_p99_ms),)),
    ("End to end p99", Axis("s", "log10"), (("", end_to_end_p99_s),)),
    (
        "Tokens out",
        Axis("tokens/s", least=0),
        (("", lambda report: report.throughput.output_tokens_per_s),),
    ),
    (
        "Requests",
        Axis("requests/s", least=0),
        (
            ("all", lambda report: report.throughput.requests_per_s),
            ("within all targets", lambda report: report.attainment.goodput_per_s),
        ),
    ),
    ("SLO attainment", Axis("% of requests", least=0, most=100), (("", lambda report: 100 * report.attainment.all),)),
)


def _sweep(reports: Sequence[Report]) -> Iterator[str]:
    """What becomes of the headlines with more load."""
    levels = sorted({report.cell.level for report in reports})
    if len(levels) < 2:
        return
    kind = reports[0].cell.load
    x = Axis(_UNITS[kind], "log2" if levels[-1] >= 4 * levels[0] else "linear")
    ticks = [(level, f"{level:g}") for level in levels]
    yield f"<h2>With the {kind}</h2>"
    yield from charts(Chart(title, x, y, lines(_points(reports, numbers)), ticks) for title, y, numbers in _SWEPT)


_UNITS = {"rate": "sessions/s", "concurrency": "sessions at a time", "speed": "speed, times the workload's own"}


def _points(reports: Sequence[Report], numbers: Sequence[tuple[str, Number]]) -> Iterator[tuple[str, float, float]]:
    for name, number in numbers:
        for report in reports:
            if value := number(report):
                yield name, report.cell.level, value


_CURVES: tuple[tuple[str, str, float, Callable[[Curves], Points], Callable[[Slo], float | None]], ...] = (
    ("Time to first token", "ms", 1e3, lambda curves: curves.ttft, lambda slo: slo.ttft_s),
    ("Inter-token latency", "ms", 1e3, lambda curves: curves.itl, lambda slo: None),
    ("Time per output token", "ms", 1e3, lambda curves: curves.tpot, lambda slo: slo.itl_s),
    ("Gap before the second token", "ms", 1e3, lambda curves: curves.second_token_gap, lambda slo: None),
    ("End to end", "s", 1.0, lambda curves: curves.end_to_end, lambda slo: slo.end_to_end_s),
    ("Sent late", "ms", 1e3, lambda curves: curves.lateness, lambda slo: None),
)


def _distributions(reports: Sequence[Report]) -> Iterator[Chart]:
    share = Axis("% of values up to this", least=0, most=100)
    for title, unit, factor, curve, target in _CURVES:
        found = [
            Series(report.cell.title, line=[(max(LEAST, value * factor), 100 * part) for value, part in points])
            for report in reports
            if (points := curve(report.curves))
        ]
        target_s = target(reports[0].slo)
        yield Chart(
            title,
            Axis(unit, "log10"),
            share,
            found,
            marks=[] if target_s is None else [(target_s * factor, "target")],
        )


def _course(report: Report, is_open: bool) -> Iterator[str]:
    course = report.course
    time = Axis("time, s", least=0)
    running = Series("", line=_over(course, course.running))
    events = Series("", line=_over(course, course.events_per_s))
    yield from folded(
        report.cell.title,
        is_open,
        charts(
            [
                Chart("Requests under way", time, Axis("requests", least=0), [running]),
                Chart("Events with tokens", time, Axis("events/s", least=0), [events]),
            ]
        ),
    )


def _over(course: Course, values: Sequence[float]) -> Points:
    """Values at the end of every interval."""
    return [(course.interval_s * (place + 1), value) for place, value in enumerate(values)]


DEFINITIONS = (
    "TTFT: from the request to its first event with a token, connecting included. ITL: between two events with tokens "
    "of a request. TPOT: (last event - first) / (output tokens - 1) of one request. End to end: until the answer's "
    "end. Of requests that ended without an error; ITL of all.",
    "SLO met: share of all requests that kept to all targets; an error misses them. Goodput: such requests per second. "
    "The duration is from the first request to the last event or end of any request.",
    "Tokens are the server's own count, and cached ones what it says to have found in its cache, as a share of prompt "
    "tokens. Sent late: how long after it was due a request was sent; if that is not small, it was not the server that "
    "was slow. Percentiles are nearest ranks; those of ITL come from buckets 2 % wide.",
)
