"""Node labels, as Kubernetes, its operators, clouds and Ray publish them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from penstock.errors import BadTopology
from penstock.fabric import Fabric
from penstock.topology.labels import LabelsTopology, Options, read_labels

Labels = Mapping[str, str]

H100 = {
    "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    "nvidia.com/gpu.count": "8",
    "nvidia.com/gpu.memory": "81559",
}
GB200 = {"nvidia.com/gpu.product": "NVIDIA-GB200", "nvidia.com/gpu.count": "4", "nvidia.com/gpu.memory": "189471"}
ZONE = "topology.kubernetes.io/zone"
LEAF = "network.topology.nvidia.com/leaf"


def load(nodes: Mapping[str, Labels], oversubscription: Mapping[str, float] | None = None) -> Fabric:
    return LabelsTopology(Options(nodes, oversubscription or {})).load()


def kinds(fabric: Fabric, name: str) -> list[str]:
    return [f"{fabric.vertices[domain].kind} {domain}" for domain in fabric.failure_domains(name)]


def test_zones_and_switches_lie_inside_each_other() -> None:
    labels = {
        "topology.kubernetes.io/region": "eu",
        ZONE: "eu-1",
        "network.topology.nvidia.com/core": "c0",
        "network.topology.nvidia.com/spine": "s3",
        LEAF: "l7",
    }
    fabric = load({"worker-1": {**labels, **H100}, "worker-2": {**labels, LEAF: "l8"}})
    assert kinds(fabric, "worker-1") == [
        "rack eu/eu-1/c0/s3/l7",
        "spine eu/eu-1/c0/s3",
        "core eu/eu-1/c0",
        "zone eu/eu-1",
        "region eu",
        "cluster cluster",
    ]
    assert fabric.lowest_common_domain("worker-1/gpu0", "worker-2/cpu0") == "eu/eu-1/c0/s3"


@pytest.mark.parametrize(
    "key",
    [
        "network.topology.nvidia.com/leaf",
        "network.topology.nvidia.com/block",
        "fabric.topograph.run/tier-0",
        "topology.k8s.aws/network-node-layer-3",
        "cloud.google.com/gce-topology-subblock",
        "topology.kubernetes.io/rack",
        "example.com/rack",
        "rack",
    ],
)
def test_racks_have_many_names(key: str) -> None:
    fabric = load({"a": {key: "r1"}, "b": {key: "r1"}, "c": {key: "r2"}})
    assert fabric.find_domain("a/cpu0", "rack") == "r1"
    assert fabric.children("r1") == ("a", "b")


def test_what_labels_ray_sets() -> None:
    labels = {"ray.io/availability-region": "us", "ray.io/availability-zone": "us-a", "ray.io/node-id": "f00"}
    fabric = load({"f00": {**labels, "ray.io/accelerator-type": "A100"}})
    assert kinds(fabric, "f00")[:2] == ["zone us/us-a", "region us"]
    assert len([name for name in fabric.devices if "gpu" in name]) == 8


def test_gpus_make_the_server() -> None:
    fabric = load({"big": H100, "half": {**H100, "nvidia.com/gpu.count": "4"}, "plain": {}})
    assert [name for name in fabric.devices if name.startswith("half/gpu")] == [f"half/gpu{n}" for n in range(4)]
    assert len(fabric.egress("half")) == 4
    assert fabric.path("big/gpu0", "big/gpu7").bytes_per_s == 355e9
    assert [name for name in fabric.devices if name.startswith("plain")] == ["plain/cpu0"]
    assert fabric.path("big/gpu0", "plain/cpu0").bytes_per_s == 6e9


def test_unknown_gpus_are_counted_and_have_their_memory() -> None:
    labels = {"nvidia.com/gpu.product": "NVIDIA-L40S", "nvidia.com/gpu.count": "2", "nvidia.com/gpu.memory": "46068"}
    fabric = load(
        {"n": labels, "m": {"nvidia.com/gpu.product": "NVIDIA-L40S"}, "o": {**H100, "nvidia.com/gpu.count": "0"}}
    )
    assert fabric.devices == ("n/cpu0", "n/gpu0", "n/gpu1", "m/cpu0", "m/gpu0", "o/cpu0")
    device = fabric.vertices["n/gpu1"].device
    assert device is not None
    assert (device.model, device.memory_bytes, device.bf16_flops_per_s) == ("NVIDIA-L40S", 46068 * 2**20, 0.0)


def test_nodes_of_one_clique_share_nvlink() -> None:
    nodes = {f"n{number}": {**GB200, LEAF: f"l{number // 2}", "nvidia.com/gpu.clique": "u.0"} for number in range(4)}
    fabric = load({**nodes, "alone": {**GB200, LEAF: "l0"}})
    assert fabric.find_domain("n3/gpu0", "nvlink") == "nvlink-u.0"
    assert fabric.path("n0/gpu0", "n3/gpu3").bytes_per_s == 700e9
    assert fabric.path("n0/gpu0", "alone/gpu0").bytes_per_s == 36e9
    assert fabric.find_domain("alone/gpu0", "nvlink") == "alone/nvlink"


def test_a_clique_in_one_rack_is_inside_it() -> None:
    fabric = load({name: {**GB200, LEAF: "l0", "nvidia.com/gpu.clique": "u.0"} for name in ("a", "b")})
    assert kinds(fabric, "a/gpu0")[1:] == ["node a", "nvlink l0/nvlink-u.0", "rack l0", "cluster cluster"]


def test_an_accelerator_domain_is_nvlink_on_nvl72_only() -> None:
    """Elsewhere the label can be a reservation."""
    key = "network.topology.nvidia.com/accelerator"
    fabric = load({name: {**gpus, key: "d"} for name, gpus in {"a": GB200, "b": GB200, "c": H100, "d": H100}.items()})
    assert fabric.find_domain("a/gpu0", "nvlink") == fabric.find_domain("b/gpu0", "nvlink") == "nvlink-d"
    assert fabric.find_domain("c/gpu0", "nvlink") == "c/nvlink"


def test_oversubscription_is_what_options_say() -> None:
    nodes = {f"n{number}": {ZONE: "z", LEAF: f"l{number % 2}"} for number in range(4)}
    fabric = load(nodes, {"rack": 4.0})
    assert (fabric.oversubscription("z/l0"), fabric.oversubscription("z")) == (4.0, 1.0)


def test_zones_are_far_apart() -> None:
    fabric = load({"a": {ZONE: "z1"}, "b": {ZONE: "z2"}})
    assert fabric.path("a/cpu0", "b/cpu0").latency_s > 0.5e-3


def test_nodes_without_labels_hang_on_what_is_known() -> None:
    fabric = load({"a": {ZONE: "z1", LEAF: "l1"}, "b": {ZONE: "z1"}, "c": {}})
    assert [fabric.vertices[name].inside for name in "abc"] == ["z1/l1", "z1", "cluster"]
    assert load({}).devices == ()


def test_a_label_that_is_no_number() -> None:
    with pytest.raises(BadTopology, match=r"node n7: label nvidia.com/gpu.count is 'eight'"):
        load({"n7": {**H100, "nvidia.com/gpu.count": "eight"}})


def test_labels_from_a_file(tmp_path: Path) -> None:
    mapping, kubectl = tmp_path / "labels.json", tmp_path / "nodes.json"
    mapping.write_text(json.dumps({"a": {ZONE: "z1"}, "b": {}}))
    items = [{"metadata": {"name": "a", "labels": {ZONE: "z1"}, "uid": "7"}, "spec": {}}, {"metadata": {"name": "b"}}]
    kubectl.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    assert read_labels(mapping) == read_labels(kubectl) == {"a": {ZONE: "z1"}, "b": {}}


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"items": [{"name": "a"}]}', '{"a": {"b": 1}}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(BadTopology, match=r"labels\.json: not labels by node"):
        read_labels(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadTopology, match="cannot read"):
        read_labels(tmp_path / "labels.json")
