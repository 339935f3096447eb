"""A drawing of a fabric: boxes inside boxes, those that are alike drawn once. No scripts, no fonts of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from penstock.fabric import Fabric
from penstock.topology.outline import Group, across, outline, summary

CHARACTER_WIDTH = 6.6  # of 12 px text, a little more than what common sans-serif fonts need
LINE = 17.0
GAP = 10.0
PADDING = 12.0
ROW_WIDTH = 900.0  # boxes beside each other, until they are wider together

FILLS = {"gpu": "#d9f0d3", "cpu": "#d6e6f5", "nic": "#fde5c8", "nvlink": "#e7dcf4"}  # the others: white, grey by turns
PLAIN = ("#ffffff", "#f4f5f7")
LINES_COLOR = "#5f6b7a"


@dataclass(frozen=True, slots=True)
class Box:
    """A group with its measures; `x` and `y` are within the box around."""

    group: Group
    x: float
    y: float
    width: float
    height: float
    inside: tuple[Box, ...]


def draw(fabric: Fabric) -> str:
    """The SVG text."""
    notes = [*summary(fabric), *(f"across: {line}" for line in across(fabric))]
    box = _placed(_measured(outline(fabric)), PADDING, PADDING + LINE * len(notes) + GAP)
    width = 2 * PADDING + max([box.width, *(CHARACTER_WIDTH * len(note) for note in notes)])
    height = box.y + box.height + PADDING
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        *(_text(PADDING, PADDING + LINE * row, note) for row, note in enumerate(notes)),
        *_drawn(box, 0.0, 0.0, 0),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _measured(group: Group) -> Box:
    """At its place 0, 0: wide enough for its text and for rows of what is inside."""
    text_width = CHARACTER_WIDTH * max(len(line) for line in (group.title, *group.facts))
    text_height = LINE * (1 + len(group.facts))
    inside, right, bottom = _in_rows([_measured(inner) for inner in group.inside], text_height + GAP / 2)
    width = max(text_width, right - PADDING) + 2 * PADDING
    return Box(group, 0.0, 0.0, width, bottom + GAP, inside)


def _in_rows(boxes: Sequence[Box], top: float) -> tuple[tuple[Box, ...], float, float]:
    """The boxes beside and below each other from `top` on, and where they end on the right and below."""
    placed: list[Box] = []
    x, y, right, bottom = PADDING, top, PADDING, top
    for box in boxes:
        if x > PADDING and x + box.width > ROW_WIDTH:
            x, y = PADDING, bottom + GAP
        placed.append(_placed(box, x, y))
        x += box.width + GAP
        right, bottom = max(right, x - GAP), max(bottom, y + box.height)
    return tuple(placed), right, bottom


def _placed(box: Box, x: float, y: float) -> Box:
    return Box(box.group, x, y, box.width, box.height, box.inside)


def _drawn(box: Box, left: float, top: float, depth: int) -> Iterator[str]:
    x, y, group = left + box.x, top + box.y, box.group
    fill = FILLS.get(group.kind, PLAIN[depth % 2])
    for shift in (4, 0) if len(group.names) > 1 else (0,):  # a second outline behind: there are several
        yield (
            f'<rect x="{x + shift:.1f}" y="{y + shift:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="5" '
            f'fill="{fill}" stroke="{LINES_COLOR}" stroke-width="0.8"/>'
        )
    yield _text(x + PADDING, y + GAP / 2, group.title, ' font-weight="600"')
    for row, fact in enumerate(group.facts, start=1):
        yield _text(x + PADDING, y + GAP / 2 + LINE * row, fact, f' fill="{LINES_COLOR}"')
    for inner in box.inside:
        yield from _drawn(inner, x, y, depth + 1)


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y + LINE - 4:.1f}"{style}>{escape(text)}</text>'
