"""What one simulation comes to: a value that is the same, byte for byte, whenever the same seed is played.

    report = summarize(recorder, Cell(...), Slo(ttft_s=2, itl_s=0.05));  msgspec.json.encode(report)

Definitions, the same for every policy and every cluster:

    TTFT                from the client's request to its first token
    ITL                 time between two tokens of a request, over all tokens; the gap between its first two, in which
                        a hand-over hides, is not among them but reported by itself (`second_token_gap`)
    TPOT                (last token - first token) / (tokens - 1), one number per request
    percentile p        nearest rank: the least value that at least p % of the values do not exceed
    latencies           of requests that ended without an error; ITL of all tokens that came
    attainment          share of all requests, those with errors included, that met a target; one with a single token
                        has no TPOT to miss
    goodput             requests per second that met both targets, over the duration
    duration            from the first request to the last event of any request
    hit share           prompt tokens taken from a cache / prompt tokens, of requests of which workers told
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.measures import Curve, Floats, Histogram, Spread, curve, per, spread, spread_of
from penstock.sim.record import NOBODY, Recorder, Requests, Series

BUSIEST_LINKS = 8  # that are told one by one
STRIPS = 256  # workers whose busy times are told one by one
STRIP_SAMPLES = 100

Flags = NDArray[np.bool_]


class Slo(msgspec.Struct, frozen=True):
    """What a request should keep to: its TTFT, and its TPOT as the mean time between its tokens."""

    ttft_s: float = 2.0
    itl_s: float = 0.05


class Cell(msgspec.Struct, frozen=True):
    """What was simulated: one place in a sweep."""

    cluster: str
    workload: str
    policy: str
    rate: float  # how many times as fast as the workload has it
    split: str  # prefill:decode[+any] workers
    gpus: int
    seed: int

    @property
    def title(self) -> str:
        return f"{self.policy}, rate {self.rate:g}, {self.split}"


class Latencies(msgspec.Struct, frozen=True):
    """None where there is no value at all."""

    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    second_token_gap: Spread | None
    end_to_end: Spread | None
    queue: Spread | None


class Curves(msgspec.Struct, frozen=True):
    """Cumulative distributions."""

    ttft: Curve
    itl: Curve
    tpot: Curve
    second_token_gap: Curve
    end_to_end: Curve
    queue: Curve


class Attainment(msgspec.Struct, frozen=True):
    """Shares of all requests, and how many a second met both targets."""

    ttft: float
    tpot: float
    both: float
    goodput_per_s: float
    goodput_per_gpu_s: float


class Throughput(msgspec.Struct, frozen=True):
    """Per second of the duration. Prompt tokens count when their request was asked, output tokens when they came."""

    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_gpu_s: float
    output_tokens_per_gpu_s: float


class Kv(msgspec.Struct, frozen=True):
    """What became of prompts' KV. Sums over requests of which workers told."""

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    moved_tokens: int
    copied_bytes: int
    preemptions: int
    prefill_attempts: int
    hit_share: float


class Worker(msgspec.Struct, frozen=True):
    """`busy` and `used` are means over time: shares of time in steps, and of KV blocks. `strip`: busy as it went."""

    name: str
    busy: float
    used: float
    prefilled: int  # requests
    decoded: int
    strip: list[float]


class Link(msgspec.Struct, frozen=True):
    """One direction. `peak` is the highest mean over one interval of the samples."""

    name: str
    mean: float
    peak: float
    utilisation: list[float]


class OtherLinks(msgspec.Struct, frozen=True):
    count: int
    mean: float
    peak: float


class Queues(msgspec.Struct, frozen=True):
    """Of all workers together, at the end of every interval; `used` and `busy` are means over workers."""

    interval_s: float
    running: list[float]
    waiting: list[float]
    queued_tokens: list[float]
    busy: list[float]
    used: list[float]


class Tenant(msgspec.Struct, frozen=True):
    name: str
    requests: int
    ttft: Spread | None
    both: float  # share that met both targets


class Report(msgspec.Struct, frozen=True):
    """See the top of this module for what the numbers mean."""

    cell: Cell
    slo: Slo
    requests: int
    ended: int  # without an error
    unfinished: int  # neither ended nor failed when the simulation stopped
    errors: dict[str, int]  # by kind
    duration_s: float
    throughput: Throughput
    latencies: Latencies
    attainment: Attainment
    kv: Kv
    curves: Curves
    queues: Queues
    strip_interval_s: float
    workers: list[Worker]
    busiest_links: list[Link]
    other_links: OtherLinks
    tenants: list[Tenant]  # none if nobody was named


def summarize(recorder: Recorder, cell: Cell, slo: Slo) -> Report:
    """Everything that can be said of a simulation that is over."""
    requests = recorder.requests()
    ended = (requests.error == 0) & ~np.isnan(requests.ended_s)
    met_ttft, met_tpot = _met(requests, ended, slo)
    duration_s = _duration_s(requests)
    busy = _busy(recorder)
    strips, together = _strips(busy)
    links, others = _links(recorder.links)
    return Report(
        cell=cell,
        slo=slo,
        requests=len(ended),
        ended=int(ended.sum()),
        unfinished=int(np.isnan(requests.ended_s).sum()),
        errors=_errors(recorder, requests),
        duration_s=duration_s,
        throughput=_throughput(requests, duration_s, cell.gpus),
        latencies=_latencies(requests, ended, recorder.gaps),
        attainment=_attainment(met_ttft, met_tpot, duration_s, cell.gpus),
        kv=_kv(requests),
        curves=_curves(requests, ended, recorder.gaps),
        queues=_queues(recorder, busy),
        strip_interval_s=recorder.interval_s * together,
        workers=_workers(recorder, requests, busy, strips),
        busiest_links=links,
        other_links=others,
        tenants=_tenants(recorder, requests, ended, met_ttft & met_tpot),
    )


# Requests


def _met(requests: Requests, ended: Flags, slo: Slo) -> tuple[Flags, Flags]:
    """Which requests met the target of their TTFT, and which that of their TPOT."""
    tpot_s = _tpot_s(requests)
    in_time = ended & (requests.first_s - requests.begun_s <= slo.ttft_s)
    return in_time, ended & (np.isnan(tpot_s) | (tpot_s <= slo.itl_s))


def _tpot_s(requests: Requests) -> Floats:
    """NaN for requests of fewer than two tokens."""
    gaps = np.where(requests.output_tokens > 1, requests.output_tokens - 1, np.nan)
    return (requests.last_s - requests.first_s) / gaps


def _duration_s(requests: Requests) -> float:
    """0 where nothing happened."""
    moments = np.concatenate([requests.begun_s, requests.last_s, requests.ended_s])
    moments = moments[~np.isnan(moments)]
    return float(moments.max() - moments.min()) if len(moments) else 0.0


def _errors(recorder: Recorder, requests: Requests) -> dict[str, int]:
    counts = np.bincount(requests.error, minlength=len(recorder.error_kinds)).tolist()
    return {kind: count for kind, count in sorted(zip(recorder.error_kinds, counts, strict=True)) if kind}


def _throughput(requests: Requests, duration_s: float, gpus: int) -> Throughput:
    prompt_tokens_per_s = per(int(requests.prompt_tokens.sum()), duration_s)
    output_tokens_per_s = per(int(requests.output_tokens.sum()), duration_s)
    return Throughput(
        requests_per_s=per(len(requests.error), duration_s),
        prompt_tokens_per_s=prompt_tokens_per_s,
        output_tokens_per_s=output_tokens_per_s,
        prompt_tokens_per_gpu_s=per(prompt_tokens_per_s, gpus),
        output_tokens_per_gpu_s=per(output_tokens_per_s, gpus),
    )


def _latencies(requests: Requests, ended: Flags, gaps: Histogram) -> Latencies:
    begun_s = requests.begun_s[ended]
    return Latencies(
        ttft=spread(requests.first_s[ended] - begun_s),
        itl=spread_of(gaps),
        tpot=spread(_tpot_s(requests)[ended]),
        second_token_gap=spread((requests.second_s - requests.first_s)[ended]),
        end_to_end=spread(requests.ended_s[ended] - begun_s),
        queue=spread(requests.queued_s[ended]),
    )


def _curves(requests: Requests, ended: Flags, gaps: Histogram) -> Curves:
    begun_s = requests.begun_s[ended]
    return Curves(
        ttft=curve(requests.first_s[ended] - begun_s),
        itl=gaps.curve(),
        tpot=curve(_tpot_s(requests)[ended]),
        second_token_gap=curve((requests.second_s - requests.first_s)[ended]),
        end_to_end=curve(requests.ended_s[ended] - begun_s),
        queue=curve(requests.queued_s[ended]),
    )


def _attainment(met_ttft: Flags, met_tpot: Flags, duration_s: float, gpus: int) -> Attainment:
    count, both = len(met_ttft), int((met_ttft & met_tpot).sum())
    goodput_per_s = per(both, duration_s)
    return Attainment(
        ttft=per(int(met_ttft.sum()), count),
        tpot=per(int(met_tpot.sum()), count),
        both=per(both, count),
        goodput_per_s=goodput_per_s,
        goodput_per_gpu_s=per(goodput_per_s, gpus),
    )


def _kv(requests: Requests) -> Kv:
    told = requests.decode_worker != NOBODY
    prompt_tokens, cached_tokens = int(requests.prompt_tokens[told].sum()), int(requests.cached_tokens.sum())
    return Kv(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        computed_tokens=int(requests.computed_tokens.sum()),
        moved_tokens=int(requests.moved_tokens.sum()),
        copied_bytes=int(requests.copied_bytes.sum()),
        preemptions=int(requests.preemptions.sum()),
        prefill_attempts=int(requests.attempts.sum()),
        hit_share=per(cached_tokens, prompt_tokens),
    )


def _tenants(recorder: Recorder, requests: Requests, ended: Flags, met: Flags) -> list[Tenant]:
    tenants = []
    for name, index in sorted((name, index) for index, name in enumerate(recorder.tenant_names)):
        own = requests.tenant == index
        if len(recorder.tenant_names) > 1 and own.any():
            ttft = spread((requests.first_s - requests.begun_s)[own & ended])
            tenants.append(Tenant(name, int(own.sum()), ttft, per(int((own & met).sum()), int(own.sum()))))
    return tenants


# The cluster


def _busy(recorder: Recorder) -> Floats:
    """[samples, workers]. A step counts where it ends; what is more than all of an interval was spent before it."""
    busy = recorder.workers.of("busy")
    for sample in range(len(busy) - 1, 0, -1):
        excess = np.maximum(busy[sample] - 1.0, 0.0)
        busy[sample] -= excess
        busy[sample - 1] += excess
    return np.minimum(busy, 1.0)


def _queues(recorder: Recorder, busy: Floats) -> Queues:
    workers = recorder.workers
    return Queues(
        interval_s=recorder.interval_s,
        running=_rounded(workers.of("running").sum(axis=1)),
        waiting=_rounded(workers.of("waiting").sum(axis=1)),
        queued_tokens=_rounded(workers.of("queued_tokens").sum(axis=1)),
        busy=_rounded(_mean_of_all(busy)),
        used=_rounded(_mean_of_all(workers.of("used"))),
    )


def _mean_of_all(values: Floats) -> Floats:
    means: Floats = values.sum(axis=1) / max(1, values.shape[1])
    return means


def _strips(busy: Floats) -> tuple[Floats, int]:
    """Not too many samples, and how many of `busy` make one."""
    together = max(1, math.ceil(len(busy) / STRIP_SAMPLES))
    starts = range(0, len(busy), together)
    strips = [busy[start : start + together].sum(axis=0) / len(busy[start : start + together]) for start in starts]
    return np.array(strips).reshape(len(strips), busy.shape[1]), together


def _workers(recorder: Recorder, requests: Requests, busy_shares: Floats, strips: Floats) -> list[Worker]:
    """In the order of their names, numbers in them counting as numbers."""
    places = {name: place for place, name in enumerate(recorder.workers.names)}
    busy, used = _means(busy_shares), _means(recorder.workers.of("used"))
    indices = {name: index for index, name in enumerate(recorder.worker_names)}
    prefilled, decoded = (
        np.bincount(column, minlength=len(indices)).tolist()
        for column in (requests.prefill_worker, requests.decode_worker)
    )
    workers: list[Worker] = []
    for name in sorted(places, key=_natural):
        place, row = places[name], indices.get(name, NOBODY)
        strip = _rounded(strips[:, place]) if len(workers) < STRIPS else []
        counts = (0, 0) if row == NOBODY else (prefilled[row], decoded[row])
        workers.append(Worker(name, busy[place], used[place], counts[0], counts[1], strip))
    return workers


def _natural(name: str) -> tuple[str, int]:
    """prefill-2 before prefill-10."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def _links(series: Series) -> tuple[list[Link], OtherLinks]:
    """Those that were used most, and the others together."""
    names, values = series.names, series.of("utilisation")
    means, peaks = _means(values), values.max(axis=0).tolist() if len(values) else []
    order = sorted(range(len(names)), key=lambda link: (-means[link], names[link]))
    busiest = [link for link in order[:BUSIEST_LINKS] if means[link] > 0]
    others = order[len(busiest) :]
    return (
        [Link(names[link], means[link], peaks[link], _rounded(values[:, link])) for link in busiest],
        OtherLinks(
            count=len(others),
            mean=per(math.fsum(means[link] for link in others), len(others)),
            peak=max((peaks[link] for link in others), default=0.0),
        ),
    )


# Numbers. Sums are exact (fsum), so that no processor's way of adding shows.


def _means(values: Floats) -> list[float]:
    """Over time, for each column."""
    return [math.fsum(column) / len(column) if len(column) else 0.0 for column in values.T]


def _rounded(values: Floats | Sequence[float]) -> list[float]:
    """For drawing: four digits are plenty."""
    return [round(float(value), 4) for value in values]
