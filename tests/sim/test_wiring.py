"""What transfers between workers cross."""

from __future__ import annotations

import pytest

from penstock.sim.network import Network
from penstock.sim.wiring import Wiring
from penstock.topology.build import NODES, Domain, Nodes, build


def wired(nodes: int = 2, **workers: tuple[str, ...]) -> Wiring:
    wiring = Wiring(build([Nodes(NODES["hgx-h100"], nodes)]), Network())
    for name, devices in workers.items():
        wiring.place(name, devices)
    return wiring


def gpus(node: int, *numbers: int) -> tuple[str, ...]:
    return tuple(f"node{node}/gpu{number}" for number in numbers)


def test_ranks_send_side_by_side() -> None:
    wiring = wired(a=gpus(0, 0), b=gpus(1, 0), four=gpus(0, 4, 5, 6, 7), others=gpus(1, 4, 5, 6, 7))
    one, four = wiring.route("a", "b"), wiring.route("four", "others")
    assert four.bytes_per_s == pytest.approx(4 * one.bytes_per_s)
    assert four.latency_s == one.latency_s
    assert not set(one.links) & set(four.links)


def test_fewer_ranks_here_than_there_send_to_all_of_them() -> None:
    wiring = wired(two=gpus(0, 0, 1), four=gpus(1, 0, 1, 2, 3))
    assert wiring.route("two", "four").bytes_per_s == pytest.approx(2 * 36e9)
    assert wiring.route("four", "two").bytes_per_s == pytest.approx(2 * 36e9)


def test_workers_of_a_node_meet_on_nvlink_and_nics_are_shared_by_all_that_leaves_a_worker() -> None:
    wiring = wired(a=gpus(0, 0), b=gpus(0, 1), c=gpus(1, 0), d=gpus(1, 1))
    assert wiring.route("a", "b").bytes_per_s > 5 * wiring.route("a", "c").bytes_per_s
    assert set(wiring.route("a", "c").links) & set(wiring.route("a", "d").links)
    assert not set(wiring.route("a", "c").links) & set(wiring.route("b", "d").links)


def test_routers_get_prices_by_device() -> None:
    wiring = wired(a=gpus(0, 0), b=gpus(0, 1), c=gpus(1, 0))
    start_s, byte_s = wiring.prices("node0/gpu0", ["node0/gpu1", "node1/gpu0"])
    assert byte_s[0] < byte_s[1] == pytest.approx(1 / 36e9)
    assert start_s[0] < start_s[1]


def test_prices_of_pairs_that_are_alike_are_those_of_each_pair() -> None:
    fabric = build([Domain("rack", (Nodes(NODES["hgx-h100"], 2),), count=2, oversubscription=4)])
    nodes = [f"rack{rack}/node{node}" for rack in range(2) for node in range(2)]
    places = {
        f"{node}-{half}": tuple(f"{node}/gpu{4 * half + g}" for g in range(4)) for node in nodes for half in (0, 1)
    }
    wiring = Wiring(fabric, Network())
    for name, devices in places.items():
        wiring.place(name, devices)
    for source, devices in places.items():
        others = [other for other in places if other != source]
        start_s, byte_s = wiring.prices(devices[0], [places[other][0] for other in others])
        routes = [wiring.route(source, other) for other in others]
        assert start_s.tolist() == [route.latency_s for route in routes]
        assert byte_s.tolist() == pytest.approx([1 / route.bytes_per_s for route in routes])
