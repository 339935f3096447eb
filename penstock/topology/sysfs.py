"""What the kernel tells in /sys and /proc about NUMA nodes, CPUs, PCI devices and NICs. Reading only, no guesses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # VGA, 3D and other display controllers, accelerators
GPU_VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}

_PCI = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_KIB = re.compile(r"MemTotal:\s+(\d+) kB")
_MODEL = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Numa:
    """A NUMA node with CPUs."""

    number: int
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a PCI device sits, and what its lanes carry in each direction: 0 if the kernel does not say."""

    address: str
    numa: int  # -1: not said
    switch: Slot | None  # the port by which the PCIe switch above it, if any, leads to the CPU
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Nic:
    """A port that is not down. `bytes_per_s` is its line rate in each direction, 0 if it does not say."""

    name: str
    slot: Slot
    is_rdma: bool
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU as the PCI bus knows it: by its maker and a number."""

    slot: Slot
    vendor: str
    product: str


def hostname(root: Path) -> str:
    return _read(root / "proc/sys/kernel/hostname") or "localhost"


def cpu_model(root: Path) -> str:
    """As the CPU calls itself; empty on architectures that do not tell."""
    match = _MODEL.search(_read(root / "proc/cpuinfo"))
    return match[1].strip() if match else ""


def numa_nodes(root: Path) -> list[Numa]:
    """Those that have CPUs; one with all memory where the kernel has no NUMA."""
    folder = root / "sys/devices/system/node"
    nodes = [
        Numa(int(path.name.removeprefix("node")), _memory_bytes(path / "meminfo"))
        for path in folder.glob("node[0-9]*")
        if _read(path / "cpulist")
    ]
    return sorted(nodes, key=lambda numa: numa.number) or [Numa(0, _memory_bytes(root / "proc/meminfo"))]


def nics(root: Path) -> list[Nic]:
    """NICs on the PCI bus: RDMA devices, and network interfaces that none of these drives."""
    rdma = [
        Nic(path.name, slot, True, _rate(_read(path / "ports/1/rate")) * 1e9 / 8)
        for path in sorted((root / "sys/class/infiniband").glob("*"))
        if (slot := _slot(path / "device")) and "ACTIVE" in _read(path / "ports/1/state")
    ]
    taken = [nic.slot.address for nic in rdma]
    plain = [
        Nic(path.name, slot, False, _rate(_read(path / "speed")) * 1e6 / 8)
        for path in sorted((root / "sys/class/net").glob("*"))
        if (slot := _slot(path / "device")) and slot.address not in taken and _read(path / "operstate") != "down"
    ]
    return rdma + plain


def accelerators(root: Path) -> list[Accelerator]:
    """GPUs of known makers, in the order of their addresses."""
    found = []
    for path in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, slot = GPU_VENDORS.get(_read(path / "vendor")), _slot(path)
        if vendor and slot and _read(path / "class")[:6] in GPU_CLASSES:
            found.append(Accelerator(slot, vendor, _read(path / "device").removeprefix("0x")))
    return found


def find_slot(root: Path, address: str) -> Slot | None:
    return _slot(root / "sys/bus/pci/devices" / address)


def _slot(device: Path) -> Slot | None:
    """The slot of the PCI device that this folder or link is, or is part of."""
    resolved = device.resolve()
    bridges = [path for path in (*reversed(resolved.parents), resolved) if _PCI.fullmatch(path.name)]
    if not device.exists() or not bridges:
        return None
    switch = bridges[-3] if len(bridges) >= 4 else None  # root port, upstream port, downstream port, device
    return _slot_of(bridges[-1], _slot_of(switch, None) if switch else None)


def _slot_of(device: Path, switch: Slot | None) -> Slot:
    numa = _read(device / "numa_node")
    transfers_per_s = _rate(_read(device / "max_link_speed")) * 1e9  # "32.0 GT/s PCIe"
    lanes = _rate(_read(device / "max_link_width"))
    return Slot(device.name, int(numa) if numa else -1, switch, transfers_per_s * lanes / 8)


def _memory_bytes(meminfo: Path) -> float:
    match = _KIB.search(_read(meminfo))
    return int(match[1]) * 1024.0 if match else 0.0


def _rate(text: str) -> float:
    """The number that a text begins with; 0 for none, or -1, by which the kernel says that it does not know."""
    match = _NUMBER.match(text)
    return float(match[0]) if match else 0.0


def _read(path: Path) -> str:
    """Empty for what is not there or does not answer, as the speed of a port without a cable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
