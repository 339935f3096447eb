"""The YAML file: what it says is built, and every mistake is told with its line and field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BadTopology
from penstock.fabric import Fabric
from penstock.topology.file import FileTopology, Options


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def load(folder: Path, text: str) -> Fabric:
    path = folder / "lab.yaml"
    path.write_text(text, encoding="utf-8")
    return FileTopology(Options(path)).load()


LAB = """\
name: lab
holds:
  - kind: rack
    count: 2
    oversubscription: 2:1
    holds:
      - preset: hgx-h100
        count: 4
  - kind: rack
    name: old
    bandwidth: 100 GB/s
    latency: 2 us
    holds:
      - preset: hgx-a100
        name: veteran
        gpus: 4
        nics: 2
        nic: {bandwidth: 10 GB/s}
        gpu: {model: a100_40, memory: 40 GB, memory_bandwidth: 1.5 TB/s}
        nvlink: none
  - preset: gb200-nvl72
    oversubscription: 4
overrides:
  rack0/node1/nic*: {bandwidth: 9 GB/s}
  rack0/node2/gpu3: {medium: nvlink, up: 20 GB/s, latency: 9 us}
  rack1/node3: gone
links:
  - {between: [rack0, rack1], bandwidth: 1 TB/s, medium: optical}
"""


def test_a_file_says_what_there_is(folder: Path) -> None:
    lab = load(folder, LAB)
    assert lab.root == "lab"
    assert lab.children("lab") == ("rack0", "rack1", "old", "rack2")
    assert lab.children("rack1") == ("rack1/node0", "rack1/node1", "rack1/node2")
    assert lab.oversubscription("rack2") == pytest.approx(4.0)
    old = lab.vertices["old/veteran/gpu0"]
    assert old.device is not None
    assert (old.device.model, old.device.memory_bytes, old.device.bf16_flops_per_s) == ("a100_40", 40e9, 312e12)
    assert lab.find_domain("old/veteran/gpu0", "nvlink") is None
    assert [lab.links[number].bytes_per_s for number in lab.egress("old/veteran")] == [10e9, 10e9]
    assert [(lab.links[number].bytes_per_s, lab.links[number].latency_s) for number in lab.egress("old")] == [
        (100e9, 2e-6)
    ]


def test_overrides_change_what_they_name_and_nothing_else(folder: Path) -> None:
    lab, untouched = load(folder, LAB), load(folder, LAB.split("overrides:")[0])
    was = {(link.source, link.target): link for link in untouched.links}
    changed = [link for link in lab.links if link.way != "across" and link != was[link.source, link.target]]
    assert {(link.source, link.target, link.bytes_per_s) for link in changed} == {
        *((f"rack0/node1/nic{number}", "rack0", 9e9) for number in range(8)),
        *(("rack0", f"rack0/node1/nic{number}", 9e9) for number in range(8)),
        ("rack0/node2/gpu3", "rack0/node2/nvlink", 20e9),
        ("rack0/node2/nvlink", "rack0/node2/gpu3", 355e9),
    }
    assert {link.latency_s for link in changed if link.medium == "nvlink"} == {9e-6}
    missing = {name for name in untouched.vertices if name not in lab.vertices}
    assert missing == {name for name in untouched.vertices if name.split("/")[:2] == ["rack1", "node3"]}


def test_links_across_are_shortcuts(folder: Path) -> None:
    lab = load(folder, LAB)
    path = lab.path("rack0/node0/gpu0", "rack1/node0/gpu0")
    assert "optical" in [lab.links[number].medium for number in path.links]


def test_fat_trees_are_short(folder: Path) -> None:
    fabric = load(
        folder,
        """
fat_tree:
  holds: {preset: tcp-host, count: 4}
  tiers:
    - {kind: rack, count: 3, oversubscription: 2}
    - {kind: pod, count: 2, oversubscription: 4, latency: 1 us}
""",
    )
    assert len(fabric.devices) == 24
    assert [fabric.vertices[name].kind for name in fabric.failure_domains("pod1/rack2/node3/cpu0")] == [
        "numa",
        "node",
        "rack",
        "pod",
        "cluster",
    ]
    assert (fabric.oversubscription("pod1/rack2"), fabric.oversubscription("pod1")) == (2.0, 4.0)


def test_nvlink_over_nodes(folder: Path) -> None:
    fabric = load(folder, "holds: [{kind: rack, nvlink: true, holds: [{preset: gb200-tray, count: 9}]}]")
    assert fabric.lowest_common_domain("rack0/node0/gpu0", "rack0/node8/gpu3") == "rack0/nvlink"


def test_servers_can_be_described(folder: Path) -> None:
    fabric = load(
        folder,
        """
holds:
  - preset: tcp-host
    gpus: 2
    numa_nodes: 2
    pcie_switches: 1
    gpu: {model: l40s, memory: 48 GB, memory_bandwidth: 864 GB/s, bf16: 362 TF, fp8: 733 TF, fp4: 0 F}
    cpu: {memory: 1 TB}
    nvlink: {bandwidth: 50 GB/s}
    gpu_host: {latency: 6 us}
    pcie: {bandwidth: 26 GB/s}
    dram: {bandwidth: 99 GB/s}
    sockets: {bandwidth: 33 GB/s}
    nic: {bandwidth: 400 Gb/s, latency: 2 us}
""",
    )
    found = {(link.medium, link.bytes_per_s, round(link.latency_s * 1e6, 3)) for link in fabric.links}
    assert {("nvlink", 50e9, 2.5), ("pcie", 26e9, 4.0), ("pcie", 52e9, 6.0), ("socket", 33e9, 0.5)} <= found
    assert {("dram", 99e9, 0.1), ("tcp", 50e9, 2.0)} <= found
    device = fabric.vertices["node0/gpu1"].device
    assert device is not None
    assert (device.fp8_flops_per_s, device.fp4_flops_per_s) == (733e12, 0.0)


# Line (from 1), the field, and a part of what is said of it.
MISTAKES: dict[str, tuple[int, str, str]] = {
    "": (1, "", "the file is empty"),
    "holds: [": (1, "", "not YAML"),
    "a: b: c": (1, "", "not YAML"),
    "- rack": (1, "", "needs fields and their values, not a list"),
    "name: lab": (1, "", "needs `holds` or `fat_tree`"),
    "holds: []": (1, "holds", "holds nothing"),
    "holds: 3": (1, "holds", "needs a list, not '3'"),
    "holds: [{count: 3}]": (1, "holds[0]", "needs `preset`"),
    "hold: []": (1, "hold", "did you mean 'holds'?"),
    "holds:\n- preset: hgx-h100\n  cuont: 3": (3, "holds[0].cuont", "did you mean 'count'?"),
    "holds:\n- preset: hgx-h10": (2, "holds[0].preset", "did you mean 'hgx-h100'?"),
    "holds:\n- preset: hgx-h100\n  count: -1": (3, "holds[0].count", "a whole number, not '-1'"),
    "holds:\n- preset: hgx-h100\n  count: 0": (3, "holds[0].count", "0 is not between 1 and"),
    "holds:\n- preset: hgx-h100\n  count: many": (3, "holds[0].count", "a whole number, not 'many'"),
    "holds:\n- preset: hgx-h100\n  count:": (3, "holds[0].count", "not nothing"),
    "holds:\n- preset: hgx-h100\n  preset: hgx-h200": (3, "holds[0].preset", "a second time"),
    "holds:\n- preset: hgx-h100\n  [a]: 1": (2, "holds[0]", "the name of a field is a text"),
    "holds:\n- preset: hgx-h100\n  nic: {bandwidth: 36}": (3, "holds[0].nic.bandwidth", "such as 36 GB/s"),
    "holds:\n- preset: hgx-h100\n  nic: {bandwidth: 0 GB/s}": (3, "holds[0].nic.bandwidth", "above 0"),
    "holds:\n- preset: hgx-h100\n  nic: {bandwidth: [1]}": (3, "holds[0].nic.bandwidth", "not a list"),
    "holds:\n- preset: hgx-h100\n  nic: fast": (3, "holds[0].nic", "needs fields and their values, not 'fast'"),
    "holds:\n- preset: hgx-h100\n  gpu: {memory: 80}": (3, "holds[0].gpu.memory", "such as 80 GiB"),
    "holds:\n- preset: hgx-h100\n  gpus: 257": (3, "holds[0].gpus", "not between 0 and 256"),
    "holds:\n- preset: hgx-h100\n  numa_nodes: 0": (3, "holds[0].numa_nodes", "not between 1"),
    "holds:\n- preset: hgx-h100\n  oversubscription: 2": (3, "holds[0].oversubscription", "no such field"),
    "holds:\n- preset: tcp-host\n  gpus: 2": (3, "holds[0].gpus", "describe one in `gpu`"),
    "holds:\n- preset: tcp-host\n  nvlink: {latency: 1 us}": (3, "holds[0].nvlink", "the preset has no NVLink"),
    "holds:\n- preset: tcp-host\n  count: 2\n  name: x": (4, "holds[0].name", "for one alone"),
    "holds:\n- preset: tcp-host\n  name: a/b": (3, "holds[0].name", "letters, digits"),
    "holds:\n- preset: gb200-nvl72\n  gpus: 3": (3, "holds[0].gpus", "no such field"),
    "holds:\n- {preset: tcp-host, name: x}\n- {preset: tcp-host, name: x}": (3, "holds[1]", "there is a 'x' here"),
    "holds:\n- {preset: tcp-host, count: 2}\n- {preset: tcp-host, name: node1}": (3, "holds[1]", "a 'node1' here"),
    "holds:\n- kind: rack": (2, "holds[0]", "needs `holds`"),
    "holds:\n- kind: gpu\n  holds: [{preset: tcp-host}]": (2, "holds[0].kind", "a meaning of its own"),
    "holds:\n- kind: rack\n  holds: [{preset: tcp-host}]\n  oversubscription: 0": (
        4,
        "holds[0].oversubscription",
        "a number above 0",
    ),
    "holds:\n- kind: rack\n  holds: [{preset: tcp-host}]\n  oversubscription: 2\n  bandwidth: 1 GB/s": (
        5,
        "holds[0].bandwidth",
        "instead of `oversubscription`",
    ),
    "holds:\n- kind: rack\n  nvlink: true\n  holds: [{preset: tcp-host}]": (3, "holds[0].nvlink", "nothing in this"),
    "holds:\n- kind: rack\n  nvlink: maybe\n  holds: [{preset: gb200-tray}]": (3, "holds[0].nvlink", "true or false"),
    "holds:\n- kind: rack\n  count: 9999\n  holds: [{preset: hgx-h100, count: 9999}]": (
        2,
        "holds",
        "vertices; at most 1000000",
    ),
    "fat_tree: {holds: {preset: tcp-host}}": (1, "fat_tree", "and `tiers`"),
    "fat_tree:\n  holds: {preset: tcp-host}\n  tiers: []": (3, "fat_tree.tiers", "at least one tier"),
    "fat_tree:\n  holds: {preset: tcp-host}\n  tiers:\n  - kind: rack": (4, "fat_tree.tiers[0]", "and `count`"),
    "fat_tree: {}\nholds: []": (1, "", "and not both"),
    "holds: [{preset: tcp-host}]\noverrides:\n  node7: gone": (3, "overrides.node7", "nothing has such a name"),
    "holds: [{preset: tcp-host}]\noverrides:\n  cluster: gone": (3, "overrides.cluster", "nothing has such a name"),
    "holds: [{preset: tcp-host}]\noverrides:\n  node0: {bandwidth: 1 GB/s}": (
        3,
        "overrides.node0",
        "leads up from what has this name",
    ),
    "holds: [{preset: tcp-host}]\noverrides:\n  node0/nic0: {medium: tcp}": (
        3,
        "overrides.node0/nic0",
        "changes nothing",
    ),
    "holds: [{preset: tcp-host}]\noverrides:\n  node0/nic0: {bandwith: 1 GB/s}": (
        3,
        "overrides.node0/nic0.bandwith",
        "did you mean 'bandwidth'?",
    ),
    "holds: [{preset: tcp-host}]\nlinks:\n- {between: [node0]}": (3, "links[0]", "and `bandwidth`"),
    "holds: [{preset: tcp-host}]\nlinks:\n- {between: [node0], bandwidth: 1 GB/s}": (
        3,
        "links[0].between",
        "two names, not 1",
    ),
    "holds: [{preset: tcp-host}]\nlinks:\n- {between: [node0, node1], bandwidth: 1 GB/s}": (
        3,
        "links[0].between[1]",
        "no 'node1' (did you mean 'node0'?)",
    ),
    "holds: [{preset: tcp-host}]\nlinks:\n- {between: [node0/nic0, cluster], bandwidth: 1 GB/s}": (
        3,
        "links[0].between",
        "linked already",
    ),
    "holds: [{kind: cluster, holds: [{preset: tcp-host}]}]": (1, "holds[0].kind", "a meaning of its own"),
    "holds: [{preset: tcp-host, name: cluster}]": (1, "", "two vertices are named 'cluster'"),
    "holds: &a\n- kind: rack\n  holds: *a": (2, "", "too many fields inside fields"),
    "holds: " + "[" * 3000: (0, "", "too many fields inside fields"),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_told_with_line_and_field(folder: Path, text: str) -> None:
    line, field, what = MISTAKES[text]
    with pytest.raises(BadTopology) as caught:
        load(folder, text)
    told = str(caught.value)
    where = f"{folder / 'lab.yaml'}:" + (f"{line}: " if line else "") + (f"{field}: " if field else "")
    assert told.startswith(where)
    assert what in told


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(BadTopology, match=r"cannot read .*lab\.yaml: No such file"):
        FileTopology(Options(folder / "lab.yaml")).load()


def test_a_file_that_is_not_text(folder: Path) -> None:
    (folder / "lab.yaml").write_bytes(b"holds: \xff")
    with pytest.raises(BadTopology, match=r"not a text file: .* at byte 7"):
        FileTopology(Options(folder / "lab.yaml")).load()


def test_control_characters(folder: Path) -> None:
    with pytest.raises(BadTopology, match="not YAML"):
        load(folder, "holds: \x07")


VALUES = (None, True, 0, 2, -1, 1.5, "rack", "hgx-h100", "gb200-nvl72", "tcp-host", "3 us", "9 GB/s", "gone", "x/*")
TOP_FIELDS = ("holds", "fat_tree", "tiers", "overrides", "links", "between", "kind", "preset", "count", "name")
OTHER_FIELDS = ("bandwidth", "latency", "oversubscription", "nvlink", "gpus", "medium", "node0", "rack0/node0/nic0")
SCRAPS = st.recursive(
    st.sampled_from(VALUES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*TOP_FIELDS, *OTHER_FIELDS]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(SCRAPS)
def test_whatever_it_says_it_is_a_fabric_or_a_mistake_with_a_place(
    tmp_path_factory: pytest.TempPathFactory, scrap: object
) -> None:
    folder = tmp_path_factory.mktemp("scraps")
    try:
        load(folder, yaml.safe_dump(scrap))
    except BadTopology as mistake:
        assert str(mistake).startswith(f"{folder / 'lab.yaml'}:")
