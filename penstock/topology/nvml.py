"""NVIDIA GPUs and their NVLinks, as the driver's management library tells of them (extra `nvidia`: nvidia-ml-py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

NVLINK_5 = 7  # as nvmlDeviceGetNvLinkVersion counts
NVLINK_BYTES_PER_S = 25e9  # of one link, nominal; generations 2 to 4
NVLINK_5_BYTES_PER_S = 50e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """What NVML says of a GPU. Figures that it does not know are 0.

    `nvlinks` has the nominal rate of all active links to the same end, by that end's PCI address. An end that is not
    one of the GPUs is an NVLink switch, and so is the empty address, for an end that a virtual machine must not see.
    """

    pci: str  # as sysfs writes it: 0000:18:00.0
    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    nvlinks: Mapping[str, float]


def find_gpus() -> list[Gpu] | None:
    """All GPUs that this process may use, in the driver's order. None without the package, or without a driver."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or none that answers
        return None
    try:
        return read_gpus(nvml)
    finally:
        nvml.nvmlShutdown()


def read_gpus(nvml: Any) -> list[Gpu]:
    """`nvml` is the module pynvml, initialised. Raises its NVMLError if a GPU has fallen off its bus."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    return [
        Gpu(
            _address(nvml.nvmlDeviceGetPciInfo(handle).busId),
            _text(nvml.nvmlDeviceGetName(handle)),
            float(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            _memory_bytes_per_s(nvml, handle),
            _nvlinks(nvml, handle),
        )
        for handle in handles
    ]


def _memory_bytes_per_s(nvml: Any, handle: Any) -> float:
    """Two transfers per clock on every line of the bus."""
    bits = _find(nvml, nvml.nvmlDeviceGetMemoryBusWidth, handle) or 0
    mhz = _find(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM) or 0
    return float(bits / 8 * 2 * mhz * 1e6)


def _nvlinks(nvml: Any, handle: Any) -> dict[str, float]:
    rates: dict[str, float] = {}
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if not _find(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link):
            continue
        version = _find(nvml, nvml.nvmlDeviceGetNvLinkVersion, handle, link) or 0
        end = _find(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        address = "" if end is None else _address(end.busId)
        rate = NVLINK_5_BYTES_PER_S if version >= NVLINK_5 else NVLINK_BYTES_PER_S
        rates[address] = rates.get(address, 0.0) + rate
    return rates


def _find(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None for what this GPU, driver or virtual machine does not tell."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _address(bus_id: str | bytes) -> str:
    """NVML writes the PCI domain with eight digits, sysfs with four."""
    domain, rest = _text(bus_id).lower().split(":", 1)
    return f"{int(domain, 16):04x}:{rest}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
