"""Topology from the labels that Kubernetes and Ray publish for their nodes.

Input is node name -> labels, so no client library is needed. Understood are

    topology.kubernetes.io/*, ray.io/availability-*         region, zone
    network.topology.nvidia.com/*, fabric.topograph.run/*   tiers of switches, as NVIDIA's Topograph finds them
    topology.k8s.aws/*, cloud.google.com/gce-topology-*     the same on two clouds
    .../rack, or just rack                                  what people write themselves
    nvidia.com/gpu.*, ray.io/accelerator-type               GPUs, and the NVLink domain that nodes share

Labels say what is where, not how fast it is. A node is taken for the server that is sold with its GPU, one without
GPUs for a plain TCP host, and a switch for one that passes on all that reaches it, unless Options say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from penstock.errors import BadTopology
from penstock.fabric import NVLINK, Device, Fabric
from penstock.topology.build import ROOT, Assembly, add_node
from penstock.topology.presets import GB200_TRAY, SWITCH_S, TCP_HOST, NodeSpec, find_server

Labels = Mapping[str, str]
Place = tuple[str, ...]  # names of the domains around a node, the largest first

# Kinds of domains, the largest first, and the labels that name one. Of several labels the first that is there counts.
LEVELS: dict[str, tuple[str, ...]] = {
    "region": ("topology.kubernetes.io/region", "ray.io/availability-region", "ray.io/region"),
    "zone": ("topology.kubernetes.io/zone", "ray.io/availability-zone"),
    "core": (
        "network.topology.nvidia.com/core",
        "network.topology.nvidia.com/datacenter",
        "fabric.topograph.run/tier-2",
        "topology.k8s.aws/network-node-layer-1",
    ),
    "spine": (
        "network.topology.nvidia.com/spine",
        "fabric.topograph.run/tier-1",
        "topology.k8s.aws/network-node-layer-2",
        "cloud.google.com/gce-topology-block",
    ),
    "rack": (
        "network.topology.nvidia.com/leaf",
        "network.topology.nvidia.com/block",
        "fabric.topograph.run/tier-0",
        "topology.k8s.aws/network-node-layer-3",
        "cloud.google.com/gce-topology-subblock",
    ),
}
UPLINK_S = {"region": 15e-3, "zone": 0.25e-3}  # half of the way between two of them [R]; others are one more switch
OWN_RACK = re.compile(r"(.*/)?rack")

PRODUCTS = ("nvidia.com/gpu.product", "ray.io/accelerator-type")
COUNT = "nvidia.com/gpu.count"
MEMORY = "nvidia.com/gpu.memory"  # MiB
CLIQUE = "nvidia.com/gpu.clique"
# Elsewhere than on NVL72 racks these can be a reservation, or one node.
ACCELERATOR_DOMAINS = ("network.topology.nvidia.com/accelerator", "accelerator.topograph.run/domain")


@dataclass(frozen=True, slots=True)
class Options:
    """`oversubscription` is by kind of domain, such as {"rack": 2.0}; what is not named has none."""

    nodes: Mapping[str, Labels]
    oversubscription: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Node:
    """What the labels of a node say."""

    name: str
    server: NodeSpec
    domains: Mapping[Place, str]  # kinds by place, the largest first
    clique: str | None  # the NVLink domain that it shares with others

    @property
    def place(self) -> Place:
        return max(self.domains, key=len, default=())


class LabelsTopology:
    """Meets the Topology port. Nodes keep their names; a domain is named by its place, as in zone-a/rack-3."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def load(self) -> Fabric:
        nodes = [read_node(name, labels) for name, labels in self._options.nodes.items()]
        kinds = {place: kind for node in nodes for place, kind in node.domains.items()}
        assembly = Assembly()
        for place, kind in kinds.items():
            assembly.add(kind, _name(place), _name(place[:-1]))
        nvlinks = _add_nvlinks(assembly, nodes)
        for node in nodes:
            add_node(assembly, node.server, node.name, _name(node.place), nvlinks.get(node.clique))
        for place in sorted(kinds, key=len, reverse=True):  # what is inside has its uplinks first
            oversubscription = self._options.oversubscription.get(kinds[place], 1.0)
            latency_s = UPLINK_S.get(kinds[place], SWITCH_S)
            assembly.add_uplink(_name(place), _name(place[:-1]), oversubscription, latency_s)
        return assembly.fabric()


TOPOLOGY = LabelsTopology


class _Metadata(msgspec.Struct):
    name: str
    labels: dict[str, str] = {}


class _KubernetesNode(msgspec.Struct):
    metadata: _Metadata


def read_labels(path: Path) -> dict[str, Labels]:
    """Labels by node from a JSON file: `{node: {label: value}}`, or what `kubectl get nodes -o json` prints.

    Raises BadTopology for anything else.
    """
    try:
        listing = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        if "items" not in listing:
            return {node: msgspec.json.decode(labels, type=dict[str, str]) for node, labels in listing.items()}
        nodes = msgspec.json.decode(listing["items"], type=list[_KubernetesNode])
    except OSError as error:
        raise BadTopology(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise BadTopology(f"{path}: not labels by node, nor a list of Kubernetes nodes: {error}") from None
    return {node.metadata.name: node.metadata.labels for node in nodes}


def read_node(name: str, labels: Labels) -> Node:
    """Raises BadTopology for a label that does not say what it should."""
    server = _server(name, labels)
    return Node(name, server, _domains(labels), _clique(labels, server))


def _server(node: str, labels: Labels) -> NodeSpec:
    """What the node probably is."""
    product, count = _first(labels, PRODUCTS), _number(node, labels, COUNT)
    if product is None or count == 0:
        return TCP_HOST
    memory_bytes = (_number(node, labels, MEMORY) or 0) * 2.0**20
    server = find_server(product, memory_bytes)
    if server is None:
        return replace(TCP_HOST, gpu=Device(product, memory_bytes), gpus=count or 1)
    if count is None:
        return server
    return replace(server, gpus=count, nics=max(1, server.nics * count // server.gpus))


def _domains(labels: Labels) -> dict[Place, str]:
    domains: dict[Place, str] = {}
    place: Place = ()
    for kind, keys in LEVELS.items():
        name = _first(labels, keys)
        if name is None and kind == "rack":
            name = _first(labels, sorted(filter(OWN_RACK.fullmatch, labels)))
        if name is not None:
            place = (*place, name)
            domains[place] = kind
    return domains


def _clique(labels: Labels, server: NodeSpec) -> str | None:
    if server.nvlink is None:
        return None
    keys = (CLIQUE, *ACCELERATOR_DOMAINS) if server.gpu == GB200_TRAY.gpu else (CLIQUE,)
    return _first(labels, keys)


def _add_nvlinks(assembly: Assembly, nodes: Sequence[Node]) -> dict[str | None, str]:
    """A vertex for each NVLink domain that nodes share, in the smallest domain around all of them. Names by clique."""
    places: dict[str, list[Place]] = {}
    for node in nodes:
        if node.clique is not None:
            places.setdefault(node.clique, []).append(node.place)
    holders = {clique: _common(found) for clique, found in places.items()}
    return {
        clique: assembly.add(NVLINK, _name((*holder, f"{NVLINK}-{clique}")), _name(holder))
        for clique, holder in holders.items()
    }


def _common(places: Sequence[Place]) -> Place:
    """The longest beginning that all have."""
    shortest = min(places, key=len)
    return next(
        shortest[:depth]
        for depth in range(len(shortest), -1, -1)
        if all(place[:depth] == shortest[:depth] for place in places)
    )


def _name(place: Place) -> str:
    return "/".join(place) or ROOT


def _first(labels: Labels, keys: Iterable[str]) -> str | None:
    """The first of these labels that says something."""
    return next((labels[key] for key in keys if labels.get(key)), None)


def _number(node: str, labels: Labels, key: str) -> int | None:
    value = labels.get(key)
    if value is None:
        return None
    if not value.isdecimal():
        raise BadTopology(f"node {node}: label {key} is {value!r}, which is not a whole number")
    return int(value)
