"""The topology of this host: NUMA nodes, CPUs, NICs and PCIe switches from sysfs, GPUs and NVLink from NVML.

What kernel and driver know is taken from them: places, memory, lanes, speeds of ports. What they do not know, such as
what the link between two sockets carries, is taken from the presets. Without NVML a GPU is known by its place alone.
Of the network around the host nothing is known but the NICs that lead there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from penstock.fabric import NVLINK, Device, Fabric, crosslink
from penstock.topology import nvml, sysfs
from penstock.topology.build import Assembly
from penstock.topology.nvml import Gpu
from penstock.topology.presets import (
    DDR5,
    NDR,
    NVLINK4,
    NVLINK_SHARE,
    PCIE4,
    PCIE_SHARE,
    RDMA_SHARE,
    SOCKETS,
    TCP_BYTES_PER_S,
    TCP_S,
    TCP_SHARE,
    Wire,
    find_server,
)
from penstock.topology.sysfs import Accelerator, Nic, Numa, Slot

log = logging.getLogger(__name__)

UNKNOWN_BYTES_PER_S = 10e9 / 8  # of a NIC that does not tell, as those of virtual machines [R]


@dataclass(frozen=True, slots=True)
class Options:
    """`root` is where the host's /sys and /proc are; a container may see them elsewhere."""

    root: Path = Path("/")


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU and where it sits. `nvlinks` are nominal rates by the PCI address of the other end, see nvml.Gpu."""

    device: Device
    slot: Slot
    nvlinks: Mapping[str, float]


class LocalTopology:
    """Meets the Topology port."""

    def __init__(
        self, options: Options = Options(), find_gpus: Callable[[], list[Gpu] | None] = nvml.find_gpus
    ) -> None:
        self._root = options.root
        self._find_gpus = find_gpus

    def load(self) -> Fabric:
        nics = sysfs.nics(self._root)
        cards = _cards(self._root, sysfs.accelerators(self._root), self._find_gpus())
        board = _Board(sysfs.hostname(self._root))
        board.add_numas(sysfs.numa_nodes(self._root), sysfs.cpu_model(self._root))
        board.add_switches([*(nic.slot for nic in nics), *(card.slot for card in cards)])
        board.add_nics(nics)
        board.add_cards(cards)
        board.add_nvlinks(cards)
        return board.assembly.fabric()


TOPOLOGY = LocalTopology


class _Board:
    """The host's vertices and links on the way to a fabric; its methods are called in the order they stand in."""

    def __init__(self, host: str) -> None:
        self.assembly = Assembly(f"network of {host}")
        self._host = self.assembly.add("node", host, self.assembly.root)
        self._numas: dict[int, str] = {}
        self._switches: dict[str, str] = {}  # by the address of their upstream port
        self._nics: dict[str, list[str]] = {}  # by the switch, and by the NUMA node, that they sit at
        self._gpus: dict[str, str] = {}  # by address

    def add_numas(self, numas: Sequence[Numa], cpu_model: str) -> None:
        for numa in numas:
            name = self.assembly.add("numa", f"{self._host}/numa{numa.number}", self._host)
            device = Device(cpu_model or "cpu", numa.memory_bytes)
            cpu = self.assembly.add("cpu", f"{self._host}/cpu{numa.number}", name, device)
            self.assembly.connect(cpu, name, DDR5)
            if len(numas) > 1:
                self.assembly.connect(name, self._host, SOCKETS)
            self._numas[numa.number] = name

    def add_switches(self, slots: Sequence[Slot]) -> None:
        """Those with more than one device; others, as on the boards of some NICs, join nothing."""
        ports = Counter(slot.switch for slot in slots if slot.switch is not None)
        shared = sorted((port for port, devices in ports.items() if devices > 1), key=lambda port: port.address)
        for number, port in enumerate(shared):
            numa = self._numa(port)
            self._switches[port.address] = self.assembly.add("pcie", f"{self._host}/pcie{number}", numa)
            self.assembly.connect(self._switches[port.address], numa, _lanes(port))

    def add_nics(self, nics: Sequence[Nic]) -> None:
        for nic in nics:
            numa, place = self._numa(nic.slot), self._place(nic.slot)
            name = self.assembly.add("nic", f"{self._host}/{nic.name}", place)
            self.assembly.connect(name, self.assembly.root, _port(nic))
            self.assembly.connect(numa, name, _lanes(nic.slot))
            for near in {numa: None, place: None}:
                self._nics.setdefault(near, []).append(name)
        everywhere = [name for numa in self._numas.values() for name in self._nics.get(numa, ())]
        for numa in self._numas.values():
            if everywhere and numa not in self._nics:
                self.assembly.connect(numa, everywhere[0], SOCKETS)

    def add_cards(self, cards: Sequence[Card]) -> None:
        """Each uses one NIC, of its switch or else of its NUMA node, without the CPU's help; neighbours another one."""
        users: Counter[str] = Counter()
        for number, card in enumerate(cards):
            place = self._place(card.slot)
            name = self.assembly.add("gpu", f"{self._host}/gpu{number}", place, card.device)
            self.assembly.connect(name, place, _lanes(card.slot))
            near = place if place in self._nics else self._numa(card.slot)
            if nics := self._nics.get(near):
                self.assembly.connect(name, nics[users[near] % len(nics)], _lanes(card.slot))
                users[near] += 1
            self._gpus[card.slot.address] = name

    def add_nvlinks(self, cards: Sequence[Card]) -> None:
        """GPUs on NVLink switches share a domain; those that are joined directly have links across."""
        switched = {
            card.slot.address: sum(rate for end, rate in card.nvlinks.items() if end not in self._gpus)
            for card in cards
        }
        if any(switched.values()):
            domain = self.assembly.add(NVLINK, f"{self._host}/{NVLINK}", self._host)
            for address, rate in switched.items():
                if rate:
                    wire = Wire(NVLINK, rate * NVLINK_SHARE, NVLINK4.latency_s)
                    self.assembly.connect(self._gpus[address], domain, wire)
        for card in cards:
            for end, rate in card.nvlinks.items():
                if end in self._gpus and card.slot.address < end:  # else it was, or will be, the other way round
                    one, other = self._gpus[card.slot.address], self._gpus[end]
                    self.assembly.links += crosslink(one, other, NVLINK, rate * NVLINK_SHARE, 2 * NVLINK4.latency_s)

    def _numa(self, slot: Slot) -> str:
        """The first where the kernel does not say, or names one without CPUs."""
        return self._numas.get(slot.numa) or next(iter(self._numas.values()))

    def _place(self, slot: Slot) -> str:
        switch = self._switches.get(slot.switch.address) if slot.switch is not None else None
        return switch or self._numa(slot)


def _cards(root: Path, seen: Sequence[Accelerator], gpus: Sequence[Gpu] | None) -> list[Card]:
    """The GPUs that NVML tells of, in its order; then what the PCI bus has and NVML does not speak for."""
    if gpus is None and any(accelerator.vendor == "nvidia" for accelerator in seen):
        log.warning("there are NVIDIA GPUs, but no figures for them: pip install 'penstock[nvidia]', with their driver")
    others = [accelerator for accelerator in seen if accelerator.vendor != "nvidia" or gpus is None]
    return [
        *(Card(_device(gpu), _slot(root, gpu.pci), gpu.nvlinks) for gpu in gpus or ()),
        *(Card(Device(f"{other.vendor} {other.product}"), other.slot, {}) for other in others),
    ]


def _device(gpu: Gpu) -> Device:
    """With the figures of the preset, where the GPU is in one."""
    server = find_server(gpu.name, gpu.memory_bytes)
    if server is None or server.gpu is None:
        return Device(gpu.name, gpu.memory_bytes, gpu.memory_bytes_per_s)
    return structs.replace(server.gpu, memory_bytes=gpu.memory_bytes)


def _slot(root: Path, address: str) -> Slot:
    """A virtual machine may hide where a GPU sits."""
    return sysfs.find_slot(root, address) or Slot(address, -1, None, 0.0)


def _lanes(slot: Slot) -> Wire:
    return Wire(PCIE4.medium, slot.bytes_per_s * PCIE_SHARE or PCIE4.bytes_per_s, PCIE4.latency_s)


def _port(nic: Nic) -> Wire:
    rate = nic.bytes_per_s
    if not rate:
        log.warning("%s does not tell its speed; taken as 10 Gb/s", nic.name)
        rate = UNKNOWN_BYTES_PER_S
    if nic.is_rdma:
        return Wire("rdma", rate * RDMA_SHARE, NDR.latency_s)
    return Wire("tcp", min(rate * TCP_SHARE, TCP_BYTES_PER_S), TCP_S)
