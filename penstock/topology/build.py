"""Fabrics put together from servers: racks of them, zones of racks, fat trees of any number of tiers.

`Domain` and `Nodes` describe; `build` makes the fabric. In it a rack is `rack0`, its second node `rack0/node1`, and
that one's GPUs `rack0/node1/gpu0` to `gpu7`; its NICs, CPUs, NUMA nodes and PCIe switches are named the same way. All
NICs of a node lead to the domain that the node is in, and all domains to the one around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from penstock.errors import BadTopology
from penstock.fabric import NVLINK, Device, Fabric, Link, Vertex, duplex
from penstock.topology.presets import GB200_TRAY, NODES, SWITCH_S, NodeSpec, Wire

T = TypeVar("T")

ROOT = "cluster"
UPLINK = "uplink"  # the medium of links between tiers
MOST_VERTICES = 1_000_000  # who asks for more has a count wrong


@dataclass(frozen=True, slots=True)
class Nodes:
    """`count` equal servers. A `name` is for one alone; without it they are node0, node1, ..."""

    spec: NodeSpec
    count: int = 1
    name: str = ""


@dataclass(frozen=True, slots=True)
class Domain:
    """`count` equal domains, each with its own switch.

    What leads out of one carries what its members can send together divided by `oversubscription`, or
    `uplink_bytes_per_s` if that is not 0.
    """

    kind: str
    holds: tuple[Domain | Nodes, ...]
    count: int = 1
    name: str = ""
    oversubscription: float = 1.0
    uplink_bytes_per_s: float = 0.0
    latency_s: float = SWITCH_S
    has_nvlink: bool = False  # its GPUs are in one NVLink domain, instead of one for each node


@dataclass(frozen=True, slots=True)
class Tier:
    """A level of a fat tree: `count` of it in each domain of the next one."""

    kind: str
    count: int
    oversubscription: float = 1.0
    latency_s: float = SWITCH_S


Member = Domain | Nodes

PRESETS: dict[str, Member] = {
    **{name: Nodes(spec) for name, spec in NODES.items()},
    "gb200-nvl72": Domain("rack", (Nodes(GB200_TRAY, 18),), has_nvlink=True),
}


def fat_tree(lowest: Member, tiers: Sequence[Tier]) -> Member:
    """`lowest` in each domain of the first tier, that tier's domains in each of the second, and so on."""
    member = lowest
    for tier in tiers:
        member = Domain(
            tier.kind, (member,), tier.count, oversubscription=tier.oversubscription, latency_s=tier.latency_s
        )
    return member


def build(members: Sequence[Member], name: str = ROOT) -> Fabric:
    """The fabric of `members`, whose switches and NICs meet in a core that is never full itself."""
    return assemble(members, name).fabric()


def assemble(members: Sequence[Member], name: str = ROOT) -> Assembly:
    """As `build`, but still open to changes."""
    if (vertices := count_vertices(members)) > MOST_VERTICES:
        raise BadTopology(f"{vertices} vertices are asked for; at most {MOST_VERTICES} are built")
    assembly = Assembly(name)
    _add_members(assembly, members, name, None)
    return assembly


def count_vertices(members: Sequence[Member]) -> int:
    return sum(member.count * _vertices_of_one(member) for member in members)


def member_names(members: Sequence[Member]) -> Iterator[tuple[Member, str]]:
    """Every domain and node of `members`, one by one, with its name inside what holds it."""
    used: dict[str, int] = {}
    for member in members:
        kind = "node" if isinstance(member, Nodes) else member.kind
        for _ in range(member.count):
            if not member.name:
                used[kind] = used.get(kind, -1) + 1
            yield member, member.name or f"{kind}{used[kind]}"


class Assembly:
    """Vertices and links on the way to a fabric."""

    def __init__(self, root: str = ROOT) -> None:
        self.root = root
        self.vertices = [Vertex(root, "cluster")]
        self.links: list[Link] = []
        self._climbing: dict[str, float] = {}

    def fabric(self) -> Fabric:
        """Raises BadTopology for what contradicts itself."""
        return Fabric(self.vertices, self.links)

    def add(self, kind: str, name: str, inside: str, device: Device | None = None) -> str:
        """A new vertex; returns its name."""
        self.vertices.append(Vertex(name, kind, inside, device))
        return name

    def connect(self, lower: str, upper: str, wire: Wire) -> None:
        """Both directions of `wire` between a vertex and one nearer to the core."""
        self.links += duplex(lower, upper, wire.medium, wire.bytes_per_s, wire.latency_s)
        self._climbing[upper] = self._climbing.get(upper, 0.0) + wire.bytes_per_s

    def add_uplink(self, domain: str, upper: str, oversubscription: float, latency_s: float = SWITCH_S) -> None:
        """Connects `domain` with what all that is connected to it can send, divided by `oversubscription`.

        To be called when all that is there. Nothing is connected if there is no NIC inside.
        """
        if (below := self._climbing.get(domain, 0.0)) > 0:
            self.connect(domain, upper, Wire(UPLINK, below / oversubscription, latency_s))


def add_node(assembly: Assembly, spec: NodeSpec, name: str, inside: str, nvlink: str | None = None) -> None:
    """A server, its NICs connected to `inside` and its GPUs to the NVLink domain `nvlink`, or to one of its own.

    A GPU reaches one of the NICs without the CPU's help, with its neighbours if there are fewer than GPUs.
    """
    assembly.add("node", name, inside)
    numas = [_add_numa(assembly, spec, name, number) for number in range(spec.numa_nodes)]
    hosts = [_add_switch(assembly, spec, name, number, numas) for number in range(spec.pcie_switches)]
    hosts = hosts or [(numa, numa) for numa in numas]
    nics = _add_nics(assembly, spec, name, inside, numas, hosts)
    for number in range(spec.gpus):
        host, _ = _share(hosts, number, spec.gpus)
        gpu = assembly.add("gpu", f"{name}/gpu{number}", host, spec.gpu)
        assembly.connect(gpu, host, spec.gpu_host)
        if nics:
            assembly.connect(gpu, _share(nics, number, spec.gpus), spec.pcie)
    if spec.nvlink is not None and spec.gpus:
        nvlink = nvlink or assembly.add(NVLINK, f"{name}/{NVLINK}", name)
        for number in range(spec.gpus):
            assembly.connect(f"{name}/gpu{number}", nvlink, spec.nvlink)


def _vertices_of_one(member: Member) -> int:
    if isinstance(member, Domain):
        return 1 + member.has_nvlink + count_vertices(member.holds)
    spec = member.spec
    return 2 + 2 * spec.numa_nodes + spec.pcie_switches + spec.nics + spec.gpus


def _add_members(assembly: Assembly, members: Sequence[Member], inside: str, nvlink: str | None) -> None:
    for member, name in member_names(members):
        full = name if inside == assembly.root else f"{inside}/{name}"
        if isinstance(member, Nodes):
            add_node(assembly, member.spec, full, inside, nvlink)
        else:
            _add_domain(assembly, member, full, inside, nvlink)


def _add_domain(assembly: Assembly, domain: Domain, name: str, inside: str, nvlink: str | None) -> None:
    assembly.add(domain.kind, name, inside)
    if domain.has_nvlink:
        nvlink = assembly.add(NVLINK, f"{name}/{NVLINK}", name)
    _add_members(assembly, domain.holds, name, nvlink)
    if domain.uplink_bytes_per_s:
        assembly.connect(name, inside, Wire(UPLINK, domain.uplink_bytes_per_s, domain.latency_s))
    else:
        assembly.add_uplink(name, inside, domain.oversubscription, domain.latency_s)


def _add_numa(assembly: Assembly, spec: NodeSpec, node: str, number: int) -> str:
    numa = assembly.add("numa", f"{node}/numa{number}", node)
    cpu = assembly.add("cpu", f"{node}/cpu{number}", numa, spec.cpu)
    assembly.connect(cpu, numa, spec.dram)
    if spec.numa_nodes > 1:
        assembly.connect(numa, node, spec.sockets)
    return numa


def _add_switch(assembly: Assembly, spec: NodeSpec, node: str, number: int, numas: Sequence[str]) -> tuple[str, str]:
    """Returns the switch and its NUMA node."""
    numa = _share(numas, number, spec.pcie_switches)
    switch = assembly.add("pcie", f"{node}/pcie{number}", numa)
    assembly.connect(switch, numa, spec.pcie)
    return switch, numa


def _add_nics(
    assembly: Assembly,
    spec: NodeSpec,
    node: str,
    network: str,
    numas: Sequence[str],
    hosts: Sequence[tuple[str, str]],
) -> list[str]:
    """NICs that lead to `network`. CPUs use those of their NUMA node; if it has none, the first, past the other CPU."""
    near: dict[str, list[str]] = {numa: [] for numa in numas}
    nics = []
    for number in range(spec.nics):
        host, numa = _share(hosts, number, spec.nics)
        nics.append(assembly.add("nic", f"{node}/nic{number}", host))
        near[numa].append(nics[-1])
        assembly.connect(nics[-1], network, spec.nic)
    for numa in numas:
        for nic in near[numa]:
            assembly.connect(numa, nic, spec.pcie)
        if nics and not near[numa]:
            assembly.connect(numa, nics[0], spec.sockets)
    return nics


def _share(places: Sequence[T], number: int, count: int) -> T:
    """The place of one out of `count` that are spread evenly."""
    return places[number * len(places) // count]
