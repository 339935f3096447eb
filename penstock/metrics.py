"""What is measured, under the field's names, in Prometheus' text format.

A frontend owns one `Metrics` and adds to it as requests go by: plain numbers, since it happens for every token. The
library comes in when somebody scrapes, and the workers' own counters are then read from their last reports.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.cluster import Load, Standing

CONTENT_TYPE = CONTENT_TYPE_LATEST

TTFT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
LAG_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
REQUEST_S = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)


class Histogram(msgspec.Struct):
    """Counts of values by upper bound. `observe` takes 0.3 us, a tenth of the library's."""

    bounds: tuple[float, ...]
    counts: list[int] = []
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


def _histogram(bounds: tuple[float, ...]) -> Histogram:
    made: Histogram = msgspec.field(default_factory=lambda: Histogram(bounds))
    return made


class ModelMetrics(msgspec.Struct):
    """One model, as the clients of this frontend saw it."""

    ttft_s: Histogram = _histogram(TTFT_S)
    itl_s: Histogram = _histogram(ITL_S)
    e2e_s: Histogram = _histogram(REQUEST_S)
    queue_s: Histogram = _histogram(REQUEST_S)
    prefill_s: Histogram = _histogram(REQUEST_S)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    stream_moves: int = 0
    finished: dict[str, int] = {}  # by reason


class QueueMetrics(msgspec.Struct):
    """Requests on their way through admission: those that wait, how long others did, and those that were shed."""

    waiting: int = 0
    wait_s: Histogram = _histogram(REQUEST_S)  # of those that had to wait and were then routed
    shed: dict[str, int] = {}  # by reason


class Metrics(msgspec.Struct):
    """Everything one frontend counts."""

    inflight: int = 0
    errors: dict[str, int] = {}  # by code
    models: dict[str, ModelMetrics] = {}
    queue: QueueMetrics = msgspec.field(default_factory=QueueMetrics)

    def model(self, name: str) -> ModelMetrics:
        found = self.models.get(name)
        if found is None:
            found = self.models[name] = ModelMetrics()
        return found


class Told(msgspec.Struct):
    """What one of several frontend processes tells the one whose page is asked for."""

    metrics: Metrics
    loop_delay_p99_s: float


class IndexMetrics:
    """What one frontend was told of its workers' prefix caches."""

    def __init__(self) -> None:
        self.blocks: dict[str, int] = {}  # by worker
        self.changes = 0
        self.snapshots = 0
        self.drifts = 0  # times that a worker held other blocks than it had told
        self.lag_s = Histogram(LAG_S)


def count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def render(
    metrics: Metrics,
    standings: Mapping[str, Standing],
    stalled: Collection[str],
    index: IndexMetrics,
    loop_delay_p99_s: float,
    more: Iterable[Metric] = (),
    processes: Mapping[str, Told] | None = None,
) -> bytes:
    """The page that Prometheus scrapes, `more` at its end.

    `loop_delay_p99_s` is this process's own; workers in `stalled` stand still. Where several frontend processes share
    a port, `processes` has them all, this one too, by name: what each has counted since it started then has its name.
    """
    told = processes if processes is not None else {"frontend": Told(metrics, loop_delay_p99_s)}
    families = (
        *(_of_requests(metrics) if processes is None else _of_processes(processes)),
        *_of_workers(standings),
        _of_stalls(standings, stalled),
        *_of_index(index),
        *_of_loops(standings, told),
        *more,
    )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page([*families]))
    return generate_latest(registry)


class _Page(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


_HISTOGRAMS = {
    "time_to_first_token_seconds": ("ttft_s", "From arrival to the first token"),
    "inter_token_latency_seconds": ("itl_s", "Between two tokens of one stream"),
    "e2e_request_latency_seconds": ("e2e_s", "From arrival to the end"),
    "request_queue_time_seconds": ("queue_s", "From arrival to the start of prefill"),
    "request_prefill_time_seconds": ("prefill_s", "From the start of prefill to its last chunk"),
}


def _of_requests(metrics: Metrics) -> Iterator[Metric]:
    for name, (attribute, help) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(f"penstock_{name}", help, labels=["model_name"])
        for model, series in metrics.models.items():
            _add_histogram(family, [model], getattr(series, attribute))
        yield family
    prompt = CounterMetricFamily("penstock_prompt_tokens", "Tokens of prompts", labels=["model_name"])
    output = CounterMetricFamily("penstock_generation_tokens", "Tokens generated", labels=["model_name"])
    moves = CounterMetricFamily(
        "penstock_stream_moves", "Streams that went on at another worker", labels=["model_name"]
    )
    success = CounterMetricFamily(
        "penstock_request_success", "Requests that ended well", labels=["model_name", "finished_reason"]
    )
    for model, series in metrics.models.items():
        prompt.add_metric([model], series.prompt_tokens)
        output.add_metric([model], series.generation_tokens)
        moves.add_metric([model], series.stream_moves)
        for reason, times in series.finished.items():
            success.add_metric([model, reason], times)
    yield from (prompt, output, moves, success)
    errors = CounterMetricFamily("penstock_request_errors", "Requests that failed", labels=["code"])
    for code, times in metrics.errors.items():
        errors.add_metric([code], times)
    yield errors
    yield GaugeMetricFamily("penstock_num_requests_inflight", "Requests in this frontend", metrics.inflight)
    yield from _of_queue(metrics.queue)


def _of_processes(processes: Mapping[str, Told]) -> Iterator[Metric]:
    """The same of each process, told apart by a label: of one that was restarted only its own series start over."""
    families: dict[str, Metric] = {}
    for name, told in processes.items():
        for family in _of_requests(told.metrics):
            samples = [sample._replace(labels={**sample.labels, "process": name}) for sample in family.samples]
            family.samples = [*families[family.name].samples, *samples] if family.name in families else samples
            families[family.name] = family
    yield from families.values()


def _of_queue(queue: QueueMetrics) -> Iterator[Metric]:
    yield GaugeMetricFamily("penstock_num_requests_queued", "Requests that wait to be routed", queue.waiting)
    wait = HistogramMetricFamily("penstock_admission_wait_seconds", "In the queue, of requests that had to wait there")
    _add_histogram(wait, [], queue.wait_s)
    yield wait
    shed = CounterMetricFamily("penstock_requests_shed", "Requests turned away unserved", labels=["reason"])
    for reason, times in queue.shed.items():
        shed.add_metric([reason], times)
    yield shed


def _add_histogram(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum)


_GAUGES = {
    "num_requests_running": ("running", "Sequences that are prefilled here or decode"),
    "num_requests_waiting": ("waiting", "Sequences that wait for blocks, and prefills for other workers"),
    "queued_prompt_tokens": ("queued_tokens", "Tokens of prompts that wait to be computed"),
    "kv_blocks_leased": ("leased_blocks", "Blocks that other workers may write"),
    "kv_blocks_quarantined": ("quarantined_blocks", "Blocks not reused until their last writer is known gone"),
}
_COUNTERS = {
    "prefix_cache_queries": ("prompt_tokens", "Tokens of prompts looked up in the prefix cache"),
    "prefix_cache_hits": ("cached_tokens", "Tokens of prompts found in the prefix cache"),
    "num_preemptions": ("preemptions", "Sequences that gave their blocks to others for a while"),
    "handoffs": ("handoffs", "Prompts whose KV another worker made"),
    "handoff_failures": ("handoff_failures", "Hand-overs that failed and were replaced"),
}
_WORKER_LABELS = ["worker", "role", "model_name"]


def _of_workers(standings: Mapping[str, Standing]) -> Iterator[Metric]:
    for name, (attribute, help) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"penstock_{name}", help, labels=_WORKER_LABELS)
        for standing in standings.values():
            gauge.add_metric(_labels(standing), getattr(standing.load, attribute))
        yield gauge
    for name, (attribute, help) in _COUNTERS.items():
        counter = CounterMetricFamily(f"penstock_{name}", help, labels=_WORKER_LABELS)
        for standing in standings.values():
            counter.add_metric(_labels(standing), getattr(standing.load, attribute))
        yield counter
    usage = GaugeMetricFamily(
        "penstock_kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1", labels=_WORKER_LABELS
    )
    moved = CounterMetricFamily("penstock_kv_bytes", "KV handed over, by path", labels=[*_WORKER_LABELS, "path"])
    for standing in standings.values():
        usage.add_metric(_labels(standing), _usage(standing.load))
        moved.add_metric([*_labels(standing), "in-place"], standing.load.in_place_bytes)
        moved.add_metric([*_labels(standing), "copied"], standing.load.copied_bytes)
    yield from (usage, moved)


def _of_index(index: IndexMetrics) -> Iterator[Metric]:
    blocks = GaugeMetricFamily(
        "penstock_prefix_index_blocks", "Blocks that a worker told it has cached", labels=["worker"]
    )
    for worker, number in index.blocks.items():
        blocks.add_metric([worker], number)
    yield blocks
    for name, help, value in (
        ("changes", "Blocks that workers told they stored or evicted", index.changes),
        ("snapshots", "Times that a worker told all it has cached", index.snapshots),
        ("drift", "Times that a worker had other blocks cached than it had told", index.drifts),
    ):
        yield CounterMetricFamily(f"penstock_prefix_index_{name}", help, value)
    bounds = [*(str(bound) for bound in index.lag_s.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(index.lag_s.counts), strict=True))
    help = "From a change of a worker's cache until it was told"
    yield HistogramMetricFamily("penstock_prefix_index_lag_seconds", help, buckets, index.lag_s.sum)


def _of_stalls(standings: Mapping[str, Standing], stalled: Collection[str]) -> Metric:
    still = GaugeMetricFamily(
        "penstock_worker_stalled", "1 while the worker's engine stands still in a step", labels=_WORKER_LABELS
    )
    for name, standing in standings.items():
        still.add_metric(_labels(standing), float(name in stalled))
    return still


def _of_loops(standings: Mapping[str, Standing], frontends: Mapping[str, Told]) -> Iterator[Metric]:
    delay = GaugeMetricFamily(
        "penstock_event_loop_delay_seconds", "How late timers run", labels=["process", "quantile"]
    )
    for name, told in frontends.items():
        delay.add_metric([name, "0.99"], told.loop_delay_p99_s)
    for name, standing in standings.items():
        delay.add_metric([name, "0.99"], standing.load.loop_delay_p99_s)
    yield delay


def _labels(standing: Standing) -> list[str]:
    member = standing.member
    return [member.worker, member.role, member.model]


def _usage(load: Load) -> float:
    return 1 - load.free_blocks / load.blocks if load.blocks else 0.0
