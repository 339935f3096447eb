"""Charts as SVG: dots, lines, both, on linear or logarithmic axes, with a legend below and values on hovering.

A chart says with classes what is what and leaves colours to a style sheet: `svg` makes a document that brings its own,
a page that holds several panels, each of `panel`, takes `style` for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Points = Sequence[tuple[float, float]]
Scale = Literal["linear", "log10", "log2"]  # log2 has ticks at powers of two
Place = Callable[[float], float]  # from a value to a pixel

COLOURS = 8
_WIDTH, _PLOT_HEIGHT = 460, 280  # of one chart, and of its axes, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 46  # margins around the axes
_CHARACTER = 6.4  # pixels; a little more than common sans-serif fonts need at 11 px
_LEGEND_LINE = 17
_HOVER_POINTS = 40  # of a line that can be asked for their values


@dataclass(frozen=True, slots=True)
class Palette:
    """Lines and dots take the colours in turn; the first are told apart by everybody (after Okabe and Ito)."""

    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]


LIGHT = Palette(
    paper="#ffffff",
    ink="#1d2530",
    faint="#5f6b7a",
    grid="#dfe3e8",
    series=("#0072b2", "#d55e00", "#009e73", "#8e44ad", "#b8860b", "#3a3f47", "#12a5bd", "#d9639f"),
)
DARK = Palette(
    paper="#161b22",
    ink="#e2e7ee",
    faint="#98a4b3",
    grid="#2c343f",
    series=("#56b4e9", "#ff8a3c", "#2fd0a0", "#c58cf0", "#f0c040", "#d5dae1", "#3fd6ea", "#ff9ecb"),
)


@dataclass(frozen=True, slots=True)
class Axis:
    """`label` tells the unit. A linear axis of `least` and `most` has these ends whatever the values are."""

    label: str
    scale: Scale = "linear"
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    label: str
    dots: Points = ()
    line: Points = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """Coordinates on logarithmic axes are positive. `ticks` replaces the numbers of the x axis by names.

    `marks` are values of the x axis with names, each an upright line.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    ticks: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[float, str]] = ()


def svg(charts: Sequence[Chart]) -> str:
    """A document with the charts side by side, in light colours."""
    width, height = _WIDTH * len(charts), max(map(_height, charts))
    panels = "\n".join(f'<g transform="translate({i * _WIDTH} 0)">\n{_drawn(c)}\n</g>' for i, c in enumerate(charts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'class="chart">\n<style>{style(LIGHT)}</style>\n'
        f'<rect width="100%" height="100%" class="paper"/>\n{panels}\n</svg>\n'
    )


def panel(chart: Chart) -> str:
    """One chart as an element of an HTML page that has a `style`."""
    height = _height(chart)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(chart.title)}">\n{_drawn(chart)}\n</svg>'
    )


def style(palette: Palette) -> str:
    """Rules for charts."""
    return "\n".join(
        [
            ".chart{font:11px system-ui,sans-serif}",
            f".chart .paper{{fill:{palette.paper}}}",
            f".chart text{{fill:{palette.ink}}}",
            f".chart .tick,.chart .label{{fill:{palette.faint}}}",
            ".chart .title{font-size:13px;font-weight:600}",
            f".chart .grid{{stroke:{palette.grid};fill:none}}",
            f".chart .frame{{stroke:{palette.faint};fill:none}}",
            f".chart .mark{{stroke:{palette.faint};stroke-dasharray:2 3;fill:none}}",
            ".chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round}",
            ".chart .line:hover{stroke-width:3.5}",
            ".chart .dashed{stroke-dasharray:5 3}",
            ".chart .value{fill:transparent}",
            *(f".chart .s{i}{{stroke:{colour}}}" for i, colour in enumerate(palette.series)),
            *(f".chart .dot.s{i}{{fill:{colour};stroke:none}}" for i, colour in enumerate(palette.series)),
        ]
    )


# Drawing


def _drawn(chart: Chart) -> str:
    points = [point for series in chart.series for point in (*series.dots, *series.line)]
    if not points:
        return "\n".join([_title(chart), f'<text x="{_LEFT}" y="60" class="label">nothing to show</text>'])
    xs, ys = [x for x, _ in (*points, *chart.marks)], [y for _, y in points]
    x = _place(chart.x, xs, _LEFT, _WIDTH - _RIGHT)
    y = _place(chart.y, ys, _TOP + _PLOT_HEIGHT, _TOP)
    x_ticks = chart.ticks or [(tick, _number(tick)) for tick in _ticks(chart.x, xs)]
    y_ticks = [(tick, _number(tick)) for tick in _ticks(chart.y, ys)]
    return "\n".join(
        [
            _title(chart),
            *_frame(chart, [(x(tick), name) for tick, name in x_ticks], [(y(tick), name) for tick, name in y_ticks]),
            *(part for value, name in chart.marks for part in _mark(x(value), name)),
            *(part for number, series in enumerate(chart.series) for part in _series(number, series, x, y)),
            *_legend(chart.series),
        ]
    )


def _title(chart: Chart) -> str:
    return f'<text x="{_LEFT}" y="20" class="title">{escape(chart.title)}</text>'


def _frame(chart: Chart, x_ticks: Iterable[tuple[float, str]], y_ticks: Iterable[tuple[float, str]]) -> Iterator[str]:
    """Grid, numbers and labels; ticks are at pixels."""
    bottom, right = _TOP + _PLOT_HEIGHT, _WIDTH - _RIGHT
    for x, name in x_ticks:
        yield f'<path d="M{x:.1f} {_TOP}V{bottom}" class="grid"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle" class="tick">{escape(name)}</text>'
    for y, name in y_ticks:
        yield f'<path d="M{_LEFT} {y:.1f}H{right}" class="grid"/>'
        yield f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" class="tick">{escape(name)}</text>'
    yield f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{_PLOT_HEIGHT}" class="frame"/>'
    middle = (_LEFT + right) / 2
    yield f'<text x="{middle}" y="{bottom + 33}" text-anchor="middle" class="label">{escape(chart.x.label)}</text>'
    turned = f"translate(14 {(_TOP + bottom) / 2}) rotate(-90)"
    yield f'<text transform="{turned}" text-anchor="middle" class="label">{escape(chart.y.label)}</text>'


def _mark(x: float, name: str) -> Iterator[str]:
    """A line at a pixel, its name beside it: where it stands in the way of no rising curve."""
    yield f'<path d="M{x:.1f} {_TOP}V{_TOP + _PLOT_HEIGHT}" class="mark"/>'
    is_right = x > (_LEFT + _WIDTH) / 2
    shift, anchor, y = (-4, "end", _TOP + _PLOT_HEIGHT - 6) if is_right else (4, "start", _TOP + 14)
    yield f'<text x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}" class="label">{escape(name)}</text>'


def _series(number: int, series: Series, x: Place, y: Place) -> Iterator[str]:
    colour, label = _colour(number), escape(series.label)
    if series.line:
        corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in series.line)
        yield f'<polyline points="{corners}" class="line {colour}"><title>{label}</title></polyline>'
        yield from (
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5" class="value"><title>{label}: {_at(a, b)}</title></circle>'
            for a, b in series.line[:: -(-len(series.line) // _HOVER_POINTS)]
        )
    for a, b in series.dots:
        place = f'cx="{x(a):.1f}" cy="{y(b):.1f}"'
        yield f'<circle {place} r="3" class="dot {colour}"><title>{label}: {_at(a, b)}</title></circle>'


def _colour(number: int) -> str:
    """Classes of the series of that number; where colours come again, lines are dashed."""
    return f"s{number % COLOURS}{' dashed' if number // COLOURS % 2 else ''}"


def _at(x: float, y: float) -> str:
    return f"{y:.4g} at {x:.4g}"


# Legends: entries in rows below the axes


def _height(chart: Chart) -> int:
    rows = max((row for _, row in _entries(chart.series)), default=-1) + 1
    return _TOP + _PLOT_HEIGHT + _BOTTOM + _LEGEND_LINE * rows


def _entries(series: Sequence[Series]) -> list[tuple[float, int]]:
    """Where the entry of each begins, and in which row. A single series without a name has none."""
    if [each.label for each in series] == [""]:
        return []
    entries: list[tuple[float, int]] = []
    x, row = float(_LEFT), 0
    for each in series:
        width = 36 + _CHARACTER * len(each.label)
        if x > _LEFT and x + width > _WIDTH:
            x, row = float(_LEFT), row + 1
        entries.append((x, row))
        x += width
    return entries


def _legend(series: Sequence[Series]) -> Iterator[str]:
    for number, (x, row) in enumerate(_entries(series)):
        y = _TOP + _PLOT_HEIGHT + _BOTTOM + _LEGEND_LINE * row + 4
        yield f'<path d="M{x:.1f} {y}h16" class="line {_colour(number)}"/>'
        yield f'<text x="{x + 21:.1f}" y="{y + 4}">{escape(series[number].label)}</text>'


# Axes


def _ends(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """What the axis reaches from and to: logarithms on a logarithmic one."""
    if axis.scale != "linear":
        low, high = math.log(min(values)), math.log(max(values))
        room = 0.04 * (high - low) + 0.01
        return low - room, high + room
    low = min(values) if axis.least is None else axis.least
    high = max(values) if axis.most is None else axis.most
    if low == high:
        return low - 0.5, high + 0.5
    room = 0.04 * (high - low)
    return low - room * (axis.least is None), high + room * (axis.most is None)


def _place(axis: Axis, values: Sequence[float], start: float, end: float) -> Place:
    low, high = _ends(axis, values)
    pixels = (end - start) / (high - low)
    if axis.scale == "linear":
        return lambda value: start + (value - low) * pixels
    return lambda value: start + (math.log(value) - low) * pixels


def _ticks(axis: Axis, values: Sequence[float]) -> list[float]:
    """Round numbers on the axis, about five."""
    if axis.scale == "linear":
        return _round_steps(*_ends(axis, values))
    low, high = min(values), max(values)
    base, leads = (16, (1, 2, 4, 8)) if axis.scale == "log2" else (10, (1,) if high > 1e4 * low else (1, 2, 5))
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    ticks = [tick for power in powers for lead in leads if low <= (tick := lead * float(base) ** power) <= high]
    return ticks if len(ticks) > 1 or low == high else _round_steps(low, high)


def _round_steps(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(lead * power for lead in (1, 2, 5, 10) if lead * power >= rough)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, digits) for number in range(first, last + 1)]


def _number(value: float) -> str:
    """Short: 20k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"
