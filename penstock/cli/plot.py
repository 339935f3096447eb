"""Charts as SVG: what was measured as dots, what was fitted as lines, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by everybody (Okabe, Ito)
_WIDTH, _HEIGHT = 460, 360  # of one chart, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 34, 46  # margins around the axes


@dataclass(frozen=True, slots=True)
class Series:
    label: str
    dots: Points
    line: Points


@dataclass(frozen=True, slots=True)
class Chart:
    """All coordinates are positive."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


def svg(charts: Sequence[Chart]) -> str:
    """A document with the charts side by side."""
    width = _WIDTH * len(charts)
    panels = "\n".join(
        f'<g transform="translate({i * _WIDTH} 0)">\n{_panel(chart)}\n</g>' for i, chart in enumerate(charts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{panels}\n</svg>\n'
    )


def _panel(chart: Chart) -> str:
    points = [point for series in chart.series for point in (*series.dots, *series.line)]
    x = _scale([x for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    y = _scale([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    return "\n".join([*_frame(chart, points, x, y), *_series(chart.series, x, y)])


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From a value to a pixel."""
    low, high = math.log(min(values)), math.log(max(values))
    room = 0.04 * (high - low) + 0.01
    pixels = (end - start) / (high - low + 2 * room)
    return lambda value: start + (math.log(value) - low + room) * pixels


def _frame(chart: Chart, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    yield f'<text x="{_LEFT}" y="20" font-size="13" font-weight="bold">{escape(chart.title)}</text>'
    for tick in _ticks([value for value, _ in points], (1, 2, 4, 8)):
        yield f'<path d="M{x(tick):.1f} {_TOP}V{bottom}" stroke="#ddd"/>'
        yield f'<text x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>'
    for tick in _ticks([value for _, value in points], (1, 2, 5)):
        yield f'<path d="M{_LEFT} {y(tick):.1f}H{right}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
    yield f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}" fill="none" stroke="#555"/>'
    middle = (_LEFT + right) / 2
    yield f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(chart.x_label)}</text>'
    turned = f"translate(14 {(_TOP + bottom) / 2}) rotate(-90)"
    yield f'<text transform="{turned}" text-anchor="middle">{escape(chart.y_label)}</text>'


def _series(series: Sequence[Series], x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[str]:
    for i, each in enumerate(series):
        colour = _COLOURS[i % len(_COLOURS)]
        corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in each.line)
        yield f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        yield from (f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in each.dots)
        height = _TOP + 16 + 15 * i
        yield f'<circle cx="{_LEFT + 12}" cy="{height - 4}" r="3" fill="{colour}"/>'
        yield f'<text x="{_LEFT + 20}" y="{height}">{escape(each.label)}</text>'


def _ticks(values: Sequence[float], leads: Sequence[int]) -> Iterator[float]:
    """Round numbers from the least to the greatest value: powers of two, or of ten."""
    low, high = min(values), max(values)
    step = 16 if leads[-1] == 8 else 10
    for power in range(math.floor(math.log(low, step)), math.ceil(math.log(high, step)) + 1):
        yield from (tick for lead in leads if low <= (tick := lead * float(step) ** power) <= high)
