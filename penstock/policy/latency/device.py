"""What engines make of a device: the figures of its data sheet, and those that no data sheet has.

How near to the peaks engines come is in `roofline`. Links between devices belong to the topology; here is only what an
all-reduce inside one worker gets out of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from penstock import devices
from penstock.fabric import Device

LAYER_S = 20e-6  # aiconfigurator's H100 tables
HOST_S = 2e-3  # 2 to 5 ms with vLLM and SGLang


@dataclass(frozen=True, slots=True)
class Rank:
    """One GPU of a worker, or the CPU cores of one.

    `sheet` must have the memory's bandwidth, and the peak in bfloat16, which stands in for dtypes without one.
    """

    sheet: Device
    link_bytes_per_s: float  # per direction, of an all-reduce of many MB
    layer_s: float = LAYER_S  # the small kernels of one layer, however little they have to do
    host_s: float = HOST_S  # from the end of one step to the start of the next

    @property
    def memory_bytes_per_s(self) -> float:
        return self.sheet.memory_bytes_per_s

    def peak_flops_per_s(self, dtype: str) -> float:
        """Of products in `dtype`; one that the sheet does not have is computed as bfloat16."""
        sheet = self.sheet
        peaks = {"float32": sheet.fp32_flops_per_s, "fp8": sheet.fp8_flops_per_s, "fp4": sheet.fp4_flops_per_s}
        return peaks.get(dtype) or sheet.bf16_flops_per_s


def cpu(cores: int) -> Rank:
    """So many cores of a server CPU with AVX-512 (Zen 4), as torch uses them; no vendor's number but measured here.

    The times per layer and step are those of Python and torch calling kernels one by one.
    """
    sheet = Device(
        "cpu", memory_bytes_per_s=20e9 * cores, bf16_flops_per_s=240e9 * cores, fp32_flops_per_s=120e9 * cores
    )
    return Rank(sheet, 10e9, layer_s=4e-4, host_s=3e-4)


# All-reduce: A100 99 GB/s and H100 208 GB/s of result at 67 MB over 8 GPUs (Vidur), times 2 (8 - 1) / 8. NVLink 5 is
# taken to carry 1.8 times as much.
RANKS: dict[str, Rank] = {
    "A100": Rank(devices.A100, 175e9),
    "H100": Rank(devices.H100, 390e9),
    "H200": Rank(devices.H200, 390e9),
    "H20": Rank(devices.H20, 390e9),
    "B200": Rank(devices.B200, 700e9),
    "GB200": Rank(devices.GB200, 700e9),
}


def find_rank(sheet: Device) -> Rank | None:
    """A GPU of that model among its like, with this data sheet. None if nobody has measured how these reduce."""
    known = next((rank for rank in RANKS.values() if rank.sheet.model == sheet.model), None)
    return known and replace(known, sheet=sheet)
