"""What is wired to what: devices, the domains they fail with, and the links a byte crosses between two of them.

A fabric is two structures over one set of vertices.

    inside   a tree, GPU < PCIe switch < NUMA node < node < rack < zone < cluster: what fails takes along what is in it
    links    one for each direction; `up` ones lead towards the core of a network (GPU to NVLink switch, GPU to NIC,
             NIC to rack, rack to pod) and have `down` ones in return; `across` ones join any two vertices

A path climbs, crosses at most one `across` link, and comes down. Devices do not forward, so they are only its ends.
Hence a vertex knows the few ways up from itself, and a path between two costs no search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Literal, TypeVar

import msgspec

from penstock.config import suggestion
from penstock.errors import BadTopology, NoPath

T = TypeVar("T")

Way = Literal["up", "down", "across"]
NVLINK = "nvlink"  # the kind of a vertex that stands for an NVLink domain

PATH_BYTES = 16 << 20  # the transfer for which a path is chosen if nobody says: some hundred tokens of KV


class Device(msgspec.Struct, frozen=True, omit_defaults=True):
    """What computes. Peak figures without sparsity; 0 is not known, or for a number format not supported."""

    model: str
    memory_bytes: float = 0.0
    memory_bytes_per_s: float = 0.0
    bf16_flops_per_s: float = 0.0
    fp8_flops_per_s: float = 0.0
    fp4_flops_per_s: float = 0.0
    fp32_flops_per_s: float = 0.0


class Vertex(msgspec.Struct, frozen=True, omit_defaults=True):
    """A place. `inside` names the smallest place that holds it, and is empty for the one that holds all."""

    name: str
    kind: str  # cluster, zone, rack, node, nvlink, numa, pcie, gpu, cpu, nic, or what a network calls its tiers
    inside: str = ""
    device: Device | None = None


class Link(msgspec.Struct, frozen=True):
    """One direction of a connection. `bytes_per_s` is what one large transfer gets when it has the link to itself."""

    source: str
    target: str
    way: Way
    medium: str
    bytes_per_s: float
    latency_s: float


class Path(msgspec.Struct, frozen=True):
    """A way from one vertex to another. `links` are positions in `Fabric.links`, in order; none: nothing is moved."""

    links: tuple[int, ...]
    bytes_per_s: float  # of the slowest link
    latency_s: float  # of all links together

    def seconds(self, size_bytes: float) -> float:
        """Time to move `size_bytes` over links that nobody else uses: alpha + bytes / bottleneck."""
        return self.latency_s + size_bytes / self.bytes_per_s


class _Leg(msgspec.Struct, frozen=True, gc=False):
    """One way from a vertex up to another, or down from there. `links` start at the lower end."""

    bytes_per_s: float
    latency_s: float
    links: tuple[int, ...]


_Steps = Mapping[str, list[tuple[int, str]]]  # from a vertex: (number of the link, where it leads)
_Legs = dict[str, list[_Leg]]  # by the vertex where the leg ends


class Fabric:
    """Vertices and links, checked, and what can be asked of them. Never changes.

    `vertices` are by name, as given; the numbers that paths speak of are positions in `links`. Raises BadTopology for
    what contradicts itself.
    """

    def __init__(self, vertices: Iterable[Vertex], links: Iterable[Link]) -> None:
        listed = list(vertices)
        self.vertices: Mapping[str, Vertex] = {vertex.name: vertex for vertex in listed}
        self.links: tuple[Link, ...] = tuple(links)
        if len(self.vertices) < len(listed):
            raise BadTopology(f"two vertices are named {_first_repeated([vertex.name for vertex in listed])!r}")
        self._chains = _chains(self.vertices)
        _check_links(self.vertices, self.links)
        self._ups = _steps((link.source, number, link.target) for number, link in self._numbered("up"))
        self._downs = _steps((link.target, number, link.source) for number, link in self._numbered("down"))
        self._across = _steps((link.source, number, link.target) for number, link in self._numbered("across"))
        self._rising: dict[str, _Legs] = {}  # filled as paths are asked for
        self._falling: dict[str, _Legs] = {}
        self._reaching: dict[str, _Legs] = {}

    # Domains

    def vertex(self, name: str) -> Vertex:
        """Raises BadTopology if there is none of that name."""
        if name not in self.vertices:
            raise BadTopology(f"there is no {name!r} in this topology{suggestion(name, self.vertices)}")
        return self.vertices[name]

    @property
    def root(self) -> str:
        """The vertex that holds all others."""
        return self._order[0]

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """All devices, ordered so that those inside one domain are neighbours, see `span`."""
        return tuple(name for name in self._order if self.vertices[name].device is not None)

    def span(self, domain: str) -> range:
        """Positions in `devices` of what is inside `domain`, itself included."""
        self.vertex(domain)
        return self._spans[domain]

    def children(self, domain: str) -> tuple[str, ...]:
        """What is directly inside `domain`."""
        self.vertex(domain)
        return tuple(self._children.get(domain, ()))

    def failure_domains(self, name: str) -> tuple[str, ...]:
        """The domains whose failure takes `name` along, or off its NVLink; the smallest first."""
        self.vertex(name)
        domains = list(self._chains[name][1:])
        for _, switch in self._ups.get(name, ()):
            if self.vertices[switch].kind == NVLINK:
                holder = self.vertices[switch].inside
                domains.insert(domains.index(holder) if holder in domains else 0, switch)
        return tuple(domains)

    def find_domain(self, name: str, kind: str) -> str | None:
        """The smallest domain of that kind which `name` is in, or is itself."""
        domains = (name, *self.failure_domains(name))
        return next((domain for domain in domains if self.vertices[domain].kind == kind), None)

    def lowest_common_domain(self, one: str, other: str) -> str:
        """The smallest domain that both are in; one of the two if it holds the other."""
        others = (other, *self.failure_domains(other))
        return next(domain for domain in (one, *self.failure_domains(one)) if domain in others)

    # Links

    def path(self, source: str, target: str, size_bytes: float = PATH_BYTES) -> Path:
        """The quickest way for `size_bytes`, from any vertex to any other. Raises NoPath if no links lead there."""
        if self.vertex(source) is self.vertex(target):
            return Path((), math.inf, 0.0)
        falling = self._legs(target, self._downs, self._falling)
        ways = (
            (up, down)
            for top, ups in self._reach(source).items()
            if top in falling
            for up in ups
            for down in falling[top]
        )
        best = min(ways, key=lambda way: _cost(way[0], way[1], size_bytes), default=None)
        if best is None:
            raise NoPath(f"no links lead from {source} to {target}; both need a NIC or an NVLink domain in common")
        return _join(*best)

    def egress(self, domain: str) -> tuple[int, ...]:
        """Numbers of the links that lead out of `domain`: what all flows leaving it share."""
        self.vertex(domain)
        return tuple(self._borders[0].get(domain, ()))

    def ingress(self, domain: str) -> tuple[int, ...]:
        """Numbers of the links that lead into `domain`."""
        self.vertex(domain)
        return tuple(self._borders[1].get(domain, ()))

    def oversubscription(self, name: str) -> float:
        """How many times more could climb to `name` than can climb on from it; 1 where nothing does either."""
        self.vertex(name)
        above = sum(self.links[number].bytes_per_s for number, _ in self._ups.get(name, ()))
        below = self._climbing_bytes_per_s.get(name, 0.0)
        return below / above if above and below else 1.0

    # Likeness

    def shape(self, name: str) -> int:
        """Equal for vertices that are alike: in kind, device, rates of their links, and what is inside them."""
        self.vertex(name)
        return self._shapes[name]

    @cached_property
    def device_classes(self) -> tuple[tuple[str, ...], ...]:
        """Devices that can stand in for each other: they and the domains around them are alike, at every size."""
        classes: dict[tuple[int, ...], list[str]] = {}
        for device in self.devices:
            classes.setdefault(tuple(self._shapes[name] for name in self._chains[device]), []).append(device)
        return tuple(tuple(members) for members in classes.values())

    # What is derived, once

    def _numbered(self, way: Way) -> Iterator[tuple[int, Link]]:
        return ((number, link) for number, link in enumerate(self.links) if link.way == way)

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {}
        for vertex in self.vertices.values():
            children.setdefault(vertex.inside, []).append(vertex.name)
        return children

    @cached_property
    def _order(self) -> list[str]:
        """All names, every domain before what is inside it and that before the next domain."""
        order: list[str] = []
        todo = self._children[""][:]
        while todo:
            order.append(todo.pop())
            todo.extend(reversed(self._children.get(order[-1], ())))
        return order

    @cached_property
    def _spans(self) -> dict[str, range]:
        counts = dict.fromkeys(self._order, 0)
        for device in self.devices:
            for domain in self._chains[device]:
                counts[domain] += 1
        spans: dict[str, range] = {}
        start = 0
        for name in self._order:
            spans[name] = range(start, start + counts[name])
            start += self.vertices[name].device is not None
        return spans

    @cached_property
    def _borders(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Links that leave a domain, and links that enter it, by domain."""
        leaving: dict[str, list[int]] = {}
        entering: dict[str, list[int]] = {}
        for number, link in enumerate(self.links):
            sources, targets = self._chains[link.source], self._chains[link.target]
            for domain in sources:
                if domain not in targets:
                    leaving.setdefault(domain, []).append(number)
            for domain in targets:
                if domain not in sources:
                    entering.setdefault(domain, []).append(number)
        return leaving, entering

    @cached_property
    def _climbing_bytes_per_s(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for _, link in self._numbered("up"):
            totals[link.target] = totals.get(link.target, 0.0) + link.bytes_per_s
        return totals

    @cached_property
    def _shapes(self) -> dict[str, int]:
        ties: dict[str, list[tuple[str, str, str, float, float]]] = {name: [] for name in self.vertices}
        for link in self.links:
            rates = (link.medium, link.bytes_per_s, link.latency_s)
            ties[link.source].append((f"{link.way} to", self.vertices[link.target].kind, *rates))
            ties[link.target].append((f"{link.way} from", self.vertices[link.source].kind, *rates))
        numbers: dict[object, int] = {}
        shapes: dict[str, int] = {}
        for name in reversed(self._order):  # what is inside comes first
            vertex = self.vertices[name]
            inside = sorted(shapes[child] for child in self._children.get(name, ()))
            key = (vertex.kind, vertex.device, tuple(sorted(ties[name])), tuple(inside))
            shapes[name] = numbers.setdefault(key, len(numbers))
        return shapes

    # Paths

    def _reach(self, source: str) -> _Legs:
        """Every quick way from `source` to where a path can begin to come down: up, and then across or not."""
        rising = self._legs(source, self._ups, self._rising)
        if not self._across:
            return rising
        if source not in self._reaching:
            reach = {top: legs[:] for top, legs in rising.items()}
            for top, legs in rising.items():
                for number, beyond in self._across.get(top, ()):
                    reach.setdefault(beyond, []).extend(_append(leg, number, self.links[number]) for leg in legs)
            self._reaching[source] = {end: _quickest(found) for end, found in reach.items()}
        return self._reaching[source]

    def _legs(self, name: str, steps: _Steps, known: dict[str, _Legs]) -> _Legs:
        """Every way up from `name` that is for some size the quickest one, itself included."""
        if name in known:
            return known[name]
        legs: _Legs = {name: [_Leg(math.inf, 0.0, ())]}
        for number, upper in steps.get(name, ()):
            link = self.links[number]
            for end, further in self._legs(upper, steps, known).items():
                legs.setdefault(end, []).extend(_prepend(number, link, leg) for leg in further)
        known[name] = {end: _quickest(found) for end, found in legs.items()}
        return known[name]


def duplex(lower: str, upper: str, medium: str, bytes_per_s: float, latency_s: float) -> tuple[Link, Link]:
    """Both directions of a connection between a vertex and one nearer to the core."""
    return (
        Link(lower, upper, "up", medium, bytes_per_s, latency_s),
        Link(upper, lower, "down", medium, bytes_per_s, latency_s),
    )


def crosslink(one: str, other: str, medium: str, bytes_per_s: float, latency_s: float) -> tuple[Link, Link]:
    """Both directions of a connection between any two vertices."""
    return (
        Link(one, other, "across", medium, bytes_per_s, latency_s),
        Link(other, one, "across", medium, bytes_per_s, latency_s),
    )


def _prepend(number: int, link: Link, leg: _Leg) -> _Leg:
    return _Leg(min(link.bytes_per_s, leg.bytes_per_s), link.latency_s + leg.latency_s, (number, *leg.links))


def _append(leg: _Leg, number: int, link: Link) -> _Leg:
    return _Leg(min(leg.bytes_per_s, link.bytes_per_s), leg.latency_s + link.latency_s, (*leg.links, number))


def _quickest(legs: list[_Leg]) -> list[_Leg]:
    """Without those that another one beats or equals both in rate and in latency."""
    kept: list[_Leg] = []
    for leg in sorted(legs, key=lambda leg: (-leg.bytes_per_s, leg.latency_s)):
        if not kept or leg.latency_s < kept[-1].latency_s:
            kept.append(leg)
    return kept


def _cost(up: _Leg, down: _Leg, size_bytes: float) -> tuple[float, int]:
    """Seconds, and among equals the number of links."""
    seconds = up.latency_s + down.latency_s + size_bytes / min(up.bytes_per_s, down.bytes_per_s)
    return seconds, len(up.links) + len(down.links)


def _join(up: _Leg, down: _Leg) -> Path:
    return Path(up.links + down.links[::-1], min(up.bytes_per_s, down.bytes_per_s), up.latency_s + down.latency_s)


def _steps(edges: Iterable[tuple[str, int, str]]) -> dict[str, list[tuple[int, str]]]:
    steps: dict[str, list[tuple[int, str]]] = {}
    for start, number, end in edges:
        steps.setdefault(start, []).append((number, end))
    return steps


def _chains(vertices: Mapping[str, Vertex]) -> dict[str, tuple[str, ...]]:
    """For every vertex itself and what it is inside of, the smallest first."""
    roots = [vertex.name for vertex in vertices.values() if not vertex.inside]
    if len(roots) != 1:
        raise BadTopology(f"one vertex must hold all others, but {len(roots)} are inside nothing: {roots[:5]}")
    for vertex in vertices.values():
        if vertex.inside and vertex.inside not in vertices:
            raise BadTopology(f"{vertex.name} is inside {vertex.inside!r}, which is not there")
    chains: dict[str, tuple[str, ...]] = {}
    for name in _outermost_first(vertices):
        inside = vertices[name].inside
        chains[name] = (name, *chains[inside]) if inside else (name,)
    return chains


def _outermost_first(vertices: Mapping[str, Vertex]) -> Iterable[str]:
    graph = {vertex.name: [vertex.inside] if vertex.inside else [] for vertex in vertices.values()}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise BadTopology(f"these are inside each other: {' < '.join(error.args[1])}") from None


def _check_links(vertices: Mapping[str, Vertex], links: tuple[Link, ...]) -> None:
    ends = [(link.source, link.target) for link in links]
    if len(set(ends)) < len(ends):
        raise BadTopology(
            "two links lead from {} to {}; make it one of their joint rate".format(*_first_repeated(ends))
        )
    for link in links:
        _check_link(vertices, link)
    graph: dict[str, list[str]] = {}
    for link in links:
        if link.way != "across":
            lower, upper = (link.source, link.target) if link.way == "up" else (link.target, link.source)
            graph.setdefault(lower, []).append(upper)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise BadTopology(f"up links lead in a circle: {' -> '.join(error.args[1])}; make one an across link") from None


def _check_link(vertices: Mapping[str, Vertex], link: Link) -> None:
    where = f"the {link.medium} link from {link.source} to {link.target}"
    for end in (link.source, link.target):
        if end not in vertices:
            raise BadTopology(f"{where} ends at {end!r}, which is not there")
    if link.source == link.target:
        raise BadTopology(f"{where} leads nowhere")
    upper = link.target if link.way == "up" else link.source
    if link.way != "across" and vertices[upper].device is not None:
        raise BadTopology(f"{where} climbs to a device; devices do not forward, so make it an across link")
    if not 0 < link.bytes_per_s < math.inf or not 0 <= link.latency_s < math.inf:
        raise BadTopology(f"{where} has {link.bytes_per_s} bytes/s and {link.latency_s} s; a rate must be above 0")


def _first_repeated(names: list[T]) -> T:
    seen: dict[T, None] = {}
    for name in names:
        if name in seen:
            return name
        seen[name] = None
    raise ValueError(f"none of {names} is repeated")
