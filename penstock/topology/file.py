"""Topology from a short YAML file.

    holds:                          # what the cluster holds
      - kind: rack                  # a domain: any word; its switch joins what it holds
        count: 2
        oversubscription: 2         # what is inside can send twice what leads out
        holds:
          - preset: hgx-h100        # servers
            count: 4
    overrides:
      rack1/node2/nic*: {bandwidth: 9 GB/s}
      rack1/node3: gone

docs/topology.md has all fields. Every mistake is a BadTopology that names file, line and field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from msgspec import structs

from penstock.config import suggestion
from penstock.errors import BadTopology
from penstock.fabric import NVLINK, Device, Fabric, Link, Vertex, crosslink
from penstock.topology.build import (
    MOST_VERTICES,
    PRESETS,
    ROOT,
    Domain,
    Member,
    Nodes,
    Tier,
    assemble,
    count_vertices,
    fat_tree,
    member_names,
)
from penstock.topology.document import Field, read
from penstock.topology.presets import NVLINK4, SWITCH_S, NodeSpec, Wire

MOST_ALIKE = 100_000
MOST_PARTS = 256  # of one kind in one server

TOP = ("name", "holds", "fat_tree", "overrides", "links")
MEMBER = ("name", "count")
UPLINK = ("oversubscription", "bandwidth", "latency")
DOMAIN = (*MEMBER, "kind", "holds", "nvlink", *UPLINK)
PARTS = ("gpus", "nics", "numa_nodes", "pcie_switches")
WIRES = ("gpu_host", "pcie", "dram", "sockets", "nic")
NODES = (*MEMBER, "preset", *PARTS, "gpu", "cpu", "nvlink", *WIRES)
RACKS = (*MEMBER, "preset", *UPLINK)
FAT_TREE = ("holds", "tiers")
TIER = ("kind", "count", "oversubscription", "latency")
DEVICE = ("model", "memory", "memory_bandwidth", "bf16", "fp8", "fp4", "fp32")
WIRE = ("bandwidth", "latency")
LINK = ("between", "medium", "bandwidth", "latency")
OVERRIDE = ("medium", "bandwidth", "up", "down", "latency")
GONE = "gone"
NONE = "none"
RESERVED = ("cluster", "node", NVLINK, "numa", "pcie", "gpu", "cpu", "nic")  # kinds with a meaning of their own


@dataclass(frozen=True, slots=True)
class Options:
    path: Path


class FileTopology:
    """Meets the Topology port."""

    def __init__(self, options: Options) -> None:
        self._path = options.path

    def load(self) -> Fabric:
        return fabric_of(read(self._path, "write `holds:` and what the cluster holds"))


TOPOLOGY = FileTopology


def fabric_of(top: Field) -> Fabric:
    """The fabric that a field describes: as a whole file does, or as one member of `holds` alone."""
    if top.has("preset") or top.has("kind"):
        return assemble((_member(top),)).fabric()
    fields = top.fields(TOP)
    assembly = assemble(_cluster(top, fields), fields["name"].name() if "name" in fields else ROOT)
    vertices, links = assembly.vertices, assembly.links
    for pattern, (key, change) in fields["overrides"].entries().items() if "overrides" in fields else ():
        matches = _matches(vertices, pattern, key)
        if change.is_text(GONE):
            vertices, links = _without(vertices, links, matches)
        else:
            links = _changed(links, matches, change)
    for item in fields["links"].items() if "links" in fields else ():
        links = [*links, *_across(vertices, links, item)]
    try:
        return Fabric(vertices, links)
    except BadTopology as error:
        raise top.wrong(str(error)) from None


# What the cluster holds


def _cluster(top: Field, fields: Mapping[str, Field]) -> Sequence[Member]:
    if ("holds" in fields) == ("fat_tree" in fields):
        raise top.wrong("needs `holds` or `fat_tree`, and not both")
    field = fields.get("holds") or fields["fat_tree"]
    members = _holds(field) if "holds" in fields else (_fat_tree(field),)
    if (vertices := count_vertices(members)) > MOST_VERTICES:
        raise field.wrong(f"asks for {vertices} vertices; at most {MOST_VERTICES} are built")
    return members


def _holds(field: Field) -> tuple[Member, ...]:
    items = field.items()
    if not items:
        raise field.wrong("holds nothing")
    members = tuple(_member(item) for item in items)
    names = member_names(members)
    taken = {NVLINK: field}
    for item, member in zip(items, members, strict=True):
        for _, name in islice(names, member.count):
            if name in taken:
                raise item.wrong(f"there is a {name!r} here already; give this one another `name`")
            taken[name] = item
    return members


def _member(item: Field) -> Member:
    """Servers, or what has a preset; else a domain."""
    entries = item.entries()
    if "preset" in entries:
        member = PRESETS[entries["preset"][1].choice(PRESETS)]
        return _nodes(item, member) if isinstance(member, Nodes) else _racks(item, member)
    if "kind" not in entries:
        raise item.wrong("needs `preset` (servers) or `kind` (a domain that holds some)")
    return _domain(item)


def _nodes(item: Field, nodes: Nodes) -> Nodes:
    fields, spec = item.fields(NODES), nodes.spec
    changed = NodeSpec(
        cpu=_device(fields.get("cpu"), spec.cpu),
        gpu=_device(fields["gpu"], spec.gpu or Device("gpu")) if "gpu" in fields else spec.gpu,
        gpus=_parts(fields.get("gpus"), spec.gpus),
        nics=_parts(fields.get("nics"), spec.nics),
        numa_nodes=_parts(fields.get("numa_nodes"), spec.numa_nodes, least=1),
        pcie_switches=_parts(fields.get("pcie_switches"), spec.pcie_switches),
        nvlink=_nvlink(fields.get("nvlink"), spec.nvlink),
        gpu_host=_wire(fields.get("gpu_host"), spec.gpu_host),
        pcie=_wire(fields.get("pcie"), spec.pcie),
        dram=_wire(fields.get("dram"), spec.dram),
        sockets=_wire(fields.get("sockets"), spec.sockets),
        nic=_wire(fields.get("nic"), spec.nic),
    )
    if changed.gpus and changed.gpu is None:
        raise fields["gpus"].wrong("this preset has no GPU; describe one in `gpu`")
    return Nodes(changed, *_count_and_name(fields))


def _racks(item: Field, rack: Domain) -> Domain:
    fields = item.fields(RACKS)
    count, name = _count_and_name(fields)
    return _with_uplink(replace(rack, count=count, name=name), fields)


def _domain(item: Field) -> Domain:
    fields = item.fields(DOMAIN)
    if "holds" not in fields:
        raise item.wrong("needs `holds`: what this domain holds")
    holds = _holds(fields["holds"])
    has_nvlink = "nvlink" in fields and fields["nvlink"].flag()
    if has_nvlink and not any(spec.nvlink and spec.gpus for spec in _specs(holds)):
        raise fields["nvlink"].wrong("nothing in this domain has NVLink")
    count, name = _count_and_name(fields)
    return _with_uplink(Domain(_kind(fields["kind"]), holds, count, name, has_nvlink=has_nvlink), fields)


def _fat_tree(field: Field) -> Member:
    fields = field.fields(FAT_TREE)
    if len(fields) < len(FAT_TREE):
        raise field.wrong("needs `holds` (what is in each domain of the first tier) and `tiers`")
    tiers = fields["tiers"].items()
    if not tiers:
        raise fields["tiers"].wrong("needs at least one tier, such as {kind: rack, count: 4}")
    return fat_tree(_member(fields["holds"]), [_tier(item) for item in tiers])


def _tier(item: Field) -> Tier:
    fields = item.fields(TIER)
    if "kind" not in fields or "count" not in fields:
        raise item.wrong("needs `kind`, such as rack, and `count`: how many in each domain of the next tier")
    return Tier(
        _kind(fields["kind"]),
        fields["count"].whole(1, MOST_ALIKE),
        fields["oversubscription"].ratio() if "oversubscription" in fields else 1.0,
        fields["latency"].quantity("time") if "latency" in fields else SWITCH_S,
    )


def _kind(field: Field) -> str:
    kind = field.name()
    if kind in RESERVED:
        raise field.wrong(f"{kind!r} has a meaning of its own; a domain is a rack, pod, zone, ...")
    return kind


def _count_and_name(fields: Mapping[str, Field]) -> tuple[int, str]:
    count = fields["count"].whole(1, MOST_ALIKE) if "count" in fields else 1
    if "name" in fields and count > 1:
        raise fields["name"].wrong(f"is for one alone, and `count` is {count}")
    return count, fields["name"].name() if "name" in fields else ""


def _with_uplink(domain: Domain, fields: Mapping[str, Field]) -> Domain:
    if "latency" in fields:
        domain = replace(domain, latency_s=fields["latency"].quantity("time"))
    if "bandwidth" in fields and "oversubscription" in fields:
        raise fields["bandwidth"].wrong("is instead of `oversubscription`; give one of them")
    if "bandwidth" in fields:
        return replace(domain, uplink_bytes_per_s=fields["bandwidth"].positive("rate"))
    if "oversubscription" in fields:
        return replace(domain, oversubscription=fields["oversubscription"].ratio())
    return domain


def _specs(members: Sequence[Member]) -> list[NodeSpec]:
    return [
        spec for member in members for spec in ([member.spec] if isinstance(member, Nodes) else _specs(member.holds))
    ]


def _parts(field: Field | None, count: int, least: int = 0) -> int:
    return count if field is None else field.whole(least, MOST_PARTS)


def _device(field: Field | None, device: Device) -> Device:
    """`device` with what the field says."""
    if field is None:
        return device
    fields = field.fields(DEVICE)
    return Device(
        fields["model"].name() if "model" in fields else device.model,
        fields["memory"].positive("memory") if "memory" in fields else device.memory_bytes,
        fields["memory_bandwidth"].positive("rate") if "memory_bandwidth" in fields else device.memory_bytes_per_s,
        fields["bf16"].quantity("compute") if "bf16" in fields else device.bf16_flops_per_s,
        fields["fp8"].quantity("compute") if "fp8" in fields else device.fp8_flops_per_s,
        fields["fp4"].quantity("compute") if "fp4" in fields else device.fp4_flops_per_s,
        fields["fp32"].quantity("compute") if "fp32" in fields else device.fp32_flops_per_s,
    )


def _wire(field: Field | None, wire: Wire) -> Wire:
    """`wire` with what the field says."""
    if field is None:
        return wire
    fields = field.fields(WIRE)
    return Wire(
        wire.medium,
        fields["bandwidth"].positive("rate") if "bandwidth" in fields else wire.bytes_per_s,
        fields["latency"].quantity("time") if "latency" in fields else wire.latency_s,
    )


def _nvlink(field: Field | None, nvlink: Wire | None) -> Wire | None:
    if field is None:
        return nvlink
    if field.is_text(NONE):
        return None
    if nvlink is None and "bandwidth" not in field.fields(WIRE):
        raise field.wrong("needs `bandwidth`: the preset has no NVLink")
    return _wire(field, nvlink or NVLINK4)


# What is said of single vertices


def _matches(vertices: Sequence[Vertex], pattern: str, key: Field) -> dict[str, None]:
    """Names that the pattern of an override fits, part by part between slashes; never the cluster itself."""
    parts = pattern.split("/")
    matches = {vertex.name: None for vertex in vertices if vertex.inside and _fits(vertex.name.split("/"), parts)}
    if not matches:
        raise key.wrong("nothing has such a name; `penstock topology show --json` lists the names")
    return matches


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _without(
    vertices: Sequence[Vertex], links: Sequence[Link], matches: Mapping[str, None]
) -> tuple[list[Vertex], list[Link]]:
    """Neither what matches nor what is inside it. Holders come before what they hold in `vertices`."""
    gone = dict(matches)
    for vertex in vertices:
        if vertex.inside in gone:
            gone[vertex.name] = None
    return (
        [vertex for vertex in vertices if vertex.name not in gone],
        [link for link in links if link.source not in gone and link.target not in gone],
    )


def _changed(links: Sequence[Link], matches: Mapping[str, None], change: Field) -> list[Link]:
    """The links with other figures where they lead up from what matches."""
    fields = change.fields(OVERRIDE)
    medium = fields["medium"].text() if "medium" in fields else None
    rates: dict[str, float] = {
        name: fields[name].positive("rate") for name in ("bandwidth", "up", "down") if name in fields
    }
    latency_s = fields["latency"].quantity("time") if "latency" in fields else None
    if not rates and latency_s is None:
        raise change.wrong(f"changes nothing: say {GONE!r}, or {', '.join(OVERRIDE[1:])}")
    found = [_is_above(link, matches, medium) for link in links]
    if not any(found):
        raise change.wrong(f"no {medium or ''} link leads up from what has this name")
    return [
        structs.replace(
            link,
            bytes_per_s=rates.get(link.way) or rates.get("bandwidth", link.bytes_per_s),
            latency_s=latency_s if latency_s is not None else link.latency_s,
        )
        if is_meant
        else link
        for link, is_meant in zip(links, found, strict=True)
    ]


def _is_above(link: Link, names: Mapping[str, None], medium: str | None) -> bool:
    """Whether it is one of the directions between a vertex of `names` and one nearer to the core."""
    lower = link.source if link.way == "up" else link.target
    return lower in names and medium in (None, link.medium)


def _across(vertices: Sequence[Vertex], links: Sequence[Link], item: Field) -> tuple[Link, Link]:
    fields = item.fields(LINK)
    if "between" not in fields or "bandwidth" not in fields:
        raise item.wrong("needs `between: [one, other]` and `bandwidth`")
    ends = fields["between"].items()
    if len(ends) != 2:
        raise fields["between"].wrong(f"needs two names, not {len(ends)}")
    names = [vertex.name for vertex in vertices]
    for end in ends:
        if end.text() not in names:
            raise end.wrong(f"there is no {end.text()!r}{suggestion(end.text(), names)}")
    one, other = (end.text() for end in ends)
    if one == other or any({one, other} == {link.source, link.target} for link in links):
        raise fields["between"].wrong(f"{one} and {other} are linked already; change that link in `overrides`")
    return crosslink(
        one,
        other,
        fields["medium"].name() if "medium" in fields else "link",
        fields["bandwidth"].positive("rate"),
        fields["latency"].quantity("time") if "latency" in fields else SWITCH_S,
    )
