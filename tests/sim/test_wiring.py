"""What transfers between workers cross."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.policy.routing.ways import Ways
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


def test_climbs_of_two_workers_make_the_route_between_them() -> None:
    """What routers reckon with, from each worker alone, is what the transfer of a pair then gets over idle links."""
    fabric = build([Domain("rack", (Nodes(NODES["hgx-h100"], 2),), count=2, oversubscription=4)])
    nodes = [f"rack{rack}/node{node}" for rack in range(2) for node in range(2)]
    places = {
        f"{node}-{half}": tuple(f"{node}/gpu{4 * half + g}" for g in range(4)) for node in nodes for half in (0, 1)
    }
    wiring = Wiring(fabric, Network())
    for name, devices in places.items():
        wiring.place(name, devices)
    names = list(places)
    ways = Ways(np.zeros(len(names), np.intp), [wiring.climb(places[name][0]) for name in names])
    for source, name in enumerate(names):
        start_s, byte_s = ways.row(source)
        for target, other in enumerate(names):
            if target != source:
                route = wiring.route(name, other)
                assert byte_s[target] == pytest.approx(1 / route.bytes_per_s)
                assert start_s[target] == pytest.approx(route.latency_s, rel=0.2)
