"""What people are shown: alike things once, and a drawing that is well-formed."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from penstock.fabric import Device, Fabric, Vertex, crosslink
from penstock.topology.build import PRESETS, Nodes, Tier, build, fat_tree
from penstock.topology.outline import Group, across, outline, summary
from penstock.topology.presets import NODES
from penstock.topology.svg import draw

TREE = build([fat_tree(Nodes(NODES["hgx-h100"], 4), [Tier("rack", 8, 2.0), Tier("pod", 4, 4.0)])])


def titles(group: Group) -> list[str]:
    return [group.title, *(title for inner in group.inside for title in titles(inner))]


def test_what_is_alike_is_said_once() -> None:
    assert titles(outline(TREE)) == [
        "cluster",
        "pod0 … pod3 (4)",
        "rack0 … rack7 (8)",
        "node0 … node3 (4)",
        "numa0 … numa1 (2)",
        "cpu0",
        "pcie0 … pcie1 (2)",
        "nic0 … nic1 (2)",
        "gpu0 … gpu1 (2)",
        "nvlink",
    ]


def test_facts_are_figures_with_units() -> None:
    pod = outline(TREE).inside[0]
    assert pod.inside[0].facts == ("uplink 576 GB/s 200 ns 2:1",)
    gpu = pod.inside[0].inside[0].inside[0].inside[1].inside[1]
    assert gpu.facts == (
        "h100_sxm 80 GiB 3.35 TB/s 989 TF bf16",
        "pcie 52 GB/s 4 us",
        "pcie 52 GB/s 4 us to nic",
        "nvlink 355 GB/s 2.5 us",
    )


def test_the_summary_counts_devices() -> None:
    assert summary(TREE) == ["256 cpu xeon_8480, 256 TiB", "1024 gpu h100_sxm, 80 TiB"]


def test_links_across_are_listed() -> None:
    vertices = [Vertex("n", "node"), *(Vertex(name, "gpu", "n", Device("chip")) for name in "abc")]
    links = [*crosslink("a", "b", "nvlink", 50e9, 1e-6), *crosslink("b", "c", "nvlink", 50e9, 1e-6)]
    assert across(Fabric(vertices, links)) == ["nvlink 50 GB/s 1 us, gpu to gpu: a - b, and 1 more"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_drawing_holds_every_box_inside_the_one_around_it(preset: str) -> None:
    drawing = ElementTree.fromstring(draw(build([PRESETS[preset]])))
    width, height = float(drawing.attrib["width"]), float(drawing.attrib["height"])
    boxes = [box for box in drawing.iter() if box.tag.endswith("rect")]
    assert len(boxes) > 3
    for box in boxes[1:]:
        assert float(box.attrib["x"]) >= 0 and float(box.attrib["x"]) + float(box.attrib["width"]) <= width
        assert float(box.attrib["y"]) >= 0 and float(box.attrib["y"]) + float(box.attrib["height"]) <= height


def test_names_are_escaped_in_a_drawing() -> None:
    drawing = draw(Fabric([Vertex("<a&b>", "node")], []))
    assert "&lt;a&amp;b&gt;" in drawing
    ElementTree.fromstring(drawing)
