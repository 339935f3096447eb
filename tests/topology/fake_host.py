"""A made-up host: a tree like /sys and /proc, and what NVML would say of its GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

Files = Mapping[str, str]


class FakeHost:
    """Writes below `root`. PCI paths are given as in /sys/devices: the bridges, then the device."""

    def __init__(self, root: Path, name: str = "host7") -> None:
        self.root = root
        self.write("proc/sys/kernel/hostname", name)

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")

    def link(self, path: str, target: str) -> None:
        source = self.root / path
        source.parent.mkdir(parents=True, exist_ok=True)
        source.symlink_to(self.root / target)

    def add_numa(self, number: int, cpus: str, kib: int) -> None:
        self.write(f"sys/devices/system/node/node{number}/cpulist", cpus)
        self.write(
            f"sys/devices/system/node/node{number}/meminfo", f"Node {number} MemTotal:  {kib} kB\nNode 0 MemFree: 1 kB"
        )

    def add_pci(self, path: str, **files: str) -> str:
        """A device or bridge; returns its place below /sys."""
        place = f"sys/devices/pci0000:00/{path}"
        for name, text in files.items():
            self.write(f"{place}/{name}", text)
        self.link(f"sys/bus/pci/devices/{path.split('/')[-1]}", place)
        return place

    def add_gpu(self, path: str, numa: int, vendor: str = "0x10de", kind: str = "0x030200", lanes: str = "16") -> None:
        self.add_pci(
            path,
            vendor=vendor,
            device="0x2330",
            numa_node=str(numa),
            max_link_speed="32.0 GT/s PCIe",
            max_link_width=lanes,
            **{"class": kind},
        )

    def add_rdma(
        self, path: str, name: str, numa: int, rate: str = "400 Gb/sec (4X NDR)", state: str = "4: ACTIVE"
    ) -> None:
        place = self.add_pci(path, numa_node=str(numa), max_link_speed="32.0 GT/s PCIe", max_link_width="16")
        self.write(f"sys/class/infiniband/{name}/ports/1/rate", rate)
        self.write(f"sys/class/infiniband/{name}/ports/1/state", state)
        self.link(f"sys/class/infiniband/{name}/device", place)

    def add_ethernet(self, path: str, name: str, numa: int, mbit_per_s: str, state: str = "up") -> None:
        place = f"sys/devices/pci0000:00/{path}"
        if not (self.root / place).exists():
            self.add_pci(path, numa_node=str(numa))
        self.write(f"sys/class/net/{name}/speed", mbit_per_s)
        self.write(f"sys/class/net/{name}/operstate", state)
        self.link(f"sys/class/net/{name}/device", place)


class NVMLError(Exception):
    pass


class FakeNvml:
    """The part of the module pynvml that is used. A GPU is its PCI address, name, memory, and the ends of its links.

    An end is a PCI address, "" where it is not told, or None for a link that is down.
    """

    NVMLError = NVMLError
    NVML_NVLINK_MAX_LINKS = 18
    NVML_CLOCK_MEM = 2

    def __init__(self, gpus: list[tuple[str, str, int, list[str | None]]], nvlink_version: int = 6) -> None:
        self.gpus = gpus
        self.nvlink_version = nvlink_version
        self.is_open = False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"0000{self.gpus[handle][0].upper()}".encode())

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.gpus[handle][1]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=self.gpus[handle][2])

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        if not self.gpus[handle][2]:
            raise NVMLError
        return 5120

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> int:
        assert clock == self.NVML_CLOCK_MEM
        return 2600

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        ends = self.gpus[handle][3]
        if link >= len(ends):
            raise NVMLError
        return int(ends[link] is not None)

    def nvmlDeviceGetNvLinkVersion(self, handle: int, link: int) -> int:
        return self.nvlink_version

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> SimpleNamespace:
        end = self.gpus[handle][3][link]
        if not end:
            raise NVMLError
        return SimpleNamespace(busId=f"0000{end}")
