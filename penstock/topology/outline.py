"""A fabric in few words: what is alike is said once. For people; `penstock topology show` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.fabric import Device, Fabric, Link
from penstock.topology import units
from penstock.topology.build import UPLINK


@dataclass(frozen=True, slots=True)
class Group:
    """Vertices inside one domain that are alike, and what is inside the first of them."""

    kind: str
    names: tuple[str, ...]
    facts: tuple[str, ...]  # of each: its device, its links towards the core
    inside: tuple[Group, ...]

    @property
    def title(self) -> str:
        first, last = _short(self.names[0]), _short(self.names[-1])
        return first if len(self.names) == 1 else f"{first} … {last} ({len(self.names)})"


def outline(fabric: Fabric) -> Group:
    return _group(fabric, (fabric.root,))


def summary(fabric: Fabric) -> list[str]:
    """How many there are of which device, and their memory together."""
    counts = Counter((fabric.vertices[name].kind, fabric.vertices[name].device) for name in fabric.devices)
    return [
        f"{count} {kind} {device.model}, {units.memory(count * device.memory_bytes)}"
        for (kind, device), count in counts.items()
        if device is not None
    ]


def across(fabric: Fabric) -> list[str]:
    """The links between any two vertices, those of one sort in one line."""
    found: dict[str, list[tuple[str, str]]] = {}
    for link in fabric.links:
        if link.way == "across":
            kinds = " to ".join(fabric.vertices[end].kind for end in (link.source, link.target))
            pairs = found.setdefault(f"{link.medium} {_figures(link)}, {kinds}", [])
            if (link.target, link.source) not in pairs:
                pairs.append((link.source, link.target))
    return [
        f"{what}: " + " - ".join(pairs[0]) + (f", and {len(pairs) - 1} more" if len(pairs) > 1 else "")
        for what, pairs in found.items()
    ]


def _group(fabric: Fabric, names: tuple[str, ...]) -> Group:
    alike: dict[int, list[str]] = {}
    for child in fabric.children(names[0]):
        alike.setdefault(fabric.shape(child), []).append(child)
    inside = tuple(_group(fabric, tuple(children)) for children in alike.values())
    return Group(fabric.vertex(names[0]).kind, names, tuple(_facts(fabric, names[0])), inside)


def _facts(fabric: Fabric, name: str) -> Iterator[str]:
    device = fabric.vertex(name).device
    if device is not None:
        yield " ".join(_device(device))
    for number in fabric.egress(name):
        link = fabric.links[number]
        if link.source == name and link.way == "up":
            yield f"{link.medium} {_figures(link)}" + _destination(fabric, link) + _oversubscription(fabric, link)


def _device(device: Device) -> Iterator[str]:
    """What is known."""
    yield device.model
    if device.memory_bytes:
        yield units.memory(device.memory_bytes)
    if device.memory_bytes_per_s:
        yield units.rate(device.memory_bytes_per_s)
    if device.bf16_flops_per_s:
        yield f"{units.compute(device.bf16_flops_per_s)} bf16"


def _figures(link: Link) -> str:
    return f"{units.rate(link.bytes_per_s)} {units.time(link.latency_s)}"


def _destination(fabric: Fabric, link: Link) -> str:
    """Nothing for the domain around, or where the medium says it."""
    source, target = fabric.vertices[link.source], fabric.vertices[link.target]
    return (
        ""
        if target.name == source.inside or target.kind == link.medium or target.inside == ""
        else f" to {target.kind}"
    )


def _oversubscription(fabric: Fabric, link: Link) -> str:
    ratio = fabric.oversubscription(link.source) if link.medium == UPLINK else 1.0
    return f" {ratio:.3g}:1" if ratio > 1.0 else ""


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
