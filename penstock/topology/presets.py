"""Servers that one can buy, and what their links carry.

Rates are what one large transfer gets in one direction, not what the vendor prints beside the plug, which a comment
says. Latencies are what a program sees, software included, shared out among the links of its path. Memory and
arithmetic are the vendors' peaks for dense matrices [R]; what share of them a model reaches is the latency model's
business. Those of GPUs are in `penstock.devices`. Where a figure is from:

    [M] measured, in public data    [V] read in a vendor's or project's own source
    [R] recalled from vendors' sheets, or typical of such machines: measure where it matters
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from penstock.devices import A100, B200, GB200, GIB, H20, H100, H200
from penstock.fabric import Device

GB = 1e9
US = 1e-6

SWITCH_S = 0.2 * US  # one more switch on the way: 0.2 us a hop [R]


@dataclass(frozen=True, slots=True)
class Wire:
    """A kind of link: the rate in each direction and the latency of one link of it."""

    medium: str
    bytes_per_s: float
    latency_s: float


# NVLink, from a GPU into its NVLink domain; a path has two of them. The fits of rate and latency give the measured
# points back: A100 228 GB/s at 13 MB, 239 at 67 MB, 8 us at 2 KB; H100 299 at 13 MB, 348 at 67 MB, 5 us at 2 KB.
NVLINK3 = Wire("nvlink", 245 * GB, 4.0 * US)  # 300 nominal, 12 links; [M]
NVLINK4 = Wire("nvlink", 355 * GB, 2.5 * US)  # 450 nominal, 18 links; [M]
NVLINK5 = Wire("nvlink", 700 * GB, 2.5 * US)  # 900 nominal, 18 links; rate [R], latency as NVLink 4

NVLINK_SHARE = 0.8  # of the nominal rate, where only that is known: between the two measured ones

# Inside a server. PCIe alone is 1 to 2 us an operation [R]; a copy that a program asks for is no quicker than NVLink.
PCIE_SHARE = 0.8  # of lanes times transfers per second
PCIE4 = Wire("pcie", 25 * GB, 4.0 * US)  # x16, 32 nominal; 24 to 26 [R]
PCIE5 = Wire("pcie", 52 * GB, 4.0 * US)  # x16, 64 nominal; 50 to 55 [R]
C2C = Wire("c2c", 360 * GB, 2.5 * US)  # Grace to GPU, 450 nominal; 0.8 of it, as NVLink 4 gets [R]
SOCKETS = Wire("socket", 50 * GB, 0.5 * US)  # one CPU socket to the middle of the board (UPI, xGMI) [R]
DDR4 = Wire("dram", 160 * GB, 0.1 * US)  # 8 channels of 3200, 205 nominal [R]
DDR5 = Wire("dram", 250 * GB, 0.1 * US)  # 8 channels of 4800, 307 nominal [R]
LPDDR5X = Wire("dram", 400 * GB, 0.1 * US)  # Grace, 512 nominal [R]

# From a NIC into the network. Two of these and two of PCIe make the 17 us that NCCL needs for 2 KB between two H100
# nodes, and their 36 GB/s are 72 % of 50, both [M]. RoCE reaches 71 % [V], so HDR is taken at 72 % too.
RDMA_SHARE = 0.72
HDR = Wire("rdma", RDMA_SHARE * 25 * GB, 4.5 * US)  # 200 Gb/s. NCCL over a cloud's network got only 7.8 GB/s [M]
NDR = Wire("rdma", RDMA_SHARE * 50 * GB, 4.5 * US)  # 400 Gb/s [M]
TCP_BYTES_PER_S = 6 * GB  # 3 to 10 on 100 to 200 Gb/s, bound by the hosts' CPUs [R]
TCP_SHARE = 0.94  # of the line rate, where that is less: what headers leave
TCP_S = 12 * US  # 20 to 50 us a path [R]
TCP = Wire("tcp", TCP_BYTES_PER_S, TCP_S)

# One socket each. What a CPU computes depends on the model and the threads: unknown, `penstock profile` measures it.
MILAN = Device("epyc_7003", 1024 * GIB, DDR4.bytes_per_s)
SAPPHIRE_RAPIDS = Device("xeon_8480", 1024 * GIB, DDR5.bytes_per_s)
GRACE = Device("grace", 480 * GIB, LPDDR5X.bytes_per_s)
HOST_CPU = Device("cpu", 256 * GIB, DDR5.bytes_per_s)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One kind of server. GPUs and NICs are spread evenly over its PCIe switches, or else its NUMA nodes."""

    cpu: Device
    gpu: Device | None = None
    gpus: int = 0
    nics: int = 1
    numa_nodes: int = 2
    pcie_switches: int = 0
    nvlink: Wire | None = None  # from each GPU into the NVLink domain
    gpu_host: Wire = PCIE5  # from a GPU to its PCIe switch or NUMA node
    pcie: Wire = PCIE5  # from a PCIe switch to its NUMA node, and from GPUs and CPUs to NICs
    dram: Wire = DDR5
    sockets: Wire = SOCKETS
    nic: Wire = NDR


HGX_H100 = NodeSpec(SAPPHIRE_RAPIDS, H100, gpus=8, nics=8, pcie_switches=4, nvlink=NVLINK4)
HGX_A100 = NodeSpec(
    MILAN, A100, gpus=8, nics=8, pcie_switches=4, nvlink=NVLINK3, gpu_host=PCIE4, pcie=PCIE4, dram=DDR4, nic=HDR
)
GB200_TRAY = NodeSpec(GRACE, GB200, gpus=4, nics=4, nvlink=NVLINK5, gpu_host=C2C, dram=LPDDR5X)
TCP_HOST = NodeSpec(HOST_CPU, numa_nodes=1, nic=TCP)

NODES: dict[str, NodeSpec] = {
    "hgx-a100": HGX_A100,
    "hgx-h100": HGX_H100,
    "hgx-h200": replace(HGX_H100, gpu=H200),
    "hgx-b200": replace(HGX_H100, gpu=B200, nvlink=NVLINK5),
    "gb200-tray": GB200_TRAY,  # alone it is an NVLink domain of four; 18 in a rack share one, see `build.PRESETS`
    "tcp-host": TCP_HOST,
}

# By the word that tells the GPU apart in the names of NVML, Kubernetes and Ray ("NVIDIA-H100-80GB-HBM3", "H100").
SERVERS: dict[str, NodeSpec] = {
    "A100": HGX_A100,
    "H100": HGX_H100,
    "H200": NODES["hgx-h200"],
    "H20": replace(HGX_H100, gpu=H20),
    "B200": NODES["hgx-b200"],
    "GB200": GB200_TRAY,
}
OTHER_BOARDS = ("PCIE", "NVL", "MIG")  # cards without NVLink switches, and parts of a GPU
MEMORY_SLACK = 0.1  # drivers keep some, vendors round


def find_server(gpu: str, memory_bytes: float = 0.0) -> NodeSpec | None:
    """The server that is sold with GPUs of that name. None if it is not known, or has another memory than its namesake.

    `memory_bytes` 0: not known.
    """
    words = re.split(r"[^A-Z0-9]+", gpu.upper())
    spec = next((SERVERS[word] for word in words if word in SERVERS), None)
    if spec is None or spec.gpu is None or any(word in OTHER_BOARDS for word in words):
        return None
    if memory_bytes and abs(memory_bytes / spec.gpu.memory_bytes - 1) > MEMORY_SLACK:
        return None
    return spec
