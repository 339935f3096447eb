"""Where workers of a simulated cluster go: aligned, in their ratio, and never two on one GPU."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import SetupError
from penstock.sim.placement import Group, Placement, order, place
from penstock.topology.build import PRESETS, Nodes, build
from penstock.topology.presets import HGX_H100, TCP_HOST

EIGHT = build([Nodes(HGX_H100, 8)])
RACK = build([PRESETS["gb200-nvl72"]])


def nodes(devices: tuple[str, ...]) -> set[str]:
    return {device.rpartition("/")[0] for device in devices}


def test_interleaved_groups_alternate_in_their_ratio() -> None:
    assert order([2, 4], "interleaved") == [1, 0, 1, 1, 0, 1]
    assert order([3, 3], "interleaved") == [0, 1, 0, 1, 0, 1]
    assert order([2, 4], "packed") == [0, 0, 1, 1, 1, 1]


def test_every_node_holds_both_roles_unless_they_are_packed() -> None:
    groups = [Group("prefill", 8, 4), Group("decode", 8, 4)]
    for placement, kinds in (("interleaved", 2), ("packed", 1)):
        by_node: dict[str, set[int]] = {}
        for index, devices in place(EIGHT, groups, placement):  # type: ignore[arg-type]
            by_node.setdefault(*nodes(devices), set()).add(index)
        assert len(by_node) == 8 and {len(held) for held in by_node.values()} == {kinds}


@given(
    st.lists(
        st.builds(Group, st.just("any"), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8])), min_size=1, max_size=3
    ),
    st.sampled_from(["interleaved", "packed"]),
)
def test_places_are_aligned_inside_one_node_and_nobody_elses(groups: list[Group], placement: Placement) -> None:
    try:
        placed = place(EIGHT, groups, placement)
    except SetupError:
        return
    taken = [device for _, devices in placed for device in devices]
    assert len(set(taken)) == len(taken)
    assert Counter(index for index, _ in placed) == {index: group.count for index, group in enumerate(groups)}
    for index, devices in placed:
        numbers = [int(device.rpartition("gpu")[2]) for device in devices]
        assert len(nodes(devices)) == 1 and numbers[0] % groups[index].gpus == 0
        assert numbers == list(range(numbers[0], numbers[0] + groups[index].gpus))


def test_a_worker_crosses_nodes_only_if_asked_and_inside_one_nvlink_domain() -> None:
    with pytest.raises(
        SetupError, match=r"any workers need 8 GPUs of one node, the largest has 4: `across_nodes: true`"
    ):
        place(RACK, [Group("any", 1, 8)], "packed")
    placed = place(RACK, [Group("any", 9, 8, across_nodes=True)], "packed")
    assert [len(nodes(devices)) for _, devices in placed] == [2] * 9
    with pytest.raises(SetupError, match="9 GPUs of one NVLink domain, the largest has 8: ask for fewer"):
        place(EIGHT, [Group("any", 1, 9, across_nodes=True)], "packed")


def test_named_domains_bound_a_group() -> None:
    placed = place(EIGHT, [Group("any", 4, 4, on=("node2", "node5"))], "packed")
    assert [nodes(devices) for _, devices in placed] == [{"node2"}, {"node2"}, {"node5"}, {"node5"}]
    with pytest.raises(SetupError, match="no 4 neighbouring GPUs of one node are left on node2 for any worker 3 of 3"):
        place(EIGHT, [Group("any", 3, 4, on=("node2",))], "packed")


def test_cpus_are_shared_evenly() -> None:
    hosts = build([Nodes(TCP_HOST, 2)])
    placed = place(hosts, [Group("prefill", 1, 0), Group("decode", 4, 0)], "packed")
    assert [devices for _, devices in placed] == [("node0/cpu0",)] * 3 + [("node1/cpu0",)] * 2
    with pytest.raises(SetupError, match="there is no CPU on node0/gpu0 for any worker 1 of 1"):
        place(EIGHT, [Group("any", 1, 0, on=("node0/gpu0",))], "packed")
