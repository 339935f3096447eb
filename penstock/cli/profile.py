"""`penstock profile`: measures an engine's steps on this machine, fits a model of their time, and shows how well.

grid of mixes -> measure (in shuffled rounds) -> fit -> table, JSON, SVG
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from penstock import clock
from penstock.blocks import BlockId, KvLayout, Region
from penstock.cli.output import OnProgress, check_writable, progress, write
from penstock.cli.worker import build_engine, host_room_bytes
from penstock.config import EngineSettings, Model
from penstock.engine.api import Engine, Slice, Step
from penstock.errors import SetupError, UnsupportedModel
from penstock.plot import Axis, Chart, Series, svg
from penstock.policy.latency.shape import shape_of
from penstock.policy.latency.steps import Mix, StepModel, chunk, fit_steps, saturating_tokens
from penstock.request import Sampling

GREEDY = Sampling(max_tokens=1, temperature=0)
LONGEST_TOKENS = 32_768  # contexts beyond are predicted, not measured
LARGEST_SHARE = 0.05  # of the whole time: a single step that would take longer is left out
LEAST_STEPS = 6  # of a kind, if time allows
DISTURBED = 1.2  # median by 10th percentile; 1.05 is usual on an idle machine
FILL = 0x3C  # small numbers in every dtype; pages that nobody wrote are all one page, and too fast
PRICES = ("step_s", "token_s", "pair_s", "sequence_s", "read_s", "experts_s")


@dataclass(frozen=True, slots=True)
class Point:
    """A kind of step, and what `count` of them took: 10th, 50th and 90th percentile.

    Whatever else runs on the machine only ever adds time, so the first of them, `seconds`, counts as the step's own.
    """

    mix: Mix
    seconds: float
    median_s: float
    upper_s: float
    count: int


@dataclass(frozen=True, slots=True)
class Profile:
    """`saturating_tokens` is the smallest chunk that comes within 5 % of the best tokens per second, by the fit."""

    model: str
    device: str
    step_model: StepModel
    points: tuple[Point, ...]
    saturating_tokens: int
    saturated_tokens_per_s: float

    def error(self, point: Point) -> float:
        """Of the fit, relative to what was measured."""
        return self.step_model.seconds(point.mix.work) / point.seconds - 1


def profile(model: Model, settings: EngineSettings, seconds: float, plot: Path | None, as_json: bool) -> None:
    """The command. Raises SetupError where the start is refused, or the plot cannot be written."""
    if plot is not None:
        check_writable(plot)
    engine = build_engine(model, settings)
    with progress(f"profiling {model.name}") as on_progress:
        points = asyncio.run(measure(engine, seconds, host_room_bytes(), on_progress))
    result = fit(model.name, engine.info.device, points, expert_share(model.folder))
    if plot is not None:
        write(plot, svg(charts(result)))
    if as_json:
        print(json.dumps(as_builtins(result)))
    else:
        show(result, Console())


async def measure(engine: Engine, budget_s: float, room_bytes: int, on_progress: OnProgress) -> list[Point]:
    """Steps of many kinds, all in one region of their own, for about `budget_s` seconds once the engine is loaded.

    A round goes through all kinds in random order, so that a busy second of the machine spoils no kind, and leaves out
    those that have had their share of the time. The first goes from small to large and warms up; it counts only for
    kinds that come to no second one. Raises SetupError where memory or time is enough for no chunk at all.
    """
    async with engine:
        bench = _Bench(engine, engine.info.kv_room_bytes or room_bytes)
        started_s = clock.now()
        taken: dict[Mix, list[float]] = {}
        rate = 0.0  # the most tokens per second yet: tells what a larger step will take at least
        mixes = [mix for mix in grid(engine.info.max_context_tokens) if bench.has_room(mix)]
        for mix in mixes:
            tokens = mix.tokens + mix.sequences
            if tokens <= rate * LARGEST_SHARE * budget_s or not taken:
                taken[mix] = [await bench.step_s(mix)]
                rate = max(rate, tokens / taken[mix][0])
                on_progress((clock.now() - started_s) / budget_s)
        if not any(mix.tokens for mix in taken):
            raise SetupError(f"{engine.info.model} is too slow or its KV too large to profile here: raise --seconds")
        rng = Random(0)
        order = list(taken)
        while clock.now() - started_s < budget_s:
            rng.shuffle(order)
            share_s = (clock.now() - started_s) / len(order)
            for mix in order:
                if sum(taken[mix]) <= share_s or len(taken[mix]) < LEAST_STEPS:
                    taken[mix].append(await bench.step_s(mix))
                    on_progress((clock.now() - started_s) / budget_s)
    return [_point(mix, seconds[1:] or seconds) for mix, seconds in taken.items()]


def grid(max_context_tokens: int) -> list[Mix]:
    """The kinds of steps to measure, those with few tokens first."""
    longest = min(max_context_tokens, LONGEST_TOKENS)
    contexts = sorted({0, longest // 4, longest // 2, 3 * longest // 4})
    chunks = [Mix(2**power, context) for power in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13) for context in contexts]
    depths = sorted({min(16, longest - 1), longest // 8, longest // 2, longest - 1})
    decodes = [Mix(0, 0, batch, depth) for batch in (1, 2, 4, 8, 16, 32, 64) for depth in depths]
    both = [Mix(tokens, longest // 4, batch, longest // 4) for tokens in (32, 128, 256) for batch in (4, 16)]
    mixes = [mix for mix in (*chunks, *decodes, *both) if mix.context + mix.tokens <= longest]
    return sorted(mixes, key=lambda mix: mix.tokens + mix.sequences)


class _Bench:
    """Makes steps of mixes. Every sequence of a step has blocks of its own."""

    def __init__(self, engine: Engine, room_bytes: int) -> None:
        info = engine.info
        layout = info.layout
        wanted = max(_blocks_for(layout, mix) for mix in grid(info.max_context_tokens))
        blocks = max(1, min(wanted, room_bytes // layout.block_bytes))
        memory = np.full(blocks * layout.block_bytes, FILL, np.uint8).data if info.shares_memory else None
        self._region = Region("profile", 1, layout, blocks, memory)
        self._engine = engine
        self._vocab_size = info.vocab_size
        self._rng = Random(0)
        engine.attach(self._region)

    def has_room(self, mix: Mix) -> bool:
        return _blocks_for(self._region.layout, mix) <= self._region.blocks

    async def step_s(self, mix: Mix) -> float:
        """How long one such step takes, from the call to its tokens."""
        step = Step(self._region, list(self._slices(mix)))
        started_s = clock.now()
        await self._engine.step(step)
        return clock.now() - started_s

    def _slices(self, mix: Mix) -> Iterator[Slice]:
        free = (BlockId(block) for block in range(self._region.blocks))
        for tokens, start in _sequences(mix):
            ids = [self._rng.randrange(self._vocab_size) for _ in range(tokens)]
            yield Slice(ids, start, list(islice(free, self._region.layout.entries_for(start + tokens))), GREEDY)


def _sequences(mix: Mix) -> list[tuple[int, int]]:
    """(new tokens, cached tokens) of each."""
    return [(1, mix.depth)] * mix.sequences + ([(mix.tokens, mix.context)] if mix.tokens else [])


def _blocks_for(layout: KvLayout, mix: Mix) -> int:
    return sum(layout.entries_for(start + tokens) for tokens, start in _sequences(mix))


def _point(mix: Mix, seconds: Sequence[float]) -> Point:
    lower, median, upper = np.percentile(seconds, (10, 50, 90)).tolist()
    return Point(mix, lower, median, upper, len(seconds))


def fit(model: str, device: str, points: Sequence[Point], share: float) -> Profile:
    """`share` of its experts is what one token uses; 0 for a dense model."""
    fitted = fit_steps([point.mix.work for point in points], [point.seconds for point in points], share)
    tokens = saturating_tokens(fitted, 0, max(point.mix.tokens for point in points))
    rate = tokens / fitted.seconds(chunk(tokens))
    return Profile(model, device, fitted, tuple(points), tokens, rate)


def expert_share(folder: Path) -> float:
    """The share of its experts that a token of the model uses; 0 for a dense one, or one of an unknown family."""
    try:
        return shape_of(json.loads((folder / "config.json").read_bytes())).expert_share
    except UnsupportedModel:
        return 0.0


def show(profile: Profile, console: Console) -> None:
    """Prints every kind of step, then what it comes to."""
    titles = ("chunk", "decodes", "10 % ms", "50 %", "90 %", "fitted", "error")
    table = Table(*titles, title=f"{profile.model} on {profile.device}")
    for point in sorted(profile.points, key=lambda point: _order(point.mix)):
        mix = point.mix
        seconds = (point.seconds, point.median_s, point.upper_s, profile.step_model.seconds(mix.work))
        table.add_row(
            f"{mix.tokens} after {mix.context}" if mix.tokens else "",
            f"{mix.sequences} at {mix.depth}" if mix.sequences else "",
            *(f"{s * 1e3:.2f}" for s in seconds),
            f"{profile.error(point):+.0%}",
        )
    console.print(table)
    for line in _summary(profile):
        console.print(line, highlight=False, soft_wrap=True)


def _summary(profile: Profile) -> Iterator[str]:
    errors = sorted(abs(profile.error(point)) for point in profile.points)
    median, most = errors[len(errors) // 2], errors[int(0.9 * len(errors))]
    yield f"The fit is off by {median:.1%} in the median, {most:.0%} in one step of ten, {errors[-1]:.0%} at most."
    disturbed = sorted(point.median_s / point.seconds for point in profile.points)[len(profile.points) // 2]
    if disturbed > DISTURBED:
        yield f"The machine was busy: a usual step took {disturbed:.1f} times the best. Try when it is idle."
    model = profile.step_model
    for name, price, row, i in zip(PRICES, model.line.prices, model.line.covariance, range(len(PRICES)), strict=False):
        yield f"  {name:12}{price * 1e6:14.6g} us  +- {row[i] ** 0.5 * 1e6:.2g}"
    if model.free_tokens:
        yield f"  the first {model.free_tokens} tokens of a step are free"
    yield (
        f"A chunk of {profile.saturating_tokens} tokens saturates the device: "
        f"{profile.saturated_tokens_per_s:,.0f} tokens/s, within 5 % of the best."
    )


def as_builtins(profile: Profile) -> dict[str, object]:
    """For scripts. `step_model` reads back as a StepModel."""
    points = [asdict(point) | {"fitted_s": profile.step_model.seconds(point.mix.work)} for point in profile.points]
    return {
        "model": profile.model,
        "device": profile.device,
        "step_model": msgspec.to_builtins(profile.step_model),
        "saturating_tokens": profile.saturating_tokens,
        "saturated_tokens_per_s": profile.saturated_tokens_per_s,
        "points": points,
    }


def charts(profile: Profile) -> list[Chart]:
    """Time of chunks, tokens per second of chunks, and time of decode steps: measured and fitted."""
    chunks = [point for point in profile.points if point.mix.sequences == 0]
    decodes = [point for point in profile.points if point.mix.tokens == 0]

    def by_context(y: Callable[[Mix, float], float]) -> list[Series]:
        return [
            _series(profile, f"after {context} tokens", points, lambda mix: mix.tokens, y)
            for context, points in _grouped(chunks, lambda mix: mix.context)
        ]

    by_depth = [
        _series(profile, f"{depth} tokens deep", points, lambda mix: mix.sequences, lambda mix, seconds: seconds * 1e3)
        for depth, points in _grouped(decodes, lambda mix: mix.depth)
    ]
    tokens, time = Axis("tokens in a chunk", "log2"), Axis("ms", "log10")
    return [
        Chart("Prefill: time of a chunk", tokens, time, by_context(lambda mix, seconds: seconds * 1e3)),
        Chart(
            "Prefill: throughput",
            tokens,
            Axis("tokens/s", "log10"),
            by_context(lambda mix, seconds: mix.tokens / seconds),
        ),
        Chart("Decode: time of a step", Axis("sequences in a step", "log2"), time, by_depth),
    ]


def _grouped(points: Sequence[Point], key: Callable[[Mix], int]) -> Iterator[tuple[int, list[Point]]]:
    for value in sorted({key(point.mix) for point in points}):
        yield value, [point for point in points if key(point.mix) == value]


def _series(
    profile: Profile,
    label: str,
    points: Sequence[Point],
    x: Callable[[Mix], float],
    y: Callable[[Mix, float], float],
) -> Series:
    """`y` of the seconds that a mix took, and of those that it should have taken."""
    dots = [(x(point.mix), y(point.mix, point.seconds)) for point in points]
    line = [(x(point.mix), y(point.mix, profile.step_model.seconds(point.mix.work))) for point in points]
    return Series(label, dots, line)


def _order(mix: Mix) -> tuple[int, ...]:
    """Chunks, then decodes, then both."""
    kind = (mix.sequences > 0) + (mix.sequences > 0 and mix.tokens > 0)
    return (kind, mix.context, mix.depth, mix.tokens, mix.sequences)
