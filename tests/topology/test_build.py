"""Presets: what they add up to, what was measured on them, and fat trees."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.errors import BadTopology
from penstock.fabric import Fabric
from penstock.topology.build import MOST_VERTICES, PRESETS, Domain, Nodes, Tier, build, fat_tree
from penstock.topology.presets import GB200_TRAY, NODES, TCP_HOST, find_server


def of_kind(fabric: Fabric, kind: str) -> list[str]:
    return [vertex.name for vertex in fabric.vertices.values() if vertex.kind == kind]


def total(fabric: Fabric, kind: str, figure: str) -> float:
    return sum(getattr(fabric.vertices[name].device, figure) for name in of_kind(fabric, kind))


@pytest.mark.parametrize(
    ("preset", "gpus", "memory_tib", "bf16_pflops", "nics"),
    [
        ("hgx-a100", 8, 0.625, 2.5, 8),
        ("hgx-h100", 8, 0.625, 7.9, 8),
        ("hgx-h200", 8, 1.1, 7.9, 8),
        ("hgx-b200", 8, 1.41, 18, 8),
        ("gb200-nvl72", 72, 13.1, 180, 72),
        ("tcp-host", 0, 0, 0, 1),
    ],
)
def test_presets_add_up_to_what_is_sold(
    preset: str, gpus: int, memory_tib: float, bf16_pflops: float, nics: int
) -> None:
    fabric = build([PRESETS[preset]])
    assert len(of_kind(fabric, "gpu")) == gpus
    assert len(of_kind(fabric, "nic")) == nics
    assert total(fabric, "gpu", "memory_bytes") / 2**40 == pytest.approx(memory_tib, rel=0.01)
    assert total(fabric, "gpu", "bf16_flops_per_s") / 1e15 == pytest.approx(bf16_pflops, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "source", "target", "size_bytes", "measured_bytes_per_s"),
    [
        ("hgx-a100", "node0/gpu0", "node0/gpu7", 13e6, 228e9),
        ("hgx-a100", "node0/gpu0", "node0/gpu7", 67e6, 239e9),
        ("hgx-h100", "node0/gpu0", "node0/gpu7", 13e6, 299e9),
        ("hgx-h100", "node0/gpu0", "node0/gpu7", 67e6, 348e9),
        ("hgx-h100", "node0/gpu0", "node1/gpu0", 67e6, 36e9),
    ],
)
def test_presets_give_measured_transfers_back(
    preset: str, source: str, target: str, size_bytes: float, measured_bytes_per_s: float
) -> None:
    path = build([Nodes(NODES[preset], 2)]).path(source, target, size_bytes)
    assert size_bytes / path.seconds(size_bytes) == pytest.approx(measured_bytes_per_s, rel=0.1)


@pytest.mark.parametrize(
    ("preset", "target", "measured_s"),
    [("hgx-a100", "node0/gpu1", 8e-6), ("hgx-h100", "node0/gpu1", 5e-6), ("hgx-h100", "node1/gpu0", 17e-6)],
)
def test_presets_give_measured_latencies_back(preset: str, target: str, measured_s: float) -> None:
    path = build([Nodes(NODES[preset], 2)]).path("node0/gpu0", target, 2048)
    assert path.seconds(2048) == pytest.approx(measured_s, rel=0.1)


def test_nvl72_is_one_nvlink_domain_over_its_trays() -> None:
    fabric = build([PRESETS["gb200-nvl72"]])
    first, last = "rack0/node0/gpu0", "rack0/node17/gpu3"
    assert fabric.path(first, last).bytes_per_s == 700e9
    assert fabric.lowest_common_domain(first, last) == "rack0/nvlink"
    assert fabric.failure_domains(first)[-4:] == ("rack0/node0", "rack0/nvlink", "rack0", "cluster")


def test_a_tray_alone_is_an_nvlink_domain_of_its_own() -> None:
    fabric = build([Nodes(GB200_TRAY, 2)])
    assert fabric.find_domain("node1/gpu0", "nvlink") == "node1/nvlink"
    assert fabric.path("node0/gpu0", "node1/gpu0").bytes_per_s == 36e9


def test_gpus_have_nics_of_their_own() -> None:
    fabric = build([Nodes(NODES["hgx-h100"], 2)])
    nics = [
        fabric.links[fabric.path(f"node0/gpu{number}", f"node1/gpu{number}").links[0]].target for number in range(8)
    ]
    assert nics == [f"node0/nic{number}" for number in range(8)]


def test_cpus_without_a_nic_use_that_of_the_other_socket() -> None:
    fabric = build([Nodes(replace(TCP_HOST, numa_nodes=2), 2)])
    media = [fabric.links[number].medium for number in fabric.path("node0/cpu1", "node1/cpu1").links]
    assert media == ["dram", "socket", "tcp", "tcp", "socket", "dram"]


@pytest.mark.parametrize("tiers", [1, 2, 3, 5])
def test_fat_trees_of_any_number_of_tiers(tiers: int) -> None:
    names = ["rack", "pod", "row", "hall", "site"][:tiers]
    fabric = build([fat_tree(Nodes(TCP_HOST, 2), [Tier(name, 2, 2.0) for name in names])])
    assert len(fabric.devices) == 2 ** (tiers + 1)
    domain = fabric.devices[0].rsplit("/", 2)[0]
    rate = 2 * TCP_HOST.nic.bytes_per_s
    for name in names:
        assert fabric.vertices[domain].kind == name
        assert fabric.oversubscription(domain) == pytest.approx(2.0)
        [uplink] = fabric.egress(domain)
        assert fabric.links[uplink].bytes_per_s == pytest.approx(rate / 2)
        domain = fabric.vertices[domain].inside
    hops = fabric.path(fabric.devices[0], fabric.devices[-1]).links
    assert len(hops) == 2 * (3 + tiers)


def test_what_has_no_nic_has_no_uplink() -> None:
    fabric = build([Domain("rack", (Nodes(replace(TCP_HOST, nics=0), 2),), 2)])
    assert fabric.egress("rack0") == ()
    assert fabric.oversubscription("rack0") == 1.0


def test_all_gpus_of_an_even_cluster_are_alike() -> None:
    fabric = build([fat_tree(Nodes(NODES["hgx-h100"], 4), [Tier("rack", 4, 2.0), Tier("pod", 2, 4.0)])])
    assert [len(members) for members in fabric.device_classes] == [2 * 32, 8 * 32]
    assert fabric.shape("pod0/rack1") == fabric.shape("pod1/rack3")
    assert fabric.shape("pod0/rack1") != fabric.shape("pod0")


def test_too_much_is_refused() -> None:
    with pytest.raises(BadTopology, match=f"at most {MOST_VERTICES}"):
        build([Domain("rack", (Nodes(TCP_HOST, 100_000),), 100_000)])


@pytest.mark.parametrize(
    ("name", "memory_gib", "model"),
    [
        ("NVIDIA-H100-80GB-HBM3", 79.6, "h100_sxm"),
        ("NVIDIA H200", 140.4, "h200_sxm"),
        ("NVIDIA-A100-SXM4-80GB", 80, "a100_sxm"),
        ("NVIDIA-H20", 95.6, "h20_sxm"),
        ("NVIDIA-B200-SHARED", 179, "b200_sxm"),
        ("NVIDIA-GB200", 185, "gb200"),
        ("H100", 0, "h100_sxm"),
        ("NVIDIA-A100-SXM4-40GB", 40, None),
        ("NVIDIA-H100-PCIe", 80, None),
        ("NVIDIA-H100-NVL", 94, None),
        ("NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", 10, None),
        ("Tesla-T4", 15, None),
    ],
)
def test_servers_are_found_by_the_name_of_their_gpu(name: str, memory_gib: float, model: str | None) -> None:
    server = find_server(name, memory_gib * 2**30)
    assert (server and server.gpu and server.gpu.model) == model
