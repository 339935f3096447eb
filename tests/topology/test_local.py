"""This host, from a made-up /sys and NVML."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.fabric import Fabric
from penstock.topology.local import LocalTopology, Options
from penstock.topology.nvml import Gpu, read_gpus
from tests.topology.fake_host import FakeHost, FakeNvml

H100 = "NVIDIA H100 80GB HBM3"
H100_BYTES = 81559 << 20
SWITCH = "0000:00:01.0/0000:10:00.0"  # root port, upstream port


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def load(host: FakeHost, gpus: list[Gpu] | None = None) -> Fabric:
    return LocalTopology(Options(host.root), lambda: gpus).load()


def server(host: FakeHost) -> FakeHost:
    """Two sockets. On the first a PCIe switch with two GPUs and a NIC; on the second two GPUs and a NIC without one."""
    host.write("proc/cpuinfo", "processor : 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8480C\nflags : fpu")
    host.add_numa(0, "0-55", 1_000_000_000)
    host.add_numa(1, "56-111", 1_000_000_000)
    host.add_numa(2, "", 80_000_000)  # memory alone
    host.add_pci("0000:00:01.0")
    host.add_pci(SWITCH, numa_node="0", max_link_speed="32.0 GT/s PCIe", max_link_width="16")
    host.add_gpu(f"{SWITCH}/0000:11:00.0/0000:18:00.0", 0)
    host.add_gpu(f"{SWITCH}/0000:11:01.0/0000:19:00.0", 0)
    host.add_rdma(f"{SWITCH}/0000:11:02.0/0000:1a:00.0", "mlx5_0", 0)
    host.add_gpu("0000:00:02.0/0000:58:00.0", 1)
    host.add_gpu("0000:00:03.0/0000:59:00.0", 1, lanes="8")
    host.add_rdma("0000:00:04.0/0000:5a:00.0", "mlx5_1", 1, rate="200 Gb/sec (4X HDR)")
    host.add_ethernet("0000:00:04.0/0000:5a:00.0", "ib1", 1, "200000")  # the same card
    host.write("sys/class/net/lo/operstate", "unknown")
    return host


def h100s(*ends: list[str | None]) -> list[Gpu]:
    addresses = ("0000:18:00.0", "0000:19:00.0", "0000:58:00.0", "0000:59:00.0")
    return read_gpus(
        FakeNvml([(address, H100, H100_BYTES, links) for address, links in zip(addresses, ends, strict=True)])
    )


def test_a_plain_host(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    host.write("proc/meminfo", "MemTotal:       16476376 kB\nMemFree: 1 kB")
    host.add_pci("0000:00:03.0")
    host.write("sys/devices/pci0000:00/0000:00:03.0/virtio2/vendor", "0x1af4")
    host.write("sys/class/net/eth0/speed", "-1")
    host.write("sys/class/net/eth0/operstate", "up")
    host.link("sys/class/net/eth0/device", "sys/devices/pci0000:00/0000:00:03.0/virtio2")
    fabric = load(host)
    assert list(fabric.vertices) == ["network of host7", "host7", "host7/numa0", "host7/cpu0", "host7/eth0"]
    device = fabric.vertices["host7/cpu0"].device
    assert device is not None
    assert (device.model, device.memory_bytes) == ("cpu", 16476376 * 1024)
    assert fabric.path("host7/cpu0", fabric.root).bytes_per_s == pytest.approx(10e9 / 8 * 0.94)
    assert caplog.messages == ["eth0 does not tell its speed; taken as 10 Gb/s"]


def test_an_empty_root_is_a_host_with_a_cpu(host: FakeHost) -> None:
    assert load(host).devices == ("host7/cpu0",)


def test_places_lanes_and_ports_of_a_server(host: FakeHost) -> None:
    fabric = load(server(host), h100s([""] * 18, [""] * 18, [""] * 18, [""] * 18))
    assert fabric.failure_domains("host7/gpu1")[:3] == ("host7/pcie0", "host7/numa0", "host7/nvlink")
    assert fabric.failure_domains("host7/gpu2")[:2] == ("host7/numa1", "host7/nvlink")
    assert [name for name in fabric.vertices if "numa" in name] == ["host7/numa0", "host7/numa1"]
    rates = {(link.source, link.target): link.bytes_per_s for link in fabric.links}
    assert rates["host7/gpu0", "host7/pcie0"] == pytest.approx(51.2e9)
    assert rates["host7/pcie0", "host7/numa0"] == pytest.approx(51.2e9)
    assert rates["host7/gpu3", "host7/numa1"] == pytest.approx(25.6e9)
    assert rates["host7/mlx5_0", fabric.root] == pytest.approx(36e9)
    assert rates["host7/mlx5_1", fabric.root] == pytest.approx(18e9)
    assert "host7/ib1" not in fabric.vertices


def test_gpus_use_the_nearest_nic(host: FakeHost) -> None:
    fabric = load(server(host), h100s([], [], [], []))
    nics = [fabric.links[fabric.path(f"host7/gpu{number}", fabric.root).links[0]].target for number in range(4)]
    assert nics == ["host7/mlx5_0", "host7/mlx5_0", "host7/mlx5_1", "host7/mlx5_1"]


def test_known_gpus_have_the_figures_of_their_preset(host: FakeHost) -> None:
    device = load(server(host), h100s([], [], [], [])).vertices["host7/gpu0"].device
    assert device is not None
    assert (device.model, device.memory_bytes, device.bf16_flops_per_s) == ("h100_sxm", H100_BYTES, 989e12)


def test_unknown_gpus_have_what_nvml_says(host: FakeHost) -> None:
    host.add_gpu("0000:00:02.0/0000:58:00.0", 0)
    fabric = load(host, [Gpu("0000:58:00.0", "NVIDIA L40S", 48e9, 864e9, {})])
    device = fabric.vertices["host7/gpu0"].device
    assert device is not None
    assert (device.model, device.memory_bytes_per_s, device.bf16_flops_per_s) == ("NVIDIA L40S", 864e9, 0.0)


def test_nvlink_switches_make_a_domain(host: FakeHost) -> None:
    switch = [f"0000:05:0{number % 4}.0" for number in range(18)]
    fabric = load(server(host), h100s(switch, switch, switch, [*switch[:9], *[None] * 9]))
    assert fabric.find_domain("host7/gpu3", "nvlink") == "host7/nvlink"
    assert fabric.path("host7/gpu0", "host7/gpu2").bytes_per_s == pytest.approx(360e9)
    assert fabric.path("host7/gpu0", "host7/gpu3").bytes_per_s == pytest.approx(180e9)


def test_direct_nvlinks_join_pairs(host: FakeHost) -> None:
    pair = [["0000:19:00.0"] * 4, ["0000:18:00.0"] * 4, ["0000:59:00.0"] * 4, ["0000:58:00.0"] * 4]
    fabric = load(server(host), h100s(*pair))
    assert fabric.find_domain("host7/gpu0", "nvlink") is None
    assert fabric.path("host7/gpu1", "host7/gpu0").bytes_per_s == pytest.approx(80e9)
    assert fabric.path("host7/gpu2", "host7/gpu3").bytes_per_s == pytest.approx(80e9)
    assert fabric.path("host7/gpu0", "host7/gpu2").bytes_per_s < 80e9


def test_gpus_without_nvml_are_known_by_their_place(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    fabric = load(server(host), None)
    device = fabric.vertices["host7/gpu3"].device
    assert device is not None
    assert (device.model, device.memory_bytes) == ("nvidia 2330", 0.0)
    assert fabric.find_domain("host7/gpu3", "numa") == "host7/numa1"
    assert "pip install 'penstock[nvidia]'" in caplog.text


def test_nvml_decides_which_nvidia_gpus_there_are(host: FakeHost) -> None:
    host.add_gpu("0000:00:02.0/0000:58:00.0", 0)
    host.add_gpu("0000:00:03.0/0000:59:00.0", 0, vendor="0x1002", kind="0x120000")
    host.add_gpu("0000:00:05.0/0000:5b:00.0", 0, vendor="0x1a03", kind="0x030000")  # a board's own graphics
    fabric = load(host, [])
    assert [fabric.vertices[name].device for name in fabric.devices if "gpu" in name] == [
        fabric.vertices["host7/gpu0"].device
    ]
    assert "amd 2330" in str(fabric.vertices["host7/gpu0"].device)


def test_a_gpu_that_sysfs_does_not_show_is_there_all_the_same(host: FakeHost) -> None:
    fabric = load(host, [Gpu("0000:58:00.0", H100, H100_BYTES, 0.0, {})])
    assert fabric.find_domain("host7/gpu0", "numa") == "host7/numa0"


def test_ports_that_are_down_are_left_out(host: FakeHost) -> None:
    host.add_rdma("0000:00:04.0/0000:5a:00.0", "mlx5_0", 0, state="1: DOWN")
    host.add_ethernet("0000:00:05.0/0000:5b:00.0", "eth0", 0, "10000", state="down")
    host.add_ethernet("0000:00:06.0/0000:5c:00.0", "eth1", 0, "100000")
    fabric = load(host)
    assert [name for name in fabric.vertices if fabric.vertices[name].kind == "nic"] == ["host7/eth1"]
    assert fabric.path("host7/cpu0", fabric.root).bytes_per_s == 6e9  # what hosts manage, not 100 Gb/s


def test_a_socket_without_a_nic_uses_that_of_the_other(host: FakeHost) -> None:
    host.add_numa(0, "0-1", 1)
    host.add_numa(1, "2-3", 1)
    host.add_ethernet("0000:00:06.0/0000:5c:00.0", "eth0", 1, "25000")
    fabric = load(host)
    media = [fabric.links[number].medium for number in fabric.path("host7/cpu0", fabric.root).links]
    assert media == ["dram", "socket", "tcp"]
