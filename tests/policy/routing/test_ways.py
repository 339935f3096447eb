"""Where workers meet, what is shared on the way there, and what a byte costs when others are under way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penstock.policy.routing.ways import MOST_BUSY, Climber, Rung, Ways
from penstock.topology.build import NODES, Domain, Nodes, build

NIC, UP = 1e-9, 2e-9  # seconds per byte


def rows() -> Ways:
    """Workers 0 and 1 in one row, 2 in another; all share the hall's floor, each row its own door."""
    names = (("a", "x"), ("b", "x"), ("c", "y"))
    climbs = [
        [Rung(row, NIC, NIC, 1e-6, name, name), Rung("hall", UP, UP, 1e-5, f"{row} door", f"{row} door")]
        for name, row in names
    ]
    return Ways(np.zeros(3, np.intp), climbs)


def test_they_meet_in_the_smallest_domain_that_both_are_in() -> None:
    ways = rows()
    assert [ways.meet(0, 1), ways.meet(0, 2), ways.meet(2, 2)] == [0, 1, 0]
    start_s, byte_s = ways.row(0)
    assert byte_s.tolist() == [NIC, NIC, UP]
    assert start_s.tolist() == pytest.approx([2e-6, 2e-6, 2e-5])


def test_networks_have_nothing_in_common() -> None:
    ways = Ways(np.array([0, 1, -1, -1]), [()] * 4)
    assert [ways.meet(0, other) for other in range(1, 4)] == [None] * 3
    assert np.isinf(ways.row(2)[0]).tolist() == [True, True, False, True]


def test_without_wiring_all_of_a_network_are_equally_near() -> None:
    ways = Ways(np.array([0, 0, 1]), [()] * 3)
    assert ways.row(0)[1].tolist() == [0, 0, 0]
    assert np.isinf(ways.row(0)[0]).tolist() == [False, False, True]


def test_who_is_nowhere_is_reached_from_everywhere() -> None:
    climb = [Rung("rack", NIC, NIC, 1e-6, "a", "a")]
    ways = Ways(np.zeros(3, np.intp), [climb, [Rung("other rack", UP, UP, 1e-6, "b", "b")], ()])
    assert [ways.meet(0, 0), ways.meet(0, 1), ways.meet(0, 2)] == [0, 1, 1]
    assert ways.row(2)[1].tolist() == [NIC, UP, 0]


def test_what_is_decided_takes_from_every_step_that_is_shared() -> None:
    ways = rows()
    ways.carry(0, 2, 0.25 / UP)
    now_s, others_s = ways.prices()
    up, down = 0, 1
    assert now_s[up, 1].tolist() == pytest.approx([UP / 0.75, UP / 0.75, UP])  # 1 leaves by the same door
    assert now_s[down, 1].tolist() == pytest.approx([UP, UP, UP / 0.75])
    assert now_s[up, 0].tolist() == pytest.approx([NIC / (1 - 0.125), NIC, NIC])
    assert others_s[up, 1, 1] == pytest.approx(UP * 0.25 / 0.75)
    ways.carry(0, 2, -0.25 / UP)
    assert ways.prices()[1].tolist() == np.zeros((2, 2, 3)).tolist()


def test_prices_that_follow_each_change_are_those_of_all_changes_at_once() -> None:
    step_by_step, at_once = rows(), rows()
    for source, target, share in ((0, 2, 0.25), (1, 0, 0.5), (2, 1, 0.125), (0, 2, -0.25)):
        step_by_step.carry(source, target, share / UP)
        step_by_step.prices()
        at_once.carry(source, target, share / UP)
    for one, other in zip(step_by_step.prices(), at_once.prices(), strict=True):
        assert one.tolist() == other.tolist()


def test_one_way_costs_what_the_row_says() -> None:
    ways = rows()
    for source in range(3):
        start_s, byte_s = ways.row(source)
        for target in {0, 1, 2} - {source}:
            assert ways.between(source, target) == pytest.approx((start_s[target], byte_s[target]))
    assert Ways(np.array([0, 1]), [(), ()]).between(0, 1) == (math.inf, 0.0)


def test_a_link_is_never_so_busy_that_nothing_gets_through() -> None:
    ways = rows()
    ways.carry(0, 2, 100 / UP)
    assert ways.prices()[0][0, 1, 1] == pytest.approx(UP / (1 - MOST_BUSY))


def test_climbs_of_a_fabric_name_shared_links() -> None:
    fabric = build([Domain("rack", (Nodes(NODES["hgx-h100"], 2),), count=2, oversubscription=4)])
    climber = Climber(fabric)
    one, other = climber.climb(("rack0/node0/gpu0",)), climber.climb(("rack0/node1/gpu0",))
    assert [rung.domain for rung in one][-2:] == ["rack0", "cluster"]
    assert one[-1].up_gate == other[-1].up_gate and one[-2].up_gate != other[-2].up_gate
    assert one[-2].up_s == pytest.approx(1 / 36e9)
    assert one[0].up_s < one[-2].up_s  # NVLink
