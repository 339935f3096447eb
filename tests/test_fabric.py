"""Domains and paths, checked against plain searches over random fabrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BadTopology, NoPath
from penstock.fabric import Device, Fabric, Link, Vertex, crosslink, duplex
from penstock.topology.build import Nodes, Tier, build, fat_tree
from penstock.topology.presets import NODES

CHIP = Device("chip", 1e9)
SIZES = (1.0, 1e6, 1e12)
RATES = st.sampled_from([1e9, 2e9, 3e9, 50e9])
LATENCIES = st.sampled_from([0.0, 1e-6, 5e-6])


@st.composite
def fabrics(draw: st.DrawFn) -> Fabric:
    """Any containment, any links that climb, and some across; v0 holds all, the last ones are devices."""
    places, devices = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    vertices = [Vertex("v0", "place")]
    for number in range(1, places + devices):
        device = CHIP if number >= places else None
        inside = draw(st.integers(0, min(number, places) - 1))
        vertices.append(Vertex(f"v{number}", "chip" if device else "place", f"v{inside}", device))
    ends = st.tuples(st.integers(0, places - 1), st.integers(1, places + devices - 1)).filter(
        lambda pair: pair[0] < pair[1]
    )
    links: list[Link] = []
    for upper, lower in draw(st.lists(ends, unique=True, max_size=14)):
        links += [
            Link(f"v{lower}", f"v{upper}", "up", "wire", draw(RATES), draw(LATENCIES)),
            Link(f"v{upper}", f"v{lower}", "down", "wire", draw(RATES), draw(LATENCIES)),
        ]
    taken = {(link.source, link.target) for link in links}
    pairs = st.tuples(*[st.integers(0, places + devices - 1)] * 2).filter(lambda pair: pair[0] < pair[1])
    for one, other in draw(st.lists(pairs, unique=True, max_size=4)):
        if (f"v{one}", f"v{other}") not in taken:
            links += crosslink(f"v{one}", f"v{other}", "bridge", draw(RATES), draw(LATENCIES))
    return Fabric(vertices, links)


def routes(
    fabric: Fabric, at: str, target: str, ways: Sequence[str] = ("up", "across", "down")
) -> Iterator[list[Link]]:
    """All that climb, cross at most once, and come down, found by trying every link."""
    if at == target:
        yield []
    for link in fabric.links:
        if link.source == at and link.way in ways:
            after = {"up": ("up", "across", "down"), "across": ("down",), "down": ("down",)}[link.way]
            yield from ([link, *rest] for rest in routes(fabric, link.target, target, after))


def seconds(route: Sequence[Link], size_bytes: float) -> float:
    rate = min((link.bytes_per_s for link in route), default=math.inf)
    return sum(link.latency_s for link in route) + size_bytes / rate


@given(fabrics(), st.sampled_from(SIZES))
def test_a_path_is_the_quickest_of_all_routes(fabric: Fabric, size_bytes: float) -> None:
    for source in fabric.devices:
        for target in fabric.devices:
            found = [seconds(route, size_bytes) for route in routes(fabric, source, target)]
            if not found:
                with pytest.raises(NoPath, match=f"{source} to {target}"):
                    fabric.path(source, target)
                continue
            path = fabric.path(source, target, size_bytes)
            assert path.seconds(size_bytes) == pytest.approx(min(found), rel=1e-12)
            assert path.seconds(size_bytes) == pytest.approx(
                seconds([fabric.links[number] for number in path.links], size_bytes), rel=1e-12
            )


@given(fabrics())
def test_the_links_of_a_path_follow_each_other(fabric: Fabric) -> None:
    for source in fabric.vertices:
        for target in fabric.vertices:
            try:
                path = fabric.path(source, target)
            except NoPath:
                continue
            stops = [source, *(fabric.links[number].target for number in path.links)]
            assert [fabric.links[number].source for number in path.links] == stops[:-1]
            assert stops[-1] == target
            assert len(set(stops)) == len(stops)


@given(fabrics())
def test_the_lowest_common_domain_is_the_deepest_that_holds_both(fabric: Fabric) -> None:
    def around(name: str) -> list[str]:
        inside = fabric.vertices[name].inside
        return [name, *around(inside)] if inside else [name]

    for one in fabric.vertices:
        assert [one, *fabric.failure_domains(one)] == around(one)
        for other in fabric.vertices:
            common = [domain for domain in around(one) if domain in around(other)]
            assert fabric.lowest_common_domain(one, other) == max(common, key=lambda name: len(around(name)))
            assert fabric.lowest_common_domain(one, other) == fabric.lowest_common_domain(other, one)


@given(fabrics())
def test_devices_of_a_domain_are_neighbours(fabric: Fabric) -> None:
    for domain in fabric.vertices:
        span = fabric.span(domain)
        inside = [device for device in fabric.devices if domain in (device, *fabric.failure_domains(device))]
        assert list(fabric.devices[span.start : span.stop]) == inside


@given(fabrics())
def test_links_out_of_a_domain_are_those_that_cross_its_border(fabric: Fabric) -> None:
    for domain in fabric.vertices:
        inside = [name for name in fabric.vertices if domain in (name, *fabric.failure_domains(name))]
        crossing = [
            number
            for number, link in enumerate(fabric.links)
            if (link.source in inside) and (link.target not in inside)
        ]
        assert list(fabric.egress(domain)) == crossing
        entering = [
            number
            for number, link in enumerate(fabric.links)
            if (link.source not in inside) and (link.target in inside)
        ]
        assert list(fabric.ingress(domain)) == entering


@st.composite
def trees(draw: st.DrawFn) -> Fabric:
    tiers = [
        Tier(kind, draw(st.integers(1, 3)), draw(st.sampled_from([0.5, 1.0, 2.0, 8.0])), draw(LATENCIES))
        for kind in ("rack", "pod", "zone")[: draw(st.integers(1, 3))]
    ]
    return build(
        [fat_tree(Nodes(NODES[draw(st.sampled_from(["tcp-host", "hgx-h100"]))], draw(st.integers(1, 2))), tiers)]
    )


@given(trees(), st.data())
def test_in_trees_paths_are_symmetric_and_detours_do_not_pay(fabric: Fabric, data: st.DataObject) -> None:
    one, other, third = (data.draw(st.sampled_from(fabric.devices)) for _ in range(3))
    for size_bytes in SIZES:
        there = fabric.path(one, other, size_bytes).seconds(size_bytes)
        assert there == pytest.approx(fabric.path(other, one, size_bytes).seconds(size_bytes))
        legs = (fabric.path(one, third, size_bytes), fabric.path(third, other, size_bytes))
        detour = sum(leg.seconds(size_bytes) for leg in legs)
        assert there <= detour * (1 + 1e-9)


@given(trees())
def test_alike_devices_have_alike_paths(fabric: Fabric) -> None:
    assert sorted(name for members in fabric.device_classes for name in members) == sorted(fabric.devices)
    for members in fabric.device_classes:
        ways = {
            (path.bytes_per_s, path.latency_s, len(path.links))
            for path in (fabric.path(member, fabric.root) for member in members)
        }
        assert len(ways) == 1


PLACE = [
    Vertex("all", "cluster"),
    Vertex("n", "node", "all"),
    Vertex("a", "gpu", "n", CHIP),
    Vertex("b", "gpu", "n", CHIP),
]


def test_a_device_reaches_itself_at_once() -> None:
    path = Fabric(PLACE, []).path("a", "a")
    assert path.links == ()
    assert path.seconds(1e12) == 0.0


def test_islands_of_direct_links_are_not_passed_through() -> None:
    vertices = [*PLACE, Vertex("c", "gpu", "n", CHIP)]
    links = [*crosslink("a", "b", "nvlink", 300e9, 1e-6), *crosslink("b", "c", "nvlink", 300e9, 1e-6)]
    links += [link for name in "abc" for link in duplex(name, "n", "pcie", 25e9, 1e-6)]
    fabric = Fabric(vertices, links)
    assert fabric.path("a", "b").bytes_per_s == 300e9
    assert fabric.path("c", "b").bytes_per_s == 300e9
    assert [fabric.links[number].medium for number in fabric.path("a", "c").links] == ["pcie", "pcie"]


def test_the_size_decides_between_a_wide_path_and_a_quick_one() -> None:
    links = [*crosslink("a", "b", "quick", 1e9, 1e-6)]
    links += [link for name in "ab" for link in duplex(name, "n", "wide", 100e9, 1e-3)]
    fabric = Fabric(PLACE, links)
    assert len(fabric.path("a", "b", 1e3).links) == 1
    assert len(fabric.path("a", "b", 1e9).links) == 2


def test_directions_have_rates_of_their_own() -> None:
    links = [*duplex("a", "n", "wire", 10e9, 0.0), *duplex("b", "n", "wire", 10e9, 0.0)]
    links[1] = Link("n", "a", "down", "wire", 1e9, 0.0)
    fabric = Fabric(PLACE, links)
    assert fabric.path("a", "b").bytes_per_s == 10e9
    assert fabric.path("b", "a").bytes_per_s == 1e9


def test_an_nvlink_domain_is_a_failure_domain_of_its_gpus() -> None:
    vertices = [*PLACE, Vertex("switch", "nvlink", "n"), Vertex("cpu", "cpu", "n", CHIP)]
    fabric = Fabric(vertices, [link for name in "ab" for link in duplex(name, "switch", "nvlink", 1e9, 0.0)])
    assert fabric.failure_domains("a") == ("switch", "n", "all")
    assert fabric.failure_domains("cpu") == ("n", "all")
    assert fabric.find_domain("b", "nvlink") == "switch"
    assert fabric.find_domain("cpu", "nvlink") is None
    assert fabric.lowest_common_domain("a", "b") == "switch"
    assert fabric.lowest_common_domain("cpu", "b") == "n"
    assert fabric.lowest_common_domain("n", "b") == "n"


def wire(source: str, target: str, way: str = "up", bytes_per_s: float = 1e9, latency_s: float = 0.0) -> Link:
    return Link(source, target, way, "wire", bytes_per_s, latency_s)  # type: ignore[arg-type]


BAD: dict[str, tuple[list[Vertex], list[Link]]] = {
    "named 'a'": ([*PLACE, Vertex("a", "gpu", "n")], []),
    "2 are inside nothing": ([*PLACE, Vertex("lost", "rack")], []),
    "0 are inside nothing": ([], []),
    "inside 'nowhere'": ([*PLACE, Vertex("x", "rack", "nowhere")], []),
    "inside each other": ([*PLACE, Vertex("x", "rack", "y"), Vertex("y", "rack", "x")], []),
    "ends at 'x'": (PLACE, [wire("a", "x")]),
    "leads nowhere": (PLACE, [wire("n", "n", "across")]),
    "two links lead from a to n": (PLACE, [wire("a", "n"), wire("a", "n", "across")]),
    "in a circle": (PLACE, [wire("n", "all"), wire("all", "n")]),
    "climbs to a device": (PLACE, [wire("a", "b")]),
    "must be above 0": (PLACE, [wire("a", "n", bytes_per_s=0.0)]),
    "-1e-06 s": (PLACE, [wire("a", "n", latency_s=-1e-6)]),
}


@pytest.mark.parametrize("complaint", BAD)
def test_a_contradiction_is_refused(complaint: str) -> None:
    vertices, links = BAD[complaint]
    with pytest.raises(BadTopology, match=complaint):
        Fabric(vertices, links)


def test_a_misspelt_name_is_refused() -> None:
    fabric = Fabric([*PLACE, Vertex("rack0", "rack", "all")], [])
    for ask in (fabric.vertex, fabric.span, fabric.children, fabric.failure_domains, fabric.egress, fabric.shape):
        with pytest.raises(BadTopology, match="did you mean 'rack0'"):
            ask("rack00")
    with pytest.raises(BadTopology, match="no 'x'"):
        fabric.path("a", "x")
