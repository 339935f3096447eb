"""Workloads by name and settings, or by the path of a trace, as a command line takes them.

mooncake-like                        the stand-in for Mooncake's conversation trace
chat:rate=4,requests=500,seed=1      sessions of people, or `agent`; they start at `rate` per second
poisson:rate=4,input=2000,output=200       single requests of such means; also gamma, bursts, diurnal
conversation_trace.jsonl, azure.csv        Mooncake's format, Azure's format
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

from msgspec import Meta

from penstock.config import parse, settings, suggestion
from penstock.errors import SetupError
from penstock.workloads.generated import (
    AGENT,
    CHAT,
    Arrivals,
    Diurnal,
    Gamma,
    OnOff,
    Poisson,
    Shape,
    Spread,
    generated,
)
from penstock.workloads.mooncake_like import mooncake_like
from penstock.workloads.traces import azure, mooncake
from penstock.workloads.workload import Workload

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]


class Kind(Protocol):
    """Settings of a workload, whose fields are their names."""

    def workload(self) -> Workload: ...


@dataclass(frozen=True, slots=True)
class MooncakeLike:
    requests: Count = 12_031
    seed: int = 0

    def workload(self) -> Workload:
        return mooncake_like(self.seed, self.requests)


@dataclass(frozen=True, slots=True)
class Chat:
    """`rate` sessions start per second; `requests` are turns."""

    rate: Positive = 1.0
    requests: Count = 1_000
    seed: int = 0
    shape: ClassVar[Shape] = CHAT

    def workload(self) -> Workload:
        return generated(Poisson(self.rate), self.shape, self.seed).of_requests(self.requests)


@dataclass(frozen=True, slots=True)
class Agent(Chat):
    shape: ClassVar[Shape] = AGENT


@dataclass(frozen=True, slots=True)
class PoissonRequests:
    """Sessions of one turn: means of prompt and answer, in tokens, and their coefficients of variation."""

    rate: Positive = 1.0
    input: Positive = 1_000
    output: Positive = 250
    input_cv: NotNegative = 1.0
    output_cv: NotNegative = 1.0
    shared: Annotated[int, Meta(ge=0)] = 0
    requests: Count = 1_000
    seed: int = 0

    @property
    def arrivals(self) -> Arrivals:
        return Poisson(self.rate)

    def workload(self) -> Workload:
        shape = Shape(Spread(self.input, self.input_cv), Spread(self.output, self.output_cv), shared_tokens=self.shared)
        return generated(self.arrivals, shape, self.seed).limited(self.requests)


@dataclass(frozen=True, slots=True)
class GammaRequests(PoissonRequests):
    """`cv` above 1: arrivals cluster; below: they keep their distance."""

    cv: Positive = 2.0

    @property
    def arrivals(self) -> Arrivals:
        return Gamma(self.rate, self.cv)


@dataclass(frozen=True, slots=True)
class Bursts(PoissonRequests):
    """`rate` while they last, about `on` seconds; then nothing for about `off`."""

    on: Positive = 10.0
    off: Positive = 30.0

    @property
    def arrivals(self) -> Arrivals:
        return OnOff(self.rate, self.on, self.off)


@dataclass(frozen=True, slots=True)
class DiurnalRequests(PoissonRequests):
    """`rate` is the mean, at the peak it is `swing` of that more; one period takes `period` seconds."""

    swing: Share = 0.8
    period: Positive = 86_400.0
    peak: NotNegative = 50_400.0

    @property
    def arrivals(self) -> Arrivals:
        return Diurnal(self.rate, self.swing, self.period, self.peak)


KINDS: Mapping[str, type[Kind]] = {
    "mooncake-like": MooncakeLike,
    "chat": Chat,
    "agent": Agent,
    "poisson": PoissonRequests,
    "gamma": GammaRequests,
    "bursts": Bursts,
    "diurnal": DiurnalRequests,
}
TRACES = {".jsonl": mooncake, ".csv": azure}


def find(spec: str) -> Workload:
    """Raises SetupError for what there is not, or for a setting that does not fit; names the setting."""
    name = spec.partition(":")[0]
    if name in KINDS:
        return parse(KINDS[name], settings(spec, "workload"), f"workload {name!r}").workload()
    path = Path(spec)
    if path.suffix in TRACES:
        return TRACES[path.suffix](path)
    raise SetupError(
        f"there is no workload {spec!r}{suggestion(name, KINDS)}: there is {', '.join(KINDS)}, "
        f"and files that end in {' or '.join(TRACES)}"
    )
