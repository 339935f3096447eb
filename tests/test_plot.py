"""Charts: what is drawn lies inside its frame, numbers are round, texts are escaped, values can be asked for."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from penstock.plot import DARK, LIGHT, Axis, Chart, Scale, Series, panel, style, svg

SPACE = "{http://www.w3.org/2000/svg}"


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.tag.removeprefix(SPACE) in ("text", "title")]


def test_a_document_has_its_points_inside_its_frames() -> None:
    series = Series("a & b", dots=[(1, 0.5), (1000, 70)], line=[(1, 0.6), (1000, 60)])
    x, y = Axis("x", "log2"), Axis("y", "log10")
    charts = [Chart("<title>", x, y, [series]), Chart("one", x, y, [Series("flat", [(3, 3)], [(3, 3)])])]
    root = ElementTree.fromstring(svg(charts))
    assert {"<title>", "a & b", "1", "512", "0.5", "50", "a & b: 70 at 1000"} <= set(texts(root))
    circles = list(root.iter(f"{SPACE}circle"))
    assert len(circles) == 6
    for circle in circles:
        assert 64 <= float(circle.attrib["cx"]) <= 444
        assert 34 <= float(circle.attrib["cy"]) <= 314


@pytest.mark.parametrize(
    ("scale", "values", "ticks"),
    [
        ("linear", (0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ("linear", (0, 43_000), ["0", "10k", "20k", "30k", "40k"]),
        ("linear", (7, 7), ["6.6", "6.8", "7", "7.2", "7.4"]),
        ("log10", (0.02, 3), ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]),
        ("log10", (1, 1e6), ["1", "10", "100", "1000", "10k", "100k", "1M"]),
        ("log10", (3.1, 3.6), ["3.1", "3.2", "3.3", "3.4", "3.5", "3.6"]),
        ("log2", (3, 40), ["4", "8", "16", "32"]),
    ],
)
def test_ticks_are_round(scale: Scale, values: tuple[float, float], ticks: list[str]) -> None:
    axis = Axis("x", scale)
    chart = Chart("", axis, Axis("y"), [Series("", line=[(value, 0) for value in values])])
    shown = texts(ElementTree.fromstring(panel(chart)))
    at = shown.index(ticks[0])
    assert shown[at : at + len(ticks)] == ticks


def test_an_axis_keeps_its_ends() -> None:
    chart = Chart("", Axis("x"), Axis("share", least=0, most=1), [Series("", dots=[(0, 0.5)])])
    root = ElementTree.fromstring(panel(chart))
    assert [circle.attrib["cy"] for circle in root.iter("circle")] == ["174.0"]
    assert "0.2" in texts(root)


def test_names_can_stand_for_numbers() -> None:
    chart = Chart("", Axis("split"), Axis("y"), [Series("", line=[(0, 1), (1, 2)])], ticks=[(0, "8:8"), (1, "<6:10>")])
    shown = texts(ElementTree.fromstring(panel(chart)))
    assert "8:8" in shown and "<6:10>" in shown and "0.2" not in shown


def test_a_mark_is_on_the_axis_though_no_value_is_near() -> None:
    lines = [Series("", line=[(1, 0), (2, 1)])]
    chart = Chart("", Axis("x", "log10"), Axis("y"), lines, marks=[(50, "<target>")])
    root = ElementTree.fromstring(panel(chart))
    mark = next(path.attrib["d"] for path in root.iter("path") if path.attrib["class"] == "mark")
    assert 400 < float(mark.removeprefix("M").split()[0]) <= 444
    assert "<target>" in texts(root)


def test_the_legend_is_below_and_takes_the_room_it_needs() -> None:
    def height(*labels: str) -> int:
        chart = Chart("", Axis("x"), Axis("y"), [Series(label, line=[(0, 0), (1, 1)]) for label in labels])
        return int(ElementTree.fromstring(panel(chart)).attrib["height"])

    assert height("") < height("one") == height("one", "two") < height("a very long name", *["another long one"] * 3)


def test_colours_that_come_again_are_dashed() -> None:
    text = panel(Chart("", Axis("x"), Axis("y"), [Series(str(i), line=[(0, i), (1, i)]) for i in range(10)]))
    assert 'class="line s7"' in text
    assert 'class="line s1 dashed"' in text


def test_nothing_to_show_is_said() -> None:
    assert "nothing to show" in panel(Chart("empty", Axis("x"), Axis("y"), []))


def test_styles_know_every_colour() -> None:
    assert all(colour in style(palette) for palette in (LIGHT, DARK) for colour in palette.series)
