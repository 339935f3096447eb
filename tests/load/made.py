"""Measurements that never were: what a Recorder would have been told of them, request by request."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from penstock.load.record import UNKNOWN, Recorder, Usage
from penstock.load.report import Cell, Report, Slo, summarize

SLO = Slo(ttft_s=1.0, itl_s=0.1)


@dataclass(frozen=True)
class Made:
    """One request: when it was due and sent, its events, and its end; `ended_s` None: it was still under way."""

    sent_s: float
    events_s: tuple[float, ...] = ()
    ended_s: float | None = None
    due_s: float | None = None
    asked: int = 1
    usage: Usage = field(default_factory=Usage)
    error: str = ""

    @property
    def is_good(self) -> bool:
        return self.ended_s is not None and not self.error

    @property
    def tokens(self) -> int:
        return len(self.events_s) if self.usage.output_tokens == UNKNOWN else self.usage.output_tokens

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.events_s)]

    @property
    def tpot_s(self) -> float | None:
        if self.tokens < 2 or len(self.events_s) < 2:
            return None
        return (self.events_s[-1] - self.events_s[0]) / (self.tokens - 1)


def cell(level: float = 8, load: str = "concurrency") -> Cell:
    return Cell("http://127.0.0.1:1", "tiny", "chat", "ISL 9, OSL 3", "words", load, level, seed=1)


def recorded(requests: list[Made]) -> Recorder:
    """What a Recorder is told of these, in order of time."""
    recorder = Recorder()
    rows: dict[int, int] = {}

    def send(number: int, made: Made) -> None:
        rows[number] = recorder.send(made.sent_s, made.due_s, made.asked)

    def end(number: int, made: Made, at_s: float) -> None:
        recorder.end(rows[number], at_s, made.usage, made.error)

    told = []
    for number, made in enumerate(requests):
        told.append((made.sent_s, 0, number, send, (number, made)))
        told += [
            (at_s, 1, number, lambda number, at_s: recorder.event(rows[number], at_s), (number, at_s))
            for at_s in made.events_s
        ]
        if made.ended_s is not None:
            told.append((made.ended_s, 2, number, end, (number, made, made.ended_s)))
    for _, _, _, tell, arguments in sorted(told, key=lambda one: one[:3]):
        tell(*arguments)  # type: ignore[operator]
    return recorder


def report(requests: list[Made], level: float = 8, slo: Slo = SLO, load: str = "concurrency") -> Report:
    return summarize(recorded(requests), cell(level, load), slo)
