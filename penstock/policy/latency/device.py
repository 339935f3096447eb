"""What accelerators can do at best: dense products, by vendors' data sheets.

How near to it engines come is in `roofline`. Links between devices belong to the topology; here is only what an
all-reduce inside one worker gets out of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the CPU cores of one worker."""

    name: str
    flops_per_s: Mapping[str, float]  # by dtype of the products; bfloat16 always
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float  # per direction, of an all-reduce of many MB
    layer_s: float  # the small kernels of one layer, however little they have to do
    host_s: float  # from the end of one step to the start of the next

    def peak_flops_per_s(self, dtype: str) -> float:
        """Of products in `dtype`; one that is not listed is computed as bfloat16."""
        return self.flops_per_s.get(dtype, self.flops_per_s["bfloat16"])


def cpu(cores: int) -> Device:
    """So many cores of a server CPU with AVX-512 (Zen 4), as torch uses them; no vendor's number but measured here.

    The times per layer and step are those of Python and torch calling kernels one by one.
    """
    return Device("CPU", {"float32": 120e9 * cores, "bfloat16": 240e9 * cores}, 20e9 * cores, 0.0, 10e9, 4e-4, 3e-4)


_HOPPER = {"bfloat16": 989e12, "fp8": 1979e12}
_GPU_S = (20e-6, 2e-3)  # 2 to 5 ms on the host with vLLM and SGLang; a layer's kernels: aiconfigurator's H100 tables

# All-reduce: A100 99 GB/s and H100 208 GB/s of result at 67 MB over 8 GPUs (Vidur), times 2 (8 - 1) / 8.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("A100", {"bfloat16": 312e12}, 2.04e12, 80e9, 175e9, *_GPU_S),
        Device("H100", _HOPPER, 3.35e12, 80e9, 390e9, *_GPU_S),
        Device("H200", _HOPPER, 4.8e12, 141e9, 390e9, *_GPU_S),
        Device("H20", {"bfloat16": 148e12, "fp8": 296e12}, 4.0e12, 96e9, 390e9, *_GPU_S),
        Device("B200", {"bfloat16": 2250e12, "fp8": 4500e12, "fp4": 9000e12}, 8e12, 180e9, 700e9, *_GPU_S),
    )
}
