"""What one measurement comes to.

    TTFT         from the request to its first event with a token; a connection that had to be made is part of it
    ITL          between two events with tokens of a request: between tokens, if every event has one
    TPOT         (last event - first) / (output tokens - 1), one number per request
    latencies    of requests that ended without an error; ITL of all that came
    throughput   of requests that ended without an error, and tokens that came, over the duration
    attainment   share of all requests, those with errors included, that met a target
    goodput      requests per second that met all targets
    duration     from the first request to the last event or end of any request
    lateness     how long after it was due a request was sent: where this is not small, the generator was too slow

Tokens are the server's own count (`usage`); where it tells none, an event is taken for a token.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.load.record import UNKNOWN, Ints, Recorder, Requests
from penstock.measures import Curve, Floats, Spread, curve, per, spread, spread_of

POINTS = 200  # of what is drawn over time, at most
LATE_S = 0.02  # p99 of lateness beyond which the generator is to blame
BUSY = 0.9  # share of a core beyond which it is

Flags = NDArray[np.bool_]


class Slo(msgspec.Struct, frozen=True):
    """What a request should keep to: its TTFT, its TPOT as the mean time between its tokens, and all of it."""

    ttft_s: float = 2.0
    itl_s: float = 0.05
    end_to_end_s: float | None = None


class Cell(msgspec.Struct, frozen=True):
    """What was measured: one place in a sweep. `load` is the kind of `level`."""

    url: str
    model: str
    endpoint: str
    workload: str
    prompts: str
    load: str  # "rate", "concurrency" or "speed"
    level: float
    seed: int

    @property
    def title(self) -> str:
        return f"{self.load} {self.level:g}"


class Latencies(msgspec.Struct, frozen=True):
    """None where there is no value at all."""

    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    second_token_gap: Spread | None
    end_to_end: Spread | None


class Curves(msgspec.Struct, frozen=True):
    """Cumulative distributions."""

    ttft: Curve
    itl: Curve
    tpot: Curve
    second_token_gap: Curve
    end_to_end: Curve
    lateness: Curve


class Throughput(msgspec.Struct, frozen=True):
    """Per second of the duration."""

    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


class Tokens(msgspec.Struct, frozen=True):
    """Sums over requests that ended without an error, and how the server told them.

    `cached` and `hit_share` are None where it tells nothing of its cache.
    """

    prompt: int
    cached: int | None
    output: int
    hit_share: float | None
    per_event: float
    unknown: int  # requests whose tokens the server did not count
    short: int  # requests with fewer tokens than were asked for


class Attainment(msgspec.Struct, frozen=True):
    """Shares of all requests, and how many a second met all targets."""

    ttft: float
    tpot: float
    end_to_end: float
    all: float
    goodput_per_s: float


class Generated(msgspec.Struct, frozen=True):
    """What the generator did: how late it sent, where requests were due at a time, and how busy it was itself."""

    lateness: Spread | None
    busy: float  # of one core


class Course(msgspec.Struct, frozen=True):
    """As time went by: requests under way at the end of every interval, and events with tokens per second in it."""

    interval_s: float
    running: list[int]
    events_per_s: list[float]


class Report(msgspec.Struct, frozen=True):
    """See the top of this module for what the numbers mean."""

    cell: Cell
    slo: Slo
    requests: int
    ended: int  # without an error
    unfinished: int  # under way when the measurement was stopped
    errors: dict[str, int]  # by kind
    duration_s: float
    throughput: Throughput
    tokens: Tokens
    latencies: Latencies
    attainment: Attainment
    generated: Generated
    curves: Curves
    course: Course


def summarize(recorder: Recorder, cell: Cell, slo: Slo) -> Report:
    """Everything that can be said of a measurement that is over."""
    requests = recorder.requests()
    ended = (requests.error == 0) & ~np.isnan(requests.ended_s)
    outputs = output_tokens(requests)
    begin_s, duration_s = _extent(requests)
    values = _values(requests, ended, outputs)
    spreads = {name: spread(found) for name, found in values.items()}
    lateness_s = requests.sent_s - requests.due_s
    return Report(
        cell=cell,
        slo=slo,
        requests=len(ended),
        ended=int(ended.sum()),
        unfinished=int(np.isnan(requests.ended_s).sum()),
        errors=_errors(recorder, requests),
        duration_s=duration_s,
        throughput=_throughput(requests, ended, outputs, duration_s),
        tokens=_tokens(requests, ended, outputs),
        latencies=Latencies(itl=spread_of(recorder.gaps), **spreads),
        attainment=_attainment(requests, ended, outputs, duration_s, slo),
        generated=Generated(spread(lateness_s), per(recorder.cpu_s, duration_s)),
        curves=Curves(
            itl=recorder.gaps.curve(),
            lateness=curve(lateness_s),
            **{name: curve(found) for name, found in values.items()},
        ),
        course=_course(recorder, requests, begin_s, duration_s),
    )


def output_tokens(requests: Requests) -> Ints:
    """As the server counted, else events. What of an answer came before it failed is counted so too."""
    return np.where(requests.output_tokens == UNKNOWN, requests.events, requests.output_tokens)


def tpot_s(requests: Requests, outputs: Ints) -> Floats:
    """NaN for requests of fewer than two tokens, and those whose tokens all came in one event."""
    gaps = np.where((outputs > 1) & (requests.events > 1), outputs - 1, np.nan)
    return (requests.last_s - requests.first_s) / gaps


def complaints(report: Report) -> list[str]:
    """What people should know before they believe the numbers."""
    lines = [f"{count:,} x {kind}" for kind, count in report.errors.items()]
    tokens, generated = report.tokens, report.generated
    if report.unfinished:
        lines.append(f"{report.unfinished:,} requests were under way when it was stopped")
    if tokens.unknown:
        lines.append(f"{tokens.unknown:,} answers without usage: an event was taken for a token")
    if tokens.per_event > 1.05:
        lines.append(f"{tokens.per_event:.2f} tokens per event: ITL is the time between events, TPOT between tokens")
    if tokens.short:
        lines.append(f"{tokens.short:,} answers were shorter than asked for")
    if generated.lateness is not None and generated.lateness.p99 > LATE_S:
        lines.append(
            f"requests were sent late (p99 {generated.lateness.p99 * 1e3:.0f} ms): this generator was too slow, or its "
            "host too busy"
        )
    if generated.busy > BUSY:
        lines.append(f"the generator took {generated.busy:.0%} of a core: times are its own too; use several")
    return lines


# Requests


def _values(requests: Requests, ended: Flags, outputs: Ints) -> dict[str, Floats]:
    """Seconds, by the names of `Latencies`."""
    sent_s = requests.sent_s[ended]
    return {
        "ttft": requests.first_s[ended] - sent_s,
        "tpot": tpot_s(requests, outputs)[ended],
        "second_token_gap": (requests.second_s - requests.first_s)[ended],
        "end_to_end": requests.ended_s[ended] - sent_s,
    }


def _extent(requests: Requests) -> tuple[float, float]:
    """When it began, and the duration; 0 where nothing happened."""
    moments = np.concatenate([requests.sent_s, requests.last_s, requests.ended_s])
    moments = moments[~np.isnan(moments)]
    return (float(moments.min()), float(moments.max() - moments.min())) if len(moments) else (0.0, 0.0)


def _errors(recorder: Recorder, requests: Requests) -> dict[str, int]:
    counts = np.bincount(requests.error, minlength=len(recorder.error_kinds)).tolist()
    return {kind: count for kind, count in sorted(zip(recorder.error_kinds, counts, strict=True)) if kind and count}


def _throughput(requests: Requests, ended: Flags, outputs: Ints, duration_s: float) -> Throughput:
    prompt = _known_sum(requests.prompt_tokens[ended])
    output = int(outputs.sum())
    return Throughput(
        requests_per_s=per(int(ended.sum()), duration_s),
        prompt_tokens_per_s=per(prompt, duration_s),
        output_tokens_per_s=per(output, duration_s),
        total_tokens_per_s=per(prompt + output, duration_s),
    )


def _tokens(requests: Requests, ended: Flags, outputs: Ints) -> Tokens:
    prompt = _known_sum(requests.prompt_tokens[ended])
    cached = requests.cached_tokens[ended]
    is_told = bool((cached != UNKNOWN).any())
    whole = outputs[ended]
    return Tokens(
        prompt=prompt,
        cached=_known_sum(cached) if is_told else None,
        output=int(whole.sum()),
        hit_share=per(_known_sum(cached), prompt) if is_told else None,
        per_event=per(int(whole.sum()), int(requests.events[ended].sum())),
        unknown=int((requests.output_tokens[ended] == UNKNOWN).sum()),
        short=int((whole < requests.asked_tokens[ended]).sum()),
    )


def _known_sum(counts: Ints) -> int:
    return int(counts[counts != UNKNOWN].sum())


def _attainment(requests: Requests, ended: Flags, outputs: Ints, duration_s: float, slo: Slo) -> Attainment:
    tpot = tpot_s(requests, outputs)
    limit_s = math.inf if slo.end_to_end_s is None else slo.end_to_end_s
    in_time = ended & (requests.first_s - requests.sent_s <= slo.ttft_s)
    steady = ended & (np.isnan(tpot) | (tpot <= slo.itl_s))
    whole = ended & (requests.ended_s - requests.sent_s <= limit_s)
    count, every = len(ended), int((in_time & steady & whole).sum())
    return Attainment(
        ttft=per(int(in_time.sum()), count),
        tpot=per(int(steady.sum()), count),
        end_to_end=per(int(whole.sum()), count),
        all=per(every, count),
        goodput_per_s=per(every, duration_s),
    )


def _course(recorder: Recorder, requests: Requests, begin_s: float, duration_s: float) -> Course:
    """Intervals of whole seconds."""
    seconds = max(1, math.ceil(duration_s))
    interval_s = math.ceil(seconds / POINTS)
    edges = begin_s + interval_s * np.arange(1, math.ceil(seconds / interval_s) + 1)
    ended_s = np.sort(requests.ended_s[~np.isnan(requests.ended_s)])
    running = np.searchsorted(requests.sent_s, edges, "right") - np.searchsorted(ended_s, edges, "right")
    events = recorder.events_per_second
    rates = [sum(events[at : at + interval_s]) / interval_s for at in range(0, len(edges) * interval_s, interval_s)]
    return Course(float(interval_s), running.tolist(), rates)
