"""Pieces of an HTML page that needs nothing else: no network, no script, dark where wanted.

Tables of reports whose best numbers are bold, charts in rows, parts that unfold. Texts given are not yet escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby

from penstock.columns import Column, R, Row
from penstock.plot import DARK, LIGHT, Chart, Palette, Series, panel, style

LAYOUT = """
body{margin:0 auto;max-width:1400px;padding:20px;font:14px/1.45 system-ui,sans-serif}
h1{font-size:22px;margin:0 0 4px} h2{font-size:17px;margin:32px 0 8px} p{margin:4px 0 12px;max-width:100em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:3px 9px;text-align:right} td{white-space:nowrap} th{font-weight:600;vertical-align:bottom}
.text{text-align:left} .best{font-weight:700} .wide{overflow-x:auto}
.charts{display:flex;flex-wrap:wrap;gap:8px;margin:12px 0;align-items:flex-start}
.charts svg{flex:1 1 380px;max-width:500px;height:auto} .charts .strips{flex:2 1 780px;max-width:920px}
summary{cursor:pointer;font-weight:600;padding:6px 0} details{padding-left:2px}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The text of a page whose body is `parts`, which are HTML."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">\n<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>\n<style>{LAYOUT}\n{_colours(LIGHT)}",
            f"@media (prefers-color-scheme:dark){{\n{_colours(DARK)}\n}}\n</style>\n</head>\n<body>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def _colours(palette: Palette) -> str:
    busy = palette.series[0]
    return "\n".join(
        [
            style(palette),
            f"body{{background:{palette.paper};color:{palette.ink}}}",
            f"p,.note{{color:{palette.faint}}}",
            f"tr{{border-bottom:1px solid {palette.grid}}} tr.first{{border-top:2px solid {palette.faint}}}",
            f".bar{{background:linear-gradient({busy}40,{busy}40) 0 100%/var(--share) 3px no-repeat}}",
            f".idle{{fill:{palette.grid}}}",
            f".busy{{fill:{busy}}}",
        ]
    )


# Tables


def table(heads: Sequence[str], columns: Sequence[Column[R]], rows: Sequence[Row[R]]) -> Iterator[str]:
    """A row for each report, named under `heads`. Of neighbours with one setting, the best of each column is bold."""
    first, *others = heads
    yield f'<div class="wide"><table>\n<thead><tr><th class="text">{escape(first)}</th>'
    yield "".join(f"<th>{escape(title)}</th>" for title in (*others, *(column.title for column in columns)))
    yield "</tr></thead>\n<tbody>"
    for setting, group in groupby(rows, key=lambda row: row.setting):
        rivals = [row.report for row in rows if row.setting == setting]
        for place, row in enumerate(group):
            name, *names = row.names
            yield (
                f'<tr{_class([] if place else ["first"])}><td class="text">{escape(name)}</td>'
                + "".join(f"<td>{escape(name)}</td>" for name in names)
                + "".join(_entry(column, row.report, rivals) for column in columns)
                + "</tr>"
            )
    yield "</tbody></table></div>"


def _entry(column: Column[R], report: R, rivals: Sequence[R]) -> str:
    """Shares have a bar as well."""
    value, text = column.number(report), column.text(report)
    classes = ["best"] if text == column.best(rivals) else []
    if value is None or not column.form.endswith("%"):
        return f"<td{_class(classes)}>{text}</td>"
    return f'<td{_class([*classes, "bar"])} style="--share:{100 * value:.1f}%">{text}</td>'


def _class(names: Sequence[str]) -> str:
    return f' class="{" ".join(names)}"' if names else ""


# Charts


def lines(points: Iterable[tuple[str, float, float]]) -> list[Series]:
    """A line with dots for each name, of (name, x, y)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, x, y in points:
        found.setdefault(name, []).append((x, y))
    return [Series(name, dots=sorted(line), line=sorted(line)) for name, line in found.items()]


def charts(some: Iterable[Chart]) -> Iterator[str]:
    return row(map(panel, some))


def row(parts: Iterable[str]) -> Iterator[str]:
    yield '<div class="charts">'
    yield from parts
    yield "</div>"


# Text


def folded(title: str, is_open: bool, parts: Iterable[str]) -> Iterator[str]:
    yield f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>"
    yield from parts
    yield "</details>"


def definitions(texts: Iterable[str]) -> Iterator[str]:
    yield "<h2>What the numbers mean</h2>"
    for text in texts:
        yield f"<p>{escape(text)}</p>"


def all_of(names: Sequence[str]) -> str:
    """Each once, in their order."""
    return ", ".join(dict.fromkeys(names))
