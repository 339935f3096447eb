"""What `penstock bench` is to measure: its flags as a plan, all checked before the first request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from penstock import clock
from penstock.cli.output import listed, positive
from penstock.config import LoadSettings, LoadTargetSettings, PromptSettings
from penstock.errors import SetupError
from penstock.load.prompts import Prefix
from penstock.load.report import Slo
from penstock.workloads import named
from penstock.workloads.generated import Arrivals, Constant, Gamma, Poisson, Shape, Spread, generated
from penstock.workloads.workload import Workload

DEFAULT_CONCURRENCY = 8
DEFAULT_DURATION_S = 20.0
TURNS_CV = 0.5


@dataclass(frozen=True, slots=True)
class Level:
    """One place in a sweep: `load` is what `value` is of, "rate", "concurrency" or "speed"."""

    load: str
    value: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, at each of `levels`. A measurement ends after `requests` or `duration_s`, what comes first.

    There are no more than `most` requests, if that is known.
    """

    levels: tuple[Level, ...]
    workload: Callable[[Level, int], Workload]  # at this level, with this seed
    name: str
    requests: int | None
    most: int | None
    duration_s: float | None
    warmup: int
    seed: int
    prefix: Prefix
    slo: Slo

    def sessions(self, level: Level, salt: str) -> Workload:
        """Other salts, other text: a server has nothing of one measurement in its cache when the next one begins."""
        workload = self.workload(level, self.seed).apart(f"{salt} {self.seed}")
        return workload if self.requests is None else workload.of_requests(self.requests)


def plan_of(load: LoadSettings, prompts: PromptSettings, targets: LoadTargetSettings) -> Plan:
    """Raises SetupError for what cannot be, and for a flag that would change nothing."""
    is_named = prompts.trace is not None or bool(prompts.workload)
    levels = levels_of(load, is_named)
    check_numbers(load, prompts)
    check_uses(load, prompts, levels[0].load, is_named)
    duration_s = load.duration_s
    if not is_named and load.requests is None:
        duration_s = duration_s or DEFAULT_DURATION_S
    workload, name, most = named_workload(prompts) if is_named else (*made_workload(load, prompts), None)
    end_to_end_s = None if targets.slo_e2e is None else positive("--slo-e2e", targets.slo_e2e)
    return Plan(
        levels=levels,
        workload=workload,
        name=name + prefix_name(prompts),
        requests=load.requests,
        most=min((limit for limit in (load.requests, most) if limit is not None), default=None),
        duration_s=duration_s,
        warmup=load.warmup,
        seed=clock.chance().randrange(1 << 31) if load.seed is None else load.seed,
        prefix=Prefix(prompts.prefix_tokens, prompts.prefixes),
        slo=Slo(positive("--slo-ttft", targets.slo_ttft), positive("--slo-itl", targets.slo_itl), end_to_end_s),
    )


def check_numbers(load: LoadSettings, prompts: PromptSettings) -> None:
    """Raises SetupError."""
    limits: tuple[tuple[float, Mapping[str, float | None]], ...] = (
        (
            1,
            {
                "requests": load.requests,
                "prefixes": prompts.prefixes,
                "max-isl": prompts.max_isl,
                "max-osl": prompts.max_osl,
                "isl": prompts.isl,
                "osl": prompts.osl,
                "turns": prompts.turns,
                "turn-tokens": prompts.turn_tokens,
            },
        ),
        (
            0,
            {
                "warmup": load.warmup,
                "prefix-tokens": prompts.prefix_tokens,
                "isl-cv": prompts.isl_cv,
                "osl-cv": prompts.osl_cv,
                "pause-s": prompts.pause_s,
            },
        ),
    )
    for least, values in limits:
        for flag, value in values.items():
            if value is not None and not least <= value < math.inf:
                raise SetupError(f"--{flag} {value:g} must be {least:g} or more")
    positive("--burstiness", load.burstiness)
    if load.duration_s is not None:
        positive("--duration-s", load.duration_s)


def check_uses(load: LoadSettings, prompts: PromptSettings, kind: str, is_named: bool) -> None:
    """Raises SetupError for a flag that goes with another one which is not there."""
    made = ("isl", "osl", "isl_cv", "osl_cv", "turns", "turn_tokens", "pause_s")
    for names, is_used, where in (
        (("arrivals", "burstiness"), kind == "rate", "--rate"),
        (("burstiness",), load.arrivals == "poisson", "--arrivals poisson"),
        (made, not is_named, "prompts that are made up, not for a --trace or --workload"),
        (("max_isl", "max_osl"), is_named, "a --trace or --workload"),
        (("turn_tokens", "pause_s"), prompts.turns > 1, "--turns above 1"),
        (("prefixes",), prompts.prefix_tokens > 0, "--prefix-tokens"),
    ):
        given = [name for name in names if is_given(load, name) or is_given(prompts, name)]
        if given and not is_used:
            raise SetupError(f"--{given[0].replace('_', '-')} is for {where}")


def is_given(settings: LoadSettings | PromptSettings, name: str) -> bool:
    """Whether there is such a setting, and it is not what it is by default."""
    default = getattr(type(settings)(), name, None)
    return getattr(settings, name, default) != default


def levels_of(load: LoadSettings, is_named: bool) -> tuple[Level, ...]:
    """Raises SetupError for two kinds of load, and for one that does not fit what is asked."""
    given = {"rate": load.rate, "concurrency": load.concurrency, "speed": load.speed}
    kinds = [kind for kind, texts in given.items() if texts]
    if len(kinds) > 1:
        raise SetupError(f"--{kinds[0]} and --{kinds[1]} are two kinds of load: give one of them")
    if not kinds:
        return (Level("speed", 1.0),) if is_named else (Level("concurrency", DEFAULT_CONCURRENCY),)
    (kind,) = kinds
    if kind == "rate" and is_named:
        raise SetupError("--rate is for prompts of --isl; a trace or workload has its own times: use --speed")
    if kind == "speed" and not is_named:
        raise SetupError("--speed is for a --trace or --workload: use --rate")
    values = [number(f"--{kind}", text) for text in listed(f"--{kind}", given[kind])]
    if kind == "concurrency" and any(value != int(value) for value in values):
        raise SetupError(f"--concurrency {','.join(given[kind])} must be whole numbers")
    return tuple(Level(kind, value) for value in dict.fromkeys(values))


def number(flag: str, text: str) -> float:
    try:
        return positive(flag, float(text))
    except ValueError:
        raise SetupError(f"{flag} {text} is no number: write one or more, such as 1,2,4") from None


def made_workload(load: LoadSettings, prompts: PromptSettings) -> tuple[Callable[[Level, int], Workload], str]:
    """Sessions of given lengths, and what to call them."""
    shape = Shape(
        first_tokens=Spread(prompts.isl, prompts.isl_cv),
        output_tokens=Spread(prompts.osl, prompts.osl_cv),
        turns=Spread(prompts.turns, TURNS_CV if prompts.turns > 1 else 0.0),
        later_tokens=Spread(prompts.turn_tokens, prompts.isl_cv),
        pause_s=Spread(prompts.pause_s, 1.0) if prompts.pause_s else Spread(0.0),
    )
    arrivals = arrivals_of(load)
    name = f"ISL {prompts.isl:g}, OSL {prompts.osl:g}"
    if prompts.turns > 1:
        name += f", {prompts.turns:g} turns of {prompts.turn_tokens:g}"
    return lambda level, seed: generated(arrivals(level.value), shape, seed), name


def arrivals_of(load: LoadSettings) -> Callable[[float], Arrivals]:
    """By rate; where there is none, times do not matter."""
    if load.arrivals == "constant":
        return Constant
    if load.burstiness == 1:
        return Poisson
    return lambda per_s: Gamma(per_s, load.burstiness**-0.5)


def named_workload(prompts: PromptSettings) -> tuple[Callable[[Level, int], Workload], str, int]:
    """A trace or a kind of workload, its name and its requests. All are read, mistakes found. Raises SetupError."""
    if prompts.trace is not None and prompts.workload:
        raise SetupError("--trace and --workload are two workloads: name one")
    name = str(prompts.trace or prompts.workload)
    limits = [1 << 31 if limit is None else limit for limit in (prompts.max_isl, prompts.max_osl)]
    workload = named.find(name).truncated(*limits)
    if not (requests := sum(len(session.turns) for session in workload)):
        raise SetupError(f"{name} has no requests")
    return lambda level, seed: workload.faster(level.value) if level.load == "speed" else workload, name, requests


def prefix_name(prompts: PromptSettings) -> str:
    if not prompts.prefix_tokens:
        return ""
    return f" after {prompts.prefix_tokens:,} shared" + f" of {prompts.prefixes}" * (prompts.prefixes > 1)


def fields_of(body: str) -> Mapping[str, object]:
    """Raises SetupError for what is no JSON object."""
    try:
        return msgspec.json.decode(body or "{}", type=dict[str, object])
    except msgspec.DecodeError as error:
        raise SetupError(f"--body {body} is no JSON object: {error}") from None
