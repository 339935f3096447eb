"""The headline numbers of a simulation, as the terminal's table and the page show them."""

from __future__ import annotations

from collections.abc import Callable

from penstock.columns import Column
from penstock.measures import Spread
from penstock.sim.report import Latencies, Report

Number = Callable[[Report], float | None]


def latency(
    which: Callable[[Latencies], Spread | None], part: Callable[[Spread], float], factor: float = 1.0
) -> Number:
    """None where nothing was measured."""

    def number(report: Report) -> float | None:
        spread = which(report.latencies)
        return None if spread is None else part(spread) * factor

    return number


ttft_mean_s = latency(lambda latencies: latencies.ttft, lambda spread: spread.mean)
ttft_p50_s = latency(lambda latencies: latencies.ttft, lambda spread: spread.p50)
ttft_p99_s = latency(lambda latencies: latencies.ttft, lambda spread: spread.p99)
itl_mean_ms = latency(lambda latencies: latencies.itl, lambda spread: spread.mean, 1e3)
itl_p99_ms = latency(lambda latencies: latencies.itl, lambda spread: spread.p99, 1e3)
second_gap_mean_ms = latency(lambda latencies: latencies.second_token_gap, lambda spread: spread.mean, 1e3)
end_to_end_p50_s = latency(lambda latencies: latencies.end_to_end, lambda spread: spread.p50)

COLUMNS: tuple[Column[Report], ...] = (
    Column("requests", lambda report: report.requests, ",d", 0),
    Column("errors", lambda report: sum(report.errors.values()) + report.unfinished, ",d", -1),
    Column("TTFT mean s", ttft_mean_s, ".3f", -1),
    Column("TTFT p50 s", ttft_p50_s, ".3f", -1),
    Column("TTFT p99 s", ttft_p99_s, ".3f", -1),
    Column("ITL mean ms", itl_mean_ms, ".1f", -1),
    Column("ITL p99 ms", itl_p99_ms, ".1f", -1),
    Column("2nd token mean ms", second_gap_mean_ms, ".1f", -1, is_brief=False),
    Column("end to end p50 s", end_to_end_p50_s, ".2f", -1),
    Column("SLO met", lambda report: report.attainment.both, ".1%", 1),
    Column("goodput /s/GPU", lambda report: report.attainment.goodput_per_gpu_s, ".4f", 1),
    Column("tokens out /s/GPU", lambda report: report.throughput.output_tokens_per_gpu_s, ",.1f", 1, is_brief=False),
    Column("cache hits", lambda report: report.kv.hit_share, ".1%", 1),
    Column("moved GB", lambda report: report.kv.copied_bytes / 1e9, ",.1f", 0),
    Column("preemptions", lambda report: report.kv.preemptions, ",d", -1, is_brief=False),
)
