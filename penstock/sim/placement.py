"""Which devices each worker of a simulated cluster gets.

order    interleaved   worker i of n of its group comes at (i + 1/2) / n, so that groups alternate in their ratio
         packed        all of the first group, then all of the next
fill     each worker in that order takes the first place that is free

A place on GPUs is `gpus` neighbours of one node (or of one NVLink domain, for a group that may cross nodes), the first
of them at a multiple of `gpus`: so with groups of one size every node holds prefill and decode in their ratio, as near
as whole workers allow. CPUs are shared by as many workers as there are, worker i of n on CPU i * CPUs // n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.cluster import Role
from penstock.errors import SetupError
from penstock.fabric import NVLINK, Fabric

Placement = Literal["interleaved", "packed"]


@dataclass(frozen=True, slots=True)
class Group:
    """`count` workers of one role. `gpus` 0: on CPUs. `on` names the domains that they may be in; none: anywhere."""

    role: Role
    count: int
    gpus: int
    on: tuple[str, ...] = ()
    across_nodes: bool = False


def order(counts: Sequence[int], placement: Placement) -> list[int]:
    """The group of each worker, in the order in which they are placed."""
    numbered = [(number, group) for group, count in enumerate(counts) for number in range(count)]
    if placement == "interleaved":
        numbered.sort(key=lambda worker: (worker[0] + 0.5) / counts[worker[1]])  # ties: in the order of the groups
    return [group for _, group in numbered]


def place(fabric: Fabric, groups: Sequence[Group], placement: Placement) -> list[tuple[int, tuple[str, ...]]]:
    """The group and the devices of every worker, in order. Raises SetupError where no place is left for one."""
    homes = [_homes(fabric, group) for group in groups]
    taken: set[str] = set()
    placed: list[tuple[int, tuple[str, ...]]] = []
    numbers = [0] * len(groups)
    for index in order([group.count for group in groups], placement):
        group, number = groups[index], numbers[index]
        numbers[index] += 1
        devices = _cpu(group, homes[index], number) if group.gpus == 0 else _free(group, homes[index], taken)
        if not devices:
            raise SetupError(_no_room(group, homes[index], number))
        taken.update(devices if group.gpus else ())
        placed.append((index, devices))
    return placed


def _homes(fabric: Fabric, group: Group) -> list[list[str]]:
    """Devices that one worker's may be chosen from, by node or NVLink domain."""
    kind, home_kind = ("gpu", NVLINK if group.across_nodes else "node") if group.gpus else ("cpu", "node")
    allowed = {place for domain in group.on for place in fabric.span(domain)}
    homes: dict[str | None, list[str]] = {}
    for place, device in enumerate(fabric.devices):
        if fabric.vertices[device].kind == kind and (not group.on or place in allowed):
            homes.setdefault(fabric.find_domain(device, home_kind), []).append(device)
    homes.pop(None, None)
    return list(homes.values())


def _free(group: Group, homes: Sequence[Sequence[str]], taken: set[str]) -> tuple[str, ...]:
    for home in homes:
        for first in range(0, len(home) - group.gpus + 1, group.gpus):
            devices = tuple(home[first : first + group.gpus])
            if taken.isdisjoint(devices):
                return devices
    return ()


def _cpu(group: Group, homes: Sequence[Sequence[str]], number: int) -> tuple[str, ...]:
    cpus = [cpu for home in homes for cpu in home]
    return (cpus[number * len(cpus) // group.count],) if cpus else ()


def _no_room(group: Group, homes: Sequence[Sequence[str]], number: int) -> str:
    where = f" on {', '.join(group.on)}" if group.on else ""
    if group.gpus == 0:
        return f"there is no CPU{where} for {group.role} worker {number + 1} of {group.count}"
    largest = max(map(len, homes), default=0)
    home = "NVLink domain" if group.across_nodes else "node"
    if largest < group.gpus:
        remedy = "ask for fewer" if group.across_nodes else "`across_nodes: true` spreads it over an NVLink domain"
        return f"{group.role} workers need {group.gpus} GPUs of one {home}, the largest{where} has {largest}: {remedy}"
    return (
        f"no {group.gpus} neighbouring GPUs of one {home} are left{where} for {group.role} worker {number + 1} of "
        f"{group.count}: ask for fewer workers, or give the topology more nodes"
    )
