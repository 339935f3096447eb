"""The headline numbers of a measurement, as the terminal's table and the page show them."""

from __future__ import annotations

from collections.abc import Callable

from penstock.columns import Column
from penstock.load.report import Latencies, Report
from penstock.measures import Spread

Number = Callable[[Report], float | None]


def latency(which: Callable[[Latencies], Spread | None], part: Callable[[Spread], float], factor: float) -> Number:
    """None where nothing was measured."""

    def number(report: Report) -> float | None:
        spread = which(report.latencies)
        return None if spread is None else part(spread) * factor

    return number


ttft_p50_ms = latency(lambda latencies: latencies.ttft, lambda spread: spread.p50, 1e3)
ttft_p90_ms = latency(lambda latencies: latencies.ttft, lambda spread: spread.p90, 1e3)
ttft_p99_ms = latency(lambda latencies: latencies.ttft, lambda spread: spread.p99, 1e3)
itl_p50_ms = latency(lambda latencies: latencies.itl, lambda spread: spread.p50, 1e3)
itl_p90_ms = latency(lambda latencies: latencies.itl, lambda spread: spread.p90, 1e3)
itl_p99_ms = latency(lambda latencies: latencies.itl, lambda spread: spread.p99, 1e3)
tpot_p50_ms = latency(lambda latencies: latencies.tpot, lambda spread: spread.p50, 1e3)
tpot_p90_ms = latency(lambda latencies: latencies.tpot, lambda spread: spread.p90, 1e3)
tpot_p99_ms = latency(lambda latencies: latencies.tpot, lambda spread: spread.p99, 1e3)
end_to_end_p50_s = latency(lambda latencies: latencies.end_to_end, lambda spread: spread.p50, 1.0)
end_to_end_p90_s = latency(lambda latencies: latencies.end_to_end, lambda spread: spread.p90, 1.0)
end_to_end_p99_s = latency(lambda latencies: latencies.end_to_end, lambda spread: spread.p99, 1.0)


def late_p99_ms(report: Report) -> float | None:
    lateness = report.generated.lateness
    return None if lateness is None else lateness.p99 * 1e3


# None is better than another: more load is another question.
COLUMNS: tuple[Column[Report], ...] = (
    Column("requests", lambda report: report.requests, ",d", 0),
    Column("errors", lambda report: sum(report.errors.values()) + report.unfinished, ",d", 0),
    Column("requests /s", lambda report: report.throughput.requests_per_s, ",.2f", 0),
    Column("tokens out /s", lambda report: report.throughput.output_tokens_per_s, ",.0f", 0),
    Column("tokens in+out /s", lambda report: report.throughput.total_tokens_per_s, ",.0f", 0, is_brief=False),
    Column("TTFT p50 ms", ttft_p50_ms, ",.1f", 0),
    Column("TTFT p90 ms", ttft_p90_ms, ",.1f", 0, is_brief=False),
    Column("TTFT p99 ms", ttft_p99_ms, ",.1f", 0),
    Column("ITL p50 ms", itl_p50_ms, ",.2f", 0, is_brief=False),
    Column("ITL p90 ms", itl_p90_ms, ",.2f", 0, is_brief=False),
    Column("ITL p99 ms", itl_p99_ms, ",.2f", 0),
    Column("TPOT p50 ms", tpot_p50_ms, ",.2f", 0),
    Column("TPOT p90 ms", tpot_p90_ms, ",.2f", 0, is_brief=False),
    Column("TPOT p99 ms", tpot_p99_ms, ",.2f", 0, is_brief=False),
    Column("end to end p50 s", end_to_end_p50_s, ",.2f", 0),
    Column("end to end p90 s", end_to_end_p90_s, ",.2f", 0, is_brief=False),
    Column("end to end p99 s", end_to_end_p99_s, ",.2f", 0, is_brief=False),
    Column("SLO met", lambda report: report.attainment.all, ".1%", 0),
    Column("goodput /s", lambda report: report.attainment.goodput_per_s, ",.2f", 0),
    Column("cached", lambda report: report.tokens.hit_share, ".1%", 0),
    Column("late p99 ms", late_p99_ms, ",.1f", 0),
    Column("tokens /event", lambda report: report.tokens.per_event, ".2f", 0, is_brief=False),
    Column("generator busy", lambda report: report.generated.busy, ".0%", 0, is_brief=False),
)
